"""Emit mixtures of experts as com.microsoft QMoE: the same node with packed weights, their scales and zero points.

1. Both layers of all experts have codes of one width and blocks of one size (`magr_onnx.core.expert_packing`).
2. The kernel for CPUs weighs the outputs of a token's experts by the softmax of their scores alone, whatever ``normalize_routing_weights``
   is. Where MoE has the softmax of all scores, that is put out by a node of its own, as ``router_weights``.
3. Biases, compensated or not, are inputs of the operator.
4. ``accuracy_level`` is written where int8 activations are asked for: onnxruntime knows it from 1.31 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.expert_packing import ExpertTensors, dequantize_experts, pack_experts, stored_block
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import Array, QuantizedWeight
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.format import stored_array
from magr_onnx.passes.graph.constants import drop_if_unused
from magr_onnx.passes.graph.nodes import attribute_of, operand
from magr_onnx.passes.layers.experts import PROJECTIONS, QUANTIZED, ExpertLayer
from magr_onnx.passes.layers.weighted import FLOATS

CODES, SCALES, BIASES, ZERO_POINTS = (2, 5), (3, 6), (4, 7), (11, 12)
"""Inputs of a QMoE for both layers."""
THIRD = range(8, 11)  # inputs of a third projection
SHARES = 14  # what outputs of experts are weighed by, in place of the scores


def emit(
    layers: Sequence[ExpertLayer],
    weights: Sequence[Sequence[QuantizedWeight]],
    biases: Sequence[Array | None],
    attributes: Mapping[str, int],
) -> list[Emitted]:
    """Write the weights of both layers of all experts into all nodes that share them.

    Args:
        layers: The nodes.
        weights: For both layers, one of each expert.
        biases: Of both layers, ``(E, N)``; None for none.
        attributes: Further attributes of the nodes.
    """
    first, spec = layers[0], weights[0][0].spec
    inputs: dict[int, ir.Value] = {}
    bits, block = container_bits(spec.bits), stored_block(spec, [first.k, first.units])
    for at, (suffix, view) in enumerate(zip(PROJECTIONS, (first.weight, first.second), strict=True)):
        packed = pack_experts(weights[at], block)
        inputs |= _constants(first, packed, at, view.name)
        if (bias := biases[at]) is not None:
            inputs[BIASES[at]] = first.constant(f"_{suffix}_bias", bias.astype(FLOATS[first.dtype]), first.name)
    size = sum(value.const_value.nbytes for value in inputs.values() if value.const_value is not None)
    repeated = block if spec.group_size is None else None
    attributes = {"expert_weight_bits": bits, **({} if block is None else {"block_size": block}), **attributes}
    emitted = []
    for layer in layers:
        node = layer.node
        before = [value for value in node.inputs[2:] if value is not None]
        node.resize_inputs(max(inputs) + 1)
        for index in range(2, len(node.inputs)):
            node.replace_input_with(index, inputs.get(index))
        for value in dict.fromkeys(before):
            drop_if_unused(value)
        if not attribute_of(node, "normalize_routing_weights", 0):
            node.resize_inputs(SHARES + 1)
            node.replace_input_with(SHARES, _shares(layer))
        node.op_type = QUANTIZED
        for name, number in attributes.items():
            node.attributes.add(ir.AttrInt64(name, number))
        node.name = layer.names.node(f"{layer.name}_q{bits}")
        emitted.append(Emitted(str(node.name), bits, size, repeated))
    return emitted


def _shares(layer: ExpertLayer) -> ir.Value:
    """Add the softmax of all scores before a node."""
    scores = layer.router
    shares = ir.val(layer.names.value(f"{layer.name}_shares"), layer.dtype, scores.shape)
    softmax = ir.node("Softmax", [scores], {"axis": 1}, outputs=[shares], name=layer.names.node(f"{layer.name}_shares"))
    layer.graph.insert_before(layer.node, softmax)
    return shares


def _constants(layer: ExpertLayer, packed: ExpertTensors, at: int, name: str) -> dict[int, ir.Value]:
    suffix = f"_q{packed.bits}"
    inputs = {
        CODES[at]: layer.constant(suffix, packed.codes, name),
        SCALES[at]: layer.constant(f"{suffix}_scales", packed.scales, name),
    }
    if packed.zero_points is not None:
        inputs[ZERO_POINTS[at]] = layer.constant(f"{suffix}_zero_points", packed.zero_points, name)
    return inputs


def emitted_matrices(node: ir.Node) -> Array | None:
    """Read the weights of a QMoE, the second layer transposed: ``(E, H, F + I)`` float32; None for those not written by `emit`."""
    if node.attributes.get_string("quant_type", "int") != "int" or any(operand(node, index) is not None for index in THIRD):
        return None
    bits = attribute_of(node, "expert_weight_bits", 4)
    if bits not in (2, 4, 8) or any(attribute_of(node, f"{name}_expert_weight_bits", bits) != bits for name in PROJECTIONS):
        return None
    parts = []
    for at in range(len(PROJECTIONS)):
        codes, scales, zeros = (stored_array(operand(node, index[at])) for index in (CODES, SCALES, ZERO_POINTS))
        if codes is None or scales is None or codes.ndim != 3:
            return None
        parts.append(ExpertTensors(codes, scales, zeros, bits))
    (count, wide, _), (_, height, _) = (part.codes.shape for part in parts)
    units = parts[1].codes.shape[2] * 8 // bits
    result: Array = np.empty((count, height, wide + units), np.float32)
    try:
        for both, first, second in zip(result, *map(dequantize_experts, parts), strict=True):
            both[:, :wide], both[:, wide:] = first, second.T
    except ValueError:  # shapes do not fit
        return None
    return result
