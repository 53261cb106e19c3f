"""What the emitters of linear layers have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.low_rank import Factors
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import QuantizedWeight
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants


def replace_layer(layer: LinearLayer, nodes: Sequence[ir.Node], factors: Factors | None, constants: WeightConstants) -> None:
    """Put an emitter's nodes in the place of a layer, and behind them the low-rank branch, if there is one: ``... + (x A) B``.

    A Sum adds it: of MatMul and Add onnxruntime makes a Gemm on two axes, and would no longer see a DequantizeLinear and a MatMul.
    """
    if factors is None:
        layer.replace(nodes)
        return
    kind, product = FLOATS[layer.dtype], nodes[-1].outputs[0]
    a, b = (constants.add(layer, f"_{name}", getattr(factors, name).astype(kind)) for name in ("down", "up"))
    down = ir.node("MatMul", [layer.x, a], name=f"{layer.name}_down")
    up = ir.node("MatMul", [down.outputs[0], b], name=f"{layer.name}_up")
    total = ir.node("Sum", [product, up.outputs[0]], name=f"{layer.name}_low_rank")
    for value, suffix in ((product, "quantized"), (down.outputs[0], "down"), (up.outputs[0], "up")):
        value.name, value.dtype = f"{layer.output.name}_{suffix}", layer.dtype
    product.shape = up.outputs[0].shape = layer.output.shape
    layer.replace([*nodes, down, up, total])


def made_of(layer: LinearLayer, constant: ir.Value, suffix: str) -> str:
    """A name for what the layer makes of a constant: after the constant, or after the layer where others read that too."""
    return f"{layer.name if len(list(constant.uses())) > 1 else constant.name}{suffix}"


def emitted_blocks(node: ir.Node, quantized: QuantizedWeight, block: int, constants: WeightConstants) -> Emitted:
    """What was written by an emitter that stores a scale for every ``block`` rows, where a scale of the solution may be that of several."""
    spec, (k, n) = quantized.spec, quantized.codes.shape
    stored = container_bits(spec.bits)
    repeated = (-(-k // block) - spec.groups(k)) * n
    if not repeated:
        return Emitted(str(node.name), stored, constants.bytes)
    bits = 8 * np.dtype(spec.scale_dtype).itemsize + (0 if spec.symmetric else stored)
    return Emitted(str(node.name), stored, constants.bytes, block, repeated * bits // 8)
