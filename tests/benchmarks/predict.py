"""What decoders of 1, 7, 13 and 70 billion parameters would take, forecast on this machine; and forecasts against runs.

    python tests/benchmarks/predict.py shapes FOLDER [--shape 7b ...] [--batches 64] [--length 512] [--options "..."]
    python tests/benchmarks/predict.py check FOLDER MODEL CALIBRATION [--options "..." ...]

``shapes`` writes decoders of Llama's sizes whose weights are holes in a file, which take no room on the disk, and forecasts a run for each,
as ``onnx-magr optimize --dry-run`` does. They have no tables of embeddings and no heads. Beside the hours it prints how many products
``H W`` (``2 K^2 N`` operations, of all layers) the solvers take, which tells what to expect from machines with other rates.

``check`` forecasts runs, makes them, one after the other, and prints both: seconds are those of the report, of a process that has started.
Peaks are the highest so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Cell, header, progress, table
from large import build, calibration

SHAPES = {"1b": (16, 2048, 8192, 32), "7b": (32, 4096, 11008, 32), "13b": (40, 5120, 13824, 40), "70b": (80, 8192, 28672, 64)}
"""Layers, hidden size, size of the feed-forward layers and heads of Llama 3.2 1B, Llama 2 7B, 13B and 70B (arXiv 2307.09288), but with
keys and values as wide as queries."""


def magr(*arguments: str) -> str:
    """Run ``onnx-magr`` in a process of its own; returns what it prints."""
    command = [sys.executable, "-m", "magr_onnx.cli.main", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def forecast(model: Path, data: Path, options: str) -> dict[str, Any]:
    """The forecast of a run, as data."""
    found: dict[str, Any] = json.loads(
        magr("optimize", str(model), "--calibration", str(data), "--dry-run", "--json", "--quiet", *shlex.split(options))
    )
    return found


@contextlib.contextmanager
def removed(model: Path) -> Iterator[Path]:
    """Remove a model and its data files at the end."""
    try:
        yield model
    finally:
        for path in model.parent.glob(f"{model.name}*"):
            path.unlink()


def shapes(given: argparse.Namespace) -> None:
    rows: list[list[Cell]] = []
    for name in given.shape:
        layers, hidden, ffn, heads = SHAPES[name]
        model = build(given.folder, layers, hidden, ffn, heads, holes=True)
        data = calibration(given.folder, given.batches, given.length, hidden)
        with removed(model), contextlib.suppress(subprocess.CalledProcessError):  # it has said why
            begin = time.perf_counter()
            found = forecast(model, data, f"--batch-size 1 {given.options}")
            seconds, rate = found["seconds"], 1e9 * found["gigaflops"]
            product = layers * (4 * 2 * hidden**3 + 2 * 2 * hidden**2 * ffn + 2 * ffn**2 * hidden) / rate
            rows.append(
                [
                    name,
                    round(found["weights"] / 1e9, 2),
                    round(found["gigaflops"]),
                    f"{seconds['calibrate'] / 3600:.2f}",
                    f"{seconds['quantize'] / 3600:.2f}",
                    f"{seconds['quantize'] / product:.1f}",
                    f"{sum(seconds.values()) / 3600:.2f}",
                    f"{found['memory'] / 1e9:.1f}",
                    f"{found['bytes_after'] / 1e9:.2f}",
                    f"{time.perf_counter() - begin:.0f}",
                ]
            )
            progress(f"{rows[-1]}")
    columns = [
        "model",
        "10^9 weights",
        "GFLOP/s",
        "calibrate h",
        "solve h",
        "in products",
        "total h",
        "memory GB",
        "file GB",
        "forecast in s",
    ]
    print(header(f"Forecasts, {given.batches} x {given.length} tokens, options: {given.options or 'none'}"))
    print(table(columns, rows))


def check(given: argparse.Namespace) -> None:
    rows: list[list[Cell]] = []
    for options in given.options or [""]:
        found = forecast(given.model, given.calibration, options)
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with removed(given.folder / "out.onnx") as output:
            text = magr(
                *("optimize", str(given.model), "--calibration", str(given.calibration), "-o", str(output), "--quiet", "--json"),
                *shlex.split(options),
            )
            whole = time.perf_counter() - begin
            size = sum(path.stat().st_size for path in given.folder.glob("out.onnx*"))
        seconds = sum(json.loads(text)["seconds"].values())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        expected = sum(found["seconds"].values())
        rows.append(
            [
                options or "default",
                f"{expected:.1f}",
                f"{seconds:.1f}",
                f"{expected / seconds:.2f}",
                f"{whole:.1f}",
                f"{found['memory'] / 1e9:.2f}",
                f"{after.ru_maxrss * 1024 / 1e9:.2f}",
                f"{found['bytes_after'] / 1e6:.1f}",
                f"{size / 1e6:.1f}",
                f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f}",
            ]
        )
        progress(f"{rows[-1]}")
    columns = [
        "options",
        "forecast s",
        "taken s",
        "ratio",
        "with its start s",
        "forecast GB",
        "peak GB",
        "forecast MB",
        "written MB",
        "processor s",
    ]
    print(header(f"Forecasts against runs: {given.model.name}"))
    print(table(columns, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    what = parser.add_subparsers(required=True)
    many = what.add_parser("shapes")
    many.add_argument("folder", type=Path)
    many.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    many.add_argument("--batches", type=int, default=64)
    many.add_argument("--length", type=int, default=512)
    many.add_argument("--options", default="", help="of onnx-magr optimize, as one text")
    many.set_defaults(run=shapes)
    one = what.add_parser("check")
    one.add_argument("folder", type=Path, help="for the results, which are removed")
    one.add_argument("model", type=Path)
    one.add_argument("calibration", type=Path)
    one.add_argument("--options", nargs="*", help="of onnx-magr optimize, one text for each run")
    one.set_defaults(run=check)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    given.run(given)


if __name__ == "__main__":
    main()
