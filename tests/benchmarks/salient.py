"""Salient inputs in 8 bits (``--split-salient``) against mixed precision by layer in a file of the same size, and uniform bits.

    python tests/benchmarks/salient.py --data DATA --work WORK [--models tiny,lm] [--shares 0.1] [--bits 2] [--effort fast]

All are made with the same other options from the same calibration data, in blocks of 32. The loss is that of ``mixed.py``. Times are of one
run of the file on one test block, and on its first token: medians of 15 rounds in which the files take turns.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from accuracy import MODELS, Benchmark
from common import Cell, header, interleaved, progress, table
from mixed import loss_of

import magr_onnx
from magr_onnx.runtime.ort.session import Session

ROUNDS = 15


def milliseconds(benchmark: Benchmark, paths: list[Path]) -> list[list[float]]:
    """Medians of every file on the first token of a block, and on the block."""
    block = {name: array[:1] for name, array in benchmark.test.items()}
    sessions = [Session(path) for path in paths]
    found = []
    for feeds in ({name: array[:, :1] for name, array in block.items()}, block):
        functions = [lambda s=s, feeds=feeds: s.run(feeds) for s in sessions]  # type: ignore[misc]
        found.append([1e3 * statistics.median(seconds) for seconds in interleaved(functions, ROUNDS)])
    for session in sessions:
        session.close()
    return [list(times) for times in zip(*found, strict=True)]


def rows_of(name: str, benchmark: Benchmark, work: Path, bits: int, shares: list[float], effort: str) -> list[list[Cell]]:
    labels, paths = list[str](), list[Path]()

    def make(label: str, **options: Any) -> int:
        progress(f"{name}: {label}")
        labels.append(label)
        paths.append(work / f"salient_{name}_{len(paths)}.onnx")
        magr_onnx.optimize(benchmark.model, benchmark.calibration, output=paths[-1], progress=False, effort=effort, **options)
        return paths[-1].stat().st_size

    make(f"{bits} bits", bits=bits)
    for share in shares:
        size = make(f"{bits} bits, --split-salient {share:g}", bits=bits, split_salient=share)
        make("mixed precision, at most as large", target_size=f"{size} B")
    make(f"{2 * bits} bits", bits=2 * bits)
    losses, times = [loss_of(name, benchmark, work, path) for path in paths], milliseconds(benchmark, paths)
    rows: list[list[Cell]] = [
        [label, f"{path.stat().st_size / 1e6:.3f}", f"{loss:.4f}", f"{token:.2f}", f"{block:.2f}"]
        for label, path, loss, (token, block) in zip(labels, paths, losses, times, strict=True)
    ]
    for path in paths:
        path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default="tiny,lm", help="of accuracy.py, comma-separated")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1])
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4))
    parser.add_argument("--effort", default="fast")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(header("Salient inputs in 8 bits"))
    for name in args.models.split(","):
        benchmark = MODELS[name](args.data, args.work)
        rows = rows_of(name, benchmark, args.work, args.bits, args.shares, args.effort)
        print(f"## {benchmark.title}\n\n{table(('weights', 'MB', 'loss', 'ms, a token', 'ms, a block'), rows)}\n", flush=True)


if __name__ == "__main__":
    main()
