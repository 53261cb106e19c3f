"""Error feedback as a setting: aim at the float output from the inputs the quantized layers before produce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.core import error_feedback
from magr_onnx.passes.base import LayerStage
from magr_onnx.passes.job import BiasPolicy, Job


@dataclass(frozen=True)
class ErrorFeedback(LayerStage):
    """Replace what a layer is quantized towards by `magr_onnx.core.error_feedback.aim`. It makes calibration run in stages.

    Attributes:
        bias: Policy of the bias compensation that will follow. A plan fills it in from its compensate-bias pass.
    """

    name: ClassVar[str] = "error-feedback"
    summary: ClassVar[str] = "quantize in stages, towards the float output from the inputs of the quantized layers before"
    slot: ClassVar[str] = "error_feedback"

    bias: BiasPolicy | None = None

    def apply(self, job: Job) -> bool:
        if job.goal is None or job.goal.held_out is None:
            return False
        found = error_feedback.aim(job.reference, job.stats, job.goal, job.centred(self.bias))
        job.facts["feedback"] = {"damping": found.damping, "held_out_before": found.before, "held_out_after": found.after}
        job.target = job.weight = found.weights
        job.kept_target = found.kept
        return found.damping is not None
