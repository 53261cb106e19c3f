"""The factor of GPTQ where the Gram matrix has few rows, without a ``(K, K)`` matrix.

Let ``H = diag(d) + F F^T`` with ``F (K, r)``, its rows in the order of rounding, and ``H = R R^T`` with R upper triangular. What is left of
H for rows up to ``k`` once those behind are eliminated (the Schur complement) has the same form,

    diag(d) + F S_k F^T,      S_k = (I + sum_{i>k} f_i f_i^T / d_i)^-1   (r, r),

so that row ``k`` weighs the error of an earlier row ``j`` by

    R_jk / R_kk = f_j^T g_k,      g_k = S_k f_k / (d_k + f_k^T S_k f_k).

The vectors g are all that is stored. They follow block by block from the last row to the first: with ``T = D_b + F_b S F_b^T = U U^T`` of a
block, U upper triangular, and ``V = U^-1 F_b S``, ``g_k`` is row ``k`` of V over ``U_kk``, and ``S - V^T V`` is the S of the block before.
Rounding keeps ``P = sum_j f_j D_j (r, N)`` of the errors D so far. ``2 K r^2`` FLOPs, and ``4 K r N`` for a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core.gram import Array, RowGram
from magr_onnx.errors import NonFiniteError

_BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class RowFeedback:
    """The factor of H that GPTQ needs; layers that share H share it.

    Attributes:
        rows: ``F (K, r)`` float32, in the order of rounding.
        weights: The vectors ``g (K, r)`` float32.
        order: ``(K,)`` the order in which rows are rounded.
    """

    rows: Array
    weights: Array
    order: npt.NDArray[np.intp]

    def notes(self, requested: float) -> tuple[str, ...]:
        """Return no notes: with any damping there is a factor."""
        del requested
        return ()

    def local(self, start: int, end: int) -> Array:
        """Return what rows of a panel weigh the errors of those before them in it by, ``(p, p)`` strictly lower."""
        return np.tril(self.weights[start:end] @ self.rows[start:end].T, -1)

    def past(self, difference: Array) -> Callable[[int, int], Array]:
        """Return a function from each panel, in turn, to the weighted errors ``(p, N)`` of all rows of ``difference (K, N)`` before it."""
        total = np.zeros((self.rows.shape[1], difference.shape[1]), np.float32)
        done = 0

        def heard(start: int, end: int) -> Array:
            nonlocal total, done
            total += self.rows[done:start].T @ difference[done:start]
            done = start
            return self.weights[start:end] @ total

        return heard


def prepare(gram: RowGram, order: npt.NDArray[np.intp]) -> RowFeedback:
    """Factor ``gram``, whose diagonal part is positive, in the ``order (K,)`` of rounding.

    Raises:
        NonFiniteError: The rows hold NaN or infinity.
    """
    rows, added = gram.factor[order], gram.added[order]
    if not (np.isfinite(rows).all() and np.isfinite(added).all()):
        raise NonFiniteError(f"the Gram matrix ({len(gram)} x {len(gram)}) holds NaN or infinite values")
    weights = np.empty(rows.shape, np.float32)
    schur = np.eye(rows.shape[1])
    for at in range(len(rows) - 1 - (len(rows) - 1) % _BLOCK, -1, -_BLOCK):
        f = rows[at : at + _BLOCK].astype(np.float64)
        product = f @ schur
        block = product @ f.T
        block[np.diag_indices(len(f))] += added[at : at + _BLOCK]
        upper = np.linalg.cholesky(block[::-1, ::-1])[::-1, ::-1]
        v = np.linalg.solve(upper, product)
        weights[at : at + _BLOCK] = v / upper.diagonal()[:, None]
        schur -= v.T @ v
    return RowFeedback(rows, weights, order)
