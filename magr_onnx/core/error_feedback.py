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

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core.linalg import damped, solve
from magr_onnx.core.types import Array, LayerStats, TargetMoments

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1)
SAMPLE = 128  # output channels the damping is chosen on


@dataclass(frozen=True, slots=True, eq=False)
class TargetWeights:
    """The weights a layer is quantized towards.

    Attributes:
        weights: ``W* (K, N)`` float32.
        fits: The same from the rows outside each fold.
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
    """Return moments of ``Y = X W0`` for ``W0 (K, N)`` from ``X_q^T X / n (K, K)``, ``X^T X / n (K, K)`` and ``mean(X) (K,)``."""
    w = weights.astype(np.float64)
    return TargetMoments(cross @ w, w.T @ float_mean, np.einsum("kn,kn->n", w, float_gram @ w), rows)


def solve_target(weights: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> TargetWeights:
    """Return the damped ``W*`` of ``weights (K, N)``; ``stats`` and ``target`` must have folds.

    ``centred``: whether a bias absorbs the mean error.
    """
    w = weights.astype(np.float64)
    channels = sample(w.shape[1], SAMPLE)
    sample_weights = w[:, channels]
    folds = range(len(stats.folds))
    fits = [(stats.without(i), target.without(i)) for i in folds]
    held_out = [(stats.folds[i], target.folds[i].columns(channels)) for i in folds]
    power = sum(moments.rows * float(moments.power.sum()) for _, moments in held_out)

    def relative(damping: float | None) -> float:
        squared = 0.0
        for (fit, fit_target), (inside, moments) in zip(fits, held_out, strict=True):
            step = 0.0 if damping is None else _step(sample_weights, fit, fit_target.columns(channels), damping, centred)
            squared += moments.rows * squared_error(sample_weights + step, inside, moments, centred)
        return squared / power if power > 0 else 0.0

    errors = {damping: relative(damping) for damping in (None, *DAMPINGS)}
    before, chosen = errors[None], min(errors, key=lambda damping: errors[damping])
    if chosen is None:
        return TargetWeights(weights, (weights,) * len(fits), None, before, before)
    damping = chosen * fits[-1][0].rows / max(stats.rows, 1)  # more rows need less damping
    solution, *fit_solutions = (
        (w + _step(w, s, t, d, centred)).astype(np.float32) for s, t, d in ((stats, target, damping), *((s, t, chosen) for s, t in fits))
    )
    return TargetWeights(solution, tuple(fit_solutions), damping, before, errors[chosen])


def sample(n: int, most: int) -> npt.NDArray[np.intp]:
    """Sample at most ``most`` of ``n`` output channels, in order: columns are independent, so a sample is representative."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def squared_error(quantized: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> float:
    """Return ``||X_q W_hat - Y||^2 / n`` over the rows of ``stats``, without the mean error if ``centred``."""
    cross, residual = target.cross, float(target.power.sum())
    if centred:
        cross, residual = cross - np.outer(stats.mean, target.mean), residual - float(np.square(target.mean).sum())
    residual += float(np.einsum("kn,kn->", quantized, stats.objective_gram(centred) @ quantized - 2 * cross))
    return max(residual, 0.0)


def _step(weights: Array, stats: LayerStats, target: TargetMoments, damping: float, centred: bool) -> Array:
    """Return ``(H_q + a diag(H_q))^-1 (C - H_q W0)``."""
    gram = stats.objective_gram(centred)
    cross = target.cross - np.outer(stats.mean, target.mean) if centred else target.cross
    return solve(damped(stats.regularized(centred), damping), cross - gram @ weights)
