"""Emit convolutions with quantized weights: integer codes, one scale per output channel, dequantized before the convolution.

1. The node and its attributes stay; only its weight and bias inputs change. Convolutions that share a weight share its codes. Constants
   are in the main graph. The dequantizing nodes are before the convolution, also in a body, or at the start of the main graph if
   convolutions of several graphs share the weight. onnxruntime folds them in either place.
2. ``fold``: ``Mul(Cast(codes), scales)``, with a Sub of zero points if there are any. onnxruntime computes this once, when it loads the
   file, and then runs the float convolution at its usual speed, in its own memory layout. Works in any opset.
3. ``dequantize``: ``DequantizeLinear(codes, scales)``, the form other tools recognise. onnxruntime keeps it, so that the weight is
   small in memory too, but dequantizes in every run and loses its layout for constant weights: convolutions take 1.5 times as long, small
   depthwise ones 5 to 10 times. (Its session option ``session.disable_quant_qdq`` folds these as well.)
4. Conv: codes ``(M, C / G, ...)`` and scales on axis 0. ConvTranspose in one group: ``(C, M, ...)``, axis 1.
5. A ConvTranspose in several groups has no weight axis of output channels: codes ``(M, C / G, ...)`` on axis 0, then Reshape, Transpose,
   Reshape, which are not needed if every group has one input and one output channel.
6. 5 to 8 bits: int8 or uint8; 3 and 4: int4 or uint4. Symmetric grids use the signed type and no zero point.
7. In models with static integer activations, a Reshape without effect follows DequantizeLinear. Between a DequantizeLinear and a
   QuantizeLinear, onnxruntime would otherwise replace a convolution whose weight is constant or dequantized by an integer QLinearConv,
   rounding float weights and biases itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.packing import broadcast_grid, container_bits, pack_qdq
from magr_onnx.core.types import Array, QuantizedWeight
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.graph.constants import constant_tensor, replace_input, step_of
from magr_onnx.passes.graph.nodes import attribute_of, operand
from magr_onnx.passes.layers.conv import ConvLayer, Form, from_matrices, is_made_of_codes, split_groups, to_matrices
from magr_onnx.passes.layers.weighted import FLOATS


def emit(layers: Sequence[ConvLayer], solutions: Sequence[LayerSolution], form: Form, stays_float: bool) -> list[Emitted]:
    """Write the codes of one weight into all convolutions that share it.

    Args:
        layers: The convolutions.
        solutions: For each, the same codes ``(K, M)`` of the channels of all groups, with one grid per channel, and a bias ``(M,)``
            that is added to its own.
        form: How codes are dequantized, see the module.
        stays_float: Whether to prevent onnxruntime from computing the convolutions in integers.
    """
    quantized = solutions[0].quantized
    assert quantized is not None
    bits = quantized.spec.bits
    first, root = layers[0], layers[0].root
    weight, nodes = _dequantized(first, quantized, form, stays_float)
    graph = first.node.graph
    if isinstance(graph, ir.Graph) and all(layer.node.graph is graph for layer in layers):
        graph.insert_before(first.node, nodes)
    else:
        root.insert_before(root[0], nodes)
    size = sum(v.const_value.nbytes for node in nodes for v in node.inputs if v is not None and v.const_value is not None)
    emitted = []
    for layer, solution in zip(layers, solutions, strict=True):
        node = layer.node
        replace_input(node, 1, weight)
        if solution.bias is not None:
            old_bias, floats = operand(node, 2), layer.read_bias()
            bias = solution.bias if floats is None else floats + solution.bias
            base = None if old_bias is None else str(old_bias.name)
            replace_input(node, 2, layer.constant("_bias", bias.astype(FLOATS[layer.dtype]), base))
        node.name = layer.names.node(f"{layer.name}_q{bits}")
        emitted.append(Emitted(node.name, container_bits(bits), size))
    return emitted


def _dequantized(layer: ConvLayer, quantized: QuantizedWeight, form: Form, stays_float: bool) -> tuple[ir.Value, list[ir.Node]]:
    """Make the nodes that dequantize a weight; return their result and the nodes."""
    packed = pack_qdq(quantized)
    scales, zeros = packed.scales, packed.zero_points
    matrices = split_groups(packed.codes, layer.group)
    group, k, n = matrices.shape
    transposed = layer.op == "ConvTranspose" and group > 1
    axis = 1 if layer.op == "ConvTranspose" and group == 1 else 0
    array = from_matrices(matrices, "Conv" if transposed else layer.op, layer.kernel)
    suffix = f"_q{packed.bits}"
    float_kind = FLOATS[layer.dtype]
    codes = layer.constant(suffix, array.astype(packed.stored_dtype))
    name = str(codes.name)
    if form == "dequantize":
        inputs = [codes, layer.constant(f"{suffix}_scales", scales.astype(float_kind))]
        if zeros is not None:
            inputs.append(layer.constant(f"{suffix}_zero_points", zeros.astype(packed.stored_dtype)))
        nodes = [ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}_dequantize")]
    else:
        channel_shape = (-1, *[1] * (array.ndim - 1 - axis))
        nodes = [ir.node("Cast", [codes], {"to": layer.dtype}, name=f"{name}_float")]
        if zeros is not None:
            levels = layer.constant(f"{suffix}_zero_points", zeros.astype(float_kind).reshape(channel_shape))
            nodes.append(ir.node("Sub", [nodes[-1].outputs[0], levels], name=f"{name}_centre"))
        steps = layer.constant(f"{suffix}_scales", scales.astype(float_kind).reshape(channel_shape))
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], steps], name=f"{name}_scale"))
    transposed &= n > 1 or k > math.prod(layer.kernel)
    if transposed:
        split_shape = layer.constant(f"{suffix}_parted", np.array([group, n, layer.channels // group, -1]))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], split_shape], name=f"{name}_part"))
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{name}_turn"))
    if transposed or (stays_float and form == "dequantize"):
        shape = layer.constant(f"{suffix}_shape", np.array(layer.shape))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape], name=f"{name}_shape"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}_out", layer.dtype
    layer.names.adopt(nodes)
    nodes[-1].outputs[0].shape = ir.Shape(layer.shape)
    return nodes[-1].outputs[0], nodes


def emitted_matrices(node: ir.Node) -> Array | None:
    """Read the weight of a Conv or ConvTranspose written by `emit`, ``(K, N)`` or in several groups ``(G, K, N)``; None for others."""
    value, group = operand(node, 1), attribute_of(node, "group", 1)
    if value is None or not is_made_of_codes(value):
        return None
    weight = _computed(value)
    if weight is None or weight.ndim < 3:
        return None
    matrices = to_matrices(weight, node.op_type, group)
    return matrices[0] if group == 1 else matrices


def _computed(value: ir.Value | None) -> Array | None:
    """Evaluate the dequantizing nodes of `emit` in float32; None for any other nodes."""
    if value is None or value.is_graph_input():
        return None
    tensor = constant_tensor(value)
    if tensor is not None:
        return tensor.numpy().astype(np.float32)
    node = value.producer()
    x = None if node is None else _computed(operand(node, 0))
    if node is None or x is None:
        return None
    if node.op_type in ("Reshape", "Transpose"):
        step = step_of(node, 0, x.shape, ir.DataType.FLOAT)
        return None if step is None else step.apply(x)
    grid = [array for v in node.inputs[1:] if (array := _computed(v)) is not None]
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
