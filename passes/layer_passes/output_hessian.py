"""The demand for second moments of gradients at layer outputs: errors weigh as much as they do at the model's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.passes.base import Stage


@dataclass(frozen=True)
class OutputHessian(Stage):
    """Have calibration differentiate the model (`magr_onnx.runtime.calibration.fisher`); ``quantize{method=auto}`` uses what it finds.

    Layers whose outputs are the model's, layers wider than
    `magr_onnx.runtime.calibration.fisher.MAX_OUTPUTS` and layers that gradients do not reach are quantized without.
    """

    name: ClassVar[str] = "output-hessian"
    summary: ClassVar[str] = "weigh output errors by the model's gradients (quantize with method auto)"
    slot: ClassVar[str] = "output_hessian"
