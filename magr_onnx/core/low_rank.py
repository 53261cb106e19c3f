"""Low-rank reconstruction of a quantization error in closed form (QERA; Zhang et al., arXiv 2410.06040).

The error ``D = W0 - W_hat (K, N)`` is approximated by ``A B`` of rank r, so that the layer computes ``x W_hat + (x A) B``. The best
factors under the layer error ``tr((D - A B)^T H (D - A B))`` follow from a singular value decomposition (Eckart and Young) of ``R D``
with any root ``R^T R = H``:

    A B = R^-1 [R D]_r,     [R D]_r = U_r Sigma_r V_r^T.

``exact`` takes H itself (QERA-exact), ``diagonal`` its diagonal, ``R = diag(sqrt(H_kk))`` (QERA-approx), which needs no factorization.

Deviations from the paper: H may be centred, where a bias absorbs the mean error; it is damped as for the quantizers, since few rows
estimate it badly; R is the Cholesky factor instead of the symmetric root, which gives the same product ``A B`` for less work; and both
factors carry ``Sigma_r^(1/2)``, which keeps them in the range of half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from magr_onnx.core.gram import Gram, RowGram
from magr_onnx.core.linalg import cholesky, damped
from magr_onnx.core.types import Array

Kind = Literal["exact", "diagonal"]


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """``A (K, r)`` and ``B (r, N)``, float32."""

    down: Array
    up: Array

    def product(self) -> Array:
        """Return ``A B (K, N)`` float32."""
        return self.down.astype(np.float32) @ self.up.astype(np.float32)

    def stored(self, kind: npt.DTypeLike) -> Factors:
        """Round the factors to the stored type."""
        return Factors(self.down.astype(kind).astype(np.float32), self.up.astype(kind).astype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """``R`` with ``R^T R = H``, damped: an upper triangular matrix, or a diagonal as a vector ``(K,)``.

    Of ``H = diag(d) + F F^T`` of few rows it is ``diag(sqrt(d))`` above ``F^T``, given as H itself; ``R^-1`` is its pseudo-inverse.
    """

    matrix: Gram

    def times(self, x: Array) -> Array:
        """Return ``R X`` for ``X (K, N)``."""
        h = self.matrix
        if isinstance(h, RowGram):
            return np.vstack([np.sqrt(h.added)[:, None] * x, h.factor.T @ x])
        return h[:, None] * x if h.ndim == 1 else h @ x

    def solve(self, x: Array) -> Array:
        """Return ``R^-1 X`` for ``X`` with as many rows as R."""
        h = self.matrix
        if isinstance(h, RowGram):
            return h.solve(np.sqrt(h.added)[:, None] * x[: len(h)] + h.factor @ x[len(h) :])
        return x / h[:, None] if h.ndim == 1 else np.linalg.solve(h, x)


def root(gram: Gram, damping: float, kind: Kind) -> Root:
    """Compute the root of ``gram (K, K)``.

    Raises:
        NonFiniteError: The matrix is not finite.
    """
    if kind == "exact":
        return Root(damped(gram, damping) if isinstance(gram, RowGram) else cholesky(gram, damping).lower.T)
    diagonal = gram.diagonal().astype(np.float64)
    return Root(np.sqrt(np.maximum(diagonal, 1e-6 * (float(diagonal.mean()) or 1.0))))  # a floor for inputs that were never active


def reconstruct(difference: Array, r: Root, rank: int) -> Factors:
    """Compute the factors of rank ``rank`` (at most ``min(K, N)``) closest to ``difference (K, N)`` under ``r``."""
    u, sigma, v = np.linalg.svd(r.times(difference.astype(np.float64)), full_matrices=False)
    half = np.sqrt(sigma[:rank])
    return Factors(r.solve(u[:, :rank] * half).astype(np.float32), (half[:, None] * v[:rank]).astype(np.float32))
