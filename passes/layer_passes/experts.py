"""Experts as layers to solve: a problem for each layer of each expert, and all solutions as one row of the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from magr_onnx.core.histograms import sketch
from magr_onnx.core.layer import LayerProblem, LayerRecord, LayerSolution, output_variance, ratio
from magr_onnx.core.types import Array, LayerStats, QuantizedWeight
from magr_onnx.passes.layer_state import float_type
from magr_onnx.passes.layers.experts import ExpertLayer

SKETCHED = 8  # experts in the histogram of a report, at most


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """What is kept of a solved layer of an expert: its float weights are not.

    Attributes:
        quantized: Its codes.
        bias: Its bias ``(N,)``; None for none.
        record: Figures for the report.
        power: Variance of its output, summed over all tokens it saw.
    """

    quantized: QuantizedWeight
    bias: Array | None
    record: LayerRecord
    power: float

    @staticmethod
    def of(problem: LayerProblem, solution: LayerSolution) -> Solved:
        """Keep what is needed of a solution."""
        assert solution.quantized is not None
        power = output_variance(problem.weight, problem.stats) * max(problem.stats.rows, 1)
        return Solved(solution.quantized, solution.bias, replace(solution.record, weights=None, errors=()), power)


def problems_of(layer: ExpertLayer, stats: Iterable[Sequence[LayerStats | None]]) -> Iterator[list[LayerProblem]]:
    """Yield both layers of every expert as problems; those without ``stats`` are data-free."""
    kind, biases = float_type(layer.dtype), layer.read_biases()
    for number, (known, matrices) in enumerate(zip(stats, layer.matrices(range(layer.experts)), strict=True)):
        yield [
            LayerProblem(matrix, None if bias is None else bias[number], LayerStats.data_free(len(matrix)) if one is None else one, kind)
            for matrix, bias, one in zip(matrices, biases, known, strict=True)
        ]


def join(layer: ExpertLayer, solved: Sequence[Sequence[Solved]], rows: int) -> LayerSolution:
    """Join the solutions of both layers of all experts to one for the report, without its weights.

    Args:
        layer: The experts.
        solved: For both layers, a solution of every expert.
        rows: Tokens that were routed.
    """
    every = [one for part in solved for one in part]
    power = sum(one.power for one in every)
    error = ratio(sum(one.power * (one.record.error or 0.0) ** 2 for one in every), power)
    some = layer.matrices(range(0, layer.experts, -(-layer.experts // SKETCHED)))
    weights = sketch(np.hstack([part for first, second in some for part in (first, second.T)]), None, None)
    compensated = any(one.record.bias_compensated for one in every)
    record = LayerRecord(rows, error, bias_compensated=compensated, weights=weights)
    nothing = np.empty((layer.k, 0), np.float32)
    return LayerSolution(nothing, None, nothing, quantized=every[0].quantized, changed=True, record=record)


def written(solved: Sequence[Sequence[Solved]]) -> Iterator[Array]:
    """Yield the dequantized weights of every expert as they are read back: ``(H, F + I)``, the second layer transposed."""
    for first, second in zip(*solved, strict=True):
        yield np.hstack([first.quantized.dequantize(), second.quantized.dequantize().T])


def biases_of(solved: Sequence[Sequence[Solved]]) -> list[Array | None]:
    """Stack the biases of both layers, ``(E, N)``; those of experts without one are zero. None where no expert has one."""

    def stacked(part: Sequence[Solved]) -> Array | None:
        if all(one.bias is None for one in part):
            return None
        return np.stack([np.zeros(one.quantized.codes.shape[1]) if one.bias is None else one.bias for one in part])

    return list(map(stacked, solved))


def notes_of(solved: Sequence[Sequence[Solved]]) -> list[str]:
    """Return what solvers said of experts, each sentence once, with the number of weights it is about."""
    every = [note for part in solved for one in part for note in one.record.notes]
    without = sum("solved without data" in note for note in every)
    notes = [f"{without} of {sum(map(len, solved))} matrices solved without data, which is better on tokens held out"] * (without > 0)
    return notes + [note for note in dict.fromkeys(every) if "solved without data" not in note]
