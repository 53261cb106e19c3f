"""Emit linear layers between the roundings of a whole graph: codes dequantized before the product, an int32 bias in a Gemm.

Values are rounded by `magr_onnx.passes.emit.tensors`, as the table of a runtime says (`magr_onnx.passes.tensors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import choose_one
from magr_onnx.passes.emit.format import Format
from magr_onnx.passes.emit.int8 import INTEGER, EmitStaticProducts
from magr_onnx.passes.emit.qdq import READERS
from magr_onnx.passes.graph.opset import raise_opset
from magr_onnx.passes.tensors.backends import BACKENDS
from magr_onnx.passes.tensors.rules import Rules


@dataclass(frozen=True)
class EmitQDQFull(EmitStaticProducts):
    """Replace quantized layers by products between roundings, and round all that a runtime computes in integers.

    Attributes:
        backend: The runtime.
    """

    name: ClassVar[str] = "emit-qdq-full"
    summary: ClassVar[str] = "write the whole graph between QuantizeLinear and DequantizeLinear, as a runtime's rules say"
    needs: ClassVar[str] = "QuantizeLinear of 16 bits"

    backend: str = next(iter(BACKENDS))

    def problems(self, spec: WeightSpec | None) -> list[str]:
        unknown = [] if self.backend in BACKENDS else [f"backend {self.backend!r} is not known; {choose_one(self.backend, BACKENDS)}"]
        return super().problems(spec) + unknown

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        return raise_opset(model, 21, self.needs)

    @property
    def rules(self) -> Rules | None:
        return BACKENDS.get(self.backend)


FORMAT = Format(
    "qdq-full",
    "QuantizeLinear and DequantizeLinear around every operator that a runtime takes so, for NPUs and other accelerators",
    EmitQDQFull,
    READERS,
    conv_form="integer",
    emitter_options={"backend": "backend"},
    exclusive_options=("backend", "activation_type", "activation_range", "wide_activations"),
    **INTEGER,
)
