"""Two 8-bit ranges for inputs that one does not fit: outputs of GELU and Softmax (PTQ4ViT; Yuan et al., arXiv 2111.12293).

GELU's negative part lies within -0.17 and 0 while its positive part may reach far; most of Softmax's values are tiny beside the few large
ones. One grid over both has steps too large for the small part. With

    x = min(x, t) + max(x - t, 0),      x W + b = (min(x, t) W + b) + max(x - t, 0) W,

each part is rounded on a grid of its own, found by calibration like any other. t = 0 for GELU. For Softmax over K channels it is
``(2 K)^(-1/3)``, where ``t^2 + P(x > t)``, the noise of both grids up to a factor, is least with Markov's bound ``P(x > t) <= 1 / (K t)``.

The cost is a second integer product and a second weight of the same size. Each product is a dot product of its own, and a proof about
accumulators covers each by itself; the sum of the two is one of floats, which has no accumulator to overflow.

Deviation from the paper: PTQ4ViT keeps both ranges in one 8-bit code, a bit of which says which, and their scales a power of two apart, for
hardware that shifts. onnxruntime's kernels know no such code. Two products need none, give both parts all 8 bits and leave the scales free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from magr_onnx.errors import listed
from magr_onnx.passes.base import InputGrids
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.rewrites.base import Context, Rewrite, add_product, operator, scalar

_GELU = {"Gelu", "com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu", "com.microsoft.BiasGelu"}
_GATES = {"Erf", "Tanh", "Sigmoid"}


def threshold(value: ir.Value, k: int) -> float | None:
    """The t of a value ``(..., K)``, or None where it is neither GELU's nor Softmax's."""
    kind = operator(value)
    if kind == "Softmax":
        return float((2 * k) ** (-1 / 3))
    if kind in _GELU or (kind == "Mul" and _is_gelu(value)):
        return 0.0
    return None


def _is_gelu(value: ir.Value) -> bool:
    """Whether ``value`` is ``c u (a + b g(u ...))`` with constants a, b and c: GELU in pieces, by Erf or Tanh, or ``u Sigmoid(c u)``."""
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
            made_of = _made_of(maker.inputs[0])
            if u in made_of or _without_constants(u, "Mul", "Div") in made_of:
                return True
    return False


def _without_constants(value: ir.Value, *kinds: str) -> ir.Value:
    """What is left of a value without operators of ``kinds`` that have one constant operand."""
    while operator(value) in kinds:
        node = value.producer()
        rest = [v for v in ([] if node is None else node.inputs) if v is not None and not _is_constant(v)]
        if len(rest) != 1:
            break
        value = rest[0]
    return value


def _made_of(value: ir.Value) -> set[ir.Value]:
    """A value and what it is made of by sums, products and powers: of ``u + c u^3``, say, u is a part."""
    found, left = set[ir.Value](), [value]
    while left:
        current = left.pop()
        node = current.producer()
        if current in found:
            continue
        found.add(current)
        if node is not None and operator(current) in ("Mul", "Div", "Add", "Pow"):
            left += [v for v in node.inputs if v is not None and not _is_constant(v)]
    return found


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() or operator(value) == "Constant"


@dataclass(frozen=True)
class TwinRanges(Rewrite):
    """Give the small and the large part of what GELU and Softmax put out a product, and so an 8-bit range, of their own."""

    name: ClassVar[str] = "twin-ranges"
    summary: ClassVar[str] = "two 8-bit ranges for inputs from GELU and Softmax, twice the cost of the layers that read them (PTQ4ViT)"
    input_grids: ClassVar[InputGrids | None] = "static"

    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        done: list[LinearLayer] = []
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
            done.append(layer)
        if not done:
            return []
        names = listed([layer.name for layer in done])
        return [f"twin-ranges: {len(parts)} inputs of {len(done)} layers have two ranges ({names})"]


def _parts(layer: LinearLayer, x: ir.Value, t: float) -> tuple[ir.Value, ir.Value]:
    """``min(x, t)`` and ``max(x - t, 0)``, made behind ``x``."""
    limit = scalar(layer, f"{x.name}_limit", t)
    small = ir.node("Min", [x, limit], name=f"{x.name}_small")
    nodes = [small]
    above = x
    if t != 0:
        nodes.append(ir.node("Sub", [x, limit], name=f"{x.name}_above"))
        above = nodes[-1].outputs[0]
    nodes.append(ir.node("Relu", [above], name=f"{x.name}_large"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = f"{node.name}_out", layer.dtype, x.shape
    producer = x.producer()
    assert producer is not None
    layer.names.adopt(nodes)
    layer.graph.insert_after(producer, nodes)
    return small.outputs[0], nodes[-1].outputs[0]
