"""The demand for second moments of gradients at layer outputs: errors weigh as much as they do at the model's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.job import Job


@dataclass(frozen=True)
class OutputHessian(LayerPass):
    """Have calibration differentiate the model (`magr_onnx.runtime.calibration.fisher`); ``quantize{method=auto}`` uses what it finds.

    The pass itself changes nothing. Layers whose outputs are the model's, layers wider than
    `magr_onnx.runtime.calibration.fisher.MOST_OUTPUTS` and layers that gradients do not reach are quantized without.
    """

    name: ClassVar[str] = "output-hessian"
    summary: ClassVar[str] = "weigh output errors by the model's gradients (quantize with method auto)"

    def problems(self, spec: WeightSpec | None) -> list[str]:
        return [f"{self.name} must come before quantize"] if spec is not None else []

    def apply(self, job: Job) -> bool:
        return False
