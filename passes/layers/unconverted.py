"""Weights outside of linear layers: the nodes that read them, and why they are not converted.

This lets the report account for the remaining bytes: fused and recurrent operators, weights that are already quantized, and every other
node with a constant of at least `LEAST` elements and two axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from magr_onnx.passes.graph.constants import CASTS, constant_view, dequantized, is_step
from magr_onnx.passes.graph.nodes import layer_name
from magr_onnx.passes.layers import experts
from magr_onnx.passes.layers.linear import REFUSED
from magr_onnx.passes.layers.recurrent import GATES, packing_nodes
from magr_onnx.report.reasons import Reason, Skip

LEAST = 2048

_MICROSOFT = {
    Reason.QUANTIZED: """DynamicQuantizeLSTM DynamicQuantizeMatMul GatherBlockQuantized MatMulBnb4 MatMulFpQ4 MatMulInteger16
        MatMulIntegerToFloat MatMulNBits QAttention QGemm QLinearMatMul QMoE QOrderedAttention QOrderedMatMul""",
    Reason.FUSED: """Attention AttnLSTM DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention EmbedLayerNormalization
        FusedConv FusedGemm FusedMatMul FusedMatMulActivation GemmFastGelu GroupQueryAttention LongformerAttention MultiHeadAttention
        PackedAttention PackedMultiHeadAttention TransposeMatMul""",
}
_KINDS = {("com.microsoft", op): reason for reason, operators in _MICROSOFT.items() for op in operators.split()}
_KINDS |= {("", op): Reason.QUANTIZED for op in ("QLinearMatMul", "MatMulInteger")}
_KINDS[("", "Einsum")] = Reason.EINSUM
_LAYERS = {("", op) for op in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "QuantizeLinear", "DequantizeLinear")}
_LAYERS.add((experts.DOMAIN, experts.OPERATOR))


def unconverted_weights(nodes: Iterable[ir.Node]) -> Iterator[Skip]:
    """Yield a skip for every node with weights that is not viewed as a layer, convolution or table."""
    nodes = list(nodes)
    recurrent = [node for node in nodes if node.domain == "" and node.op_type in GATES]
    viewed = {*recurrent, *(inner for node in recurrent for value in node.inputs[1:] for inner in packing_nodes(value))}
    for node in nodes:
        if (node.domain, node.op_type) in _LAYERS or is_step(node) or node in viewed:
            continue
        kind = _kind(node)
        tensors: list[ir.TensorProtocol] = []
        floats = False
        for value in node.inputs:
            view = constant_view(value)
            shape, stored = ((), dequantized(value)) if view is None else (view.shape, view.stored)
            if stored is None:
                continue
            shape = shape or tuple(int(d) for d in stored.shape.numpy())
            real = view is not None and view.dtype in CASTS
            if view is not None and not real and kind != Reason.QUANTIZED:
                continue  # indices, shapes, masks
            if len(shape) >= (1 if kind == Reason.EINSUM else 2) and (kind is not None or math.prod(shape) >= LEAST):
                tensors.append(stored)
                floats |= real
        if not tensors:
            continue
        described = experts.described(node) if kind == Reason.QUANTIZED else ""
        reason, detail = node.meta.get(REFUSED) or (kind or Reason.OTHER if floats else Reason.QUANTIZED, described)
        size = sum({id(t): t.nbytes for t in tensors}.values())
        text = f"{', '.join(dict.fromkeys(str(t.name) for t in tensors))}: {size / 1e6:.2f} MB"
        yield Skip(layer_name(node), node.op_type, reason, f"{detail}; {text}" if detail else text, size)


def _kind(node: ir.Node) -> Reason | None:
    return _KINDS.get((node.domain, node.op_type))
