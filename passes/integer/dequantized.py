"""Integer dot products before fusion: MatMul, Gemm and Conv of dequantized values, or of those that QONNX's Quant puts out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.overflow.accumulator import Int64
from magr_onnx.core.overflow.proof import IntegerDot
from magr_onnx.core.packing import MATMULNBITS_BLOCKS, broadcast_grid
from magr_onnx.passes.graph.constants import constant_array
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, only_use, operand, producers
from magr_onnx.passes.integer import quant
from magr_onnx.passes.integer.operands import (
    CONTRIB,
    PASSES_THROUGH,
    Array,
    activation_codes,
    blocks,
    columns,
    constant_codes,
    conv_matrix,
    integer_bias,
    integers,
    required,
    type_of,
    weight_name,
)
from magr_onnx.report.reasons import IntegerReason

DEFAULT_BLOCK = 32  # onnxruntime's block for a fused weight with one scale per tensor or channel (measured)


def _dequantize(value: ir.Value) -> tuple[ir.Node | None, list[ir.Node]]:
    """Return the DequantizeLinear or Quant of a value, and the Transpose and Identity nodes in between, last first."""
    between: list[ir.Node] = []
    for node in producers(value):
        if quant.is_quant(node) or (node.domain in ("", CONTRIB) and node.op_type == "DequantizeLinear"):
            return node, between
        if node.domain not in ("", CONTRIB) or node.op_type not in ("Transpose", "Identity"):
            break
        between.append(node)
    return None, between


def _dequantized_activation(value: ir.Value) -> ir.Node | None:
    """Return the DequantizeLinear or Quant of an activation, through nodes that only move data."""
    moving = PASSES_THROUGH - {"Concat"}
    node = next((node for node in producers(value) if node.op_type not in moving), None)
    return node if node is not None and (node.op_type == "DequantizeLinear" or quant.is_quant(node)) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """A dequantized weight: codes, scales and zero points, all in the shape of the operand."""

    name: str
    codes: Array
    kind: str
    scales: Array
    zeros: Array
    block: int | None  # DequantizeLinear's block_size
    axis: int  # axis of the blocks or channels

    @property
    def bits(self) -> int:
        return int(self.kind.lstrip("uint"))


def _grid(dq: ir.Node, between: list[ir.Node]) -> _Grid:
    if quant.is_quant(dq):
        codes, *full = quant.constant(dq)
        return _turned(_Grid(weight_name(required(dq, 0)), codes, quant.type_of_codes(dq), full[0], full[1], None, 0), between)
    codes, kind = integers(constant_codes(required(dq, 0)))
    scales, zeros = constant_array(required(dq, 1)), constant_array(operand(dq, 2))
    if scales is None:
        raise UnsupportedNode(IntegerReason.SCALE, "of the weight")
    if zeros is None:
        if operand(dq, 2) is not None:
            raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the weight")
        zeros = np.zeros(scales.shape, np.int32)
    axis, block = attribute_of(dq, "axis", 1), attribute_of(dq, "block_size", 0)
    axis += codes.ndim if axis < 0 else 0
    try:
        full = [broadcast_grid(a, codes.shape, axis, block) for a in (scales, zeros.astype(np.int32))]
    except ValueError as error:
        raise UnsupportedNode(IntegerReason.SHAPE, f"scales {list(scales.shape)} for {list(codes.shape)}") from error
    return _turned(_Grid(weight_name(required(dq, 0)), codes, kind, full[0], full[1], block or None, axis), between)


def _turned(grid: _Grid, between: list[ir.Node]) -> _Grid:
    """Transpose a weight as the nodes behind it do."""
    for node in reversed(between):
        if node.op_type == "Transpose":
            perm = attribute_of(node, "perm", None) or tuple(reversed(range(grid.codes.ndim)))
            codes, scales, zeros = (array.transpose(perm) for array in (grid.codes, grid.scales, grid.zeros))
            grid = replace(grid, codes=codes, scales=scales, zeros=zeros, axis=list(perm).index(grid.axis))
    return grid


def product(node: ir.Node) -> IntegerDot:
    """Read a MatMul, Gemm or Conv of dequantized values."""
    x, w = required(node, 0), required(node, 1)
    dq_w, between = _dequantize(w)
    if dq_w is None:
        raise UnsupportedNode(IntegerReason.FLOAT)
    dq_x = _dequantized_activation(x)
    conv = node.op_type == "Conv"
    try:
        grid = _grid(dq_w, between)
    except UnsupportedNode as unsupported:
        if unsupported.reason is IntegerReason.DYNAMIC_WEIGHT and dq_x is not None and constant_array(required(dq_x, 0)) is not None:
            raise UnsupportedNode(IntegerReason.CONSTANT_LEFT) from unsupported
        raise
    flip = node.op_type == "Gemm" and bool(attribute_of(node, "transB", 0))
    if dq_x is None:
        if conv or flip or quant.is_quant(dq_w):
            raise UnsupportedNode(IntegerReason.FLOAT, "activations are floats")
        return _fused_blocks(node, dq_w, grid)
    taps, depthwise = 1, False
    if conv:
        codes, taps, depthwise = conv_matrix(grid.codes, attribute_of(node, "group", 1))
        scales, zeros = (a.reshape(len(a), -1).T for a in (grid.scales, grid.zeros))
    else:
        codes, scales, zeros = (columns(np.swapaxes(a, -1, -2) if flip else a) for a in (grid.codes, grid.scales, grid.zeros))
    block = _steps(scales, zeros, grid.block)
    x_scale = constant_array(required(dq_x, 1))
    if x_scale is None or x_scale.size != 1:
        raise UnsupportedNode(IntegerReason.SCALE, "of the activation")
    x_type, span, x_zeros = _activation(dq_x)
    w_zeros = zeros[:1] if block is None else zeros
    added = _added_bias(node) if node.op_type == "MatMul" else None
    form = "Quant" if quant.is_quant(dq_x) else "QDQ"
    op, codes, w_zeros = f"{node.op_type} ({form})", np.ascontiguousarray(codes), np.ascontiguousarray(w_zeros, np.int64)
    dot = IntegerDot("", op, "qdq", grid.name, codes, x_type, grid.kind, span, x_zeros, w_zeros, block=block, taps=taps, bits=grid.bits)
    bias = _dequantized_bias(operand(node, 2) if added is None else added, dot.n, scales[0] * x_scale.reshape(()))
    made = quant.is_quant(dq_x) or any(
        producer.op_type not in PASSES_THROUGH for producer in producers(required(dq_x, 0))
    )  # not moved from an input
    return replace(dot, bias=bias, bias_may_be_float=added is not None, depthwise=depthwise, quantized_in_graph=made)


def _activation(dq: ir.Node) -> tuple[str, tuple[int, int], tuple[int, ...]]:
    """Return type, range and zero point of the codes of an activation."""
    if quant.is_quant(dq):
        zeros = quant.zero_points(dq)
        if zeros.size != 1:
            raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the activation")
        return quant.type_of_codes(dq), quant.span_of(dq), (int(zeros.item()),)
    if operand(dq, 2) is not None and constant_array(operand(dq, 2)) is None:
        raise UnsupportedNode(IntegerReason.ZERO_POINT, "of the activation")
    return activation_codes(required(dq, 0), operand(dq, 2))


def _steps(scales: Array, zeros: Array, block: int | None) -> int | None:
    """Return the rows that share a scale in all columns: None for all of K, else the block."""
    if (scales == scales[:1]).all() and (zeros == zeros[:1]).all():
        return None
    if block is not None:
        starts = np.arange(len(scales)) // block * block
        if (scales == scales[starts]).all() and (zeros == zeros[starts]).all():
            return block
    raise UnsupportedNode(IntegerReason.SCALE, "they change along K")


def _dequantized_bias(value: ir.Value | None, n: int, scales: Array) -> Int64 | None:
    """Return the integer bias of a DequantizeLinear, or of a Quant on the grid of the sums; None where the bias is added as floats.

    Args:
        value: The bias.
        n: How many outputs there are.
        scales: Of the sums ``(n,)``.
    """
    dq, _ = (None, []) if value is None else _dequantize(value)
    if dq is None or not quant.is_quant(dq):
        return None if dq is None else integer_bias(required(dq, 0), n)
    codes, of_bias, zeros = quant.constant(dq)
    on_grid = codes.size == n and not zeros.any() and (of_bias.reshape(-1).astype(np.float32) == scales.astype(np.float32)).all()
    return codes.reshape(-1).astype(np.int64) if on_grid else None


def _added_bias(node: ir.Node) -> ir.Value | None:
    """Return the dequantized int32 bias of an Add that is a MatMul's only reader: onnxruntime may fuse the two to a Gemm."""
    add, index = only_use(node.outputs[0])
    if add is None or (add.domain, add.op_type) != ("", "Add"):
        return None
    operand_added = add.inputs[1 - index]
    dq = None if operand_added is None else _dequantize(operand_added)[0]
    return operand_added if dq is not None and type_of(required(dq, 0)) == "int32" else None


def _fused_blocks(node: ir.Node, dq: ir.Node, grid: _Grid) -> IntegerDot:
    """Read a float activation times a dequantized weight, which onnxruntime fuses to MatMulNBits with int8 activations."""
    bits = grid.bits
    uses = len(list(dq.outputs[0].uses()))
    if grid.codes.ndim != 2 or bits not in (2, 4, 8) or uses != 1 or dq.outputs[0].is_graph_output():
        raise UnsupportedNode(IntegerReason.FLOAT, "activations are floats, and the weight is not one that is fused")
    if grid.block is None:
        _steps(grid.scales, grid.zeros, None)
    elif grid.block not in MATMULNBITS_BLOCKS or grid.axis != 0:
        raise UnsupportedNode(IntegerReason.FLOAT, f"activations are floats, and blocks of {grid.block} on this axis are not fused")
    shift = 0 if grid.kind.startswith("u") else 1 << (bits - 1)
    return blocks(f"{node.op_type} (QDQ)", grid.name, grid.codes + shift, bits, grid.block or DEFAULT_BLOCK)
