"""Emit recurrent operators with quantized weights: int8 codes, one scale per direction and row of a gate.

1. ``dynamic-quantize-lstm``: com.microsoft DynamicQuantizeLSTM, onnxruntime's own operator for CPUs. It rounds inputs and states to uint8
   at every product and multiplies integers. Its weights are transposed, ``(D, I, 4 H)`` and ``(D, H, 4 H)``; scales and zero points,
   which are zero, are ``(D, 4 H)`` and come after the inputs of an LSTM.
2. ``fold`` and ``dequantize``: the operator stays, and its weights are dequantized as those of convolutions
   (`magr_onnx.passes.emit.channel_codes`): ``(D G H, K)`` with scales on axis 0, then a Reshape. Measured in onnxruntime 1.32, ``fold``
   takes the float operator's time, ``dequantize`` 1.1 to 2.6 times as much, and up to 8 times at a single step.
3. Operators that share both weights share their codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.packing import QdqTensors, pack_qdq
from magr_onnx.core.types import Array
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.channel_codes import dequantized_weight, dequantizing_nodes, finish, place, reshaped
from magr_onnx.passes.emit.matmulnbits import DOMAIN
from magr_onnx.passes.graph.constants import constant_tensor
from magr_onnx.passes.graph.nodes import operand
from magr_onnx.passes.layers.conv import is_made_of_codes, split_groups
from magr_onnx.passes.layers.recurrent import RecurrentForm, RecurrentLayer, drop_packing, to_matrices

SCALES = 8  # the first input of DynamicQuantizeLSTM that an LSTM does not have


def emit(layers: Sequence[RecurrentLayer], solutions: Sequence[LayerSolution], form: RecurrentForm) -> list[Emitted]:
    """Write the solutions of ``W`` and ``R`` into all operators that share both.

    Args:
        layers: The operators.
        solutions: Codes ``(I, D G H)`` and ``(H, D G H)``, with one grid per column.
        form: See the module.
    """
    first = layers[0]
    packed = [pack_qdq(solution.quantized) for solution in solutions if solution.quantized is not None]
    names = [view.name for view in (first.weight, first.recurrence)]
    if form == "dynamic-quantize-lstm":
        inputs, size = _integers(first, packed, names)
    else:
        weights = [_dequantized(first, part, form, name) for part, name in zip(packed, names, strict=True)]
        inputs = {index: value for index, (value, _) in enumerate(weights, 1)}
        size = place(layers, [node for _, nodes in weights for node in nodes])
    emitted = []
    for layer in layers:
        node = layer.node
        floats = [v for v in node.inputs[1:3] if v is not None]
        node.resize_inputs(max(len(node.inputs), *(index + 1 for index in inputs)))
        for index, value in inputs.items():
            node.replace_input_with(index, value)
        for value in floats:
            drop_packing(value)
        if form == "dynamic-quantize-lstm":
            node.op_type, node.domain, node.version = "DynamicQuantizeLSTM", DOMAIN, 1
            node.attributes.pop("layout", None)  # 0: onnxruntime runs no other
            layer.root.opset_imports.setdefault(DOMAIN, 1)
        node.name = layer.names.node(f"{layer.name}_q8")
        emitted.append(Emitted(node.name, 8, size))
    return emitted


def _integers(layer: RecurrentLayer, packed: Sequence[QdqTensors], names: Sequence[str]) -> tuple[dict[int, ir.Value], int]:
    """Make the inputs of a DynamicQuantizeLSTM that hold weights, by index; return them and their bytes."""
    inputs: dict[int, ir.Value] = {}
    for i, (part, name) in enumerate(zip(packed, names, strict=True)):
        codes = split_groups(part.codes, layer.directions).astype(np.int8)
        scales = part.scales.reshape(layer.directions, -1).astype(np.float32)
        inputs[1 + i] = layer.constant("_q8", codes, name)
        inputs[SCALES + 2 * i] = layer.constant("_q8_scales", scales, name)
        inputs[SCALES + 2 * i + 1] = layer.constant("_q8_zero_points", np.zeros(scales.shape, np.int8), name)
    return inputs, sum(v.const_value.nbytes for v in inputs.values() if v.const_value is not None)


def _dequantized(layer: RecurrentLayer, packed: QdqTensors, form: RecurrentForm, name: str) -> tuple[ir.Value, list[ir.Node]]:
    """Make the nodes that dequantize one weight; return their result and the nodes."""
    assert form != "dynamic-quantize-lstm"
    codes = to_matrices(split_groups(packed.codes, layer.directions))
    shape = codes.shape
    nodes = dequantizing_nodes(layer, packed, codes.reshape(-1, shape[2]), 0, form, name)
    nodes.append(reshaped(layer, nodes, shape, "_q8", name))
    return finish(layer, nodes, shape), nodes


def emitted_matrices(node: ir.Node) -> Array | None:
    """Read the weights of a recurrent operator written by `emit`, ``(D, I + H, G H)``; None for others."""
    parts = []
    for index in (1, 2):
        value = operand(node, index)
        if value is None:
            return None
        if node.op_type == "DynamicQuantizeLSTM":
            tensors = [constant_tensor(operand(node, i)) for i in (index, SCALES + 2 * index - 2)]
            if tensors[0] is None or tensors[1] is None:
                return None
            codes, scales = (tensor.numpy().astype(np.float32) for tensor in tensors if tensor is not None)
            parts.append(codes * scales.reshape(len(codes), 1, -1))
        else:
            weight = dequantized_weight(value) if is_made_of_codes(value) else None
            if weight is None or weight.ndim != 3:
                return None
            parts.append(to_matrices(weight))
    return np.concatenate(parts, axis=1)
