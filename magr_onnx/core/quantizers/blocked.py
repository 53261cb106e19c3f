"""A pass over the rows of a layer, group after group, each with its residual, at nearly the rate of matrix products.

A method that changes few rows of ``W_hat (K, N)`` at a time needs ``R = H (W0 - W_hat)`` in these rows, with all changes so far. Keeping
all of R up to date means products with few inner terms, which wait for memory. Here the residual of a panel of `PANEL` rows is one product
with the present difference, and changes reach the rest of their panel only: ``2 K^2 N`` FLOPs a pass, nearly all in products of so
many rows. Of a matrix of few rows ``H = diag(d) + F F^T``, ``F^T (W0 - W_hat)`` is kept up to date instead, which is small.

Groups come in descending order of their most important row, and so do the rows of a group: what is rounded late makes up for what is
rounded early. They are gathered, not permuted, so that no second ``(K, K)`` matrix is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core import backends
from magr_onnx.core.gram import Gram, RowGram
from magr_onnx.core.types import Array, WeightSpec

PANEL = 128

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one group that are visited together: all of them, or, of a group larger than `PANEL`, a part.

    Attributes:
        group: The group.
        rows: Its rows, in descending importance.
    """

    group: int
    rows: Rows


Panel = Sequence[Piece]
Enter = Callable[[Rows, Array], Array]
"""What begins a panel: computes the residual of its rows into an array ``(p, N)``, and returns the matrix ``(p, p)`` of these rows."""
Step = Callable[[Piece, Array, Array], Array]
"""What is done to a piece: from the matrix ``(p, p)`` and the residual ``(p, N)`` of its rows to what it adds to ``W_hat (p, N)``."""


def panels(importance: Array, spec: WeightSpec, most: int = PANEL) -> list[Panel]:
    """Arrange the rows of a layer, of the given ``importance (K,)``, in panels of ``most`` rows, of which no piece has more."""
    k = len(importance)
    size = spec.rows(k)
    order = np.argsort(-importance, kind="stable")
    rank = np.empty(spec.groups(k), np.intp)
    rank[order[::-1] // size] = np.arange(k)[::-1]  # of a group's most important row
    order = order[np.argsort(rank[order // size], kind="stable")]  # the rows of each group together
    starts = np.flatnonzero(np.diff(order // size, prepend=-1))
    result: list[list[Piece]] = []
    room = 0
    for rows in np.split(order, starts[1:]):
        for part in np.array_split(rows, -(-len(rows) // most)):
            if len(part) > room:
                result.append([])
                room = most
            result[-1].append(Piece(int(part[0]) // size, part))
            room -= len(part)
    return [*result]


def visit(arranged: Sequence[Panel], gram: Gram, difference: Array, step: Step) -> None:
    """Take one step at every piece; ``difference = W0 - W_hat (K, N)`` float32 is kept up to date in place.

    Args:
        arranged: All rows.
        gram: ``H (K, K)``, float32 where it is an array.
        difference: ``W0 - W_hat``.
        step: What is done.
    """
    most = max(sum(len(piece.rows) for piece in panel) for panel in arranged)
    b = backends.of(difference)
    residuals, heard = b.empty((2, most, difference.shape[1]))
    enter = _by_rows(gram, difference) if isinstance(gram, RowGram) else _by_matrix(gram, difference)
    for panel in arranged:
        rows = np.concatenate([piece.rows for piece in panel])
        residual = residuals[: len(rows)]
        local = enter(rows, residual)
        at = 0
        for piece in panel:
            end = at + len(piece.rows)
            change = step(piece, local[at:end, at:end], residual[at:end])
            difference[b.index(piece.rows)] -= change
            if end < len(rows):
                residual[end:] -= b.xp.matmul(local[end:, at:end], change, out=heard[end : len(rows)])
            at = end


def _by_matrix(gram: Array, difference: Array) -> Enter:
    b = backends.of(difference)

    def enter(rows: Rows, residual: Array) -> Array:
        index = b.index(rows)
        h = gram[index]
        b.product(h, difference, out=residual)
        return h[:, index]

    return enter


def _by_rows(gram: RowGram, difference: Array) -> Enter:
    factor, added = gram.factor, gram.added.astype(np.float32)
    total = factor.T @ difference
    previous: Rows = np.empty(0, np.intp)
    before = difference[previous]

    def enter(rows: Rows, residual: Array) -> Array:
        nonlocal total, previous, before
        total += factor[previous].T @ (difference[previous] - before)
        previous, before = rows, difference[rows]
        np.matmul(factor[rows], total, out=residual)
        residual += added[rows, None] * before
        return gram.block(rows)

    return enter
