"""Error feedback across layers: the weights that compute the float output from the quantized prefix's inputs.

After quantized layers a layer reads ``X_q`` where the float model reads ``X``. Its target output is ``Y = X W0``, or, where its output is
added to a residual stream that already carries an error (``R_q`` instead of ``R``), ``Y = X W0 + R - R_q``, which corrects the sum. The
least-squares weights are

    W* = argmin_W || X_q W - Y ||^2 = H_q^-1 C,      H_q = X_q^T X_q / n,   C = X_q^T Y / n,

and quantizing towards W* under H_q, instead of towards W0 under H, corrects part of the error of the layers before (the idea of GPFQ and
of Qronos, arXiv 2505.11695, here in closed form; the residual term is new here). From few rows W* overfits, so it is damped towards W0,

    W* = W0 + (H_q + a diag(H_q))^-1 (C - H_q W0),

and ``a`` is chosen for the least error on the rows of folds that are held out in turn; W0 itself is a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from magr_onnx.core import backends
from magr_onnx.core.linalg import damped, objective_on_backend, solver, transposed_product
from magr_onnx.core.product import Product
from magr_onnx.core.types import Array, LayerStats, TargetMoments, column_parts

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1)
KEPT = 2048  # inputs up to which layers that share statistics share factors, of all dampings
SAMPLE = 64  # output channels the damping is chosen on


@dataclass(frozen=True, slots=True, eq=False)
class TargetWeights:
    """The weights a layer is quantized towards.

    Attributes:
        weights: ``W* (K, N)`` float32.
        fits: The same from the rows outside each fold, of the output channels `sample` (N, `SAMPLE`) alone.
        damping: The ``a`` in use; None for W0 itself.
        before: Relative error of W0 on the held-out rows.
        after: Relative error of W* on the held-out rows, from the rows outside their folds.
    """

    weights: Array
    fits: tuple[Array, ...]
    damping: float | None
    before: float
    after: float


def target_moments(weights: Array, cross: Array, float_gram: Array, float_mean: Array, rows: int) -> TargetMoments:
    """Return moments of ``Y = X W0`` for ``W0 (K, N)`` from ``X_q^T X / n (K, K)``, ``X^T X / n (K, K)`` and ``mean(X) (K,)``.

    The two matrices are of one backend, the others of NumPy.
    """
    b, parts = backends.of(float_gram), column_parts(*weights.shape)
    columns = (b.array(weights[:, c], "float64") for c in parts)
    power = np.concatenate([b.host(b.xp.einsum("kn,kn->n", w, float_gram @ w)) for w in columns])
    if len(parts) > 1:
        product: Array | Product = Product(b.host(cross), weights)
    else:
        product = b.host(cross @ b.array(weights, "float64"))
    return TargetMoments(product, transposed_product(weights, float_mean), power, rows)


def solve_target(weights: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> TargetWeights:
    """Return the damped ``W*`` of ``weights (K, N)``; ``stats`` and ``target`` must have folds.

    ``centred``: whether a bias absorbs the mean error.
    """
    channels, folds = sample(weights.shape[1], SAMPLE), range(len(stats.folds))
    w, sampled = weights[:, channels].astype(np.float64), target.columns(channels)
    outside = [(stats.without(i), sampled.without(i)) for i in folds]
    inside = list(zip(stats.folds, sampled.folds, strict=True))
    power = sum(moments.rows * float(moments.power.sum()) for _, moments in inside)

    def relative(fits: Sequence[Array]) -> float:
        squared = sum(t.rows * squared_error(fit, s, t, centred) for fit, (s, t) in zip(fits, inside, strict=True))
        return squared / power if power > 0 else 0.0

    fits: dict[float | None, list[Array]] = {None: [w for _ in folds]}
    errors: dict[float | None, float] = {None: relative(fits[None])}
    least = math.inf
    for strength in DAMPINGS:
        fits[strength] = [w + _step(w, s, t, strength, centred) for s, t in outside]
        errors[strength] = relative(fits[strength])
        if errors[strength] > least:  # weaker ones overfit more still
            break
        least = errors[strength]
    before, chosen = errors[None], min(errors, key=lambda damping: errors[damping])
    solved = tuple(fit.astype(np.float32) for fit in fits[chosen])
    if chosen is None:
        return TargetWeights(weights, solved, None, before, before)
    damping = chosen * outside[-1][0].rows / max(stats.rows, 1)  # more rows need less damping
    whole, solution = replace(target, folds=()), np.empty(weights.shape, np.float32)
    for c in column_parts(*weights.shape):
        part = weights[:, c].astype(np.float64)
        solution[:, c] = part + _step(part, stats, whole.columns(c), damping, centred)
    return TargetWeights(solution, solved, damping, before, errors[chosen])


def sample(n: int, most: int) -> npt.NDArray[np.intp]:
    """Sample at most ``most`` of ``n`` output channels, in order: columns are independent, so a sample is representative."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def squared_error(quantized: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> float:
    """Return ``||X_q W_hat - Y||^2 / n`` over the rows of ``stats``, without the mean error if ``centred``."""
    b, gram, residual = stats.backend, objective_on_backend(stats, centred), float(target.power.sum())
    if centred:
        residual -= float(np.square(target.mean).sum())
    for c in column_parts(*quantized.shape):
        w, cross = quantized[:, c].astype(np.float64), target.cross[:, c]
        if centred:
            cross = cross - np.outer(stats.mean, target.mean[c])
        w, cross = b.array(w), b.array(cross)
        residual += float(b.xp.einsum("kn,kn->", w, gram @ w - 2 * cross))
    return max(residual, 0.0)


def _step(weights: Array, stats: LayerStats, target: TargetMoments, damping: float, centred: bool) -> Array:
    """Return ``(H_q + a diag(H_q))^-1 (C - H_q W0)``."""
    b, gram = stats.backend, objective_on_backend(stats, centred)
    cross = target.cross[:, :]
    if centred:
        cross = cross - np.outer(stats.mean, target.mean)
    key, few = ("feedback", centred, damping, b.name), len(stats.mean) <= KEPT

    def factor() -> Callable[[Array], Array]:
        return solver(damped(backends.gram_on(stats.regularized(centred), b), damping))

    return b.host((stats.memo(key, factor) if few else factor())(b.array(cross) - gram @ b.array(weights)))
