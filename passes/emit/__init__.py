"""Output formats: how quantized weights are written, and read back."""

from __future__ import annotations

from magr_onnx.passes.base import Emitter
from magr_onnx.passes.emit.int8 import EmitDynamicInt8, EmitQDQInt8
from magr_onnx.passes.emit.matmulnbits import EmitMatMulNBits
from magr_onnx.passes.emit.qdq import EmitQDQ

EMITTERS: tuple[type[Emitter], ...] = (EmitMatMulNBits, EmitQDQ, EmitQDQInt8, EmitDynamicInt8)
