"""The demand for second moments of gradients at layer outputs: errors weigh as much as they do at the model's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import choose_one
from magr_onnx.passes.base import Stage

Kind = Literal["two-sided", "adaptive"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class OutputHessian(Stage):
    """Have calibration differentiate the model (`magr_onnx.runtime.calibration.fisher`); ``quantize{method=auto}`` uses what it finds.

    Attributes:
        kind: ``two-sided``: errors of outputs cancel as far as the model's outputs allow (`magr_onnx.core.quantizers.two_sided`);
            ``adaptive``: the output-adaptive Hessian takes the place of the Gram matrix (`magr_onnx.core.adaptive_hessian`).
        share: Of the output-adaptive Hessian in its mix with the Gram matrix, 0 to 1.

    Layers whose outputs are the model's, layers wider than
    `magr_onnx.runtime.calibration.fisher.MAX_WIDTH` and layers that gradients do not reach are quantized without.
    """

    name: ClassVar[str] = "output-hessian"
    summary: ClassVar[str] = "weigh output errors by the model's gradients (quantize with method auto)"
    slot: ClassVar[str] = "output_hessian"

    kind: Kind = "two-sided"
    share: float = 0.5

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = [] if self.kind in KINDS else [f"output-hessian: kind={self.kind!r} is not known; {choose_one(self.kind, KINDS)}"]
        return problems if 0 <= self.share <= 1 else [*problems, f"output-hessian: share={self.share} must be from 0 to 1"]
