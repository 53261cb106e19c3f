"""Error feedback as a pass: aim at the float output from the inputs the quantized layers before produce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.core import error_feedback
from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.job import BiasPolicy, Job


@dataclass(frozen=True)
class ErrorFeedback(LayerPass):
    """Replace what a layer is quantized towards by `magr_onnx.core.error_feedback.aim`. It makes calibration run in stages.

    Attributes:
        bias: Policy of the bias compensation that will follow. A pipeline fills it in from its compensate-bias pass.
    """

    name: ClassVar[str] = "error-feedback"
    summary: ClassVar[str] = "quantize in stages, towards the float output from the inputs of the quantized layers before"

    bias: BiasPolicy | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        return [f"{self.name} must come before magr and quantize"] if spec is not None else []

    def apply(self, job: Job) -> bool:
        if job.goal is None or job.goal.held_out is None:
            return False
        found = error_feedback.aim(job.reference, job.stats, job.goal, job.centred(self.bias))
        job.facts["feedback"] = {"damping": found.damping, "held_out_before": found.before, "held_out_after": found.after}
        job.target = job.weight = found.weights
        job.kept_target = found.kept
        return found.damping is not None
