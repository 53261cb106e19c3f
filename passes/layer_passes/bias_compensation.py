"""Bias compensation as a pass: the bias takes up the mean error that quantization leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from magr_onnx.core.bias_compensation import correction, shrinkage
from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerSolution
from magr_onnx.core.linalg import transposed_product
from magr_onnx.core.types import Array, LayerStats, TargetMoments
from magr_onnx.passes.base import LayerPass


@dataclass(frozen=True)
class CompensateBias(LayerPass):
    """Correct the bias for the mean output error (`magr_onnx.core.bias_compensation`).

    Attributes:
        bias: ``existing`` corrects biases that are there; ``any`` also gives a bias to layers without one, which costs a
            vector in MatMulNBits (it has a bias input) and an Add in other formats.
    """

    name: ClassVar[str] = "compensate-bias"
    summary: ClassVar[str] = "move the mean quantization error into the bias"
    slot: ClassVar[str] = "bias"

    bias: BiasPolicy = "existing"

    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        if not problem.centred(self.bias):
            return solution
        added = _shrunk(problem, solution.weight, solution.record.error)
        bias = added if solution.bias is None else solution.bias + added
        return replace(solution, bias=bias, changed=True, record=replace(solution.record, bias_compensated=True))

    def placeholder(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        return replace(solution, bias=np.zeros(problem.weight.shape[1])) if problem.centred(self.bias) else solution


def compensate_groups(problems: Sequence[LayerProblem], solution: LayerSolution) -> LayerSolution:
    """Correct the bias of a convolution, none so far, for its own mean error: ``problems`` are its groups, side by side in ``solution``."""
    weights = np.split(solution.weight, len(problems), axis=1)
    bias = np.concatenate([_shrunk(problem, weight, solution.record.error) for problem, weight in zip(problems, weights, strict=True)])
    return replace(solution, bias=bias, record=replace(solution.record, bias_compensated=True))


def _shrunk(problem: LayerProblem, weight: Array, error: float | None) -> Array:
    """Return the shrunk correction ``(N,)`` for ``weight (K, N)``, with the relative error of its output (`LayerRecord.error`)."""
    stats, moments = problem.stats, problem.target_moments
    every = [(stats, moments), *_parts(stats, moments)]
    if moments is None:
        targets = transposed_product(problem.weight, np.stack([s.target_mean for s, _ in every], axis=1))
    else:
        targets = np.stack([target.mean for _, target in every if target is not None], axis=1)
    total, *corrections = correction(targets, weight, np.stack([s.mean for s, _ in every], axis=1)).T
    parts = [(s.rows, part) for (s, _), part in zip(every[1:], corrections, strict=True)]
    result: Array = shrinkage(total, parts, (error or 0.0) ** 2 * problem.output_variance) * total
    return result


def _parts(stats: LayerStats, moments: TargetMoments | None) -> list[tuple[LayerStats, TargetMoments | None]]:
    """Return the statistics of the folds and of the rows in none of them, if any."""
    folds = list(stats.folds)
    targets: list[TargetMoments | None] = [None] * len(folds) if moments is None else list(moments.folds)
    if len(folds) == 1:
        folds.append(stats.without(0))
        targets.append(None if moments is None else moments.without(0))
    return list(zip(folds, targets, strict=True))
