"""Error feedback across layers: the weights that compute the float output from the quantized prefix's inputs.

After quantized layers a layer reads ``X_q`` where the float model reads ``X``. Its target output is ``Y = X W0``, or, where its output is
added to a residual stream that already carries an error (``R_q`` instead of ``R``), ``Y = X W0 + R - R_q``, which corrects the sum. The
least-squares weights are

    W* = argmin_W || X_q W - Y ||^2 = H_q^-1 C,      H_q = X_q^T X_q / n,   C = X_q^T Y / n,

and quantizing towards W* under H_q, instead of towards W0 under H, corrects part of the error of the layers before (the idea of GPFQ and
of Qronos, arXiv 2505.11695, here in closed form; the residual term is new here). From few rows W* overfits, so it is damped towards W0,

    W* = W0 + (H_q + a diag(H_q))^-1 (C - H_q W0),

and ``a`` is chosen for the least error on held-out rows; W0 itself is a candidate.
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
    """The weights a layer is quantized towards.

    Attributes:
        weights: ``W* (K, N)`` float32.
        fit: The same, from the rows that are not held out.
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
    """Return moments of ``Y = X W0`` for ``W0 (K, N)`` from ``X_q^T X / n (K, K)``, ``X^T X / n (K, K)`` and ``mean(X) (K,)``."""
    w = weights.astype(np.float64)
    return TargetMoments(cross @ w, w.T @ float_mean, np.einsum("kn,kn->n", w, float_gram @ w), rows)


def solve_target(weights: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> TargetWeights:
    """Return the damped ``W*`` of ``weights (K, N)``; ``stats`` and ``target`` must have a held-out part.

    ``centred``: whether a bias absorbs the mean error.
    """
    held_out, held_out_target = stats.held_out, target.held_out
    assert held_out is not None
    assert held_out_target is not None
    w = weights.astype(np.float64)
    fit, fit_target = stats.memo("kept", lambda: stats.combine(held_out, -1)), target.combine(held_out_target, -1)
    channels = sample(w.shape[1], SAMPLE)
    sample_weights, sample_target, sample_held_out = w[:, channels], fit_target.columns(channels), held_out_target.columns(channels)
    before = error(sample_weights, held_out, sample_held_out, centred)
    best, chosen = before, None
    for damping in DAMPINGS:
        relative = error(sample_weights + _step(sample_weights, fit, sample_target, damping, centred), held_out, sample_held_out, centred)
        if relative < best:
            best, chosen = relative, damping
    if chosen is None:
        return TargetWeights(weights, weights, None, before, before)
    damping = chosen * fit.rows / max(stats.rows, 1)  # more rows need less damping
    solution, fit_solution = (w + _step(w, s, g, d, centred) for s, g, d in ((stats, target, damping), (fit, fit_target, chosen)))
    return TargetWeights(solution.astype(np.float32), fit_solution.astype(np.float32), damping, before, best)


def sample(n: int, most: int) -> npt.NDArray[np.intp]:
    """Sample at most ``most`` of ``n`` output channels, in order: columns are independent, so a sample is representative."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def error(quantized: Array, stats: LayerStats, target: TargetMoments, centred: bool) -> float:
    """Return ``||X_q W_hat - Y||^2 / ||Y||^2`` over the rows of ``stats``, without the mean error if ``centred``.

    The denominator is never centred, so errors with and without feedback and in the running model are comparable.
    """
    cross, power = target.cross, float(target.power.sum())
    residual = power
    if centred:
        cross, residual = cross - np.outer(stats.mean, target.mean), residual - float(np.square(target.mean).sum())
    residual += float(np.einsum("kn,kn->", quantized, stats.objective_gram(centred) @ quantized - 2 * cross))
    return max(residual, 0.0) / power if power > 0 else 0.0


def _step(weights: Array, stats: LayerStats, target: TargetMoments, damping: float, centred: bool) -> Array:
    """Return ``(H_q + a diag(H_q))^-1 (C - H_q W0)``."""
    gram = stats.objective_gram(centred)
    cross = target.cross - np.outer(stats.mean, target.mean) if centred else target.cross
    return np.linalg.solve(damped(gram, damping), cross - gram @ weights)
