"""Dense linear algebra the solvers share: spectral bound, damping, Cholesky with retries, the layer error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from magr_onnx.errors import NonFiniteError
from magr_onnx.types import Array


def lambda_max(matrix: Array, iterations: int = 24, seed: int = 0) -> float:
    """Largest eigenvalue of a symmetric positive semidefinite ``(K, K)`` matrix, by Lanczos iteration.

    Costs one product with the matrix an iteration (``2 K^2`` FLOPs). The Ritz value is a lower bound, tight to about
    1e-3 in 24 iterations even where the top of the spectrum is clustered; callers that need an upper bound add a margin.
    """
    k = len(matrix)
    if k <= iterations:
        return float(np.linalg.eigvalsh(matrix.astype(np.float64))[-1])
    basis = np.zeros((iterations + 1, k))
    diagonal, off = np.zeros(iterations), np.zeros(iterations)
    v = np.random.default_rng(seed).standard_normal(k)
    basis[0] = v / np.linalg.norm(v)
    steps = iterations
    for i in range(iterations):
        w = (matrix @ basis[i].astype(matrix.dtype)).astype(np.float64)
        diagonal[i] = w @ basis[i]
        for _ in range(2):  # once would lose orthogonality by a factor of diagonal / off a step
            w -= basis[: i + 1].T @ (basis[: i + 1] @ w)
        off[i] = np.linalg.norm(w)
        if off[i] <= 1e-12 * max(float(np.abs(diagonal[: i + 1]).max()), 1e-300):
            steps = i + 1
            break
        basis[i + 1] = w / off[i]
    t = np.diag(diagonal[:steps]) + np.diag(off[: steps - 1], 1) + np.diag(off[: steps - 1], -1)
    return float(np.linalg.eigvalsh(t)[-1])


def mean_diagonal(gram: Array) -> float:
    """Mean of the diagonal, or 1 for an all-zero matrix: the unit of damping."""
    return float(np.trace(gram)) / len(gram) or 1.0


def damped(gram: Array, damping: float) -> Array:
    """``gram + damping * mean(diag(gram)) * I``."""
    result: Array = gram.copy()
    result[np.diag_indices(len(gram))] += damping * mean_diagonal(gram)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Cholesky:
    """A lower Cholesky factor and the damping that was needed to obtain it."""

    lower: Array
    damping: float


def cholesky(gram: Array, damping: float, retries: int = 8) -> Cholesky:
    """Lower Cholesky factor of the damped matrix in float64, with ten times the damping at every failure.

    Raises:
        NonFiniteError: No damping up to ``damping * 10**retries`` makes the matrix positive definite.
    """
    for attempt in range(retries + 1):
        if attempt:
            damping = max(10 * damping, 1e-6)
        try:
            return Cholesky(np.linalg.cholesky(damped(gram.astype(np.float64), damping)), damping)
        except np.linalg.LinAlgError:
            continue
    raise NonFiniteError(f"the Gram matrix ({len(gram)} x {len(gram)}) is not positive definite even with damping {damping:g}")


def layer_error(difference: Array, gram: Array) -> float:
    """``tr(D^T H D)``: the mean squared output error that a weight difference ``D (K, N)`` causes, summed over outputs."""
    return float(column_errors(difference, gram).sum())


def column_errors(difference: Array, gram: Array) -> Array:
    """``d^T H d`` for every column ``d`` of ``difference (K, N)``, as ``(N,)`` float64."""
    product = gram.astype(difference.dtype, copy=False) @ difference
    result: Array = np.einsum("kn,kn->n", difference, product, dtype=np.float64)
    return result
