"""Error feedback as a setting: aim at the float output from the inputs the quantized layers before produce."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from magr_onnx.core import error_feedback
from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerSolution
from magr_onnx.passes.base import LayerStage


@dataclass(frozen=True)
class ErrorFeedback(LayerStage):
    """Replace what a layer is quantized towards by `magr_onnx.core.error_feedback.solve_target`. It makes calibration run in stages.

    Attributes:
        bias: Policy of the bias compensation that will follow. A plan fills it in from its compensate-bias pass.
    """

    name: ClassVar[str] = "error-feedback"
    summary: ClassVar[str] = "quantize in stages, towards the float output from the inputs of the quantized layers before"
    slot: ClassVar[str] = "error_feedback"

    bias: BiasPolicy | None = None

    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        moments = problem.target_moments
        if moments is None or not moments.folds:
            return solution
        target = error_feedback.solve_target(problem.weight, problem.stats, moments, problem.centred(self.bias))
        figures = {"damping": target.damping, "held_out_before": target.before, "held_out_after": target.after}
        record = replace(solution.record, feedback=figures)
        return replace(solution, weight=target.weights, target=target.weights, fit_targets=target.fits, record=record)
