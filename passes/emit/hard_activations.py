"""Write HardSigmoid and HardSwish between roundings as operators that onnxruntime's CPU provider runs on integers.

    HardSigmoid(x) = clip(alpha x + beta, 0, 1) = alpha clip(x + beta / alpha, 0, 1 / alpha),    HardSwish(x) = x HardSigmoid(x)

A QuantizeLinear whose grid ends at 0 and at ``1 / alpha`` clips, and a DequantizeLinear of ``alpha`` times its scale multiplies, so that an
Add is left, and for HardSwish a Mul: QLinearAdd and QLinearMul in onnxruntime 1.32, which has integer kernels for neither activation. The
factor of HardSwish has 255 steps from 0 to the largest that its input allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from magr_onnx.core.grid_type import GridType
from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.emit.tensors import is_rounded, round_constant
from magr_onnx.passes.graph.constants import constant_array, replace_input
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.nodes import only_use, operand

ALPHA = {"HardSigmoid": 0.2, "HardSwish": 1 / 6}
"""Defaults of the attribute; HardSwish has none."""
BETA = 0.5
"""That of HardSwish, and the default of the attribute."""


def lower(graph: ir.Graph) -> None:
    """Write the activations of the main graph that read and put out rounded values in this form, in place.

    A HardSigmoid whose grid does not end at 0 and within 1 stays.
    """
    for found in list(_found(graph)):
        _lower(graph, found)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """An activation, the value that it reads, the QuantizeLinear behind it, and the grid of the factor of HardSwish or of the result."""

    node: ir.Node
    x: ir.Value
    quantize: ir.Node
    grid: ActivationGrid


def _found(graph: ir.Graph) -> Iterator[_Found]:
    for node in graph:
        x = operand(node, 0)
        if node.domain != "" or node.op_type not in ALPHA or x is None or not is_rounded(x) or _alpha(node) <= 0:
            continue
        quantize, index = only_use(node.outputs[0])
        if quantize is None or index != 0 or quantize.op_type != "QuantizeLinear":
            continue
        grid = _grid(quantize)
        if node.op_type == "HardSwish" and grid is not None and (read := _grid(x.producer())) is not None:
            high = min(max(_alpha(node) * read.range[1] + BETA, 0.0), 1.0)
            grid = GridType(grid.signed).of_range(0.0, high, 1.0)
        if grid is not None and grid.range[0] == 0 and np.float32(grid.range[1]) <= 1:
            yield _Found(node, x, quantize, grid)


def _grid(node: ir.Node | None) -> ActivationGrid | None:
    """Read the grid of 8 bits of a QuantizeLinear or DequantizeLinear."""
    scale, zero = (None if node is None else constant_array(operand(node, i)) for i in (1, 2))
    if scale is None or zero is None or zero.dtype.itemsize != 1:
        return None
    return ActivationGrid(float(scale.item()), int(zero.item()), zero.dtype == np.int8)


def _alpha(node: ir.Node) -> float:
    return node.attributes.get_float("alpha", ALPHA[node.op_type])


def _lower(graph: ir.Graph, found: _Found) -> None:
    node, x, base = found.node, found.x, str(found.node.outputs[0].name)
    alpha = _alpha(node)
    shift = add_initializer(graph, f"{base}_shift", np.float32(node.attributes.get_float("beta", BETA) / alpha))
    scale = add_initializer(graph, f"{base}_clip_scale", np.float32(found.grid.scale / alpha))
    shifted = ir.val(None, ir.DataType.FLOAT, x.shape)
    nodes = [ir.node("Add", [x, shift], outputs=[shifted], name=f"{base}_add")]
    if node.op_type == "HardSwish":
        nodes += _factor(graph, found, shifted, scale)
    result = nodes[-1].outputs[0]
    Names.of(graph).adopt(nodes, [node], node.outputs[0])
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [result])
    if node.op_type == "HardSigmoid":
        replace_input(found.quantize, 1, scale)
    round_constant(graph, nodes[0], 1, np.asarray(shift.const_value.numpy()), GridType(found.grid.signed))  # type: ignore[union-attr]


def _factor(graph: ir.Graph, found: _Found, shifted: ir.Value, scale: ir.Value) -> list[ir.Node]:
    """Return the nodes that clip, scale and multiply for HardSwish."""
    base, grid = str(found.node.outputs[0].name), found.grid
    zero = add_initializer(graph, f"{base}_factor_zero_point", np.array(grid.zero_point, grid.dtype))
    own_scale = add_initializer(graph, f"{base}_factor_scale", np.float32(grid.scale))
    codes, factor = ir.val(f"{base}_factor_codes", ir.DataType.from_numpy(grid.dtype), shifted.shape), ir.val(None, ir.DataType.FLOAT)
    return [
        ir.node("QuantizeLinear", [shifted, scale, zero], outputs=[codes], name=f"{base}_factor_quantize"),
        ir.node("DequantizeLinear", [codes, own_scale, zero], outputs=[factor], name=f"{base}_factor_dequantize"),
        ir.node("Mul", [found.x, factor], outputs=[ir.val(None, ir.DataType.FLOAT, shifted.shape)], name=f"{base}_mul"),
    ]
