"""Accuracy over the number of calibration samples, for models with layers that see one row a sample.

    python tests/benchmarks/few.py WORK [--models vit cnn tabular recommender lstm] [--samples 4 16 64 256] [--formats matmulnbits:8 ...]

The models are trained on first use into the folder WORK, with torch and scikit-learn (`trained`). Of every format the SQNR of the outputs
on fresh samples is compared with the same format rounded to nearest without data (with the same data where the format needs ranges). The
first line is the worst ratio.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import header, progress, table
from trained import KINDS, trained

import magr_onnx
from magr_onnx.runtime.ort.session import Session

FORMATS = ("matmulnbits:8", "matmulnbits:4", "matmulnbits:3", "matmulnbits:2", "qdq:4", "qdq-int8:8", "dynamic-int8:8")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="format:bits")
    parser.add_argument("--effort", default=None, help="fast, balanced or best; the default of the format if not given")
    args = parser.parse_args()
    effort = {} if args.effort is None else {"effort": args.effort}
    rows, worst = [], (np.inf, "")
    for kind in args.models:
        folder = trained(kind, args.work)
        for text in args.formats:
            form, bits = text.split(":")
            options: dict[str, Any] = {"format": form} if form.endswith("int8") else {"format": form, "bits": int(bits)}
            static, gains = form == "qdq-int8", []
            base = np.nan if static else sqnr(folder, None, quantizer="rtn", **options)
            for count in args.samples:
                progress(f"{kind} {text} {count}")
                rounded = sqnr(folder, count, quantizer="rtn", **options) if static else base
                gains.append(sqnr(folder, count, **options, **effort) - rounded)
                worst = min(worst, (gains[-1], f"{kind} {text}, {count} samples"))
            rows.append([kind, text, "-" if static else f"{base:.1f}", *(f"{gain:+.1f}" for gain in gains)])
    print(f"Worst: {worst[0]:+.2f} dB ({worst[1]})\n")
    print(header("SQNR in dB above rounding to nearest, by calibration samples"))
    print(table(["model", "format", "rounded", *map(str, args.samples)], rows))


if __name__ == "__main__":
    main()
