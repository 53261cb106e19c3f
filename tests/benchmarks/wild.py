"""Models found in the wild through `optimize`: what is converted, what is left and why, and what it does to the outputs.

    python tests/benchmarks/wild.py FOLDER... [--bits 8] [--format matmulnbits] [--calibrate] [--sizes 64 512]

Every ``.onnx`` file below the folders is optimized with default options at ``--bits``, loaded, and run on random inputs beside the
float model. Unknown dimensions become 1 where they come first, and else the first of ``--sizes`` that the model runs with. A model that
runs with none is still converted and loaded; a remark says so.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import header, progress, table

import magr_onnx
from magr_onnx.errors import MagrError
from magr_onnx.runtime.ort.session import Arithmetic, Session

COLUMNS = ("model", "MB", "size", "layers", "left", "error", "seconds")


def feeds(session: Session, size: int, seed: int) -> dict[str, Any]:
    """Normal floats, small nonnegative integers."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for i in session.inputs:
        shape = [d if d is not None else 1 if at == 0 else size for at, d in enumerate(i.shape)]
        if i.dtype.kind == "f":
            found[i.name] = rng.standard_normal(shape).astype(i.dtype)
        elif i.dtype.kind == "b":
            found[i.name] = np.ones(shape, bool)
        else:
            found[i.name] = (rng.integers(0, 8, shape) if shape else np.asarray(16000)).astype(i.dtype)
    return found


def distance(got: list[Any], wanted: list[Any]) -> float:
    """The largest error of an output, relative to it, or to 0.01 where it is smaller (probabilities of nearly nothing)."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if np.asarray(b).dtype.kind == "f":
            norm = max(float(np.linalg.norm(b.astype(np.float64))), 0.01 * float(np.sqrt(b.size)))
            worst = max(worst, float(np.linalg.norm(a.astype(np.float64) - b)) / norm if norm else 0.0)
    return worst


def one(path: Path, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """A row of the table, and remarks."""
    remarks, begin = [], time.perf_counter()
    inputs: list[dict[str, Any]] = []
    wanted, why = None, ""
    for size in args.sizes:
        try:
            with Session(path) as session:
                inputs = [feeds(session, size, seed) for seed in range(5)]
                wanted = session.run(inputs[-1])
            break
        except MagrError as error:
            why = str(error).splitlines()[0]
    if wanted is None:
        remarks.append(f"the float model does not run on random inputs: {why[:300]}")
    row = [path.name, f"{path.stat().st_size / 1e6:.2f}"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "q.onnx")
        try:
            data = inputs[:4] if args.calibrate and wanted is not None else None
            report = magr_onnx.optimize(path, data, output=output, bits=args.bits, format=args.format).report
        except MagrError as error:
            return [*row, "-", "-", "-", "-", f"{time.perf_counter() - begin:.1f}"], [*remarks, f"refused: {str(error)[:300]}"]
        counts = collections.Counter((s.op, s.reason) for s in report.skipped)
        remarks += [f"{count} {op}: {reason}" for (op, reason), count in counts.items()]
        error_text = "-"
        if wanted is not None:
            errors = []
            for arithmetic in (Arithmetic.DEFAULT, Arithmetic.UNOPTIMIZED):
                with Session(output, arithmetic=arithmetic) as session:
                    errors.append(distance(session.run(inputs[-1]), wanted))
            error_text = f"{max(errors):.2g}"
        layers, size = str(len(report.layers)), f"{report.bytes_after / report.bytes_before:.2f}"
    return [*row, size, layers, str(len(report.skipped)), error_text, f"{time.perf_counter() - begin:.1f}"], remarks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--format", default="matmulnbits")
    parser.add_argument("--calibrate", action="store_true", help="calibrate on four random inputs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1, 16, 512, 16000], help="what unknown dimensions may become")
    args = parser.parse_args()
    print(header(f"Models found in the wild, {args.bits} bits, {args.format}, {'calibrated' if args.calibrate else 'data-free'}"))
    rows, remarks = [], []
    for path in sorted(p for folder in args.folders for p in folder.rglob("*.onnx")):
        progress(str(path))
        row, said = one(path, args)
        rows.append(row)
        remarks += [f"- {path.name}: {text}" for text in said]
    print(table(COLUMNS, rows))
    print("\n" + "\n".join(remarks))


if __name__ == "__main__":
    main()
