"""Errors of layers as reports have them, against errors measured on fresh samples.

    python tests/benchmarks/errors.py WORK [--models vit cnn tabular recommender lstm] [--samples 16 64 128] [--formats matmulnbits:8 ...]

The models are trained on first use into the folder WORK, with torch and scikit-learn (`trained`). The error at every layer's output is
computed from what onnxruntime puts out there in both models. The first line is the share of layers where the two agree within 1.5.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from common import header, progress, table
from few import BATCH
from trained import KINDS, trained

import magr_onnx
from magr_onnx.runtime.ort.session import Session

FORMATS = ("matmulnbits:8", "matmulnbits:4", "qdq:4", "qdq-int8:8", "dynamic-int8:8")
FRESH, FACTOR = 1024, 1.5


def channels(path: Path, names: list[str], images: set[str], feeds: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Values of a model as rows ``(n, channels)``, as far as it has values of these names."""
    model = onnx.load(path)
    there = {output for node in model.graph.node for output in node.output}
    names = [name for name in names if name in there]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    parts: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        onnx.save(model, copy := Path(work, "model.onnx"))
        with Session(copy) as session:
            for at in range(0, FRESH, BATCH):
                batch = {name: array[at : at + BATCH] for name, array in feeds.items()}
                for name, value in zip(names, session.run(batch, names), strict=True):
                    value = np.moveaxis(value, 1, -1) if name in images else value
                    parts[name].append(value.reshape(-1, value.shape[-1]).astype(np.float64))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def ratios(folder: Path, count: int, **options: Any) -> list[float]:
    """Reported over measured errors of the layers of a model quantized with so many samples."""
    with np.load(folder / "calibration.npz") as file:
        data = {name: file[name][:count] for name in file.files}
    with np.load(folder / "heldout.npz") as file:
        fresh = {name: file[name][:FRESH] for name in file.files}
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = Path(work, "q.onnx")
        layers = magr_onnx.optimize(folder / "model.onnx", data, output=output, progress=False, **options).report.layers
        names, images = [str(row.output) for row in layers], {str(row.output) for row in layers if row.op.startswith("Conv")}
        before, after = (channels(path, names, images, fresh) for path in (folder / "model.onnx", output))
    found = []
    for row, name in zip(layers, names, strict=True):
        if row.error is not None and name in before and name in after:
            y, noise = before[name], np.square(before[name] - after[name]).sum()
            found.append(row.error / float(np.sqrt(noise / np.square(y - y.mean(axis=0)).sum())))
    return found


def within(found: list[float]) -> int:
    """The number of ratios within the factor."""
    return sum(1 / FACTOR <= ratio <= FACTOR for ratio in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="format:bits")
    args = parser.parse_args()
    rows, everything = [], list[float]()
    for kind in args.models:
        folder = trained(kind, args.work)
        for text in args.formats:
            form, bits = text.split(":")
            options: dict[str, Any] = {"format": form} if form.endswith("int8") else {"format": form, "bits": int(bits)}
            cells = []
            for count in args.samples:
                progress(f"{kind} {text} {count}")
                found = ratios(folder, count, **options)
                everything += found
                cells.append(f"{within(found)}/{len(found)} ({min(found):.2f} to {max(found):.2f})")
            rows.append([kind, text, *cells])
    print(f"Within {FACTOR}: {within(everything) / len(everything):.1%} of {len(everything)} layers\n")
    print(header("Layers whose reported and measured error agree, and ratios of the two, by calibration samples"))
    print(table(["model", "format", *map(str, args.samples)], rows))


if __name__ == "__main__":
    main()
