"""Integer dot products of a graph from any tool: a view of each, or the reason why there is none.

Read: MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv, QGemm, DynamicQuantizeMatMul, MatMulIntegerToFloat, MatMulNBits; MatMul, Gemm
and Conv whose inputs come from DequantizeLinear; MatMul and Gemm of a float activation with a dequantized weight where onnxruntime
fuses them into MatMulNBits with int8 activations. Subgraphs and model-local functions are read like the main graph. Nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.core.overflow.proof import IntegerDot
from magr_onnx.core.packing import packed_shape, unpack_codes
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, constant_array, operand
from magr_onnx.passes.integer.dequantized import product
from magr_onnx.passes.integer.operands import (
    CONTRIB,
    activation_codes,
    blocks,
    columns,
    constant_weight,
    conv_matrix,
    integer_bias,
    integers,
    per_column,
    required,
    weight_name,
    weight_zeros,
)
from magr_onnx.report.reasons import IntegerReason, Skip

UNREAD = frozenset(
    {
        "Attention",
        "ConvTranspose",
        "ConvTransposeWithDynamicPads",
        "DecoderAttention",
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "DeformConv",
        "DynamicQuantizeLSTM",
        "Einsum",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "GRU",
        "GatedRelativePositionBias",
        "GemmFastGelu",
        "GemmFloat8",
        "GroupQueryAttention",
        "LongformerAttention",
        "LSTM",
        "MatMulBnb4",
        "MatMulFpQ4",
        "MatMulInteger16",
        "MoE",
        "MultiHeadAttention",
        "NhwcConv",
        "NhwcFusedConv",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "QAttention",
        "QMoE",
        "QOrderedAttention",
        "QOrderedLongformerAttention",
        "QOrderedMatMul",
        "RNN",
        "SparseAttention",
        "SparseToDenseMatMul",
        "TransposeMatMul",
    }
)
"""Operators with dot products that have no reader here."""


def find(model: ir.Model) -> Iterator[IntegerDot | Skip]:
    """Yield every dot product of the model, subgraphs and functions included, or the reason why it is not proved.

    A generator, since the widened codes of a model can be several times its size.

    Args:
        model: The model; not changed.
    """
    names: set[str] = set()
    for node, function_prefix in _nodes(model):
        dot = view(node)
        if dot is None:
            continue
        if isinstance(dot, Skip) and function_prefix and dot.reason is IntegerReason.DYNAMIC_WEIGHT:
            dot = replace(dot, reason=IntegerReason.FUNCTION)
        name = function_prefix + dot.name
        if name in names:  # ONNX requires only value names to be unique
            name = f"{name}:{node.outputs[0].name}"
        names.add(name)
        yield replace(dot, name=name)


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Yield every node of the main graph, its subgraphs and the functions; the latter with the function's name as prefix."""
    for node in model.graph.all_nodes():
        yield node, ""
    for function in model.functions.values():
        for node in function.all_nodes():
            yield node, f"{function.name}/"


def view(node: ir.Node) -> IntegerDot | Skip | None:
    """Return the dot product of a node, or the reason why it is not proved; None for nodes without one."""
    reader = _READERS.get((node.domain, node.op_type))
    name = node.name or f"{node.op_type}:{node.outputs[0].name}"
    if reader is None:
        if node.domain in ("", CONTRIB):
            return Skip(name, node.op_type, IntegerReason.OPERATOR) if node.op_type in UNREAD else None
        has_dot = node.op_type in UNREAD or any(op == node.op_type for _, op in _READERS)
        return Skip(name, node.op_type, IntegerReason.OPERATOR, f"domain {node.domain}") if has_dot else None
    try:
        return replace(reader(node), name=name)
    except UnsupportedNode as unsupported:
        return Skip(name, node.op_type, unsupported.reason, unsupported.detail)
    except (ValueError, IndexError) as error:  # from NumPy, for axes and shapes of an invalid model
        return Skip(name, node.op_type, IntegerReason.SHAPE, str(error))


def _matrix(
    node: ir.Node, x: ir.Value, x_zero: ir.Value | None, w: ir.Value, w_zero: ir.Value | None, *, flip: bool = False, **more: Any
) -> IntegerDot:
    """Read an integer product of a matrix with constant codes."""
    stored = constant_weight(w, x)
    if flip:
        stored = np.swapaxes(stored, -1, -2)
    codes, w_type = integers(columns(stored))
    n = codes.shape[1]
    x_type, span, zeros = activation_codes(x, x_zero)
    w_zeros = per_column(weight_zeros(w_zero, stored.shape), n)
    return IntegerDot("", node.op_type, "integer", weight_name(w), codes, x_type, w_type, span, zeros, w_zeros, **more)


def _matmul_integer(node: ir.Node) -> IntegerDot:
    return _matrix(node, required(node, 0), operand(node, 2), required(node, 1), operand(node, 3))


def _qlinear_matmul(node: ir.Node) -> IntegerDot:
    return _matrix(node, required(node, 0), operand(node, 2), required(node, 3), operand(node, 5))


def _qgemm(node: ir.Node) -> IntegerDot:
    flip = bool(attribute_of(node, "transB", 0))
    dot = _matrix(node, required(node, 0), operand(node, 2), required(node, 3), operand(node, 5), flip=flip)
    return replace(dot, bias=integer_bias(operand(node, 6), dot.n))


def _dynamic_quantize_matmul(node: ir.Node) -> IntegerDot:
    """Read a product of float activations, which the operator quantizes to uint8 with a zero point at run time."""
    stored = constant_weight(required(node, 1), required(node, 0))
    codes, w_type = integers(columns(stored))
    w_zeros = per_column(weight_zeros(operand(node, 3), stored.shape), codes.shape[1])
    name = weight_name(required(node, 1))
    return IntegerDot("", node.op_type, "integer", name, codes, "uint8", w_type, (0, 255), (0, 255), w_zeros)


def _matmul_integer_to_float(node: ir.Node) -> IntegerDot:
    return _matrix(node, required(node, 0), operand(node, 4), required(node, 1), operand(node, 5))


def _conv(
    node: ir.Node, x: ir.Value, x_zero: ir.Value | None, w: ir.Value, w_zero: ir.Value | None, bias: ir.Value | None, weight_left: bool
) -> IntegerDot:
    stored = constant_weight(w, x)
    zeros = constant_array(w_zero)
    if w_zero is not None and zeros is None:
        raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the weight")
    matrix, taps, depthwise = conv_matrix(stored, attribute_of(node, "group", 1))
    codes, w_type = integers(matrix)
    m = codes.shape[1]
    flat = np.zeros(1, np.int64) if zeros is None else zeros.astype(np.int64).reshape(-1)
    if flat.size not in (1, m):
        raise UnsupportedNode(IntegerReason.SHAPE, f"{flat.size} weight zero points for {m} channels")
    x_type, span, x_zeros = activation_codes(x, x_zero)
    return IntegerDot(
        "",
        node.op_type,
        "integer",
        weight_name(w),
        codes,
        x_type,
        w_type,
        span,
        x_zeros,
        per_column(flat.reshape(1, -1), m),
        integer_bias(bias, m),
        taps=taps,
        depthwise=depthwise,
        weight_left=weight_left,
    )


def _conv_integer(node: ir.Node) -> IntegerDot:
    return _conv(node, required(node, 0), operand(node, 2), required(node, 1), operand(node, 3), None, True)


def _qlinear_conv(node: ir.Node) -> IntegerDot:
    return _conv(node, required(node, 0), operand(node, 2), required(node, 3), operand(node, 5), operand(node, 8), False)


def _matmul_nbits(node: ir.Node) -> IntegerDot:
    level = attribute_of(node, "accuracy_level", 0)
    if level != 4:
        raise UnsupportedNode(IntegerReason.FLOAT, f"accuracy level {level or 'unset'}")
    if operand(node, 4) is not None:
        raise UnsupportedNode(IntegerReason.OPERATOR, "g_idx")
    bits, block = attribute_of(node, "bits", 4), attribute_of(node, "block_size", 0)
    k, n = attribute_of(node, "K", 0), attribute_of(node, "N", 0)
    packed = constant_weight(required(node, 1))
    if bits not in (2, 4, 8) or block < 1 or packed.size != math.prod(packed_shape(k, n, bits, block)):
        raise UnsupportedNode(IntegerReason.SHAPE, f"{bits} bits, block {block}, K {k}, N {n}, weight {list(packed.shape)}")
    codes = unpack_codes(packed, bits, block, k, n)
    return blocks(node.op_type, weight_name(required(node, 1)), codes, bits, block)


_READERS: dict[tuple[str, str], Callable[[ir.Node], IntegerDot]] = {
    ("", "MatMulInteger"): _matmul_integer,
    ("", "ConvInteger"): _conv_integer,
    ("", "QLinearMatMul"): _qlinear_matmul,
    ("", "QLinearConv"): _qlinear_conv,
    (CONTRIB, "QLinearConv"): _qlinear_conv,
    (CONTRIB, "QGemm"): _qgemm,
    (CONTRIB, "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
    (CONTRIB, "MatMulIntegerToFloat"): _matmul_integer_to_float,
    (CONTRIB, "MatMulNBits"): _matmul_nbits,
    ("", "MatMul"): product,
    ("", "Gemm"): product,
    ("", "Conv"): product,
}
