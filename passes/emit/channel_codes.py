"""Weights of operators that compute in float, as integer codes with one scale per output channel, dequantized before the operator.

1. ``fold``: ``Mul(Cast(codes), scales)``, with a Sub of zero points if there are any. onnxruntime computes this once, when it loads the
   file, and then runs the float operator at its usual speed, with its weights in a layout of its own. Works in any opset.
2. ``dequantize``: ``DequantizeLinear(codes, scales)``, the form other tools recognise. onnxruntime keeps it, so that the weight is
   small in memory too, but dequantizes in every run and loses its layout for constant weights. (Its session option
   ``session.disable_quant_qdq`` folds these as well.)
3. ``integer`` and ``integer-int4``: for convolutions only; see `magr_onnx.passes.emit.conv`.
4. 5 to 8 bits: int8 or uint8; 3 and 4: int4 or uint4. Symmetric grids use the signed type and no zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.packing import QdqTensors, broadcast_grid
from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import constant_tensor, step_of
from magr_onnx.passes.graph.nodes import attribute_of, operand
from magr_onnx.passes.layers.conv import Form
from magr_onnx.passes.layers.weighted import FLOATS, WeightedNode


def opset_of(form: Form, bits: int, dtypes: Iterable[ir.DataType]) -> int:
    """The opset that has the form: 21 for int4; any to fold int8; DequantizeLinear 13 for an axis, 19 for float16."""
    kinds = set(dtypes)
    if not kinds or (form == "fold" and bits > 4):
        return 0
    if bits <= 4:
        return 21
    return 19 if ir.DataType.FLOAT16 in kinds else 13


def dequantizing_nodes(
    layer: WeightedNode, packed: QdqTensors, array: npt.NDArray[Any], axis: int, form: Form, base: str | None = None
) -> list[ir.Node]:
    """Make the nodes that dequantize a weight; the output of the last one is the weight, of the shape of ``array``.

    Args:
        layer: The layer, which makes the constants.
        packed: Scales and zero points of output channels, and the stored type.
        array: The codes, with output channels on ``axis``.
        axis: See ``array``.
        form: See the module.
        base: Name of the weight, if it is not that of the layer.
    """
    suffix, kind = f"_q{packed.bits}", FLOATS[layer.dtype]
    codes = layer.constant(suffix, array.astype(packed.stored_dtype), base)
    name = str(codes.name)
    scales, zeros = packed.scales.astype(kind), packed.zero_points
    if form != "fold":
        cast = [ir.node("Cast", [codes], {"to": ir.DataType.INT8}, name=f"{name}_int8")] if form == "integer" and packed.bits == 4 else []
        inputs = [cast[0].outputs[0] if cast else codes, layer.constant(f"{suffix}_scales", scales, base)]
        if zeros is None and form == "integer-int4" and packed.bits == 4:
            zeros = np.zeros(scales.shape, np.int16)
        if zeros is not None:
            inputs.append(layer.constant(f"{suffix}_zero_points", zeros.astype(packed.stored_dtype), base))
        return [*cast, ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}_dequantize")]
    channel_shape = (-1, *[1] * (array.ndim - 1 - axis))
    nodes = [ir.node("Cast", [codes], {"to": layer.dtype}, name=f"{name}_float")]
    if zeros is not None:
        levels = layer.constant(f"{suffix}_zero_points", zeros.astype(kind).reshape(channel_shape), base)
        nodes.append(ir.node("Sub", [nodes[-1].outputs[0], levels], name=f"{name}_centre"))
    steps = layer.constant(f"{suffix}_scales", scales.reshape(channel_shape), base)
    return [*nodes, ir.node("Mul", [nodes[-1].outputs[0], steps], name=f"{name}_scale")]


def reshaped(layer: WeightedNode, nodes: Sequence[ir.Node], shape: Sequence[int], suffix: str, base: str | None = None) -> ir.Node:
    """Make a Reshape of what ``nodes`` put out; ``suffix`` and ``base`` name its constant."""
    codes = nodes[0].inputs[0]
    assert codes is not None
    target = layer.constant(f"{suffix}_shape", np.array(shape), base)
    return ir.node("Reshape", [nodes[-1].outputs[0], target], name=f"{codes.name}_shape")


def finish(layer: WeightedNode, nodes: Sequence[ir.Node], shape: Sequence[int]) -> ir.Value:
    """Name and type what the nodes of a weight of ``shape`` put out; return the weight."""
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_out", ir.DataType(attribute_of(node, "to", layer.dtype))
    layer.names.adopt(nodes)
    nodes[-1].outputs[0].shape = ir.Shape(shape)
    return nodes[-1].outputs[0]


def place(layers: Sequence[WeightedNode], nodes: Sequence[ir.Node]) -> int:
    """Insert the nodes before the first layer, or at the start of the main graph if layers of several graphs read them.

    Returns:
        Bytes of their constants.
    """
    first, root = layers[0], layers[0].root
    graph = first.node.graph
    if isinstance(graph, ir.Graph) and all(layer.node.graph is graph for layer in layers):
        graph.insert_before(first.node, nodes)
    else:
        root.insert_before(root[0], nodes)
    return sum(v.const_value.nbytes for node in nodes for v in node.inputs if v is not None and v.const_value is not None)


def dequantized_weight(value: ir.Value | None) -> Array | None:
    """Evaluate dequantizing nodes in float32, with Reshape and Transpose behind them; None for any other nodes."""
    if value is None or value.is_graph_input():
        return None
    tensor = constant_tensor(value)
    if tensor is not None:
        return tensor.numpy().astype(np.float32)
    node = value.producer()
    x = None if node is None else dequantized_weight(operand(node, 0))
    if node is None or x is None:
        return None
    if node.op_type in ("Reshape", "Transpose"):
        step = step_of(node, 0, x.shape, ir.DataType.FLOAT)
        return None if step is None else step.apply(x)
    grid = [array for v in node.inputs[1:] if (array := dequantized_weight(v)) is not None]
    if len(grid) != len(node.inputs) - 1:
        return None
    if node.op_type == "DequantizeLinear":
        axis = attribute_of(node, "axis", 1) % max(x.ndim, 1)
        if attribute_of(node, "block_size", 0) or any((array.size,) != x.shape[axis : axis + 1] for array in grid):
            return None
        scales, *zeros = (broadcast_grid(array, x.shape, axis, 0) for array in grid)
        weight: Array = (x - zeros[0] if zeros else x) * scales
        return weight
    return _ARITHMETIC[node.op_type](x, *grid) if node.op_type in _ARITHMETIC else None


_ARITHMETIC: dict[str, Callable[..., Array]] = {"Cast": lambda x: x, "Sub": np.subtract, "Mul": np.multiply}
