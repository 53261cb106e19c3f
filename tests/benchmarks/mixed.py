"""Mixed precision against uniform bits at the same size, on the models of ``accuracy.py``.

    python tests/benchmarks/mixed.py --data DATA --work WORK [--models minilm,lm] [--sizes 4bit] [--json FILE]

For every model: uniform models of 2, 4 and 8 bits (block 32), and mixed ones no larger than each, and between the first two. All are made
with the same other options from the same calibration data. The loss is measured on test data that no choice was made with: the mean KL
divergence of next-token distributions from the float model's, in nats (language models), or 1 minus the mean cosine of embeddings to the
float ones (``minilm``). Sensitivities are measured once a model; the seconds of later rows are without them.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import svg
from accuracy import MODELS, Benchmark, divergences, float_outputs, is_language
from common import Cell, header, progress, table, write_json

import magr_onnx
from magr_onnx.runtime.measure import sensitivity

SIZES = ("2bit", "between", "4bit", "8bit")


@dataclass(slots=True)
class Row:
    """One file."""

    size: str
    method: str
    bytes: int
    share: float
    loss: float
    predicted: float | None
    seconds: float
    choices: dict[str, int] | None = None


@contextlib.contextmanager
def measured_once() -> Iterator[None]:
    """Let all budgets of one model share its sensitivities: they do not depend on the budget."""
    measure, known = sensitivity.measure, []

    def remembered(*arguments: Any, **options: Any) -> Any:
        if not known:
            known.append(measure(*arguments, **options))
        return known[0]

    with mock.patch.object(sensitivity, "measure", remembered):
        yield


def loss_of(name: str, benchmark: Benchmark, work: Path, path: Path) -> float:
    """The loss of a file on the test data."""
    if is_language(benchmark):
        return float(divergences(benchmark, path).mean())
    return 1 - benchmark.metrics(benchmark.outputs(path), float_outputs(name, benchmark, work))[0]


def rows_of(name: str, benchmark: Benchmark, work: Path, sizes: list[str]) -> Iterator[Row]:
    output = work / f"mixed_{name}.onnx"
    source = benchmark.model.stat().st_size

    def made(size: str, method: str, **options: Any) -> Row:
        progress(f"{name}: {size}, {method}")
        begin = time.perf_counter()
        report = magr_onnx.optimize(benchmark.model, benchmark.calibration, output=output, **options).report
        seconds = time.perf_counter() - begin
        a, choices = report.assignment, {}
        for row in a.rows if a is not None else ():
            choices[row.label] = choices.get(row.label, 0) + len(row.layers)
        written = output.stat().st_size
        assert written == report.bytes_after
        loss = loss_of(name, benchmark, work, output)
        return Row(size, method, written, written / source, loss, None if a is None else a.attempts[-1].predicted, seconds, choices)

    uniform: dict[str, Row] = {}
    with measured_once():
        for size in sizes:
            if size == "between":
                budget = (uniform["2bit"].bytes + uniform["4bit"].bytes) // 2 if {"2bit", "4bit"} <= uniform.keys() else None
            else:
                uniform[size] = made(size, "uniform, block 32", bits=int(size.removesuffix("bit")))
                budget = uniform[size].bytes
                yield uniform[size]
            if budget is not None:
                found = made(size, "mixed", target_size=f"{budget} B")
                assert found.bytes <= budget
                yield found
    output.unlink(missing_ok=True)


def render(benchmark: Benchmark, rows: list[Row]) -> str:
    lines: list[list[Cell]] = [
        [
            r.size,
            r.method,
            f"{r.bytes / 1e6:.3f}",
            f"{r.share:.2%}",
            f"{r.loss:.3g}",
            None if r.predicted is None else f"{r.predicted:.3g}",
            f"{r.seconds:.1f}",
        ]
        for r in rows
    ]
    return f"## {benchmark.title}\n\n{table(('size of', 'method', 'MB', 'of source', 'loss', 'predicted', 'seconds'), lines)}\n"


def panel(benchmark: Benchmark, rows: list[Row]) -> svg.Panel:
    """Loss against size of the uniform and of the mixed files, by size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: r.bytes):
        lines.setdefault(row.method, []).append((100 * row.share, row.loss))
    measure = "KL from float, nats" if is_language(benchmark) else "1 - mean cosine"
    return svg.Panel(benchmark.title.split(",")[0], "% of the float file", measure, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of books, stsb, lm and charlm")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exported encoder, float results and temporary files")
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (default {','.join(MODELS)})")
    parser.add_argument("--sizes", default="2bit,4bit,between,8bit", help="of 2bit, 4bit, 8bit; between is after 2bit and 4bit")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--plot", type=Path, help="also draw loss against size as SVG")
    arguments = parser.parse_args()
    print(header("Mixed precision against uniform bits"))
    results = {}
    panels: list[svg.Panel] = []
    for name in arguments.models.split(","):
        benchmark = MODELS[name](arguments.data, arguments.work)
        rows = list(rows_of(name, benchmark, arguments.work, arguments.sizes.split(",")))
        results[name] = [asdict(r) for r in rows]
        panels.append(panel(benchmark, rows))
        print(render(benchmark, rows), flush=True)
    write_json(arguments.json, {"results": results})
    if arguments.plot is not None:
        svg.write(arguments.plot, [("Loss on test data against size", panels)])


if __name__ == "__main__":
    main()
