"""Dense linear algebra shared by the solvers: spectral bound, damping, Cholesky with retries, the layer error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from magr_onnx.core import threads
from magr_onnx.core.gram import LARGE_ROWS, Array, Gram, RowGram
from magr_onnx.core.types import column_parts
from magr_onnx.errors import NonFiniteError


def lambda_max(matrix: Gram, iterations: int = 24, seed: int = 0, scale: Array | None = None) -> float:
    """Compute the largest eigenvalue of a symmetric positive semidefinite ``(K, K)`` matrix, by Lanczos iteration; of ``S matrix S`` with
    ``S = diag(scale)`` if a scale is given.

    Costs one product with the matrix an iteration (``2 K^2`` FLOPs). The Ritz value is a lower bound, tight to about
    1e-3 in 24 iterations even where the top of the spectrum is clustered; callers that need an upper bound add a margin.
    """
    k = len(matrix)
    if k <= iterations and isinstance(matrix, np.ndarray):
        dense = matrix.astype(np.float64)
        return float(np.linalg.eigvalsh(dense if scale is None else dense * scale * scale[:, None])[-1])
    basis = np.zeros((iterations + 1, k))
    diagonal, off = np.zeros(iterations), np.zeros(iterations)
    v = np.random.default_rng(seed).standard_normal(k)
    basis[0] = v / np.linalg.norm(v)
    steps = iterations
    for i in range(iterations):
        x = basis[i] if scale is None else basis[i] * scale
        w = (matrix @ x.astype(matrix.dtype)).astype(np.float64)
        if scale is not None:
            w *= scale
        diagonal[i] = w @ basis[i]
        for _ in range(2):  # one pass would lose orthogonality by a factor of diagonal / off in every step
            w -= basis[: i + 1].T @ (basis[: i + 1] @ w)
        off[i] = np.linalg.norm(w)
        if off[i] <= 1e-12 * max(float(np.abs(diagonal[: i + 1]).max()), 1e-300):
            steps = i + 1
            break
        basis[i + 1] = w / off[i]
    t = np.diag(diagonal[:steps]) + np.diag(off[: steps - 1], 1) + np.diag(off[: steps - 1], -1)
    return float(np.linalg.eigvalsh(t)[-1])


@overload
def damped(gram: Array, damping: float, overwrite: bool = ...) -> Array: ...
@overload
def damped(gram: RowGram, damping: float, overwrite: bool = ...) -> RowGram: ...
@overload
def damped(gram: Gram, damping: float, overwrite: bool = ...) -> Gram: ...
def damped(gram: Gram, damping: float, overwrite: bool = False) -> Gram:
    """Return ``gram + damping * diag(gram)`` of one matrix or many: correlations between inputs are shrunk, scales kept in proportion.

    GPTQ's authors add a multiple of the MEAN of the diagonal; with a few strong inputs that drowns all the others. Inputs
    that were never active get a millionth of the mean, so that the result has no zero on its diagonal. Rounding may leave the
    variance of constant inputs slightly negative.
    """
    diagonal = gram.diagonal() if isinstance(gram, RowGram) else np.diagonal(gram, axis1=-2, axis2=-1).copy()
    mean = np.abs(diagonal).mean(axis=-1, keepdims=True).astype(np.float64)
    floor = (1e-6 * np.where(mean > 0, mean, 1.0)).astype(diagonal.dtype)
    if isinstance(gram, RowGram):
        return gram.plus_diagonal(damping * np.maximum(diagonal, floor))
    result: Array = gram if overwrite else gram.copy()
    view = np.einsum("...kk->...k", result)  # of the diagonal
    view += damping * np.maximum(diagonal, floor)
    return result


def automatic_damping(k: int, rows: int) -> float:
    """Return ``2 K / n`` clipped to [0.01, 1], for statistics of ``n`` rows of width ``K``.

    The optimal shrinkage of a sample covariance is of the order of K / n (Ledoit and Wolf 2004); the factor 2, for rows that are
    not independent, was chosen by the layer error on held-out rows of five models.
    """
    return float(np.clip(2 * k / max(rows, 1), 0.01, 1.0)) if rows else 0.01


_BLOCK = 64  # columns of a factor made at a time
_WIDE = 2048  # from so many columns on, eight of its parts
_TRIANGLE = 128  # unknowns that a triangular solve finds at a time
_PIVOT = 1e-6  # of a diagonal element, for each input: what a pivot must exceed for a factor in single precision


@dataclass(frozen=True, slots=True, eq=False)
class Cholesky:
    """A lower Cholesky factor and the damping that was needed to obtain it."""

    lower: Array
    damping: float


def cholesky(gram: Array, damping: float, retries: int = 8, order: npt.NDArray[np.intp] | None = None, single: bool = False) -> Cholesky:
    """Compute the lower Cholesky factor of the damped matrix (`damped`) in float64, with ten times the damping after every failure.

    With ``single``, in float32 where every pivot is far enough from zero for that: above ``K`` rounding errors of its diagonal element.
    ``order (K,)`` permutes rows and columns first. No temporary is as large as the factor.

    Raises:
        NonFiniteError: NaN or infinity, or no damping up to ``damping * 10**retries`` makes the matrix positive definite.
    """
    if not np.isfinite(gram).all():
        raise NonFiniteError(f"the Gram matrix ({len(gram)} x {len(gram)}) holds NaN or infinite values")
    if single and (factor := _single(damped(_ordered(gram, order, np.float32), damping, overwrite=True))) is not None:
        return Cholesky(factor, damping)
    for attempt in range(retries + 1):
        if attempt:
            damping = max(10 * damping, 1e-6)
        try:
            return Cholesky(_factor(damped(_ordered(gram, order), damping, overwrite=True)), damping)
        except np.linalg.LinAlgError:
            continue
    raise NonFiniteError(f"the Gram matrix ({len(gram)} x {len(gram)}) is not positive definite even with damping {damping:g}")


def _ordered(gram: Array, order: npt.NDArray[np.intp] | None, kind: type[np.floating[Any]] = np.float64) -> Array:
    """Copy a matrix in another type, rows and columns in ``order``."""
    if order is None:
        return gram.astype(kind)
    result: Array = np.empty(gram.shape, kind)
    for at in range(0, len(gram), LARGE_ROWS):
        result[at : at + LARGE_ROWS] = gram[order[at : at + LARGE_ROWS]].astype(kind).take(order, axis=1)
    return result


def _single(matrix: Array) -> Array | None:
    """Compute the lower Cholesky factor of ``matrix (K, K)`` float32 in place; None where rounding may have changed it much."""
    least = _PIVOT * len(matrix) * matrix.diagonal()
    try:
        lower = _factor(matrix)
    except np.linalg.LinAlgError:
        return None
    return lower if (np.square(lower.diagonal()) > least).all() else None


def _factor(matrix: Array) -> Array:
    """Compute the lower Cholesky factor of ``matrix (K, K)`` in place, by block columns: nearly all of it is matrix products.

    LAPACK's routine as NumPy calls it takes several times as long, and three such matrices.
    """
    k = len(matrix)
    size = _BLOCK if k <= _WIDE else _WIDE // 8
    if k <= size:
        return np.linalg.cholesky(matrix)
    for a in range(0, k, size):
        b = min(a + size, k)
        if a:
            matrix[a:, a:b] -= threads.product(matrix[a:, :a], matrix[a:b, :a].T)
        block = _factor(matrix[a:b, a:b].copy())
        matrix[a:b, a:b] = block
        matrix[a:b, b:] = 0
        if b < k:
            matrix[b:, a:b] = threads.product(matrix[b:, a:b], np.linalg.inv(block).T.astype(matrix.dtype))
    return matrix


def solver(gram: Gram) -> Callable[[Array], Array]:
    """Factor a positive definite ``gram``; return the function ``X -> gram^-1 X`` of ``X (K, N)`` float64.

    In single precision, where a factor of it is good enough for that (`cholesky`).
    """
    if isinstance(gram, RowGram):
        return gram.solve
    lower = _single(gram.astype(np.float32))
    if lower is None:
        return lambda x: np.linalg.solve(gram, x)
    k = len(lower)
    blocks = [slice(at, min(at + _TRIANGLE, k)) for at in range(0, k, _TRIANGLE)]
    inverses = [np.linalg.inv(lower[b, b]) for b in blocks]

    def solve(x: Array) -> Array:
        result: Array = x.astype(np.float32)
        for b, inverse in zip(blocks, inverses, strict=True):
            result[b] = inverse @ (result[b] - threads.product(lower[b, : b.start], result[: b.start]))
        for b, inverse in zip(blocks[::-1], inverses[::-1], strict=True):
            result[b] = inverse.T @ (result[b] - threads.product(lower[b.stop :, b].T, result[b.stop :]))
        return result

    return solve


def left_product(x: Array, gram: Gram, out: Array) -> None:
    """Compute ``X gram`` for ``X (N, K)`` into ``out``."""
    if isinstance(gram, RowGram):
        gram.left_product(x, out)
    else:
        threads.product(x, gram, out)


def inner(a: Array, b: Array) -> float:
    """Return ``sum a b`` of float32 arrays, in double precision where single precision overflows."""
    total = float(np.vdot(a, b))
    return total if np.isfinite(total) else float(np.einsum("kn,kn->", a, b, dtype=np.float64))


def layer_error(difference: Array, gram: Gram) -> float:
    """Return ``tr(D^T H D)``, the mean squared output error caused by a weight difference ``D (K, N)``, summed over outputs."""
    return float(column_errors(difference, gram).sum())


def column_errors(difference: Array, gram: Gram) -> Array:
    """Return ``d^T H d`` for every column ``d`` of ``difference (K, N)``, as ``(N,)`` float64."""
    h = gram.astype(difference.dtype, copy=False)
    parts = (difference[:, c] for c in column_parts(*difference.shape))
    return np.concatenate([np.einsum("kn,kn->n", part, h @ part, dtype=np.float64) for part in parts])


def transposed_product(weight: Array, x: Array) -> Array:
    """Return ``W^T X`` of ``weight (K, N)`` and ``x (K, m)`` or ``(K,)`` in float64."""
    return np.concatenate([weight[:, c].astype(np.float64).T @ x for c in column_parts(*weight.shape)])
