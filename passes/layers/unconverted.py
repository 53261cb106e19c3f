"""Weights outside of linear layers: the nodes that hold them, and why they stay as they are.

So that the report says where the remaining bytes are: fused and recurrent operators, weights that are quantized already, and every other
node with a constant of `LEAST` elements or more on two axes or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from magr_onnx.passes.graph.constants import CASTS, dequantized, held, is_step
from magr_onnx.passes.layers.linear import REFUSED, layer_name
from magr_onnx.report.reasons import Reason, Skip

LEAST = 2048

_MICROSOFT = {
    Reason.QUANTIZED: """DynamicQuantizeLSTM DynamicQuantizeMatMul GatherBlockQuantized MatMulBnb4 MatMulFpQ4 MatMulInteger16
        MatMulIntegerToFloat MatMulNBits QAttention QGemm QLinearMatMul QMoE QOrderedAttention QOrderedMatMul""",
    Reason.FUSED: """Attention DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention EmbedLayerNormalization FusedConv
        FusedGemm FusedMatMul FusedMatMulActivation GemmFastGelu GroupQueryAttention LongformerAttention MoE MultiHeadAttention
        PackedAttention PackedMultiHeadAttention TransposeMatMul""",
    Reason.RECURRENT: "AttnLSTM",
}
_KINDS = {("com.microsoft", op): reason for reason, operators in _MICROSOFT.items() for op in operators.split()}
_KINDS |= {("", op): Reason.QUANTIZED for op in ("QLinearMatMul", "MatMulInteger")}
_KINDS |= {("", op): Reason.RECURRENT for op in ("LSTM", "GRU", "RNN")}
_KINDS[("", "Einsum")] = Reason.EINSUM
_PACKING = {("", op) for op in ("Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Transpose", "Reshape", "Cast", "Identity")}
_LAYERS = {("", op) for op in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "QuantizeLinear", "DequantizeLinear")}


def holders(nodes: Iterable[ir.Node]) -> Iterator[Skip]:
    """The nodes, other than those that are looked at as layers, that hold weights."""
    nodes = list(nodes)
    passed: set[ir.Node] = set()
    packed = {node: [*node.inputs[:1], *_packed(node.inputs[1:], passed)] for node in nodes if _kind(node) == Reason.RECURRENT}
    for node in nodes:
        if (node.domain, node.op_type) in _LAYERS or is_step(node) or node in passed:
            continue
        kind = _kind(node)
        found: list[ir.TensorProtocol] = []
        floats = False
        for value in packed.get(node, node.inputs):
            constant = held(value)
            shape, stored = ((), dequantized(value)) if constant is None else (constant.shape, constant.stored)
            if stored is None:
                continue
            shape = shape or tuple(int(d) for d in stored.shape.numpy())
            real = constant is not None and constant.dtype in CASTS
            if constant is not None and not real and kind != Reason.QUANTIZED:
                continue  # indices, shapes, masks
            if len(shape) >= (1 if kind == Reason.EINSUM else 2) and (kind is not None or math.prod(shape) >= LEAST):
                found.append(stored)
                floats |= real
        if not found:
            continue
        reason, detail = node.meta.get(REFUSED) or (kind or Reason.OTHER if floats else Reason.QUANTIZED, "")
        size = sum({id(t): t.nbytes for t in found}.values())
        text = f"{', '.join(dict.fromkeys(str(t.name) for t in found))}: {size / 1e6:.2f} MB"
        yield Skip(layer_name(node), node.op_type, reason, f"{detail}; {text}" if detail else text, size)


def _kind(node: ir.Node) -> Reason | None:
    return _KINDS.get((node.domain, node.op_type))


def _packed(values: Iterable[ir.Value | None], passed: set[ir.Node]) -> Iterator[ir.Value | None]:
    """What recurrent weights are cut out of and joined from (torch has its gates in another order); ``passed`` gets the nodes between."""
    for value in values:
        node = None if value is None or held(value) is not None else value.producer()
        if node is None or (node.domain, node.op_type) not in _PACKING:
            yield value
        elif node not in passed:
            passed.add(node)
            yield from _packed(node.inputs, passed)
