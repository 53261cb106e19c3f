"""Emit convolutions of quantized weights: ``DequantizeLinear(W) -> Conv``, one scale an output channel.

1. The node stays, with its attributes; only its weight and bias inputs change. Convolutions that share a weight share its codes.
2. Conv: codes ``(M, C / G, ...)`` and scales on axis 0. ConvTranspose in one group: ``(C, M, ...)``, axis 1.
3. In several groups a channel's scale lies on no axis of a ConvTranspose's weight: codes ``(M, C / G, ...)`` on axis 0, then Reshape,
   Transpose, Reshape; none of them where every group has one channel in and one out.
4. 5 to 8 bits: int8 or uint8; 3 and 4: int4 or uint4. Symmetric grids use the signed type and no zero point.
5. Where the model has integer activations a Reshape that changes nothing stands between the two: between a DequantizeLinear and a
   QuantizeLinear onnxruntime would make a QLinearConv of the convolution, rounding a float bias as well, in integers that nobody asked
   for. It sees no weight behind a Reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from magr_onnx.packing import QdqTensors, dequantize_qdq, pack_qdq
from magr_onnx.passes.constants import drop_if_unused
from magr_onnx.passes.conv import ConvLayer, from_matrices, to_matrices
from magr_onnx.passes.linear import FLOATS
from magr_onnx.passes.operands import NoView, attribute_of, constant, operand
from magr_onnx.types import Array, QuantizedWeight


def emit(layers: Sequence[ConvLayer], weights: Sequence[QuantizedWeight], biases: Sequence[Array | None], apart: bool) -> None:
    """Write one weight, a `QuantizedWeight` a group, into all convolutions that share it.

    Args:
        layers: The convolutions.
        weights: Codes of every group, one grid a column.
        biases: A bias ``(M,)`` for every layer; None leaves what is there.
        apart: Whether to see to it that onnxruntime does not compute them in integers.
    """
    first = layers[0]
    weight = _dequantized(first, weights, apart)
    for layer, bias in zip(layers, biases, strict=True):
        node, old = layer.node, layer.node.inputs[1]
        node.replace_input_with(1, weight)
        if old is not None:
            drop_if_unused(old)
        if bias is not None:
            held = operand(node, 2)
            base = layer.weight_name if held is None else str(held.name)
            value = layer.matrix(np.zeros((1, 1)), None).constant("_bias", bias.astype(FLOATS[layer.dtype]), base=base)
            node.resize_inputs(3)
            node.replace_input_with(2, value)
            if held is not None:
                drop_if_unused(held)
        node.name = f"{layer.name}_q{weights[0].spec.bits}"


def _dequantized(layer: ConvLayer, weights: Sequence[QuantizedWeight], apart: bool) -> ir.Value:
    """The weight as the layer reads it, made of codes before the layer."""
    packed = [pack_qdq(w) for w in weights]
    symmetric = packed[0].zero_points is None
    names = ("int4", "uint4") if packed[0].bits == 4 else ("int8", "uint8")
    kind = np.dtype(getattr(ml_dtypes, names[not symmetric]) if packed[0].bits == 4 else names[not symmetric])
    matrices = np.stack([p.codes for p in packed])
    group, k, n = matrices.shape
    turned = layer.op == "ConvTranspose" and group > 1
    axis = 1 if layer.op == "ConvTranspose" and group == 1 else 0
    codes = from_matrices(matrices, "Conv" if turned else layer.op, layer.kernel)
    base, suffix, place = layer.weight_name, f"_q{packed[0].bits}", layer.matrix(np.zeros((1, 1)), None)
    inputs = [
        place.constant(suffix, codes.astype(kind), base=base),
        place.constant(f"{suffix}_scales", np.concatenate([p.scales for p in packed]).astype(FLOATS[layer.dtype]), base=base),
    ]
    if not symmetric:
        zeros = np.concatenate([p.zero_points for p in packed if p.zero_points is not None])
        inputs.append(place.constant(f"{suffix}_zero_points", zeros.astype(kind), base=base))
    name = str(inputs[0].name)
    nodes = [ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}_dequantize")]
    turned &= n > 1 or k > math.prod(layer.kernel)
    if turned:
        parted = place.constant(f"{suffix}_parted", np.array([group, n, layer.channels // group, -1]), base=base)
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], parted], name=f"{name}_part"))
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{name}_turn"))
    if turned or apart:
        shape = place.constant(f"{suffix}_shape", np.array(layer.shape), base=base)
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape], name=f"{name}_shape"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}d", layer.dtype
    nodes[-1].outputs[0].shape = ir.Shape(layer.shape)
    place.graph.insert_before(layer.node, nodes)
    return nodes[-1].outputs[0]


def emitted_matrices(node: ir.Node) -> Array | None:
    """The dequantized weight of a Conv or ConvTranspose as `emit` writes it, ``(K, N)`` or in several groups ``(G, K, N)``; else None."""
    value = operand(node, 1)
    between: list[ir.Node] = []
    while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Reshape", "Transpose"):
        between.append(maker)
        value = maker.inputs[0]
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    try:
        codes, scales, zeros = (constant(operand(maker, i)) for i in range(3))
        axis, group = attribute_of(maker, "axis", 1), attribute_of(node, "group", 1)
        if codes is None or scales is None or scales.ndim != 1 or codes.ndim < 3 or attribute_of(maker, "block_size", 0):
            return None
        moved = np.moveaxis(codes.astype(np.int16), axis, -1)
        levels = None if zeros is None else zeros.astype(np.int16)
        flat = dequantize_qdq(QdqTensors(moved.reshape(-1, len(scales)), scales, levels, 8, 1, 0))
        weight = np.moveaxis(flat.reshape(moved.shape), -1, axis)
        for step in reversed(between):
            if step.op_type == "Transpose":
                weight = weight.transpose(attribute_of(step, "perm", None))
            else:
                shape = constant(operand(step, 1))
                if shape is None:
                    return None
                weight = weight.reshape(tuple(int(d) for d in shape))
    except NoView:
        return None
    matrices = to_matrices(weight, node.op_type, group)
    return matrices[0] if group == 1 else matrices
