"""Operands of integer products: constants, types, ranges and zero points, or the reason why one cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.overflow.accumulator import Int64
from magr_onnx.core.overflow.proof import IntegerDot
from magr_onnx.core.packing import broadcast_grid
from magr_onnx.core.types import activation_limits
from magr_onnx.passes.graph.constants import constant_array
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, operand, producers
from magr_onnx.report.reasons import IntegerReason

Array = npt.NDArray[Any]
CONTRIB = "com.microsoft"
_MOVING = "Concat Expand Flatten Gather Identity MaxPool Pad Reshape Slice Split Squeeze Transpose Unsqueeze"
PASSES_THROUGH = frozenset(_MOVING.split())
"""Operators that move activation codes without changing their type."""


def required(node: ir.Node, index: int) -> ir.Value:
    """Return input ``index`` of a node.

    Raises:
        UnsupportedNode: It is missing.
    """
    value = operand(node, index)
    if value is None:
        raise UnsupportedNode(IntegerReason.SHAPE, f"input {index} is missing")
    return value


def integers(array: Array) -> tuple[Array, str]:
    """Convert integer codes to a wider NumPy type; return them and the name of the stored type."""
    name = array.dtype.name
    if name not in RANGES:
        raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, name)
    wide = np.int16 if name in ("int16", "uint8", "int8") else np.int32 if name == "uint16" else np.int8
    return array.astype(wide), name


def constant_codes(value: ir.Value) -> Array:
    """Return constant codes, including those of a QuantizeLinear of a constant float weight, which onnxruntime folds.

    The arithmetic is onnxruntime's: float32 division, rounding half to even, saturation.
    """
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear" or node.domain != "":
        return constant_weight(value)
    floats, scales, zeros = (constant_array(operand(node, i)) for i in range(3))
    if floats is None or scales is None:
        raise UnsupportedNode(IntegerReason.DYNAMIC_WEIGHT)
    if zeros is None or attribute_of(node, "block_size", 0) or not floats.dtype == scales.dtype == np.float32:
        raise UnsupportedNode(
            IntegerReason.WEIGHT_TYPE, "quantized in the graph other than by float32 scales and zero points, one a tensor or channel"
        )
    if zeros.dtype.name not in RANGES or floats.size == 0:
        raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, zeros.dtype.name)
    axis = attribute_of(node, "axis", 1) % max(floats.ndim, 1)
    try:
        grid = [broadcast_grid(a, floats.shape, axis, 0) for a in (scales, zeros.astype(np.float32))]
    except ValueError as error:
        raise UnsupportedNode(IntegerReason.SHAPE, f"scales {list(scales.shape)} for {list(floats.shape)}") from error
    with np.errstate(all="ignore"):
        rounded = np.rint(floats / grid[0]) + grid[1]
    if np.isnan(rounded).any():
        raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, "the float weight quantizes to NaN")
    codes: Array = np.clip(rounded, *RANGES[zeros.dtype.name]).astype(zeros.dtype)
    return codes


RANGES = {f"{'' if signed else 'u'}int{bits}": activation_limits(signed, bits) for bits in (2, 4, 8, 16) for signed in (True, False)}


def constant_weight(value: ir.Value, other_operand: ir.Value | None = None) -> Array:
    """Return the constant of a weight operand; ``other_operand`` serves to tell which side is constant."""
    weight = constant_array(value)
    if weight is None and (codes := _cast_codes(value)) is not None:
        return codes
    if weight is None:
        constant_left = other_operand is not None and constant_array(other_operand) is not None
        raise UnsupportedNode(IntegerReason.CONSTANT_LEFT if constant_left else IntegerReason.DYNAMIC_WEIGHT)
    if weight.size == 0:
        raise UnsupportedNode(IntegerReason.SHAPE, f"weight has shape {list(weight.shape)}")
    return weight


def _cast_codes(value: ir.Value) -> Array | None:
    """Return constant codes behind a Cast to 8 bits that keeps them, which onnxruntime folds; None for anything else."""
    node = value.producer()
    kind = None if node is None else ir.DataType(attribute_of(node, "to", 0))
    if node is None or (node.domain, node.op_type) != ("", "Cast") or kind not in (ir.DataType.INT8, ir.DataType.UINT8):
        return None
    codes = constant_array(operand(node, 0))
    if codes is None or codes.dtype.name not in RANGES or codes.size == 0:
        return None
    (low, high), (least, most) = RANGES[codes.dtype.name], RANGES[kind.name.lower()]
    return codes.astype(kind.numpy()) if least <= low and high <= most else None


def weight_name(value: ir.Value) -> str:
    """Return the name of the initializer or Constant of a weight."""
    return str(([value] + [v for node in producers(value) if (v := operand(node, 0)) is not None])[-1].name)


def type_of(value: ir.Value) -> str | None:
    """Return the type of activation codes, inferred where it is undeclared."""
    for _ in range(64):
        if value.dtype is not None:
            return value.dtype.name.lower()
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "DynamicQuantizeLinear":
            return "uint8"
        if node.op_type == "Cast":
            return ir.DataType(attribute_of(node, "to", 0)).name.lower()
        if node.op_type == "QuantizeLinear":
            zero = operand(node, 2)
            declared = ir.DataType(attribute_of(node, "output_dtype", 0))
            if zero is None:
                return "uint8" if declared == ir.DataType.UNDEFINED else declared.name.lower()
            value = zero
        elif node.op_type in PASSES_THROUGH and node.inputs and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            return None
    return None


def activation_codes(codes: ir.Value, zero: ir.Value | None) -> tuple[str, tuple[int, int], tuple[int, ...]]:
    """Return type, range and zero points of activation codes; the extreme zero points where they are computed at run time."""
    kind = type_of(codes) or (None if zero is None else type_of(zero))
    zero_points = constant_array(zero)
    if kind is None and zero_points is not None:
        kind = zero_points.dtype.name
    if kind not in RANGES:
        raise UnsupportedNode(IntegerReason.ACTIVATION_TYPE, str(kind))
    span = RANGES[kind]
    if zero is None:
        return kind, span, (0,)
    if zero_points is None:
        return kind, span, span
    values = zero_points.astype(np.int64).reshape(-1)
    return kind, span, tuple(sorted({int(values.min()), int(values.max())})) if values.size else (0,)


def columns(array: Array) -> Array:
    """Reshape ``(..., K, N)`` or ``(K,)`` to ``(K, N')``: every output of a batched product is a column."""
    if array.ndim == 0:
        raise UnsupportedNode(IntegerReason.SHAPE, "weight is a scalar")
    if array.ndim == 1:
        return array[:, None]
    return np.moveaxis(array, -2, 0).reshape(array.shape[-2], -1)


def weight_zeros(value: ir.Value | None, shape: tuple[int, ...]) -> Int64:
    """Return weight zero points of an integer matrix product as ``(1, N')``: scalar, per column, or batched ``(..., 1, N)``."""
    if value is None:
        return np.zeros((1, 1), np.int64)
    zero_points = constant_array(value)
    if zero_points is None:
        raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the weight")
    zeros = zero_points.astype(np.int64)
    try:
        return columns(np.broadcast_to(zeros, shape)).astype(np.int64)[:1] if zeros.size > 1 else zeros.reshape(1, 1)
    except ValueError as error:
        raise UnsupportedNode(IntegerReason.SHAPE, f"weight zero point {list(zeros.shape)}") from error


def per_column(zeros: Int64, n: int) -> Int64:
    """Broadcast zero points to every column."""
    return np.ascontiguousarray(np.broadcast_to(zeros, (len(zeros), n)))


def integer_bias(value: ir.Value | None, n: int) -> Int64 | None:
    """Return a constant integer bias ``(n,)``; None if there is none."""
    if value is None:
        return None
    bias = constant_array(value)
    if bias is None:
        raise UnsupportedNode(IntegerReason.BIAS)
    if not np.issubdtype(bias.dtype, np.integer):
        raise UnsupportedNode(IntegerReason.BIAS, bias.dtype.name)
    flat = bias.astype(np.int64).reshape(-1)
    if flat.size not in (1, n):
        raise UnsupportedNode(IntegerReason.SHAPE, f"bias of {flat.size} for {n} outputs")
    return np.broadcast_to(flat, (n,)).copy()


def conv_matrix(stored: Array, group: int) -> tuple[Array, int, bool]:
    """Reshape a convolution's weight to ``(C / group * taps, M)``; return it, its taps, and whether it is depthwise."""
    if stored.ndim < 3:
        raise UnsupportedNode(IntegerReason.SHAPE, f"convolution weight {list(stored.shape)}")
    m, channels = stored.shape[:2]
    return stored.reshape(m, -1).T, int(np.prod(stored.shape[2:])), channels == 1 and group == m


def blocks(op: str, name: str, codes: Array, bits: int, block: int) -> IntegerDot:
    """Describe blocks of unsigned codes times activations quantized to ``[-127, 127]`` at run time."""
    span, block = (-127, 127), min(block, len(codes))
    return IntegerDot("", op, "blockwise", name, codes.astype(np.int16), "int8", f"uint{bits}", span, None, None, block=block, bits=bits)
