"""Accuracy over the number of calibration samples, for models with layers that see one row a sample.

    python tests/benchmarks/few.py WORK [--models lm vit ...] [--samples 0 4 16 ...] [--formats qdq:4 ...] [--efforts best ...] [--cases 60]

The models are the language model of the package, and others that are trained on first use into the folder WORK, with torch and scikit-learn
(`trained`). Of every format the SQNR of the outputs on fresh samples is compared with the same format rounded to nearest without data
(with the same data where the format needs ranges). The first line is the worst ratio.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import header, progress, table
from trained import KINDS, trained

import magr_onnx
from magr_onnx.models import bundled
from magr_onnx.runtime.ort.session import Session

FORMATS = ("matmulnbits:8", "matmulnbits:4", "matmulnbits:3", "matmulnbits:2", "qdq:4", "qdq-int8:8", "dynamic-int8:8")
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "adaptive": {"output_hessian": "adaptive"}}
BATCH = 256


def outputs(path: Path, feeds: dict[str, Any]) -> np.ndarray:
    """The first output on all samples."""
    with Session(path) as session:
        count = len(next(iter(feeds.values())))
        parts = [session.run({name: a[at : at + BATCH] for name, a in feeds.items()})[0] for at in range(0, count, BATCH)]
    return np.concatenate(parts).astype(np.float64)


def sqnr(folder: Path, count: int | None, **options: Any) -> float:
    """SQNR in dB on the held-out samples of a model quantized with so many calibration samples; None for none."""
    with np.load(folder / "calibration.npz") as file:
        data = None if count is None else {name: file[name][:count] for name in file.files}
    with np.load(folder / "heldout.npz") as file:
        fresh = {name: file[name] for name in file.files}
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = Path(work, "q.onnx")
        magr_onnx.optimize(folder / "model.onnx", data, output=output, progress=False, **options)
        expected, actual = outputs(folder / "model.onnx", fresh), outputs(output, fresh)
    noise = np.square(expected - actual).sum()
    return float(10 * np.log10(np.square(expected).sum() / max(noise, 1e-30)))


def folder_of(kind: str, work: Path) -> Path:
    """The folder of a model and its inputs: the language model of the package, or one that is trained."""
    return bundled.FOLDER if kind == "lm" else trained(kind, work)


def available(folder: Path) -> int:
    """The number of calibration samples."""
    with np.load(folder / "calibration.npz") as file:
        return len(file[file.files[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", nargs="+", default=["lm", *KINDS], choices=["lm", *KINDS])
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64, 256], help="0 for none")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="format:bits")
    parser.add_argument(
        "--efforts",
        nargs="+",
        default=["default"],
        help="fast, balanced, best, adaptive (balanced, with --output-hessian adaptive), or default: of the format",
    )
    parser.add_argument("--cases", type=int, help="so many of all cases only, drawn at random")
    args = parser.parse_args()
    cases = list(itertools.product(args.models, args.formats, args.efforts, args.samples))
    chosen = cases if args.cases is None else sorted(random.Random(0).sample(cases, min(args.cases, len(cases))), key=cases.index)
    gains: dict[tuple[str, str, str], dict[int, float]] = {}
    rounded: dict[tuple[Any, ...], float] = {}
    for kind, text, effort, count in chosen:
        folder, (form, bits) = folder_of(kind, args.work), text.split(":")
        static = form == "qdq-int8"
        needs_data = static or effort in ("balanced", "best", "adaptive")
        if count > available(folder) or (needs_data and not count):
            continue
        options: dict[str, Any] = {"format": form} if form.endswith("int8") else {"format": form, "bits": int(bits)}
        data, key = count or None, (kind, text, count if static else None)
        if key not in rounded:
            rounded[key] = sqnr(folder, key[2], quantizer="rtn", **options)
        gain = sqnr(folder, data, **options, **OPTIONS.get(effort, {"effort": effort})) - rounded[key]
        gains.setdefault((kind, text, effort), {})[count] = gain
        progress(f"{kind} {text} {effort} {count}: {gain:+.2f} dB")
    worst = min((gain, f"{' '.join(key)}, {count} samples") for key, row in gains.items() for count, gain in row.items())
    print(f"Worst: {worst[0]:+.2f} dB ({worst[1]})\n")
    print(header("SQNR in dB above rounding to nearest, by calibration samples"))
    rows = []
    for (kind, text, effort), row in gains.items():
        base = rounded.get((kind, text, None))
        shown = [f"{row[count]:+.1f}" if count in row else "" for count in args.samples]
        rows.append([kind, text, effort, "-" if base is None else f"{base:.1f}", *shown])
    print(table(["model", "format", "effort", "rounded", *map(str, args.samples)], rows))


if __name__ == "__main__":
    main()
