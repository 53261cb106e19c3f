"""Reading the operands of integer products: constants, types, ranges and zero points, or the reason one cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.overflow.proof import Int64, IntegerDot
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, constant, operand
from magr_onnx.report.reasons import IntegerReason

Array = npt.NDArray[Any]
CONTRIB = "com.microsoft"


PASSES_THROUGH = frozenset(
    {
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that move activation codes and leave their type alone."""


def required(node: ir.Node, index: int) -> ir.Value:
    """Input ``index`` of a node."""
    value = operand(node, index)
    if value is None:
        raise UnsupportedNode(IntegerReason.SHAPE, f"input {index} is missing")
    return value


def integers(array: Array) -> tuple[Array, str]:
    """Integer codes in a NumPy type of their own, and the name of the type they are stored in."""
    name = array.dtype.name
    if name not in RANGES:
        raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, name)
    wide = np.int16 if name in ("int16", "uint8", "int8") else np.int32 if name == "uint16" else np.int8
    return array.astype(wide), name


def constant_codes(value: ir.Value) -> Array:
    """Constant codes, also those a QuantizeLinear makes of a constant float weight, which onnxruntime folds.

    The arithmetic is its: float32 division, rounding half to even, saturation.
    """
    node = value.producer()
    if node is None or node.op_type != "QuantizeLinear" or node.domain != "":
        return constant_weight(value)
    floats, scales, zeros = (constant(operand(node, i)) for i in range(3))
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


def _range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


RANGES = {f"{'' if signed else 'u'}int{bits}": _range(bits, signed) for bits in (2, 4, 8, 16) for signed in (True, False)}


def constant_weight(value: ir.Value, other: ir.Value | None = None) -> Array:
    """The constant behind a weight operand; ``other`` is the other side, to tell which one is constant."""
    found = constant(value)
    if found is None:
        left = other is not None and constant(other) is not None
        raise UnsupportedNode(IntegerReason.CONSTANT_LEFT if left else IntegerReason.DYNAMIC_WEIGHT)
    if found.size == 0:
        raise UnsupportedNode(IntegerReason.SHAPE, f"weight has shape {list(found.shape)}")
    return found


def weight_name(value: ir.Value) -> str:
    """Name of the initializer or Constant behind a weight."""
    for _ in range(16):
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return str(value.name)


def type_of(value: ir.Value) -> str | None:
    """The type of activation codes, also where the graph does not say it."""
    for _ in range(64):
        if value.dtype is not None:
            return value.dtype.name.lower()
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "DynamicQuantizeLinear":
            return "uint8"
        if node.op_type == "QuantizeLinear":
            zero = operand(node, 2)
            named = ir.DataType(attribute_of(node, "output_dtype", 0))
            if zero is None:
                return "uint8" if named == ir.DataType.UNDEFINED else named.name.lower()
            value = zero
        elif node.op_type in PASSES_THROUGH and node.inputs and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            return None
    return None


def activation_codes(codes: ir.Value, zero: ir.Value | None, default_zero: int | None = 0) -> tuple[str, tuple[int, int], tuple[int, ...]]:
    """Type, range and zero points of activation codes; the least and greatest zero point where it is chosen at run time."""
    kind = type_of(codes) or (None if zero is None else type_of(zero))
    held = constant(zero)
    if kind is None and held is not None:
        kind = held.dtype.name
    if kind not in RANGES:
        raise UnsupportedNode(IntegerReason.ACTIVATION_TYPE, str(kind))
    span = RANGES[kind]
    if zero is None:
        if default_zero is None:
            raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the activation")
        return kind, span, (default_zero,)
    if held is None:
        return kind, span, span
    values = held.astype(np.int64).reshape(-1)
    return kind, span, tuple(sorted({int(values.min()), int(values.max())})) if values.size else (0,)


def columns(array: Array) -> Array:
    """``(..., K, N)``, or ``(K,)``, as ``(K, N')``: every output of a batched product is a column."""
    if array.ndim == 0:
        raise UnsupportedNode(IntegerReason.SHAPE, "weight is a scalar")
    if array.ndim == 1:
        return array[:, None]
    return np.moveaxis(array, -2, 0).reshape(array.shape[-2], -1)


def weight_zeros(value: ir.Value | None, shape: tuple[int, ...]) -> Int64:
    """Weight zero points of an integer matrix product, as ``(1, N')``: one, one a column, or batched ``(..., 1, N)``."""
    if value is None:
        return np.zeros((1, 1), np.int64)
    found = constant(value)
    if found is None:
        raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the weight")
    zeros = found.astype(np.int64)
    try:
        return columns(np.broadcast_to(zeros, shape)).astype(np.int64)[:1] if zeros.size > 1 else zeros.reshape(1, 1)
    except ValueError as error:
        raise UnsupportedNode(IntegerReason.SHAPE, f"weight zero point {list(zeros.shape)}") from error


def spread(zeros: Int64, n: int) -> Int64:
    """Zero points of every column."""
    return np.ascontiguousarray(np.broadcast_to(zeros, (len(zeros), n)))


def integer_bias(value: ir.Value | None, n: int) -> Int64 | None:
    """A constant integer bias ``(n,)``; None if there is none."""
    if value is None:
        return None
    found = constant(value)
    if found is None:
        raise UnsupportedNode(IntegerReason.BIAS)
    if not np.issubdtype(found.dtype, np.integer):
        raise UnsupportedNode(IntegerReason.BIAS, found.dtype.name)
    flat = found.astype(np.int64).reshape(-1)
    if flat.size not in (1, n):
        raise UnsupportedNode(IntegerReason.SHAPE, f"bias of {flat.size} for {n} outputs")
    return np.broadcast_to(flat, (n,)).copy()


def broadcast_grid(values: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Scales or zero points broadcast to the codes: one, one a slice of ``axis``, or one a block along it."""
    if values.size == 1:
        return np.broadcast_to(values.reshape((1,) * len(shape)), shape)
    if block:
        return np.broadcast_to(np.repeat(values, block, axis=axis)[(slice(None),) * axis + (slice(shape[axis]),)], shape)
    return np.broadcast_to(values.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def unrolled(stored: Array, group: int) -> tuple[Array, int, bool]:
    """A convolution's weight as ``(C / group * taps, M)``, its taps, and whether it is depthwise."""
    if stored.ndim < 3:
        raise UnsupportedNode(IntegerReason.SHAPE, f"convolution weight {list(stored.shape)}")
    m, channels = stored.shape[:2]
    return stored.reshape(m, -1).T, int(np.prod(stored.shape[2:])), channels == 1 and group == m


def blocks(op: str, name: str, codes: Array, bits: int, block: int) -> IntegerDot:
    """Blocks of unsigned codes that meet activations quantized to ``[-127, 127]`` at run time."""
    return IntegerDot(
        "",
        op,
        "blockwise",
        name,
        codes.astype(np.int16),
        "int8",
        f"uint{bits}",
        (-127, 127),
        None,
        None,
        block=min(block, len(codes)),
        bits=bits,
    )
