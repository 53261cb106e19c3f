"""Two 8-bit ranges for the outputs of GELU and Softmax, which one range does not fit (PTQ4ViT; Yuan et al., arXiv 2111.12293).

GELU's negative part is within -0.17 and 0 while its positive part is unbounded; most Softmax values are tiny compared to the few large
ones. The steps of one grid over both are too large for the small part. With

    x = min(x, t) + max(x - t, 0),      x W + b = (min(x, t) W + b) + max(x - t, 0) W,

each part is rounded on its own calibrated grid. t = 0 for GELU. For Softmax over K channels it is
``(2 K)^(-1/3)``, where ``t^2 + P(x > t)``, the noise of both grids up to a factor, is least with Markov's bound ``P(x > t) <= 1 / (K t)``.

The cost is a second integer product and a second weight of the same size. Accumulator proofs cover each product separately; the two are
added in float, which cannot overflow an accumulator.

Deviation from the paper: PTQ4ViT encodes both ranges in one 8-bit code with a range bit and scales a power of two apart, for shifting
hardware. onnxruntime's kernels do not support this. Two products give both parts all 8 bits and independent scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.errors import listed
from magr_onnx.passes.base import InputGrids
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weighted import FLOATS
from magr_onnx.passes.rewrites.base import Context, Rewrite, add_product, operator

_GELU = {"Gelu", "com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu", "com.microsoft.BiasGelu"}
_GATES = {"Erf", "Tanh", "Sigmoid"}


def threshold(value: ir.Value, k: int) -> float | None:
    """Return the t of a value ``(..., K)``; None if it comes from neither GELU nor Softmax."""
    kind = operator(value)
    if kind == "Softmax":
        return float((2 * k) ** (-1 / 3))
    if kind in _GELU or (kind == "Mul" and _is_gelu(value)):
        return 0.0
    return None


def _is_gelu(value: ir.Value) -> bool:
    """Whether ``value`` is ``c u (a + b g(u ...))`` with constants a, b and c: decomposed GELU, by Erf or Tanh, or ``u Sigmoid(c u)``."""
    product = _without_constants(value, "Mul", "Div")
    node = product.producer()
    if node is None or operator(product) != "Mul":
        return False
    for u, gate in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        if u is None or gate is None:
            continue
        inner = _without_constants(gate, "Mul", "Div", "Add")
        maker = inner.producer()
        if maker is not None and operator(inner) in _GATES and maker.inputs[0] is not None:
            operands = _operands(maker.inputs[0])
            if u in operands or _without_constants(u, "Mul", "Div") in operands:
                return True
    return False


def _without_constants(value: ir.Value, *kinds: str) -> ir.Value:
    """Follow a value back through operators of ``kinds`` with one non-constant operand."""
    while operator(value) in kinds:
        node = value.producer()
        variable = [v for v in ([] if node is None else node.inputs) if v is not None and not _is_constant(v)]
        if len(variable) != 1:
            break
        value = variable[0]
    return value


def _operands(value: ir.Value) -> set[ir.Value]:
    """Collect a value and its operands through sums, products and powers, such as ``u`` of ``u + c u^3``."""
    operands, pending = set[ir.Value](), [value]
    while pending:
        current = pending.pop()
        node = current.producer()
        if current in operands:
            continue
        operands.add(current)
        if node is not None and operator(current) in ("Mul", "Div", "Add", "Pow"):
            pending += [v for v in node.inputs if v is not None and not _is_constant(v)]
    return operands


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() or operator(value) == "Constant"


@dataclass(frozen=True)
class TwinRanges(Rewrite):
    """Give the small and the large part of GELU and Softmax outputs separate products, and so separate 8-bit ranges."""

    name: ClassVar[str] = "twin-ranges"
    summary: ClassVar[str] = "two 8-bit ranges for inputs from GELU and Softmax, twice the cost of the layers that read them (PTQ4ViT)"
    input_grids: ClassVar[InputGrids | None] = "static"

    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        layers: list[LinearLayer] = []
        for layer in context.layers(model):
            x = layer.x
            t = threshold(x, layer.k)
            if t is None:
                continue
            if x not in parts:
                parts[x] = _parts(layer, x, t)
            small, large = parts[x]
            add_product(layer, large, layer.read(), "_large", context.activations)
            layer.node.replace_input_with(0, small)
            layers.append(layer)
        if not layers:
            return []
        names = listed([layer.name for layer in layers])
        return [f"twin-ranges: {len(parts)} inputs of {len(layers)} layers have two ranges ({names})"]


def _parts(layer: LinearLayer, x: ir.Value, t: float) -> tuple[ir.Value, ir.Value]:
    """Insert ``min(x, t)`` and ``max(x - t, 0)`` behind ``x``."""
    limit = layer.constant("_limit", np.asarray(t, FLOATS[layer.dtype]), str(x.name))
    nodes = [ir.node("Min", [x, limit], name=f"{x.name}_small")]
    if t != 0:
        nodes.append(ir.node("Sub", [x, limit], name=f"{x.name}_above"))
    nodes.append(ir.node("Relu", [x if t == 0 else nodes[-1].outputs[0]], name=f"{x.name}_large"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = f"{node.name}_out", layer.dtype, x.shape
    producer = x.producer()
    assert producer is not None
    layer.names.adopt(nodes)
    layer.graph.insert_after(producer, nodes)
    return nodes[0].outputs[0], nodes[-1].outputs[0]
