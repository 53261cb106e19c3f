"""Accuracy over the width of the accumulator: a part of ``integer.py``.

Every file is made from one calibration (ranges of the activations, Gram matrices) by the passes of `magr_onnx.optimize`, proved by
`magr_onnx.verify` not to overflow its accumulator, and judged by onnxruntime.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import svg
from accuracy import Benchmark, bundled_lm, divergences, sentence_encoder
from common import BATCH_SIZE, Cell, progress, table

import magr_onnx
from magr_onnx.config.options import Options
from magr_onnx.config.plans import build_pipeline
from magr_onnx.core.overflow.accumulator import Accumulator, data_type_bits
from magr_onnx.core.quantizers import QUANTIZERS, gptq
from magr_onnx.core.quantizers import Options as SolverOptions
from magr_onnx.core.quantizers.interface import Problem, Solution
from magr_onnx.model_io import files, writing
from magr_onnx.passes import run_layers
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import activation_ranges, moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import resolve_mask
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Session

MODELS: dict[str, Callable[[Path, Path], Benchmark]] = {"minilm": partial(sentence_encoder, every=8), "tiny": partial(bundled_lm, every=4)}
WIDTHS = range(24, 11, -1)
TILES: tuple[int | None, ...] = (None, 64)
BITS = (8, 4)
ACTIVATION = (0, 255)
REDUCED = "fewer weight bits"
METHODS: dict[str, Options] = {
    "ours (default)": {"quantizer": "comq"},
    "ours, GPTQ": {"quantizer": "gptq"},
    REDUCED: {"quantizer": "gptq"},
    "A2Q": {"quantizer": "a2q"},
    "A2Q+": {"quantizer": "a2q+", "symmetric": False},
}


class Calibrated:
    """A float model with the ranges and statistics of its activations, to be quantized many times."""

    def __init__(self, benchmark: Benchmark) -> None:
        plan = build_pipeline(format="qdq-int8")
        activations = plan.activations
        assert activations is not None
        self.model = files.load(benchmark.model).model
        with Session(benchmark.model) as session:
            data = open_data(benchmark.calibration, session.inputs, BATCH_SIZE)
        context = CalibrationContext(data, resolve_mask(self.model, "auto"))
        plan.prepare(self.model)
        layers, _ = find(self.model)
        self.longest = max(layer.k for layer in layers)
        grids = activation_ranges.choose(
            self.model, activation_ranges.inputs_of(layers), context, method=activations.ranges, kind=activations.type
        )
        self.stats = moments.collect(self.model, layers, replace(context, grids=grids)).stats

    def quantize(self, output: Path, options: Options) -> None:
        """What `magr_onnx.optimize` would write with these options, as static QDQ."""
        plan = build_pipeline(**{"format": "qdq-int8", **options})  # type: ignore[arg-type]
        work = self.model.clone()
        run_layers(plan, find(work)[0], lambda layer: self.stats[layer.reads], lambda solved: None)
        writing.save(work, output)


@contextlib.contextmanager
def solved_once() -> Iterator[None]:
    """Let COMQ start from the GPTQ solution of the same problem where there just was one: the search for scales is the longest part."""
    run, known = gptq.run, {}

    def remembered(problem: Problem, options: SolverOptions) -> Solution:
        weights = hashlib.sha256(np.ascontiguousarray(problem.weights)).digest()
        key = (id(problem.stats), weights, problem.centred, problem.spec, problem.budget, options)
        if key not in known:
            known[key] = run(problem, options)
        return known[key]

    with mock.patch.object(gptq, "run", remembered), mock.patch.dict(QUANTIZERS, {"gptq": replace(gptq.QUANTIZER, run=remembered)}):
        yield


def most_bits(width: int, tile: int, most: int) -> int | None:
    """The most weight bits, up to ``most``, of which a tile fits by their data type alone."""
    fitting = [m for m in range(2, most + 1) if data_type_bits(tile, *ACTIVATION, -(2 ** (m - 1)), 2 ** (m - 1) - 1) <= width]
    return max(fitting, default=None)


def measure(benchmark: Benchmark, reference: npt.NDArray[Any], work: Path) -> Iterator[dict[str, Any]]:
    """A row for every weight width, tile, accumulator and method.

    A file that fits the next narrower accumulator as it is stands for that one too; but not those of A2Q, whose own bound is coarser.
    """
    progress(f"{benchmark.title}: calibrating")
    model = Calibrated(benchmark)
    for bits, tile in itertools.product(BITS, TILES):
        before: dict[str, dict[str, Any]] = {}
        for width in WIDTHS:
            with solved_once():
                for i, method in sorted(enumerate(METHODS), key=lambda m: m[1] != "ours, GPTQ"):
                    output = work / f"curve_{bits}_{tile}_{i}.onnx"
                    accumulator = Accumulator(width, tile)
                    fewer = most_bits(width, tile or model.longest, bits) if method == REDUCED else bits
                    row: dict[str, Any] = {"bits": bits, "tile": tile, "width": width, "method": method, "written": fewer, "losses": None}
                    last = None if method.startswith("A2Q") else before.get(method)
                    if last is not None and last["written"] == fewer and _holds(output, accumulator):
                        row |= {"losses": last["losses"], "proved": True}
                    elif fewer is not None:
                        options: Options = {"bits": fewer, **METHODS[method]}  # type: ignore[typeddict-item]
                        if method != REDUCED:
                            options |= {"accumulator_bits": width, "accumulator_tile": tile}
                        begin = time.perf_counter()
                        model.quantize(output, options)
                        row["seconds"] = time.perf_counter() - begin
                        row |= {"losses": _losses(benchmark, reference, output), "proved": _holds(output, accumulator)}
                        before[method] = row
                    how = f"{row['seconds']:.1f} s" if "seconds" in row else "as before" if row["losses"] else "no bits fit"
                    progress(f"W{bits}A8, T={tile or 'K'}, P={width}, {method}: {row['losses']} ({how})")
                    yield row
        for path in work.glob(f"curve_{bits}_{tile}_*.onnx"):
            path.unlink()


def _holds(path: Path, accumulator: Accumulator) -> bool:
    return magr_onnx.verify(path, accumulator=accumulator, run=False).ok


def _losses(benchmark: Benchmark, reference: npt.NDArray[Any], path: Path) -> tuple[float, ...]:
    """What a file lost against the float model, by the measures of `measures`."""
    first, second = benchmark.metrics(benchmark.outputs(path), reference)
    return (1 - first,) if _cosine(benchmark) else (second, float(divergences(benchmark, path).mean()))


def measures(benchmark: Benchmark) -> tuple[str, ...]:
    """Names of the losses; the last one is plotted."""
    return ("1 - cosine",) if _cosine(benchmark) else ("cross-entropy over float", "KL divergence from float")


def _cosine(benchmark: Benchmark) -> bool:
    return benchmark.columns[0].startswith("cosine")


def render(benchmark: Benchmark, rows: list[dict[str, Any]]) -> str:
    """A table for every weight width, tile and measure."""
    found = {(r["bits"], r["tile"], r["width"], r["method"]): r for r in rows if r["losses"] is not None}
    parts = [f"### {benchmark.title}", ""]
    for bits in BITS:
        for tile in TILES:
            for i, measure in enumerate(measures(benchmark)):
                lines: list[list[Cell]] = []
                for width in WIDTHS:
                    some = (found.get((bits, tile, width, method)) for method in METHODS)
                    lines.append([width, *(None if row is None else _cell(row, i) for row in some)])
                parts += [f"W{bits}A8, {_tile(tile)}: {measure}", "", table(("P", *METHODS), lines), ""]
    return "\n".join(parts)


def _tile(tile: int | None) -> str:
    return "whole dot products" if tile is None else f"tiles of {tile}"


def _cell(row: dict[str, Any], measure: int) -> str:
    text = f"{row['losses'][measure]:.5f}"
    return text + (f" ({row['written']} bits)" if row["method"] == REDUCED else "") + ("" if row["proved"] else " OVERFLOWS")


def plot(path: Path, results: list[tuple[Benchmark, list[dict[str, Any]]]]) -> None:
    """One row of panels a model."""
    panels = []
    for benchmark, rows in results:
        line = []
        for bits in BITS:
            for tile in TILES:
                some = [r for r in rows if (r["bits"], r["tile"]) == (bits, tile) and r["losses"] is not None]
                lines = {m: [(r["width"], r["losses"][-1]) for r in some if r["method"] == m] for m in METHODS}
                line.append(svg.Panel(f"W{bits}A8, {_tile(tile)}", "accumulator bits P", measures(benchmark)[-1], lines))
        panels.append((benchmark.title, line))
    svg.write(path, panels)
