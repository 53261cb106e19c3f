"""Registers of the kernel that computes a layer, on a named target or for a given accumulator.

onnxruntime's kernels, measured as described in `magr_onnx.core.overflow.targets`:

- Products of matrices (MatMulInteger, QLinearMatMul, QGemm, DynamicQuantizeMatMul, MatMulIntegerToFloat, and DequantizeLinear forms, which
  are fused into them) visit K in order.
- QLinearConv and fused Conv visit K as (kernel taps, channels); depthwise ones have kernels of their own, exact on x86, with pairs of taps
  in 16 bits on ARM without dot product (adjacent taps, or ``k`` and ``k + 2`` of four in a 3 x 3 kernel with channels in multiples of 16).
- ConvInteger visits K as (channels, taps), and the weight is the LEFT operand: it is uint8 weights with int8 activations that saturate
  on AVX2, not the other way around.
- MatMulNBits with int8 activations multiplies ``[-127, 127]`` by the unsigned codes as stored; on AVX2 two products of up to 4-bit codes
  share 16 bits, and 8-bit codes are split into even and odd ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from magr_onnx.core.overflow.accumulator import Accumulator, Rows
from magr_onnx.core.overflow.proof import IntegerDot, KernelRegisters
from magr_onnx.core.overflow.targets import Kernel, Target


def on_accumulator(dot: IntegerDot, accumulator: Accumulator) -> KernelRegisters:
    """Return the registers of ``accumulator``, for raw codes in the order of K.

    Where the order decides which rows share a tile and the target is unknown (convolutions), both orders must hold. MatMulNBits sums
    at most a block: block sums are scaled as floats.
    """
    plain = np.arange(dot.k)
    orders: tuple[Rows, ...] = (plain,)
    label = ""
    if dot.taps > 1 and dot.block is None and accumulator.tile is not None:
        channels_last = dot.channels_last()
        if not np.array_equal(channels_last, plain):
            orders, label = (plain, channels_last), "both (channels, taps) and (taps, channels)"
    return KernelRegisters(accumulator, orders, label=label)


def on_target(dot: IntegerDot, target: Target, outer_bits: int | None = None) -> KernelRegisters | str:
    """Return the registers of onnxruntime's kernel for ``dot`` on ``target``, or the reason why there is none.

    Args:
        dot: The layer.
        target: The machine.
        outer_bits: Width of the outer register, instead of the target's own.

    Raises:
        OptionError: The outer register is narrower than the inner one.
    """
    if dot.form == "blockwise":
        inner = target.blockwise if dot.bits <= 4 or target.blockwise.tile is None else replace(target.blockwise, tile=1)
        registers = KernelRegisters(inner, (np.arange(dot.k),))
    else:
        if dot.x_type not in ("int8", "uint8") or (dot.w_type not in ("int8", "uint8")):
            return f"onnxruntime computes {dot.x_type} x {dot.w_type} in floats"
        if dot.form == "qdq" and dot.block is not None:
            return "scales change along K: onnxruntime has no integer kernel for them, and what it fuses them into is wrong"
        x_signed, w_signed = dot.x_type == "int8", dot.w_type == "int8"
        if dot.form == "qdq" and x_signed and target.qdq_unsigned and not dot.quantized_in_graph:
            return f"int8 activations from outside the graph are not fused on {target.name}"
        if dot.weight_left:
            kernel = target.kernel(w_signed, x_signed)
            label = "(channels, taps), weights on the left" if dot.taps > 1 else ""
            registers = KernelRegisters(kernel.accumulator, (kernel.order(dot.k),), 0, kernel.shift, label)
        else:
            registers = _integer(dot, target, target.kernel(x_signed, w_signed, qdq=dot.form == "qdq"))
    if outer_bits is None:
        return registers
    inner = registers.accumulator
    bits = outer_bits if inner.tile is None else inner.bits
    return replace(registers, accumulator=replace(inner, bits=bits, outer_bits=outer_bits))


def _integer(dot: IntegerDot, target: Target, kernel: Kernel) -> KernelRegisters:
    if dot.taps == 1 and not dot.depthwise:
        return KernelRegisters(kernel.accumulator, (kernel.order(dot.k),), kernel.shift)
    if not dot.depthwise:
        channels_last = dot.channels_last()
        order = kernel.order(dot.k)
        return KernelRegisters(kernel.accumulator, (np.where(order < 0, -1, channels_last[order]),), kernel.shift, 0, "(taps, channels)")
    if not target.depthwise_pairs:
        return KernelRegisters(Accumulator(32, None, kernel.accumulator.outer_bits), (np.arange(dot.k),), kernel.shift, 0, "depthwise")
    orders = [np.arange(dot.k), Kernel(stride=2).order(dot.k)] if kernel.accumulator.tile == 2 else [np.arange(dot.k)]
    if kernel.stride > 1:
        orders.append(kernel.order(dot.k))
    return KernelRegisters(kernel.accumulator, tuple(orders), kernel.shift, 0, "depthwise: taps (k, k + 1) and (k, k + 2)")
