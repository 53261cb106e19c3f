"""Functions shared by the emitters of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import onnx_ir as ir

from magr_onnx.core.low_rank import Factors
from magr_onnx.core.packing import MATMULNBITS_BLOCKS, container_bits, kernel_block
from magr_onnx.core.types import QuantizedWeight, WeightSpec
from magr_onnx.passes.base import Emitted, Emitter
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.layers.weighted import FLOATS


@dataclass(frozen=True)
class BlockEmitter(Emitter):
    """An emitter for the kernels of MatMulNBits, whose blocks of 16 to 256 rows share a scale.

    Attributes:
        largest_block: Most rows in a block, a power of two from 16 to 256; larger groups repeat their scale. A provider may have a
            smaller limit (`magr_onnx.passes.providers`).
    """

    largest_block: int = field(default=256, kw_only=True)

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = []
        if spec is None:
            problems.append(f"{self.name} needs a quantize pass before it")
        elif spec.group_size is not None and kernel_block(spec.group_size, 1 << 30, spec.bits) is None:
            problems.append(
                f"block size {spec.group_size} cannot be cut into blocks that onnxruntime has; give a multiple of 16, or 'channel'"
            )
        if self.largest_block not in MATMULNBITS_BLOCKS:
            problems.append(f"largest_block={self.largest_block} is no block size; choose one of {', '.join(map(str, MATMULNBITS_BLOCKS))}")
        return problems

    def suited(self, largest_block: int) -> Self:
        return replace(self, largest_block=min(self.largest_block, largest_block))


def replace_layer(layer: LinearLayer, nodes: Sequence[ir.Node], factors: Factors | None, constants: WeightConstants) -> None:
    """Replace a layer by an emitter's nodes, followed by the low-rank branch ``... + (x A) B``, if any.

    The branch is added by a Sum: onnxruntime merges MatMul and Add of two axes into a Gemm, which hides DequantizeLinear and MatMul.
    """
    if factors is None:
        layer.replace(nodes)
        return
    kind, product, name = FLOATS[layer.dtype], nodes[-1].outputs[0], layer.output.name
    a, b = (constants.add(layer, f"_{side}", getattr(factors, side).astype(kind)) for side in ("down", "up"))
    inner, outer = ir.val(f"{name}_down", layer.dtype), ir.val(f"{name}_up", layer.dtype, layer.output.shape)
    product.name, product.dtype, product.shape = f"{name}_quantized", layer.dtype, layer.output.shape
    down = ir.node("MatMul", [layer.x, a], outputs=[inner], name=f"{layer.name}_down")
    up = ir.node("MatMul", [inner, b], outputs=[outer], name=f"{layer.name}_up")
    layer.replace([*nodes, down, up, ir.node("Sum", [product, outer], name=f"{layer.name}_low_rank")])


def derived_name(layer: LinearLayer, constant: ir.Value, suffix: str) -> str:
    """Name a value computed from a constant: after the constant or, if other nodes read it too, after the layer."""
    return f"{layer.name if len(list(constant.uses())) > 1 else constant.name}{suffix}"


def emitted_blocks(node: ir.Node, quantized: QuantizedWeight, block: int, constants: WeightConstants) -> Emitted:
    """Describe a layer stored with a scale per ``block`` rows, which repeats scales of larger groups."""
    spec, (k, n) = quantized.spec, quantized.codes.shape
    stored = container_bits(spec.bits)
    repeated = (-(-k // block) - spec.groups(k)) * n
    if not repeated:
        return Emitted(str(node.name), stored, constants.bytes)
    bits = 8 * np.dtype(spec.scale_dtype).itemsize + (0 if spec.symmetric else stored)
    return Emitted(str(node.name), stored, constants.bytes, block, repeated * bits // 8)
