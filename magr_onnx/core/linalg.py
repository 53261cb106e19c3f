"""Dense linear algebra shared by the solvers: spectral bound, damping, Cholesky with retries, the layer error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from magr_onnx.core import backends
from magr_onnx.core.gram import LARGE_ROWS, Array, Gram, RowGram
from magr_onnx.core.types import LayerStats, column_parts
from magr_onnx.errors import NonFiniteError


def lambda_max(matrix: Gram, iterations: int = 24, seed: int = 0, scale: Array | None = None) -> float:
    """Compute the largest eigenvalue of a symmetric positive semidefinite ``(K, K)`` matrix, by Lanczos iteration; of ``S matrix S`` with
    ``S = diag(scale)`` if a scale is given.

    Costs one product with the matrix an iteration (``2 K^2`` FLOPs). The Ritz value is a lower bound, tight to about
    1e-3 in 24 iterations even where the top of the spectrum is clustered; callers that need an upper bound add a margin.
    """
    k, b = len(matrix), backends.of(matrix)
    if k <= iterations and not isinstance(matrix, RowGram):
        dense = b.host(matrix).astype(np.float64)
        return float(np.linalg.eigvalsh(dense if scale is None else dense * scale * scale[:, None])[-1])
    basis = np.zeros((iterations + 1, k))
    diagonal, off = np.zeros(iterations), np.zeros(iterations)
    v = np.random.default_rng(seed).standard_normal(k)
    basis[0] = v / np.linalg.norm(v)
    steps = iterations
    for i in range(iterations):
        x = basis[i] if scale is None else basis[i] * scale
        w = b.host(matrix @ b.array(x, matrix.dtype)).astype(np.float64)
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
    b = backends.of(gram)
    xp = b.xp
    diagonal = gram.diagonal() if isinstance(gram, RowGram) else b.copy(b.diagonal(gram))
    mean = b.cast(xp.mean(xp.abs(diagonal), axis=-1, keepdims=True), "float64")
    floor = b.cast(1e-6 * xp.where(mean > 0, mean, 1.0), diagonal.dtype)
    if isinstance(gram, RowGram):
        return gram.plus_diagonal(damping * np.maximum(diagonal, floor))
    result: Array = gram if overwrite else b.copy(gram)
    view = b.diagonal(result)
    view += damping * xp.maximum(diagonal, floor)
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
    b = backends.of(gram)
    if not b.xp.all(b.xp.isfinite(gram)):
        raise NonFiniteError(f"the Gram matrix ({len(gram)} x {len(gram)}) holds NaN or infinite values")
    if single and (factor := _single(damped(_ordered(gram, order, "float32"), damping, overwrite=True))) is not None:
        return Cholesky(factor, damping)
    for attempt in range(retries + 1):
        if attempt:
            damping = max(10 * damping, 1e-6)
        try:
            return Cholesky(_factor(damped(_ordered(gram, order), damping, overwrite=True)), damping)
        except b.singular:
            continue
    raise NonFiniteError(f"the Gram matrix ({len(gram)} x {len(gram)}) is not positive definite even with damping {damping:g}")


def _ordered(gram: Array, order: npt.NDArray[np.intp] | None, kind: str = "float64") -> Array:
    """Copy a matrix in another type, rows and columns in ``order``."""
    b = backends.of(gram)
    if order is None:
        return b.copy(b.cast(gram, kind))
    result, index = b.empty(gram.shape, kind), b.index(order)
    for at in range(0, len(gram), LARGE_ROWS):
        result[at : at + LARGE_ROWS] = b.xp.take(b.cast(gram[index[at : at + LARGE_ROWS]], kind), index, axis=1)
    return result


def _single(matrix: Array) -> Array | None:
    """Compute the lower Cholesky factor of ``matrix (K, K)`` float32 in place; None where rounding may have changed it much."""
    b = backends.of(matrix)
    least = _PIVOT * len(matrix) * matrix.diagonal()
    try:
        lower = _factor(matrix)
    except b.singular:
        return None
    return lower if b.xp.all(b.xp.square(lower.diagonal()) > least) else None


def _factor(matrix: Array) -> Array:
    """Compute the lower Cholesky factor of ``matrix (K, K)`` in place, by block columns: nearly all of it is matrix products.

    LAPACK's routine as NumPy calls it takes several times as long, and three such matrices; on a GPU it is the other way round.
    """
    k, backend = len(matrix), backends.of(matrix)
    xp, product = backend.xp, backend.product
    size = backend.part(_BLOCK if k <= _WIDE else _WIDE // 8, k)
    if k <= size:
        lower: Array = xp.linalg.cholesky(matrix)
        return lower
    for a in range(0, k, size):
        b = min(a + size, k)
        if a:
            matrix[a:, a:b] -= product(matrix[a:, :a], matrix[a:b, :a].T)
        block = _factor(backend.copy(matrix[a:b, a:b]))
        matrix[a:b, a:b] = block
        matrix[a:b, b:] = 0
        if b < k:
            matrix[b:, a:b] = product(matrix[b:, a:b], backend.cast(xp.linalg.inv(block).T, matrix.dtype))
    return matrix


def solver(gram: Gram) -> Callable[[Array], Array]:
    """Factor a positive definite ``gram``; return the function ``X -> gram^-1 X`` of ``X (K, N)`` float64.

    In single precision, where a factor of it is good enough for that (`cholesky`).
    """
    if isinstance(gram, RowGram):
        return gram.solve
    backend = backends.of(gram)
    xp, product = backend.xp, backend.product
    lower = _single(backend.copy(backend.cast(gram, "float32")))
    if lower is None:
        return lambda x: xp.linalg.solve(gram, x)
    k = len(lower)
    blocks = [slice(at, min(at + _TRIANGLE, k)) for at in range(0, k, _TRIANGLE)]
    inverses = [xp.linalg.inv(lower[b, b]) for b in blocks]

    def solve(x: Array) -> Array:
        result = backend.copy(backend.cast(x, "float32"))
        for b, inverse in zip(blocks, inverses, strict=True):
            result[b] = inverse @ (result[b] - product(lower[b, : b.start], result[: b.start]))
        for b, inverse in zip(blocks[::-1], inverses[::-1], strict=True):
            result[b] = inverse.T @ (result[b] - product(lower[b.stop :, b].T, result[b.stop :]))
        return result

    return solve


def left_product(x: Array, gram: Gram, out: Array) -> None:
    """Compute ``X gram`` for ``X (N, K)`` into ``out``."""
    if isinstance(gram, RowGram):
        gram.left_product(x, out)
    else:
        backends.of(x).product(x, gram, out=out)


def inner(a: Array, b: Array) -> float:
    """Return ``sum a b`` of float32 arrays, in double precision where single precision overflows."""
    backend = backends.of(a)
    total = backend.inner(a, b)
    return total if np.isfinite(total) else float(backend.contract("kn,kn->", a, b))


def layer_error(difference: Array, gram: Gram) -> float:
    """Return ``tr(D^T H D)``, the mean squared output error caused by a weight difference ``D (K, N)``, summed over outputs."""
    return float(column_errors(difference, gram).sum())


def column_errors(difference: Array, gram: Gram) -> Array:
    """Return ``d^T H d`` for every column ``d`` of ``difference (K, N)``, as ``(N,)`` float64."""
    b = backends.of(difference)
    h = b.cast(gram, difference.dtype)
    parts = (difference[:, c] for c in column_parts(*difference.shape, most=b.column_bytes))
    return np.concatenate([b.host(b.contract("kn,kn->n", part, h @ part)) for part in parts])


def objective_on_backend(stats: LayerStats, centred: bool) -> Gram:
    """Return the matrix that errors are measured by (`LayerStats.objective_gram`) where solvers compute; copied once unless large."""
    b = stats.backend
    if b is backends.HOST:
        return stats.objective_gram(centred)
    if stats.is_large:
        return backends.gram_on(stats.objective_gram(centred), b)
    return stats.memo(("objective", centred, b.name), lambda: backends.gram_on(stats.objective_gram(centred), b))


def error_of_inputs(difference: Array, stats: LayerStats, centred: bool) -> float:
    """Return the `layer_error` of a weight difference ``D (K, N)`` of NumPy for inputs of these statistics."""
    return layer_error(stats.backend.array(difference), objective_on_backend(stats, centred))


def transposed_product(weight: Array, x: Array) -> Array:
    """Return ``W^T X`` of ``weight (K, N)`` and ``x (K, m)`` or ``(K,)`` in float64."""
    return np.concatenate([weight[:, c].astype(np.float64).T @ x for c in column_parts(*weight.shape)])
