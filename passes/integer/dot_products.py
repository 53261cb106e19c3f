"""Integer dot products of a graph from any tool: a view of each, or the reason why there is none.

Read: MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv, QGemm, DynamicQuantizeMatMul, MatMulIntegerToFloat, MatMulNBits; MatMul, Gemm
and Conv whose inputs come from DequantizeLinear or from QONNX's Quant; MatMul and Gemm of a float activation with a dequantized weight
where onnxruntime fuses them into MatMulNBits with int8 activations. Subgraphs and model-local functions are read like the main graph.
Nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from magr_onnx.core.overflow.proof import IntegerDot
from magr_onnx.core.packing import packed_shape, unpack_codes
from magr_onnx.passes.graph.constants import constant_array
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, layer_name, operand
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

_WITHOUT_READER = """
    Attention ConvTranspose ConvTransposeWithDynamicPads DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention
    DeformConv Einsum FusedConv FusedGemm FusedMatMul FusedMatMulActivation GatedRelativePositionBias
    GemmFastGelu GemmFloat8 GroupQueryAttention LongformerAttention MatMulBnb4 MatMulFpQ4 MatMulInteger16 MoE MultiHeadAttention
    NhwcConv NhwcFusedConv PackedAttention PackedMultiHeadAttention PagedAttention QAttention QMoE QOrderedAttention
    QOrderedLongformerAttention QOrderedMatMul SparseAttention SparseToDenseMatMul TransposeMatMul
"""
UNREAD = frozenset(_WITHOUT_READER.split())
"""Operators with dot products that have no reader here."""


def find(model: ir.Model) -> Iterator[IntegerDot | Skip]:
    """Yield every dot product of the model, subgraphs and functions included, or the reason why it is not proved.

    A generator, since the widened codes of a model can be several times its size.

    Args:
        model: The model; not changed.
    """
    names: set[str] = set()
    functions = ((function, f"{function.name}/") for function in model.functions.values())
    graphs: list[tuple[ir.Graph | ir.Function, str]] = [(model.graph, ""), *functions]
    for node, function_prefix in ((node, prefix) for graph, prefix in graphs for node in graph.all_nodes()):
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


def view(node: ir.Node) -> IntegerDot | Skip | None:
    """Return the dot product of a node, or the reason why it is not proved; None for nodes without one."""
    reader = _READERS.get((node.domain, node.op_type))
    name = layer_name(node)
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


def _matrix(node: ir.Node, x: int, x_zero: int | None, w: int, w_zero: int, *, flip: bool = False) -> IntegerDot:
    """Read an integer product of a matrix with constant codes, given which inputs are what.

    An activation without a zero point is one of floats, which the operator quantizes to uint8 with a zero point at run time.
    """
    weight = required(node, w)
    stored = constant_weight(weight, required(node, x))
    if flip:
        stored = np.swapaxes(stored, -1, -2)
    codes, w_type = integers(columns(stored))
    at_run_time = ("uint8", (0, 255), (0, 255))
    x_type, span, zeros = at_run_time if x_zero is None else activation_codes(required(node, x), operand(node, x_zero))
    w_zeros = per_column(weight_zeros(operand(node, w_zero), stored.shape), codes.shape[1])
    return IntegerDot("", node.op_type, "integer", weight_name(weight), codes, x_type, w_type, span, zeros, w_zeros)


def _qgemm(node: ir.Node) -> IntegerDot:
    dot = _matrix(node, 0, 2, 3, 5, flip=bool(attribute_of(node, "transB", 0)))
    return replace(dot, bias=integer_bias(operand(node, 6), dot.n))


def _conv(node: ir.Node, w: int, w_zero: int, bias: int | None) -> IntegerDot:
    weight, x = required(node, w), required(node, 0)
    stored, zeros = constant_weight(weight, x), constant_array(operand(node, w_zero))
    if operand(node, w_zero) is not None and zeros is None:
        raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the weight")
    matrix, taps, depthwise = conv_matrix(stored, attribute_of(node, "group", 1))
    codes, w_type = integers(matrix)
    m = codes.shape[1]
    flat = np.zeros(1, np.int64) if zeros is None else zeros.astype(np.int64).reshape(-1)
    if flat.size not in (1, m):
        raise UnsupportedNode(IntegerReason.SHAPE, f"{flat.size} weight zero points for {m} channels")
    x_type, span, x_zeros = activation_codes(x, operand(node, 2))
    w_zeros = per_column(flat.reshape(1, -1), m)
    dot = IntegerDot("", node.op_type, "integer", weight_name(weight), codes, x_type, w_type, span, x_zeros, w_zeros)
    added = None if bias is None else integer_bias(operand(node, bias), m)
    return replace(dot, bias=added, taps=taps, depthwise=depthwise, weight_left=bias is None)  # ConvInteger has none, and the weight first


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


def _dynamic_lstm(node: ir.Node) -> IntegerDot:
    """Read both products of a DynamicQuantizeLSTM as one: columns of ``R`` beside those of ``W``, with rows of zeros below."""
    parts, kinds, zeros = [], [], []
    for weight, zero in ((1, 9), (2, 11)):
        codes, kind = integers(columns(constant_weight(required(node, weight))))
        points = constant_array(operand(node, zero))
        if points is None or points.any():
            raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the weight is not zero")
        parts.append(codes)
        kinds.append(kind)
        zeros.append(np.zeros((1, codes.shape[1]), np.int64))
    if kinds[0] != kinds[1]:
        raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, f"{kinds[0]} and {kinds[1]}")
    k = max(map(len, parts))
    codes = np.hstack([np.pad(part, ((0, k - len(part)), (0, 0))) for part in parts])
    return IntegerDot(
        "", node.op_type, "integer", weight_name(required(node, 1)), codes, *("uint8", kinds[0]), (0, 255), (0, 255), np.hstack(zeros)
    )


def _float(node: ir.Node) -> IntegerDot:
    raise UnsupportedNode(IntegerReason.FLOAT)


_QLINEAR_CONV = partial(_conv, w=3, w_zero=5, bias=8)
_READERS: dict[tuple[str, str], Callable[[ir.Node], IntegerDot]] = {
    ("", "MatMulInteger"): partial(_matrix, x=0, x_zero=2, w=1, w_zero=3),
    ("", "ConvInteger"): partial(_conv, w=1, w_zero=3, bias=None),
    ("", "QLinearMatMul"): partial(_matrix, x=0, x_zero=2, w=3, w_zero=5),
    ("", "QLinearConv"): _QLINEAR_CONV,
    (CONTRIB, "QLinearConv"): _QLINEAR_CONV,
    (CONTRIB, "QGemm"): _qgemm,
    (CONTRIB, "DynamicQuantizeMatMul"): partial(_matrix, x=0, x_zero=None, w=1, w_zero=3),
    (CONTRIB, "MatMulIntegerToFloat"): partial(_matrix, x=0, x_zero=4, w=1, w_zero=5),
    (CONTRIB, "MatMulNBits"): _matmul_nbits,
    (CONTRIB, "DynamicQuantizeLSTM"): _dynamic_lstm,
    **{("", op): _float for op in ("LSTM", "GRU", "RNN")},
    ("", "MatMul"): product,
    ("", "Gemm"): product,
    ("", "Conv"): product,
}
