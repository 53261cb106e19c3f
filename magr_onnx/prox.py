"""Projection on the l1 ball and the proximal operator of the l_inf norm.

Both are one root-finding problem. For a row ``v`` of a metric ``d > 0`` the *level* ``c`` solves

    sum_i d_i max(|v_i| - c, 0) = t,        c = 0 when sum_i d_i |v_i| <= t,

a convex, decreasing, piecewise linear equation. Then ``clip(v, -c, c)`` is the prox of ``t ||.||_inf`` in the metric ``diag(d)``,
and, with ``d = 1``, ``sign(v) max(|v| - c, 0)`` is the projection on the l1 ball of radius ``t`` (Moreau: the two add up to
``v``).

Newton's method from the left never oversteps the root and only ever shrinks the active set (Michelot 1986; Condat 2016 for the l1
ball), so it ends exactly after a few steps; a level from an earlier, similar problem makes it two. No sort is needed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from magr_onnx.types import Array


def levels(values: Array, threshold: float, metric: Array | None = None, start: Array | None = None) -> Array:
    """Clipping level of every row.

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
    lower = np.maximum((_dot(magnitude, weights) - threshold) / weights.sum(axis=-1), 0)
    level = _newton_step(magnitude, weights, threshold, lower if start is None else start, lower)
    return _finish(magnitude, weights, threshold, level)


def _dot(rows: Array, weights: Array) -> Array:
    product: Array = rows @ weights if weights.ndim == 1 else np.einsum("...gn,gn->...g", rows, weights)
    return product


def _newton_step(magnitude: Array, weights: Array, threshold: float, at: Array, lower: Array) -> Array:
    """One dense step from ``at``; from either side of the root it lands on or left of it."""
    excess = np.maximum(magnitude - at[..., None], 0)
    gap = _dot(excess, weights) - threshold
    slope = _dot((excess > 0).astype(magnitude.dtype), weights)
    stepped = at + gap / np.where(slope > 0, slope, 1)
    result: Array = np.maximum(np.where(slope > 0, stepped, lower), lower)
    return result


def _finish(magnitude: Array, weights: Array, threshold: float, level: Array) -> Array:
    """Newton on the entries still above the level, until the active set stands still."""
    active = np.flatnonzero(magnitude > level[..., None])
    row: npt.NDArray[np.intp] = active // magnitude.shape[-1]
    value = magnitude.reshape(-1)[active].astype(np.float64)
    weight = weights.reshape(-1)[active % weights.size].astype(np.float64)
    current = level.reshape(-1).astype(np.float64)
    for _ in range(100):
        slope = np.bincount(row, weight, current.size)
        total = np.bincount(row, weight * value, current.size)
        solved = (total - threshold) / np.where(slope > 0, slope, 1)
        current = np.where(slope > 0, np.maximum(current, solved), current)
        keep = value > current[row]
        if keep.all():
            break
        row, value, weight = row[keep], value[keep], weight[keep]
    result: Array = current.astype(magnitude.dtype).reshape(level.shape)
    return result


def prox_linf(vector: Array, threshold: float) -> Array:
    """``argmin_x 1/2 ||x - v||^2 + t ||x||_inf`` for every column of ``(K,)`` or ``(K, N)``."""
    columns = np.ascontiguousarray(np.atleast_2d(vector.T))
    if threshold <= 0:
        return vector.copy()
    level = levels(columns, threshold)[:, None]
    result: Array = np.clip(columns, -level, level).T.reshape(vector.shape)
    return result


def project_l1_ball(vector: Array, radius: float) -> Array:
    """Euclidean projection of every column of ``(K,)`` or ``(K, N)`` on ``{x : ||x||_1 <= radius}``."""
    if radius < 0:
        raise ValueError(f"the radius of an l1 ball must not be negative; got {radius}")
    if radius == 0:
        return np.zeros_like(vector)
    result: Array = vector - prox_linf(vector, radius)
    return result
