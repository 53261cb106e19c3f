"""Proof over all inputs that an integer dot product fits its registers, or a witness where it does not.

Three claims about a layer, each about one register:

- *inner*: the sum of a tile, as the kernel adds it: RAW activation codes (with a flipped sign bit where the kernel flips it) times raw
  weight codes;
- *outer*: the sum of the tiles, raw too, with the integer bias, before and after it is added;
- *result*: what the operator defines, ``sum (x - zero point) (w - zero point) + bias``.

Extremes are those of `magr_onnx.core.overflow.accumulator`, exact over all inputs and all orders within a tile. Everything here is int64
or Python integers; only the displayed headroom is a float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from magr_onnx.core.overflow.accumulator import (
    Accumulator,
    Int64,
    Integers,
    Rows,
    bits_for,
    column_pieces,
    extremes,
    log2_gap,
    taps_first,
    tile_starts,
)

ClaimName = Literal["inner", "outer", "result"]


@dataclass(frozen=True, slots=True, eq=False)
class IntegerDot:
    """A dot product of activation codes with constant weight codes, computed by any kind of node.

    Attributes:
        name: Node name, unique among those of a model.
        op: Operator, and the form it has in the graph.
        form: How it is computed: ``integer`` by an integer operator, ``qdq`` by what onnxruntime fuses DequantizeLinear nodes into,
            ``blockwise`` by MatMulNBits with activations quantized at run time.
        weight: Name of the weight.
        codes: Raw weight codes ``(K, N)``; for convolutions K is (channels of a group, kernel taps) as in ONNX and N all channels.
        x_type: Type of the activation codes.
        w_type: Type of the weight codes.
        x_range: Least and greatest activation code of that type.
        x_zeros: Zero points of the activation: one constant, or the least and greatest where it is chosen at run time; None where
            the operator has none (blockwise).
        w_zeros: Zero points of the weight, ``(1, N)`` or ``(K, N)``; None for blockwise.
        bias: Integer bias ``(N,)`` added in the accumulator, if there is one.
        block: Terms after which the sum is scaled as a float; None for all of K.
        taps: Kernel taps of a convolution; 1 for matrix products.
        depthwise: Whether every channel of a convolution is its own group.
        weight_left: Whether the kernel takes the weight as its left operand (ConvInteger).
        quantized_in_graph: Whether a QuantizeLinear in the graph makes the activation codes.
        bits: Width of the weight codes.
        bias_may_be_float: Whether the bias is added as floats where onnxruntime does not fuse it: the result must fit without it as well.
    """

    name: str
    op: str
    form: Literal["integer", "qdq", "blockwise"]
    weight: str
    codes: Integers
    x_type: str
    w_type: str
    x_range: tuple[int, int]
    x_zeros: tuple[int, ...] | None
    w_zeros: Int64 | None
    bias: Int64 | None = None
    block: int | None = None
    taps: int = 1
    depthwise: bool = False
    weight_left: bool = False
    quantized_in_graph: bool = True
    bits: int = 8
    bias_may_be_float: bool = False

    @property
    def k(self) -> int:
        return int(self.codes.shape[0])

    @property
    def n(self) -> int:
        return int(self.codes.shape[1])

    def channels_last(self) -> Rows:
        """Rows in the order (taps, channels), as onnxruntime's quantized convolution visits them."""
        return taps_first(self.k, self.taps)


@dataclass(frozen=True, slots=True, eq=False)
class KernelRegisters:
    """The registers of the kernel of one layer.

    Attributes:
        accumulator: The registers.
        orders: Orders of K a kernel may visit, each ``(K',)`` rows with -1 for a padded zero; all of them must hold.
        x_shift: Added to activation codes before they are multiplied.
        w_shift: Added to weight codes before they are multiplied.
        label: The order or orders, in words.
    """

    accumulator: Accumulator
    orders: tuple[Rows, ...]
    x_shift: int = 0
    w_shift: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """Range of one register's sum.

    Attributes:
        low: The least value any input reaches.
        high: The greatest.
        bits: Width of the register.
        needed: The least width that holds both.
        headroom: How many times the worst case could double, in bits; None for a sum that is always zero.
        holds: Whether the register is wide enough.
    """

    low: int
    high: int
    bits: int
    needed: int
    headroom: float | None
    holds: bool

    @staticmethod
    def of(low: int, high: int, bits: int) -> Claim:
        needed = bits_for(low, high)
        return Claim(low, high, bits, needed, None if low == high == 0 else log2_gap(low, high, bits), needed <= bits)


@dataclass(frozen=True, slots=True, eq=False)
class Witness:
    """An input that a register cannot hold.

    Attributes:
        claim: Which register.
        column: Output channel.
        rows: Rows of K the register had added, in the kernel's order.
        x: Raw activation codes ``(K,)``, in the order of the graph.
        x_zero: Zero point of the activation in the sum ``result``; 0 in raw sums.
        exact: The true sum in that register.
        wrapped: The value in the register instead, wrapped or clipped.
        dot: The true integer dot product of the layer at ``column``: raw for inner and outer (there with the bias, if that is what
            overflows), with zero points, and the bias where it is in the sum, for result.
        simulated: The same, as computed by the registers.
    """

    claim: ClaimName
    column: int
    rows: tuple[int, ...]
    x: Int64
    x_zero: int
    exact: int
    wrapped: int
    dot: int
    simulated: int


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """The claims of one layer and, where one fails, its witness."""

    inner: Claim
    outer: Claim
    result: Claim | None
    witness: Witness | None

    @property
    def holds(self) -> bool:
        return self.inner.holds and self.outer.holds and (self.result is None or self.result.holds)


def wrap(value: int, bits: int) -> int:
    """Wrap a value in two's complement."""
    half = 1 << (bits - 1)
    return (value + half) % (1 << bits) - half


def hold(value: int, bits: int, saturating: bool) -> int:
    """Store a value in a register of ``bits``: clip or wrap it."""
    half = 1 << (bits - 1)
    return min(max(value, -half), half - 1) if saturating else wrap(value, bits)


class _Extremes:
    """Running minimum and maximum, each with its position."""

    def __init__(self) -> None:
        self.low, self.high = 0, 0
        self.low_at: Any = None
        self.high_at: Any = None

    def update(self, low: Int64, high: Int64, at: Callable[[int, int], Any]) -> None:
        """Update with extremes ``(rows, columns)``; ``at`` maps an index to a position."""
        if not low.size:
            return
        i, j = np.unravel_index(int(low.argmin()), low.shape)
        if self.low_at is None or low[i, j] < self.low:
            self.low, self.low_at = int(low[i, j]), at(int(i), int(j))
        i, j = np.unravel_index(int(high.argmax()), high.shape)
        if self.high_at is None or high[i, j] > self.high:
            self.high, self.high_at = int(high[i, j]), at(int(i), int(j))

    def overflow(self, bits: int) -> tuple[Any, bool]:
        """Return the position where a register of ``bits`` overflows, and whether above."""
        above = self.high > 2 ** (bits - 1) - 1
        return (self.high_at, True) if above else (self.low_at, False)


def _ordered(codes: Integers, order: Rows) -> Integers:
    ordered = codes[order]
    if (order < 0).any():
        ordered[order < 0] = 0
    return ordered


def prove(dot: IntegerDot, registers: KernelRegisters) -> Proof:
    """Decide the claims of a layer on the registers of a kernel."""
    acc = registers.accumulator
    x_low, x_high = dot.x_range[0] + registers.x_shift, dot.x_range[1] + registers.x_shift
    inner, outer, result = _Extremes(), _Extremes(), _Extremes()
    for columns in column_pieces(dot.codes):
        first_column = columns.start
        chunk = dot.codes[:, columns].astype(np.int64)
        bias = 0 if dot.bias is None else dot.bias[columns]
        for number, order in enumerate(registers.orders):
            ordered = _ordered(chunk + registers.w_shift, order)
            low, high = extremes(ordered, acc.tile, x_low, x_high, dot.block)
            starts = tile_starts(len(order), acc.tile, dot.block)
            inner.update(low, high, lambda t, c, o=number, s=starts, f=first_column: (o, s, t, f + c))  # type: ignore[misc]
            blocks = np.flatnonzero(np.isin(starts, tile_starts(len(order), None, dot.block)))
            low, high = np.add.reduceat(low, blocks, axis=0), np.add.reduceat(high, blocks, axis=0)
            outer.update(low + np.minimum(bias, 0), high + np.maximum(bias, 0), lambda b, c, o=number, f=first_column: (o, b, f + c))  # type: ignore[misc]
        if dot.x_zeros is not None and dot.w_zeros is not None:
            levels = chunk - dot.w_zeros[:, columns]
            for zero in dot.x_zeros:
                low, high = extremes(levels, None, dot.x_range[0] - zero, dot.x_range[1] - zero, dot.block)
                least, most = (np.minimum(bias, 0), np.maximum(bias, 0)) if dot.bias_may_be_float else (bias, bias)
                result.update(low + least, high + most, lambda b, c, z=zero, f=first_column: (z, b, f + c))  # type: ignore[misc]
    claims = (
        Claim.of(inner.low, inner.high, acc.bits),
        Claim.of(outer.low, outer.high, acc.outer_bits),
        None if dot.x_zeros is None or dot.w_zeros is None else Claim.of(result.low, result.high, acc.outer_bits),
    )
    witness = None
    if not claims[0].holds:
        (number, starts, tile, column), above = inner.overflow(acc.bits)
        stop = starts[tile + 1] if tile + 1 < len(starts) else len(registers.orders[number])
        witness = _raw_witness(dot, registers, "inner", number, slice(int(starts[tile]), int(stop)), column, above)
    elif not claims[1].holds:
        (number, block, column), above = outer.overflow(acc.outer_bits)
        size = dot.block or len(registers.orders[number])
        witness = _raw_witness(dot, registers, "outer", number, slice(block * size, (block + 1) * size), column, above)
    elif claims[2] is not None and not claims[2].holds:
        witness = _result_witness(dot, registers, *result.overflow(acc.outer_bits))
    return Proof(*claims, witness)


def _raw_witness(
    dot: IntegerDot, registers: KernelRegisters, claim: ClaimName, number: int, span: slice, column: int, above: bool
) -> Witness:
    """Build the input with the extreme sum over ``span`` and all other products zero."""
    order = registers.orders[number]
    rows = order[span][order[span] >= 0]
    codes = dot.codes[:, column].astype(np.int64) + registers.w_shift
    low, high = dot.x_range[0] + registers.x_shift, dot.x_range[1] + registers.x_shift
    x = np.zeros(dot.k, np.int64)
    x[rows] = np.where((codes[rows] > 0) == above, high, low)
    x[codes == 0] = 0
    acc = registers.accumulator
    bias = 0 if dot.bias is None else int(dot.bias[column])
    total = sum(int(a) * int(b) for a, b in zip(x[rows], codes[rows], strict=True))
    added = bias if (bias > 0) == above else 0  # the sum with or without the bias, whichever is further out
    exact = total if claim == "inner" else total + added
    bits, saturating = (acc.bits, acc.saturating) if claim == "inner" else (acc.outer_bits, False)
    raw = x - registers.x_shift
    plain = sum(int(a) * int(b) for a, b in zip(raw, dot.codes[:, column], strict=True))
    simulated = simulate(dot, registers, raw, column, number)
    if claim == "outer":
        plain, simulated = plain + added, wrap(simulated + added, acc.outer_bits)
    return Witness(claim, column, tuple(map(int, rows)), raw, 0, exact, hold(exact, bits, saturating), plain, simulated)


def _result_witness(dot: IntegerDot, registers: KernelRegisters, at: tuple[int, int, int], above: bool) -> Witness:
    zero, block, column = at
    assert dot.w_zeros is not None
    size = dot.block or dot.k
    rows = range(block * size, min((block + 1) * size, dot.k))
    zeros = np.broadcast_to(dot.w_zeros[:, column], (dot.k,))
    x = np.full(dot.k, zero, np.int64)
    total = 0 if dot.bias is None else int(dot.bias[column])
    if dot.bias_may_be_float and (total > 0) != above:
        total = 0
    for row in rows:
        level = int(dot.codes[row, column]) - int(zeros[row])
        if level:
            x[row] = dot.x_range[1] if (level > 0) == above else dot.x_range[0]
            total += (int(x[row]) - zero) * level
    wrapped = wrap(total, registers.accumulator.outer_bits)
    return Witness("result", column, tuple(rows), x, zero, total, wrapped, total, wrapped)


def simulate(dot: IntegerDot, registers: KernelRegisters, x: Int64, column: int, order: int = 0) -> int:
    """Compute the raw dot product ``sum x w`` of one column as the registers do, in exact integers.

    Tile sums are stored in the inner register; the outer one adds them and removes the kernel's shifts. A tile's sum is formed exactly
    before it is stored: that equals a register that wraps, or one that clips only at the end.
    """
    acc = registers.accumulator
    rows = registers.orders[order]
    codes = dot.codes[:, column].astype(np.int64)
    starts = list(map(int, tile_starts(len(rows), acc.tile, dot.block)))
    total = 0
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        tile = [int(r) for r in rows[start:stop] if r >= 0]
        exact = sum((int(x[r]) + registers.x_shift) * (int(codes[r]) + registers.w_shift) for r in tile)
        total = hold(total + hold(exact, acc.bits, acc.saturating), acc.outer_bits, False)
    a, b = registers.x_shift, registers.w_shift
    correction = a * int(codes.sum()) + b * int(x.sum()) + a * b * dot.k
    return wrap(total - correction, acc.outer_bits)
