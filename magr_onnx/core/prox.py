"""Projection on the l1 ball and the proximal operator of the l_inf norm.

Both are one root-finding problem. For a row ``v`` of a metric ``d > 0`` the *level* ``c`` solves

    sum_i d_i max(|v_i| - c, 0) = t,        c = 0 when sum_i d_i |v_i| <= t,

a convex, decreasing, piecewise linear equation. Then ``clip(v, -c, c)`` is the prox of ``t ||.||_inf`` in the metric ``diag(d)``, and, with
``d = 1``, ``sign(v) max(|v| - c, 0)`` is the projection on the l1 ball of radius ``t`` (Moreau: the two add up to ``v``).

Newton's method from the left never oversteps the root and only ever shrinks the active set (Michelot 1986; Condat 2016 for the l1
ball), so it ends exactly after a few steps; a level from an earlier, similar problem makes it two. No sort is needed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array

_MARGIN = 0.95  # factor on a warm start, so that it is left of the root unless the root moved further


def levels(values: Array, threshold: float, metric: Array | None = None, start: Array | None = None) -> Array:
    """Compute the clipping level of every row.

    Args:
        values: ``(..., n)``, contiguous; rows along the last axis are independent problems.
        threshold: ``t > 0``.
        metric: Positive weights, ``(n,)``, or ``(G, n)`` for values ``(..., G, n)``; None for ones.
        start: Levels of a similar problem, ``(...)``, to begin from.

    Returns:
        ``(...)`` levels, at least 0, in the dtype of ``values``.
    """
    magnitude = np.abs(values)
    weights = np.ones(values.shape[-1:], values.dtype) if metric is None else metric
    if start is None:
        return _finish(magnitude, weights, threshold, _from_left(magnitude, weights, threshold))
    level = _finish(magnitude, weights, threshold, np.maximum(start * _MARGIN, 0).astype(magnitude.dtype), check=True)
    overshot = np.isnan(level)
    if overshot.any():  # the root moved left of the start: restart those rows (all groups of a row together)
        rows = overshot if weights.ndim == 1 else overshot.any(axis=-1)
        magnitudes = magnitude[rows]
        level[rows] = _finish(magnitudes, weights, threshold, _from_left(magnitudes, weights, threshold))
    return level


def _from_left(magnitude: Array, weights: Array, threshold: float) -> Array:
    """Return a level at or left of every root: two Newton steps, the first with all entries active."""
    lower = np.maximum((_dot(magnitude, weights) - threshold) / weights.sum(axis=-1), 0)
    excess = np.maximum(magnitude - lower[..., None], 0)
    gap = _dot(excess, weights) - threshold
    slope = _dot((excess > 0).astype(magnitude.dtype), weights)
    result: Array = np.maximum(lower + gap / np.where(slope > 0, slope, 1), lower)
    return result


def _dot(rows: Array, weights: Array) -> Array:
    return rows @ weights if weights.ndim == 1 else np.einsum("...gn,gn->...g", rows, weights)


def _finish(magnitude: Array, weights: Array, threshold: float, level: Array, check: bool = False) -> Array:
    """Run Newton on the entries above the level until the active set no longer changes.

    The level must not be right of the root; with ``check``, NaN marks the rows where it was.
    """
    active = np.flatnonzero(magnitude > level[..., None])
    row: npt.NDArray[np.intp] = active // magnitude.shape[-1]
    value = magnitude.reshape(-1)[active].astype(np.float64)
    weight = weights.reshape(-1)[active % weights.size].astype(np.float64)
    current = level.reshape(-1).astype(np.float64)
    overshot = np.zeros(current.size, bool)
    for step in range(100):
        slope = np.bincount(row, weight, current.size)
        total = np.bincount(row, weight * value, current.size)
        if check and step == 0:
            overshot = (total - slope * current < threshold) & (current > 0)
        solved = (total - threshold) / np.where(slope > 0, slope, 1)
        current = np.where(slope > 0, np.maximum(current, solved), current)
        keep = value > current[row]
        if keep.all():
            break
        row, value, weight = row[keep], value[keep], weight[keep]
    current[overshot] = np.nan
    return current.astype(magnitude.dtype).reshape(level.shape)


def prox_linf(vector: Array, threshold: float) -> Array:
    """Return ``argmin_x 1/2 ||x - v||^2 + t ||x||_inf`` for every column of ``(K,)`` or ``(K, N)``."""
    columns = np.ascontiguousarray(np.atleast_2d(vector.T))
    if threshold <= 0:
        return vector.copy()
    level = levels(columns, threshold)[:, None]
    return np.clip(columns, -level, level).T.reshape(vector.shape)


def project_l1_ball(vector: Array, radius: float) -> Array:
    """Project every column of ``(K,)`` or ``(K, N)`` on ``{x : ||x||_1 <= radius}``."""
    if radius < 0:
        raise ValueError(f"the radius of an l1 ball must not be negative; got {radius}")
    if radius == 0:
        return np.zeros_like(vector)
    return vector - prox_linf(vector, radius)
