"""Quantizers of QONNX and Brevitas: Quant (also called IntQuant) and BipolarQuant, whose results are floats on a grid of any width.

    Quant(x, s, z, b) = s (round(clip(x / s + z, low, high)) - z),    BipolarQuant(x, s) = s if x >= 0 else -s

``low`` and ``high`` are those of ``b`` bits: ``[-2^(b - 1), 2^(b - 1) - 1]`` if signed, one more at the lower end if narrow; else
``[0, 2^b - 1]``, one less at the upper end if narrow. Signed, one bit is -1 or 1. Source: qonnx.custom_op.general of
fastmachinelearning/qonnx, whose arithmetic in float32 this is. The product of two such values is one of their codes, and two scales.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.constants import constant_array
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, operand
from magr_onnx.passes.integer.operands import RANGES, Array, required
from magr_onnx.report.reasons import IntegerReason

DOMAINS = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")
OPERATORS = ("BipolarQuant", "IntQuant", "Quant")
_ROUNDING: dict[str, Callable[[Array], Array]] = {"ROUND": np.rint, "CEIL": np.ceil, "FLOOR": np.floor}


def is_quant(node: ir.Node) -> bool:
    """Whether a node is one of these quantizers."""
    return node.domain in DOMAINS and node.op_type in OPERATORS


def _is_bipolar(node: ir.Node) -> bool:
    return node.op_type == "BipolarQuant" or (bool(attribute_of(node, "signed", 1)) and _bits(node) == 1)


def _bits(node: ir.Node) -> int:
    array = constant_array(operand(node, 3))
    if array is None or array.size != 1 or array.item() != int(array.item()) or not 1 <= array.item() <= 16:
        raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, f"{node.op_type} of a width that is not constant, whole and at most 16 bits")
    return int(array.item())


def span_of(node: ir.Node) -> tuple[int, int]:
    """Return the least and the greatest code of a quantizer.

    Raises:
        UnsupportedNode: The width is not known, or is no whole number of 1 to 16 bits.
    """
    if _is_bipolar(node):
        return -1, 1
    bits, signed, narrow = _bits(node), bool(attribute_of(node, "signed", 1)), bool(attribute_of(node, "narrow", 0))
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def type_of_codes(node: ir.Node) -> str:
    """Return the type of 8 or 16 bits that has the codes of a quantizer, unsigned if none is negative."""
    low, high = span_of(node)
    kinds = ("uint8", "uint16") if low >= 0 else ("int8", "int16")
    return next(kind for kind in kinds if RANGES[kind][0] <= low and high <= RANGES[kind][1])


def zero_points(node: ir.Node) -> Array:
    """Return the zero points of a quantizer, as integers.

    Raises:
        UnsupportedNode: They are computed at run time, or are no whole numbers.
    """
    if node.op_type == "BipolarQuant":
        return np.zeros((), np.int32)
    zeros = constant_array(required(node, 2))
    if zeros is None or (zeros != np.rint(zeros)).any():
        raise UnsupportedNode(IntegerReason.ZERO_POINT, f"of {node.op_type} is computed, or no whole number")
    whole: Array = zeros.astype(np.int32)
    return whole


def constant(node: ir.Node) -> tuple[Array, Array, Array]:
    """Return codes, scales and zero points of a quantizer of constants, all in the shape of its input.

    Raises:
        UnsupportedNode: They are computed at run time, or cannot be read.
    """
    floats, scales = (constant_array(required(node, i)) for i in (0, 1))
    zeros, (low, high) = zero_points(node), span_of(node)
    if floats is None:
        raise UnsupportedNode(IntegerReason.DYNAMIC_WEIGHT)
    if scales is None or not (scales > 0).all():
        raise UnsupportedNode(IntegerReason.SCALE, "of the weight")
    try:
        full = [np.broadcast_to(array, floats.shape) for array in (scales, zeros)]
    except ValueError as error:
        raise UnsupportedNode(IntegerReason.SHAPE, f"scales {list(scales.shape)} for {list(floats.shape)}") from error
    if _is_bipolar(node):
        codes = np.where(floats / full[0] + full[1] >= 0, 1, -1)
    else:
        mode = str(attribute_of(node, "rounding_mode", "ROUND")).upper()
        if mode not in _ROUNDING:
            raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, f"rounding mode {mode}")
        steps = floats.astype(np.float32) / full[0].astype(np.float32) + full[1].astype(np.float32)
        if np.isnan(steps).any():
            raise UnsupportedNode(IntegerReason.WEIGHT_TYPE, "the float weight quantizes to NaN")
        codes = _ROUNDING[mode](np.clip(steps, low, high))
    return codes.astype(np.int32), full[0], full[1]
