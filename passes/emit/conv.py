"""Emit convolutions with quantized weights: integer codes, one scale per output channel, dequantized before the convolution.

1. The node and its attributes stay; only its weight and bias inputs change. Convolutions that share a weight share its codes. Constants
   are in the main graph. The dequantizing nodes are before the convolution, also in a body, or at the start of the main graph if
   convolutions of several graphs share the weight. onnxruntime folds them in either place.
2. How codes become floats (``fold`` or ``dequantize``): see `magr_onnx.passes.emit.channel_codes`. With ``dequantize`` convolutions take
   1.5 times as long, small depthwise ones 5 to 10 times.
3. Conv: codes ``(M, C / G, ...)`` and scales on axis 0. ConvTranspose in one group: ``(C, M, ...)``, axis 1.
4. A ConvTranspose in several groups has no weight axis of output channels: codes ``(M, C / G, ...)`` on axis 0, then Reshape, Transpose,
   Reshape, which are not needed if every group has one input and one output channel.
5. ``integer``: as ``dequantize``, with an int32 bias in units of the scales of input and weight. Between rounded activations
   (`magr_onnx.passes.emit.tensors`) onnxruntime makes a QLinearConv of it. Codes of 3 and 4 bits are stored in int4, and cast to int8:
   onnxruntime does that once, when it loads the file.
   ``integer-int4`` leaves them int4, for accelerators that have it, with zero points: onnxruntime-qnn 2.7 takes a DequantizeLinear without
   for one of int8, and the result is wrong [measured on Qualcomm's emulator].
6. In models with static integer activations, a Reshape without effect follows DequantizeLinear. Between a DequantizeLinear and a
   QuantizeLinear, onnxruntime would otherwise replace a convolution that is to stay float by an integer QLinearConv, rounding
   float weights and biases itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.int32_bias import bias_codes, bias_scales
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.packing import container_bits, pack_qdq
from magr_onnx.core.types import ActivationGrid, Array, QuantizedWeight
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.channel_codes import dequantized_weight, dequantizing_nodes, finish, place, reshaped
from magr_onnx.passes.graph.constants import replace_input
from magr_onnx.passes.graph.nodes import attribute_of, operand
from magr_onnx.passes.layers.conv import ConvLayer, Form, from_matrices, is_made_of_codes, split_groups, to_matrices
from magr_onnx.passes.layers.weighted import FLOATS


def emit(
    layers: Sequence[ConvLayer],
    solutions: Sequence[LayerSolution],
    form: Form,
    stays_float: bool,
    grids: Mapping[str, ActivationGrid] | None = None,
) -> list[Emitted]:
    """Write the codes of one weight into all convolutions that share it.

    Args:
        layers: The convolutions.
        solutions: For each, the same codes ``(K, M)`` of the channels of all groups, with one grid per channel, and a bias ``(M,)``
            that is added to its own.
        form: How codes are dequantized, see the module.
        stays_float: Whether to prevent onnxruntime from computing the convolutions in integers.
        grids: The grids of the inputs of convolutions that are computed in integers, by name of the convolution.
    """
    grids = grids or {}
    quantized = solutions[0].quantized
    assert quantized is not None
    bits = quantized.spec.bits
    weight, nodes = _dequantized(layers[0], quantized, form, stays_float)
    size = place(layers, nodes)
    emitted = []
    for layer, solution in zip(layers, solutions, strict=True):
        node = layer.node
        replace_input(node, 1, weight)
        old_bias, floats = operand(node, 2), layer.read_bias()
        if solution.bias is not None:
            floats = solution.bias if floats is None else floats + solution.bias
        if layer.name in grids and floats is not None:
            replace_input(node, 2, _int32_bias(layer, floats, quantized, grids[layer.name]))
        elif solution.bias is not None and floats is not None:
            base = None if old_bias is None else str(old_bias.name)
            replace_input(node, 2, layer.constant("_bias", floats.astype(FLOATS[layer.dtype]), base))
        node.name = layer.names.node(f"{layer.name}_q{bits}")
        emitted.append(Emitted(node.name, container_bits(bits), size))
    return emitted


def _int32_bias(layer: ConvLayer, bias: Array, quantized: QuantizedWeight, grid: ActivationGrid) -> ir.Value:
    """Add the nodes that dequantize the int32 codes of a bias ``(M,)``."""
    scales = bias_scales(quantized.scales[0], grid)
    codes = layer.constant("_bias_int32", bias_codes(bias, scales).astype(np.int32), layer.name)
    inputs = [codes, layer.constant("_bias_scales", scales, layer.name)]
    node = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{layer.name}_bias_dequantize")
    value = finish(layer, [node], bias.shape)
    layer.graph.insert_before(layer.node, node)
    return value


def _dequantized(layer: ConvLayer, quantized: QuantizedWeight, form: Form, stays_float: bool) -> tuple[ir.Value, list[ir.Node]]:
    """Make the nodes that dequantize a weight; return their result and the nodes."""
    packed = pack_qdq(quantized)
    suffix = f"_q{packed.bits}"
    matrices = split_groups(packed.codes, layer.group)
    group, k, n = matrices.shape
    transposed = layer.op == "ConvTranspose" and group > 1
    axis = 1 if layer.op == "ConvTranspose" and group == 1 else 0
    array = from_matrices(matrices, "Conv" if transposed else layer.op, layer.kernel)
    nodes = dequantizing_nodes(layer, packed, array, axis, form)
    transposed &= n > 1 or k > math.prod(layer.kernel)
    if transposed:
        codes = nodes[0].inputs[0]
        assert codes is not None
        split_shape = layer.constant(f"{suffix}_parted", np.array([group, n, layer.channels // group, -1]))
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], split_shape], name=f"{codes.name}_part"))
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{codes.name}_turn"))
    if transposed or (stays_float and form == "dequantize"):
        nodes.append(reshaped(layer, nodes, layer.shape, suffix))
    return finish(layer, nodes, layer.shape), nodes


def emitted_matrices(node: ir.Node) -> Array | None:
    """Read the weight of a Conv or ConvTranspose written by `emit`, ``(K, N)`` or in several groups ``(G, K, N)``; None for others."""
    value, group = operand(node, 1), attribute_of(node, "group", 1)
    if value is None or not is_made_of_codes(value):
        return None
    weight = dequantized_weight(value)
    if weight is None or weight.ndim < 3:
        return None
    matrices = to_matrices(weight, node.op_type, group)
    return matrices[0] if group == 1 else matrices
