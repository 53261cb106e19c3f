"""Error feedback across layers: the weights that compute the float output from the quantized prefix's inputs.

Behind quantized layers a layer reads ``X_q`` where the float model reads ``X``. What it should put out is ``Y = X W0``, and where its
output is added to a value that is already wrong (``R_q`` instead of the float model's residual ``R``), ``Y = X W0 + R - R_q``, which
makes the sum right. The weights nearest to that are

    W* = argmin_W || X_q W - Y ||^2 = H_q^-1 C,      H_q = X_q^T X_q / n,   C = X_q^T Y / n,

and quantizing towards W* under H_q, instead of towards W0 under H, corrects part of what the layers before did wrong (the idea of GPFQ and
of Qronos, arXiv 2505.11695, here in closed form; the residual is our own). From few rows W* overfits, so it is damped towards W0,

    W* = W0 + (H_q + a diag(H_q))^-1 (C - H_q W0),

and ``a`` is the one that leaves least error on held-out rows; none at all (W0) is among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core.linalg import damped
from magr_onnx.core.types import Array, LayerStats, TargetMoments

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1)
SAMPLE = 128  # output channels the damping is chosen on


@dataclass(frozen=True, slots=True, eq=False)
class TargetWeights:
    """What a layer should be quantized towards.

    Attributes:
        weights: ``W* (K, N)`` float32.
        fit: The same from the rows that are not held out.
        damping: The ``a`` in use; None for W0 itself.
        before: Relative error of W0 on the held-out rows.
        after: Relative error of W* on the held-out rows, ``a`` applied to the other rows.
    """

    weights: Array
    fit: Array
    damping: float | None
    before: float
    after: float


def target_moments(weights: Array, cross: Array, float_gram: Array, float_mean: Array, rows: int) -> TargetMoments:
    """Moments of the float output ``Y = X W0`` of ``weights (K, N)``.

    Args:
        weights: ``W0``.
        cross: ``X_q^T X / n (K, K)``.
        float_gram: ``X^T X / n (K, K)``.
        float_mean: ``mean(X) (K,)``.
        rows: ``n``.
    """
    w = weights.astype(np.float64)
    return TargetMoments(cross @ w, w.T @ float_mean, np.einsum("kn,kn->n", w, float_gram @ w), rows)


def solve_target(weights: Array, stats: LayerStats, moments: TargetMoments, centred: bool) -> TargetWeights:
    """The damped ``W*`` of ``weights (K, N)``; statistics and moments must have a held-out part.

    ``centred``: whether a bias will absorb the mean error.
    """
    held_out, held_moments = stats.held_out, moments.held_out
    assert held_out is not None
    assert held_moments is not None
    w = weights.astype(np.float64)
    fit, fit_moments = stats.memo("kept", lambda: stats.combine(held_out, -1)), moments.combine(held_moments, -1)
    columns = sample(w.shape[1], SAMPLE)
    part, part_fit, part_held = w[:, columns], fit_moments.columns(columns), held_moments.columns(columns)
    before = error(part, held_out, part_held, centred)
    least, chosen = before, None
    for damping in DAMPINGS:
        after = error(part + _step(part, fit, part_fit, damping, centred), held_out, part_held, centred)
        if after < least:
            least, chosen = after, damping
    if chosen is None:
        return TargetWeights(weights, weights, None, before, before)
    damping = chosen * fit.rows / max(stats.rows, 1)  # all rows need less of it
    target, fit_target = (w + _step(w, s, m, d, centred) for s, m, d in ((stats, moments, damping), (fit, fit_moments, chosen)))
    return TargetWeights(target.astype(np.float32), fit_target.astype(np.float32), damping, before, least)


def sample(n: int, most: int) -> npt.NDArray[np.intp]:
    """At most ``most`` of ``n`` output channels, in order: columns are independent, so a sample tells as much as all of them."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def error(quantized: Array, stats: LayerStats, moments: TargetMoments, centred: bool) -> float:
    """``||X_q W_hat - Y||^2 / ||Y||^2`` over the rows of ``stats``, the mean error left out if ``centred``.

    The output is never centred, so that errors with feedback, without it and in the running model are all measured against the same.
    """
    cross, power = moments.cross, float(moments.power.sum())
    squares = power
    if centred:
        cross, squares = cross - np.outer(stats.mean, moments.mean), squares - float(np.square(moments.mean).sum())
    squares += float(np.einsum("kn,kn->", quantized, stats.objective_gram(centred) @ quantized - 2 * cross))
    return max(squares, 0.0) / power if power > 0 else 0.0


def _step(weights: Array, stats: LayerStats, moments: TargetMoments, damping: float, centred: bool) -> Array:
    """``(H_q + a diag(H_q))^-1 (C - H_q W0)``."""
    gram = stats.objective_gram(centred)
    cross = moments.cross - np.outer(stats.mean, moments.mean) if centred else moments.cross
    result: Array = np.linalg.solve(damped(gram, damping), cross - gram @ weights)
    return result
