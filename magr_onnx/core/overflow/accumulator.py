"""Integer accumulators: exact bounds of dot products, and the codes that fit.

A dot product of activations ``x`` in ``[x_min, x_max]`` (``x_min <= 0 <= x_max``) with integer codes ``q`` is summed in tiles of ``T``
consecutive terms, each in a register of ``P`` bits; tile sums are added in an outer register. Over all inputs and all orders of
summation a tile with ``p`` the sum of its positive codes and ``m`` the sum of its negative ones reaches exactly

    x_max p + x_min m   at most,      x_max m + x_min p   at least,

because positive and negative terms can be drawn separately (A2Q, Colbert et al., arXiv 2308.13504, bounds the same by the l1 norm;
A2Q+, arXiv 2401.10432, splits it by sign; AXE, arXiv 2409.17092, keeps ``p`` and ``m`` as running sums). All of it is integer
arithmetic: no float takes part in a verdict. Kernels multiply RAW codes, so the range of an asymmetric uint8 activation is 0 to 255
whatever its zero point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.errors import OptionError

Integers = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]
CHUNK = 1 << 22  # elements of a weight widened to 64 bits at a time


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A register that sums ``tile`` products, and the one that sums the tiles.

    Attributes:
        bits: Width ``P`` of the register, two's complement.
        tile: Consecutive terms ``T`` along K that share it; None for the whole dot product.
        outer_bits: Width of the register the tile sums are added in.
        saturating: Whether the register clips on overflow (else it wraps).
    """

    bits: int = 32
    tile: int | None = None
    outer_bits: int = 32
    saturating: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 64 or not self.bits <= self.outer_bits <= 64:
            raise OptionError(f"accumulators have 2 to 64 bits, the outer one no fewer; got {self.bits} and {self.outer_bits}")
        if self.tile is not None and self.tile < 1:
            raise OptionError(f"accumulator tile {self.tile} must be at least 1, or none for the whole dot product")

    def __str__(self) -> str:
        per = "the whole dot product" if self.tile is None else f"{self.tile} terms"
        return f"{self.bits} bits{' saturating' if self.saturating else ''} for {per}"


@dataclass(frozen=True, slots=True)
class Budget:
    """An accumulator and the range ``[x_min, x_max]`` of activations: the bound on sums of codes.

    Attributes:
        accumulator: The registers.
        x_min: Least raw activation code, 0 or negative.
        x_max: Greatest raw activation code, positive.
        taps: Orders of K whose consecutive rows share a tile; all must hold. 1 is that of the rows; of a convolution, whose rows are
            (channels, taps), its number of taps is that of `taps_first`.
    """

    accumulator: Accumulator
    x_min: int = 0
    x_max: int = 255
    taps: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.x_min <= 0 < self.x_max:
            raise OptionError(f"the activation range [{self.x_min}, {self.x_max}] must hold 0 and a positive code")

    @property
    def high(self) -> int:
        """The largest sum the inner register holds."""
        return int(2 ** (self.accumulator.bits - 1) - 1)

    @property
    def low(self) -> int:
        """The least sum the inner register holds."""
        return int(-(2 ** (self.accumulator.bits - 1)))

    @property
    def largest_code(self) -> int:
        """The largest ``c`` such that a lone code ``c``, and a lone ``-c``, cannot overflow; 0 when the budget is infeasible."""
        code = min(self.high, -self.low) // self.x_max
        return min(code, self.high // -self.x_min, -self.low // -self.x_min) if self.x_min else code

    @property
    def l1(self) -> float:
        """The l1 norm of zero-sum codes that is always safe (A2Q+, arXiv 2401.10432, eq. 11): ``2 high / (x_max - x_min)``."""
        return 2 * self.high / (self.x_max - self.x_min)

    @property
    def l1_any(self) -> float:
        """The l1 norm that is safe for codes of any sign pattern (A2Q, arXiv 2308.13504, eq. 15): ``high / max |x|``."""
        return self.high / max(self.x_max, -self.x_min)

    def column_extremes(self, codes: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the least and greatest sum of any tile in every column of ``codes (K, N)``, ``(N,)`` each; exact for integer codes."""
        bounds = [(low.min(axis=0), high.max(axis=0)) for low, high in self.tile_extremes(codes)]
        return np.concatenate([low for low, _ in bounds]), np.concatenate([high for _, high in bounds])

    def tile_extremes(self, codes: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Yield the least and greatest sum of every tile in every order, ``(tiles, n)`` each, for some columns of ``codes`` at a time."""
        for c in column_pieces(codes):  # (tiles, N) can be larger than the weight
            parts = [extremes(codes[order, c], self.accumulator.tile, self.x_min, self.x_max) for order in self.orders(len(codes))]
            yield np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])

    def orders(self, k: int) -> list[Rows]:
        """Return the orders of K rows whose consecutive rows share a tile."""
        return [taps_first(k, taps) for taps in self.taps]


def taps_first(k: int, taps: int) -> Rows:
    """Return K rows (channels, taps) of a convolution in the order (taps, channels)."""
    return np.arange(k).reshape(-1, taps).T.reshape(-1)


def tile_starts(k: int, tile: int | None, block: int | None = None) -> npt.NDArray[np.intp]:
    """Return the first row of every tile of ``k`` rows; tiles restart after every ``block`` rows (whose sums are scaled as floats)."""
    blocks = range(0, max(k, 1), block or max(k, 1))
    return np.concatenate([np.arange(b, max(min(b + (block or k), k), b + 1), tile or max(k, 1)) for b in blocks])


def column_pieces(codes: npt.NDArray[Any]) -> Iterator[slice]:
    """Split the columns of ``(K, N)`` into slices small enough to widen to 64 bits."""
    k, n = codes.shape
    step = max(1, CHUNK // max(k, 1))
    return (slice(at, at + step) for at in range(0, max(n, 1), step))


def signed_sums(codes: Integers, tile: int | None, block: int | None = None) -> tuple[Int64, Int64]:
    """Sum the positive and the negative codes of every tile.

    Args:
        codes: ``(K, N)`` raw integer codes.
        tile: Terms a tile; None for all K.
        block: Rows after which tiles restart; None for never.

    Returns:
        ``p`` and ``m``, each ``(tiles, N)`` int64, ``p >= 0 >= m``.
    """
    k, n = codes.shape
    starts = tile_starts(k, tile, block)
    kind: Any = codes.dtype if np.issubdtype(codes.dtype, np.floating) else np.int64  # floats: codes before they are rounded
    positive, negative = np.zeros((len(starts), n), kind), np.zeros((len(starts), n), kind)
    for c in column_pieces(codes) if k else ():
        wide = codes[:, c].astype(kind, copy=False)  # before the sign is split: the least code has no negative in its own type
        np.add.reduceat(np.maximum(wide, 0), starts, axis=0, out=positive[:, c])
        np.add.reduceat(np.minimum(wide, 0), starts, axis=0, out=negative[:, c])
    return positive, negative


def extremes(codes: Integers, tile: int | None, x_min: int, x_max: int, block: int | None = None) -> tuple[Int64, Int64]:
    """Compute the least and greatest sum of every tile over all inputs, ``(tiles, N)`` int64 each."""
    p, m = signed_sums(codes, tile, block)
    return x_max * m + x_min * p, x_max * p + x_min * m


def bits_for(low: int, high: int) -> int:
    """Return the least two's complement width for ``[low, high]``."""
    return max(max(int(high), 0).bit_length(), (-int(low) - 1).bit_length() if low < 0 else 0) + 1


def data_type_bits(tile: int, x_min: int, x_max: int, q_min: int, q_max: int) -> int:
    """Return the accumulator width for ``tile`` products of any codes: the bound that needs no weights."""
    corners = (x_min * q_min, x_min * q_max, x_max * q_min, x_max * q_max)
    return bits_for(tile * min(corners), tile * max(corners))


def smallest_feasible(budget: Budget) -> int:
    """Return the fewest accumulator bits for codes of 1 and -1: with fewer only zero weights are safe."""
    return bits_for(-max(budget.x_max, -budget.x_min), max(budget.x_max, -budget.x_min))


class RunningSums:
    """Exact running sums of AXE (arXiv 2409.17092, eq. 15 to 21): the codes that still fit in every column's tile.

    Rows may come in any order; `take` one before asking for the next of the same tile. Deviations from the paper: floors and ceilings on
    exact integers instead of a margin for rounding, and ``[low, high]`` of the register instead of a symmetric bound.
    """

    def __init__(self, budget: Budget, k: int, n: int, codes: Integers | None = None) -> None:
        self._budget = budget
        self._sums = []
        for order in budget.orders(k):
            tiles = np.empty(k, np.intp)
            tiles[order] = np.arange(k) // (budget.accumulator.tile or k)
            empty = np.zeros((int(tiles.max()) + 1, n), np.int64)
            self._sums.append((tiles, *((empty, empty.copy()) if codes is None else signed_sums(codes[order], budget.accumulator.tile))))

    def limits(self, row: int) -> tuple[Int64, Int64]:
        """Return the least and greatest code ``(N,)`` that may be added at ``row``."""
        lower, upper = self._limits(row, *self._sums[0])
        for sums in self._sums[1:]:
            other = self._limits(row, *sums)
            lower, upper = np.maximum(lower, other[0]), np.minimum(upper, other[1])
        return lower, upper

    def _limits(self, row: int, tiles: Rows, positive: Int64, negative: Int64) -> tuple[Int64, Int64]:
        b = self._budget
        p, m = positive[tiles[row]], negative[tiles[row]]
        above = b.high - (b.x_max * p + b.x_min * m)  # room below the register's largest value
        below = (b.x_max * m + b.x_min * p) - max(b.low, 1 - 2**63)  # room above its least; int64 has no 2**63
        upper, lower = above // b.x_max, below // b.x_max
        if b.x_min:
            upper, lower = np.minimum(upper, below // -b.x_min), np.minimum(lower, above // -b.x_min)
        return -np.maximum(lower, 0), np.maximum(upper, 0)

    def take(self, row: int, codes: npt.NDArray[Any], sign: int = 1) -> None:
        """Add ``codes (N,)`` at ``row``, or (``sign=-1``) take them out again."""
        integers = codes.astype(np.int64)
        for tiles, positive, negative in self._sums:
            positive[tiles[row]] += sign * np.maximum(integers, 0)
            negative[tiles[row]] += sign * np.minimum(integers, 0)

    def clip(self, row: int, codes: npt.NDArray[np.floating[Any]], middle: Any) -> None:
        """Clip codes ``(N,)``, ``middle`` above the raw ones, in place to what still fits at ``row``, and add them."""
        lower, upper = self.limits(row)
        np.clip(codes, lower + middle, upper + middle, out=codes)
        self.take(row, codes - middle)


def largest_block(bits: int, accumulator_bits: int, blocks: tuple[int, ...], x_max: int = 127, shift: int = 0) -> int | None:
    """Return the largest block whose sum of ``bits``-wide codes, each raised by ``shift``, times activations in ``[-x_max, x_max]`` fits.

    None if no block does.
    """
    fitting = [b for b in blocks if data_type_bits(b, -x_max, x_max, 0, 2**bits - 1 + shift) <= accumulator_bits]
    return max(fitting) if fitting else None


def log2_gap(low: int, high: int, bits: int) -> float:
    """Compute the headroom in bits: how often the worst case can double within ``bits``; negative when it does not fit."""
    worst = max(high / (2 ** (bits - 1) - 1), low / -(2 ** (bits - 1)))
    return math.inf if worst <= 0 else 0.0 - math.log2(worst)  # never -0.0
