"""MagR as a float-to-float pass: smaller weights at nearly the same output, for this or any other quantizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from magr_onnx.core import magr
from magr_onnx.core.histograms import sampled_steps, sketch, subsample
from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerSolution
from magr_onnx.core.linalg import automatic_damping
from magr_onnx.core.quantizers.interface import damped_gram
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.passes.base import LayerPass, negative_or_infinite


@dataclass(frozen=True)
class MagR(LayerPass):
    """Reduce weight magnitudes (`magr_onnx.core.magr.reduce`).

    Attributes:
        alpha: Strength; 0 does nothing.
        relative: Whether alpha is relative to the layer, or absolute as the authors define it.
        block_size: Rows per l_inf norm; none for whole columns.
        damping: Multiple of the diagonal added to the Gram matrix, so that directions that few calibration rows excite are
            not free to change; none for one that follows from the number of rows.
        method: ``fista``, or ``authors`` for the published iteration.
        bias: Policy of the bias compensation that follows, and so whether the centred Gram matrix is the objective; a plan fills it in.
    """

    name: ClassVar[str] = "magr"
    summary: ClassVar[str] = "reduce weight magnitudes at nearly unchanged output (float to float)"
    slot: ClassVar[str] = "magr"
    solves: ClassVar[bool] = True

    alpha: float = 1e-3
    relative: bool = True
    block_size: int | None = None
    damping: float | None = None
    method: magr.Method = "fista"
    bias: BiasPolicy | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = [*negative_or_infinite("magr: alpha", self.alpha), *negative_or_infinite("magr: damping", self.damping)]
        if self.block_size is not None and self.block_size < 1:
            problems.append(f"magr: block_size={self.block_size} must be at least 1, or none")
        if spec is not None:
            problems.append("magr must come before quantize")
        return problems

    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        if self.alpha == 0:
            return solution
        stats, weight, backend = problem.stats, solution.weight, problem.stats.backend
        if stats.is_data_free:
            return replace(solution, record=solution.record.noting("MagR skipped: no calibration data"))
        damping = automatic_damping(len(weight), stats.rows) if self.damping is None else self.damping
        gram = damped_gram(stats, problem.centred(self.bias), damping)
        options: dict[str, Any] = {"relative": self.relative, "group_size": self.block_size, "method": self.method}
        reduction = magr.reduce(backend.array(weight), gram, alpha=self.alpha, **options).host()
        record = replace(solution.record, magr=figures(weight, reduction), weights=sketch(weight, reduction.weights, None))
        return replace(solution, weight=reduction.weights, changed=True, record=record)


def figures(weights: Array, reduction: magr.Reduction) -> dict[str, Any]:
    """What MagR did to ``weights``, for the report."""
    return {
        "iterations": reduction.iterations,
        "converged": reduction.converged,
        "objective": reduction.objective,
        "objective_start": reduction.start,
        "gap": reduction.gap,
        "max_before": float(np.abs(weights).max()),
        "max_after": float(np.abs(reduction.weights).max()),
        "trace": subsample(reduction.trace),
        "steps": sampled_steps(len(reduction.trace)),
    }
