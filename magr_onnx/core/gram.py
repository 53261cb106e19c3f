"""Gram matrices: the type they are stored in, and those of few rows, which are kept without the ``(K, K)`` matrix.

    H = diag(d) + sum_j w_j x_j x_j^T = diag(d) + F F^T,      F = (sqrt(w_j) x_j)_j  (K, r).

Products with H cost ``4 K r`` FLOPs a column, and memory is that of the rows. The damped matrix differs in ``d`` alone. Its inverse follows
from Woodbury's identity, and the factor that GPTQ needs from one pass over blocks of inputs (`magr_onnx.core.quantizers.row_feedback`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Rows = TypeVar("Rows")

LARGE = 6144
"""Inputs of a layer from which its ``(K, K)`` matrices are stored in float32 and processed in place, a few at a time."""
LARGE_ROWS = 512  # of such a matrix processed at a time
LEAST_WIDTH = 1024  # inputs; a narrower matrix costs little
SHARE = 4  # times as many inputs as rows: from there on rows cost less in all solvers
NOISE = 3e-7  # of a second moment that was summed in single precision
_NOTHING = 1e-9  # of a weight: what rounding leaves where rows are taken out


def gram_type(k: int) -> type[np.float32] | type[np.float64]:
    """Return the type ``(K, K)`` statistics are stored in. They are summed in float64; the rounding afterwards is far below the damping,
    and halves the memory of the largest layers."""
    return np.float32 if k >= LARGE else np.float64


def few(rows: float, k: int) -> bool:
    """Return whether a Gram matrix of ``k`` inputs is kept by its rows."""
    return k >= LEAST_WIDTH and SHARE * rows <= k


@dataclass(frozen=True, slots=True, eq=False)
class RowGram:
    """A symmetric positive semidefinite ``(K, K)`` matrix of few rows; it takes part in products and sums like an array.

    Attributes:
        pieces: Rows ``(n, K)`` float32 and their weights ``(n,)`` float64, at least 0; matrices of common rows share the arrays.
        added: The diagonal ``d (K,)`` float64.
    """

    pieces: tuple[tuple[Array, Array], ...]
    added: Array
    _memo: dict[str, Array] = field(default_factory=dict, repr=False)

    __array_ufunc__ = None  # arrays leave sums and products with it to this class

    @staticmethod
    def of(rows: Array, weights: Array | None = None) -> RowGram:
        """Return ``X^T diag(w) X`` of ``rows (n, K)``; weights of 1 by default. Rows of zeros are left out."""
        used = rows.any(axis=1)
        w = np.ones(len(rows)) if weights is None else weights
        return RowGram(((np.ascontiguousarray(rows[used], np.float32), w[used]),), np.zeros(rows.shape[1]))

    @staticmethod
    def diagonal_of(added: Array) -> RowGram:
        """Return ``diag(added)``, without rows."""
        return RowGram((), added)

    def __len__(self) -> int:
        return len(self.added)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), len(self)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that products with vectors are computed in."""
        return np.dtype(np.float32)

    @property
    def rank(self) -> int:
        """Number of rows ``r``."""
        return sum(len(rows) for rows, _ in self.pieces)

    @property
    def factor(self) -> Array:
        """``F (K, r)`` float32, computed once."""
        if "factor" not in self._memo:
            scaled = [np.sqrt(w).astype(np.float32)[:, None] * rows for rows, w in self.pieces]
            self._memo["factor"] = np.ascontiguousarray(np.concatenate([np.empty((0, len(self)), np.float32), *scaled]).T)
        return self._memo["factor"]

    def diagonal(self) -> Array:
        """Return the diagonal ``(K,)`` float64."""
        result: Array = self.added + self.squares()
        return result

    def squares(self) -> Array:
        """Return the diagonal of ``F F^T``, ``(K,)`` float64; computed once."""
        if "squares" not in self._memo:
            self._memo["squares"] = sum((w @ np.square(rows, dtype=np.float64) for rows, w in self.pieces), np.zeros(len(self)))
        return self._memo["squares"]

    def dense(self) -> Array:
        """Return the matrix ``(K, K)``, in the type that such matrices are stored in."""
        k, kind = len(self), gram_type(len(self))
        result: Array = np.zeros((k, k), kind)
        for rows, w in self.pieces:
            left, right = np.multiply(w[:, None], rows, dtype=kind).T, np.asarray(rows, kind)
            for at in range(0, k, LARGE_ROWS):  # in strips, so that a large matrix has no second copy
                result[at : at + LARGE_ROWS] += left[at : at + LARGE_ROWS] @ right
        result[np.diag_indices(k)] += self.added
        return result

    def astype(self, dtype: npt.DTypeLike, order: str = "K", copy: bool = True) -> RowGram:
        """Return the matrix itself: rows are stored in single precision, and products are computed in the type of the other factor."""
        del dtype, order, copy
        return self

    def plus_diagonal(self, added: Array | float) -> RowGram:
        """Return ``H + diag(added)``; the rows are shared."""
        return replace(self, added=self.added + added)

    def centred(self, mean: Array) -> RowGram:
        """Return ``H - mean mean^T`` for the weighted ``mean (K,)`` of rows whose weights add up to 1; constant inputs get zero."""
        pieces = tuple(((rows - mean).astype(np.float32), w) for rows, w in self.pieces)
        constant = RowGram(pieces, self.added).diagonal() <= NOISE * self.diagonal()
        for rows, _ in pieces:
            rows[:, constant] = 0
        return RowGram(pieces, self.added)

    def joined(self) -> RowGram:
        """Return the matrix with all rows in one array."""
        if len(self.pieces) < 2:
            return self
        rows, weights = zip(*self.pieces, strict=True)
        return RowGram(((np.concatenate(rows), np.concatenate(weights)),), self.added)

    def padded(self, k: int) -> RowGram:
        """Return the matrix with zeros for inputs up to ``k``."""
        more = k - len(self)
        return RowGram(tuple((np.pad(rows, ((0, 0), (0, more))), w) for rows, w in self.pieces), np.pad(self.added, (0, more)))

    def __mul__(self, scale: float) -> RowGram:
        return RowGram(tuple((rows, w * scale) for rows, w in self.pieces), self.added * scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> RowGram:
        return self * (1 / scale)

    def __add__(self, other: RowGram | Array) -> RowGram | Array:
        """Add matrices; the sum is an array where it has no longer few rows, or the other one is an array.

        Weights of the same rows are added, and may be negative in one of them: rows of weight 0 are left out.
        """
        if not isinstance(other, RowGram):
            result: Array = other + self.dense()
            return result
        both = RowGram(tuple(_merged((*self.pieces, *other.pieces))), self.added + other.added)
        return both if few(both.rank, len(both)) else both.dense()

    __radd__ = __add__

    def __matmul__(self, x: Array) -> Array:
        """Return ``H X`` for ``X (K, N)`` or ``(K,)``, in its type."""
        f, added = self.factor.astype(x.dtype, copy=False), self.added.astype(x.dtype)
        result: Array = f @ (f.T @ x)
        result += added * x if x.ndim == 1 else added[:, None] * x
        return result

    def __getitem__(self, index: tuple[slice, slice]) -> Block:
        """Return a block, on the diagonal or without a part of it, for products."""
        rows, columns = index
        return Block(self.factor[rows], self.factor[columns], self.added[rows] if rows == columns else None)

    def block(self, rows: npt.NDArray[np.intp]) -> Array:
        """Return the dense block of some ``rows (p,)``, ``(p, p)`` float32."""
        f = self.factor[rows]
        result: Array = f @ f.T
        result[np.diag_indices(len(rows))] += self.added[rows].astype(np.float32)
        return result

    def left_product(self, x: Array, out: Array) -> None:
        """Compute ``X H`` for ``X (N, K)`` into ``out``."""
        f = self.factor.astype(x.dtype, copy=False)
        np.matmul(x @ f, f.T, out=out)
        if self.added.any():
            out += x * self.added.astype(x.dtype)

    def solve(self, x: Array) -> Array:
        """Return ``H^-1 X`` for ``X (K, N)``, in float64, by Woodbury's identity; the diagonal must be positive."""
        f = self.factor.astype(np.float64)
        scaled = f / self.added[:, None]
        small = f.T @ scaled
        small[np.diag_indices(len(small))] += 1
        result: Array = x / self.added[:, None] - scaled @ np.linalg.solve(small, scaled.T @ x)
        return result


Gram = Array | RowGram
"""A symmetric ``(K, K)`` matrix."""


def dense(gram: Gram) -> Array:
    """Return a matrix as an array ``(K, K)``."""
    return gram.dense() if isinstance(gram, RowGram) else gram


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A block of a `RowGram`, which multiplies from the left.

    Attributes:
        left: ``F`` of its rows.
        right: ``F`` of its columns.
        added: Its diagonal; None off the diagonal.
    """

    left: Array
    right: Array
    added: Array | None

    def __matmul__(self, x: Array) -> Array:
        result: Array = self.left @ (self.right.T @ x)
        if self.added is not None:
            result += self.added.astype(x.dtype)[:, None] * x
        return result


def added(pieces: Iterable[tuple[Rows, Any]]) -> list[tuple[Rows, Any]]:
    """Add the weights of the same rows, numbers or arrays; those of which nothing is left go."""
    sums: dict[int, tuple[Rows, Any, float]] = {}
    for rows, w in pieces:
        before, most = (0.0, 0.0) if id(rows) not in sums else sums[id(rows)][1:]
        sums[id(rows)] = rows, before + w, max(most, float(np.abs(w).max(initial=0)))
    return [(rows, w) for rows, w, most in sums.values() if np.abs(w).max(initial=0) > _NOTHING * most]


def _merged(pieces: Iterable[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    """Add the weights of the same rows; return rows with positive weights."""
    merged = added(pieces)
    return merged if all(w.min() >= 0 for _, w in merged) else [_positive(merged)]


def _positive(pieces: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return rows with positive weights of a positive semidefinite matrix, of ``pieces`` of which some weights are negative."""
    rows, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    basis, r = np.linalg.qr(rows.T.astype(np.float64))
    values, vectors = np.linalg.eigh((r * weights) @ r.T)
    used = values > _NOTHING * max(values[-1], 0)
    return (basis @ vectors[:, used]).T.astype(np.float32), values[used]
