"""Error feedback across layers: the weights that compute the float output from the quantized prefix's inputs.

Behind quantized layers a layer reads ``X_q`` where the float model reads ``X``. The weights nearest to the float output are

    W* = argmin_W || X_q W - X W0 ||^2 = H_q^-1 G W0,      H_q = X_q^T X_q / n,   G = X_q^T X / n,

and quantizing towards W* under H_q, instead of towards W0 under H, corrects part of what the layers before did wrong (the idea of GPFQ and
of Qronos, arXiv 2505.11695; here in closed form). From few rows W* overfits, so it is damped towards W0,

    W* = W0 + (H_q + a diag(H_q))^-1 (G - H_q) W0,

and ``a`` is the one that leaves least error on held-out rows; none at all (W0) is among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from magr_onnx.linalg import cholesky
from magr_onnx.types import Array, LayerStats

DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1)


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What a layer should be quantized towards.

    Attributes:
        weights: ``W* (K, N)`` float32.
        damping: The ``a`` in use; None for W0 itself.
        before: Relative error of W0 on the held-out rows.
        after: Relative error of W* on the held-out rows, ``a`` applied to the other rows.
    """

    weights: Array
    damping: float | None
    before: float
    after: float


def aim(weights: Array, stats: LayerStats, centred: bool) -> Aim:
    """The damped ``W*`` of ``weights (K, N)``; statistics must hold both inputs and a held-out part.

    ``centred``: whether a bias will absorb the mean error.
    """
    held = stats.held_out
    assert held is not None
    w = weights.astype(np.float64)
    kept = stats.memo("kept", lambda: _without(stats, held))
    before = error(w, w, held, centred)
    best, chosen = before, None
    for damping in DAMPINGS:
        found = error(w + _step(w, kept, damping, centred), w, held, centred)
        if found < best:
            best, chosen = found, damping
    if chosen is None:
        return Aim(weights, None, before, before)
    damping = chosen * kept.rows / max(stats.rows, 1)  # all rows need less of it
    return Aim((w + _step(w, stats, damping, centred)).astype(np.float32), damping, before, best)


def error(quantized: Array, weights: Array, stats: LayerStats, centred: bool) -> float:
    """``||X_q W_hat - X W0||^2 / ||X W0||^2`` over the rows of ``stats``, the mean error left out if ``centred``."""
    gram, cross, float_gram = _moments(stats, centred)
    power = float(np.einsum("kn,kn->", weights, float_gram @ weights))
    value = float(np.einsum("kn,kn->", quantized, gram @ quantized - 2 * (cross @ weights))) + power
    return max(value, 0.0) / power if power > 0 else 0.0


def _step(weights: Array, stats: LayerStats, damping: float, centred: bool) -> Array:
    """``(H_q + a diag(H_q))^-1 (G - H_q) W0``; layers with the same input share the factor."""
    gram, cross, _ = _moments(stats, centred)
    lower = stats.memo(("feedback", centred, damping), lambda: cholesky(gram, damping).lower)
    right = (cross - gram) @ weights
    half = np.linalg.solve(lower, right)
    result: Array = np.linalg.solve(lower.T, half)
    return result


def _moments(stats: LayerStats, centred: bool) -> tuple[Array, Array, Array]:
    """``H_q``, ``G`` and ``H``, centred or not."""
    cross, float_gram = stats.cross, stats.float_gram
    assert cross is not None
    assert float_gram is not None
    if not centred:
        return stats.gram, cross, float_gram
    mean, target = stats.mean, stats.target_mean
    return stats.memo(
        "centred moments",
        lambda: (stats.objective_gram(True), cross - np.outer(mean, target), float_gram - np.outer(target, target)),
    )


def _without(stats: LayerStats, part: LayerStats) -> LayerStats:
    """Statistics of the rows of ``stats`` that are not in ``part``."""
    n = stats.rows - part.rows
    if n <= 0:
        return stats

    def rest(a: Array | None, b: Array | None) -> Array:
        assert a is not None
        assert b is not None
        result: Array = (stats.rows * a - part.rows * b) / n
        return result

    return replace(
        stats,
        gram=rest(stats.gram, part.gram),
        mean=rest(stats.mean, part.mean),
        rows=n,
        float_mean=rest(stats.target_mean, part.target_mean),
        cross=rest(stats.cross, part.cross),
        float_gram=rest(stats.float_gram, part.float_gram),
        held_out=None,
        _memo={},
    )
