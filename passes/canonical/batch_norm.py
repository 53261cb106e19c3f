"""BatchNormalization behind a convolution, folded into its weight and bias.

``gamma (Y - mean) / sqrt(var + eps) + beta`` scales every output channel and adds to its bias. Done before weights are quantized, since
onnxruntime cannot do it afterwards. Unlike in other patterns the weight is computed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import drop_if_unused, fixed_array
from magr_onnx.passes.graph.nodes import only_use, operand
from magr_onnx.passes.layers.conv import ConvLayer, find, from_matrices
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight


def fold(model: ir.Model, selection: Selection = ALL) -> list[str]:
    """Fold the normalizations behind selected convolutions, in place; return the names of these convolutions."""
    folded = []
    for readers in by_weight(find(model, selection)[0]):
        norm = only_use(readers[0].node.outputs[0])[0]
        parameters = None if len(readers) > 1 or norm is None else _parameters(norm)
        if norm is not None and parameters is not None and readers[0].takes_bias:
            _fold(readers[0], norm, *parameters)
            folded.append(readers[0].name)
    return folded


def _parameters(norm: ir.Node) -> tuple[Array, Array] | None:
    """Read the factor and the addend of every channel; None for anything but a BatchNormalization of constants."""
    if (norm.domain, norm.op_type) != ("", "BatchNormalization") or norm.attributes.get_int("training_mode", False):
        return None
    arrays = [fixed_array(operand(norm, i)) for i in range(1, 5)]
    if any(a is None for a in arrays) or any(value.uses() or value.is_graph_output() for value in norm.outputs[1:]):
        return None
    gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    return factor, beta - factor * mean


def _fold(layer: ConvLayer, norm: ir.Node, factor: Array, addend: Array) -> None:
    bias = layer.read_bias()
    matrices = layer.read() * factor.reshape(layer.group, 1, layer.n)
    layer.write(1, from_matrices(matrices, layer.op, layer.kernel))
    layer.write(2, addend if bias is None else addend + factor * bias)
    constants, output = [v for v in norm.inputs[1:] if v is not None], norm.outputs[0]
    value = layer.node.outputs[0]
    value.name, output.name = output.name, None
    value.type, value.shape = output.type, output.shape or value.shape
    value.metadata_props.update(output.metadata_props)
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    layer.graph.remove(norm, safe=True)
    for constant in constants:
        drop_if_unused(constant)
