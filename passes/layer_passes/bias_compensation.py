"""Bias compensation as a pass: the bias takes up the mean error that quantization leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.core.bias_compensation import compensate
from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.job import BiasPolicy, Job


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

    def apply(self, job: Job) -> bool:
        if not job.centred(self.bias) or job.emitted:
            return False
        target = job.reference.astype("float64").T @ job.stats.target_mean if job.goal is None else job.goal.mean
        job.bias = compensate(job.bias, target, job.weight, job.stats.mean)
        job.changed = True
        job.facts["bias_compensated"] = True
        return True
