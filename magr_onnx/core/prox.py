"""Projection on the l1 ball and the proximal operator of the l_inf norm.

Both are one root-finding problem. For a row ``v`` of a metric ``d > 0`` the *level* ``c`` solves

    sum_i d_i max(|v_i| - c, 0) = t,        c = 0 when sum_i d_i |v_i| <= t,

a convex, decreasing, piecewise linear equation. Then ``clip(v, -c, c)`` is the prox of ``t ||.||_inf`` in the metric ``diag(d)``, and, with
``d = 1``, ``sign(v) max(|v| - c, 0)`` is the projection on the l1 ball of radius ``t`` (Moreau: the two add up to ``v``).

Newton's method from the left never oversteps the root and only ever shrinks the active set (Michelot 1986; Condat 2016 for the l1
ball), so it ends exactly after a few steps; a level from an earlier, similar problem makes it two. No sort is needed.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from magr_onnx.core import backends
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
    b = backends.of(values)
    xp = b.xp
    magnitude = xp.abs(values)
    weights = b.zeros(values.shape[-1:], values.dtype) + 1 if metric is None else metric
    if start is None:
        return _finish(magnitude, weights, threshold, _from_left(magnitude, weights, threshold))
    level = _finish(magnitude, weights, threshold, b.cast(xp.maximum(start * _MARGIN, 0), magnitude.dtype), check=True)
    overshot = xp.isnan(level)
    if xp.any(overshot):  # the root moved left of the start: restart those rows (all groups of a row together)
        rows = overshot if weights.ndim == 1 else xp.any(overshot, axis=-1)
        magnitudes = magnitude[rows]
        level[rows] = _finish(magnitudes, weights, threshold, _from_left(magnitudes, weights, threshold))
    return level


def _from_left(magnitude: Array, weights: Array, threshold: float) -> Array:
    """Return a level at or left of every root: two Newton steps, the first with all entries active."""
    b = backends.of(magnitude)
    xp = b.xp
    lower = xp.maximum((_dot(magnitude, weights) - threshold) / xp.sum(weights, axis=-1), 0)
    excess = xp.maximum(magnitude - lower[..., None], 0)
    gap = _dot(excess, weights) - threshold
    slope = _dot(b.cast(excess > 0, magnitude.dtype), weights)
    result: Array = xp.maximum(lower + gap / xp.where(slope > 0, slope, 1), lower)
    return result


def _dot(rows: Array, weights: Array) -> Array:
    if weights.ndim == 1:
        return rows @ weights
    result: Array = backends.of(rows).xp.einsum("...gn,gn->...g", rows, weights)
    return result


def _finish(magnitude: Array, weights: Array, threshold: float, level: Array, check: bool = False) -> Array:
    """Run Newton on the entries above the level until the active set no longer changes.

    The level must not be right of the root; with ``check``, NaN marks the rows where it was.
    """
    b = backends.of(magnitude)
    xp = b.xp
    active: _Active = (_Listed if b.cached else _Marked)(magnitude, weights, level)
    current = b.cast(level.reshape(-1), "float64")
    overshot = None
    for step in range(100):
        slope, total = active.sums()
        if check and step == 0:
            overshot = (total - slope * current < threshold) & (current > 0)
        solved = (total - threshold) / xp.where(slope > 0, slope, 1)
        current = xp.where(slope > 0, xp.maximum(current, solved), current)
        if not active.shrink(current):
            break
    if overshot is not None:
        current[overshot] = xp.nan
    return b.cast(current, magnitude.dtype).reshape(level.shape)


class _Active(Protocol):
    """The entries above the level of their row, in float64."""

    def sums(self) -> tuple[Array, Array]:
        """Return the sums of their weights, and of their weights times themselves, in every row."""

    def shrink(self, level: Array) -> bool:
        """Keep the entries above a higher ``level``; return whether there were others."""


class _Listed:
    """A list of the entries, which soon are few: each step takes less time than the one before."""

    def __init__(self, magnitude: Array, weights: Array, level: Array) -> None:
        active = np.flatnonzero(magnitude > level[..., None])
        self._rows = level.size
        self._row = active // magnitude.shape[-1]
        self._value = magnitude.reshape(-1)[active].astype(np.float64)
        self._weight = weights.reshape(-1)[active % weights.size].astype(np.float64)

    def sums(self) -> tuple[Array, Array]:
        sums: list[Any] = [np.bincount(self._row, each, self._rows) for each in (self._weight, self._weight * self._value)]
        return sums[0], sums[1]

    def shrink(self, level: Array) -> bool:
        keep = self._value > level[self._row]
        if keep.all():
            return False
        self._row, self._value, self._weight = self._row[keep], self._value[keep], self._weight[keep]
        return True


class _Marked:
    """All entries, those that count marked: on a GPU a pass over all takes less time than a list, and sums have one order."""

    def __init__(self, magnitude: Any, weights: Any, level: Any) -> None:
        self._backend = backends.of(magnitude)
        self._value = self._backend.cast(magnitude, "float64")
        self._weight = self._backend.cast(weights, "float64")
        self._above = magnitude > level[..., None]

    def sums(self) -> tuple[Array, Array]:
        xp = self._backend.xp
        weight = xp.where(self._above, self._weight, 0.0)
        return xp.sum(weight, axis=-1).reshape(-1), xp.sum(weight * self._value, axis=-1).reshape(-1)

    def shrink(self, level: Array) -> bool:
        above = self._value > level.reshape(self._value.shape[:-1])[..., None]
        fewer = bool(self._backend.xp.any(self._above & ~above))
        self._above &= above
        return fewer


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
