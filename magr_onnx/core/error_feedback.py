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
from magr_onnx.core.types import Array, Goal, LayerStats

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1)
SAMPLE = 128  # output channels the damping is chosen on


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What a layer should be quantized towards.

    Attributes:
        weights: ``W* (K, N)`` float32.
        kept: The same from the rows that are not held out.
        damping: The ``a`` in use; None for W0 itself.
        before: Relative error of W0 on the held-out rows.
        after: Relative error of W* on the held-out rows, ``a`` applied to the other rows.
    """

    weights: Array
    kept: Array
    damping: float | None
    before: float
    after: float


def goal_of(weights: Array, cross: Array, float_gram: Array, float_mean: Array, rows: int) -> Goal:
    """The goal ``Y = X W0`` of ``weights (K, N)``, from ``X_q^T X / n (K, K)``, ``X^T X / n (K, K)`` and ``mean(X) (K,)``."""
    w = weights.astype(np.float64)
    return Goal(cross @ w, w.T @ float_mean, np.einsum("kn,kn->n", w, float_gram @ w), rows)


def aim(weights: Array, stats: LayerStats, goal: Goal, centred: bool) -> Aim:
    """The damped ``W*`` of ``weights (K, N)``; statistics and goal must have a held-out part.

    ``centred``: whether a bias will absorb the mean error.
    """
    held, held_goal = stats.held_out, goal.held_out
    assert held is not None
    assert held_goal is not None
    w = weights.astype(np.float64)
    kept, kept_goal = stats.memo("kept", lambda: stats.combine(held, -1)), goal.combine(held_goal, -1)
    some = sample(w.shape[1], SAMPLE)
    part, part_goal, part_held = w[:, some], kept_goal.columns(some), held_goal.columns(some)
    before = error(part, held, part_held, centred)
    best, chosen = before, None
    for damping in DAMPINGS:
        found = error(part + _step(part, kept, part_goal, damping, centred), held, part_held, centred)
        if found < best:
            best, chosen = found, damping
    if chosen is None:
        return Aim(weights, weights, None, before, before)
    damping = chosen * kept.rows / max(stats.rows, 1)  # all rows need less of it
    whole, nearest = (w + _step(w, s, g, d, centred) for s, g, d in ((stats, goal, damping), (kept, kept_goal, chosen)))
    return Aim(whole.astype(np.float32), nearest.astype(np.float32), damping, before, best)


def sample(n: int, most: int) -> npt.NDArray[np.intp]:
    """At most ``most`` of ``n`` output channels, in order: columns are independent, so a sample tells as much as all of them."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def error(quantized: Array, stats: LayerStats, goal: Goal, centred: bool) -> float:
    """``||X_q W_hat - Y||^2 / ||Y||^2`` over the rows of ``stats``, the mean error left out if ``centred``.

    The output is never centred, so that errors with feedback, without it and in the running model are all measured against the same.
    """
    cross, power = goal.cross, float(goal.power.sum())
    left = power
    if centred:
        cross, left = cross - np.outer(stats.mean, goal.mean), left - float(np.square(goal.mean).sum())
    left += float(np.einsum("kn,kn->", quantized, stats.objective_gram(centred) @ quantized - 2 * cross))
    return max(left, 0.0) / power if power > 0 else 0.0


def _step(weights: Array, stats: LayerStats, goal: Goal, damping: float, centred: bool) -> Array:
    """``(H_q + a diag(H_q))^-1 (C - H_q W0)``."""
    gram = stats.objective_gram(centred)
    cross = goal.cross - np.outer(stats.mean, goal.mean) if centred else goal.cross
    result: Array = np.linalg.solve(damped(gram, damping), cross - gram @ weights)
    return result
