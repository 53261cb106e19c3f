"""Bias compensation as a pass: the bias takes up the mean error that quantization leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from magr_onnx.core.bias_compensation import compensate
from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerSolution
from magr_onnx.passes.base import LayerPass


@dataclass(frozen=True)
class CompensateBias(LayerPass):
    """Correct the bias for the mean output error (`magr_onnx.core.bias_compensation.compensate`).

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
        moments, stats = problem.target_moments, problem.stats
        target = problem.weight.astype(np.float64).T @ stats.target_mean if moments is None else moments.mean
        bias = compensate(solution.bias, target, solution.weight, stats.mean)
        return replace(solution, bias=bias, changed=True, record=replace(solution.record, bias_compensated=True))

    def placeholder(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        return replace(solution, bias=np.zeros(problem.weight.shape[1])) if problem.centred(self.bias) else solution
