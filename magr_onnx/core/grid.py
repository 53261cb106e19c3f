"""Choice of a weight's integer grid: one scale and zero point per group and column.

``minmax`` spans the group's range, both ends shrunk by ``beta`` (MagR's authors shrink the scale and keep the lower end, so that only the
upper end is clipped; the scales are the same). ``search`` tries shrink factors from 1 downwards, then two near the best, then the
least-squares scale for the codes of the best so far, and keeps, per group, the grid whose rounding error weighted by ``diag(H)`` is least
(the layer error with input correlations left out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from magr_onnx.core import backends, compiled
from magr_onnx.core.types import Array, Columns, QuantizedWeight, WeightSpec

SHRINKS = tuple(float(shrink) for shrink in np.linspace(1.0, 0.4, 9))
NEAR = (-0.025, 0.025)  # of the best of these
_VALUES = 1 << 16  # weights processed at a time, so that temporaries stay in cache
_ALL_VALUES = 1 << 26  # where nothing is to stay in cache
_LEAST_COLUMNS = 64  # of them side by side


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scales ``(G, N)`` float32 and zero points ``(G, N)`` float32 (integers), for columns of ``k`` rows."""

    scales: Array
    zeros: Array
    spec: WeightSpec
    k: int

    def codes(self, weights: Array) -> Array:
        """Round ``(K, N)`` weights to the nearest codes, as float32 integers."""
        rows = backends.of(weights).index(self.spec.group_of_row(self.k))
        return round_codes(weights, self.scales[rows], self.zeros[rows], self.spec.top)

    def columns(self, chosen: Columns) -> Grid:
        """Return the grid of the ``chosen`` columns."""
        return Grid(self.scales[:, chosen], self.zeros[:, chosen], self.spec, self.k)

    def weight(self, codes: Array) -> QuantizedWeight:
        """Combine codes on this grid into a `QuantizedWeight`."""
        b = backends.of(codes)
        return QuantizedWeight(b.cast(codes, "uint8"), self.scales, b.cast(self.zeros, "uint8"), self.spec)

    @staticmethod
    def of(weight: QuantizedWeight) -> Grid:
        zeros = backends.of(weight.codes).cast(weight.zero_points, "float32")
        return Grid(weight.scales, zeros, weight.spec, len(weight.codes))


def round_codes(weights: Array, scales: Array, zeros: Array, top: int) -> Array:
    """Return ``clip(round(w / s) + z, 0, top)``."""
    b = backends.of(weights)
    codes = b.rint(weights / scales)
    codes += zeros
    clipped: Array = b.xp.clip(codes, 0, top, out=codes)
    return clipped


def stored(scales: Array, spec: WeightSpec) -> Array:
    """Round scales to the stored type ``spec.scale_dtype``, never zero or infinite, and return them as float32."""
    kind = np.dtype(spec.scale_dtype)
    smallest = float(np.finfo(kind).smallest_subnormal) if kind == np.float16 else float(np.finfo(kind).tiny)
    b = backends.of(scales)
    return b.cast(b.cast(b.xp.clip(scales, smallest, float(np.finfo(kind).max)), spec.scale_dtype), "float32")


def blocks(array: Array, spec: WeightSpec) -> Array:
    """Reshape ``(K, N)`` to ``(G, g, N)``, the last group padded with zeros (which change no range and no error)."""
    k, n = array.shape
    rows, groups = spec.rows(k), spec.groups(k)
    if groups * rows != k:
        b = backends.of(array)
        array = b.xp.concatenate([array, b.zeros((groups * rows - k, n), array.dtype)])
    return array.reshape(groups, rows, n)


def _from_range(low: Array, high: Array, spec: WeightSpec) -> tuple[Array, Array]:
    """Return the scale and zero point of the grid over ``[low, high]``, ``low <= 0 <= high``."""
    b = backends.of(low)
    xp = b.xp
    if spec.symmetric:
        scale = xp.maximum(-low / spec.middle, high / max(spec.middle - 1, 1))
        scales = stored(xp.where(scale > 0, scale, 1), spec)
        return scales, xp.full_like(scales, spec.middle)
    span = (high - low) / spec.top
    scales = stored(xp.where(span > 0, span, 1), spec)
    return scales, b.cast(xp.clip(b.rint(-low / scales), 0, spec.top), "float32")


def ladder(group: Array, spec: WeightSpec, shrinks: Sequence[float]) -> tuple[Array, Array]:
    """Return scales and zero points ``(S, N)`` of one group ``(g, N)``, a row for each of S shrink factors of its range."""
    b = backends.of(group)
    factors = b.array(np.array(shrinks, np.float32)[:, None])
    return _from_range(factors * b.xp.minimum(b.xp.min(group, axis=0), 0), factors * b.xp.maximum(b.xp.max(group, axis=0), 0), spec)


def minmax(weights: Array, spec: WeightSpec, beta: float = 1.0) -> Grid:
    """Return the grid over ``beta`` times the range of every group of ``weights (K, N)``."""
    grouped, xp = blocks(weights, spec), backends.of(weights).xp
    low = xp.minimum(xp.min(grouped, axis=1), 0) * beta
    high = xp.maximum(xp.max(grouped, axis=1), 0) * beta
    scales, zeros = _from_range(low, high, spec)
    return Grid(scales, zeros, spec, len(weights))


def search(weights: Array, spec: WeightSpec, diagonal: Array) -> Grid:
    """Return the grid with little ``sum_k diagonal_k (w_k - w_hat_k)^2`` in every group: the best that is tried, never worse than `minmax`.

    Args:
        weights: ``(K, N)`` float32.
        spec: The grid's specification.
        diagonal: ``diag(H) (K,)``.
    """
    k, n = weights.shape
    b, grouped, power = backends.of(weights), blocks(weights, spec), backends.of(diagonal).host(diagonal)
    importance = b.array(np.ascontiguousarray(blocks(np.maximum(power, 0).astype(np.float32)[:, None], spec)[..., 0]))
    groups, rows, _ = grouped.shape
    if compiled.serves(k, n, backend=b):

        def search_columns(c: slice) -> tuple[Array, Array]:
            from magr_onnx.core.compiled.grids import fits, losses

            return _search(np.ascontiguousarray(grouped[:, :, c]), importance, spec, losses, fits)

        parts = compiled.by_columns(search_columns, k, n)
        return Grid(np.hstack([scales for scales, _ in parts]), np.hstack([zeros for _, zeros in parts]), spec, k)
    scales, zeros = b.empty((2, groups, n))
    values = b.part(_VALUES, _ALL_VALUES)
    width = min(n, max(_LEAST_COLUMNS, values // rows))
    height = max(1, values // (rows * width))
    for at in range(0, n, width):
        c = slice(at, at + width)
        for first in range(0, groups, height):
            g = slice(first, first + height)
            scales[g, c], zeros[g, c] = _search(b.contiguous(grouped[g, :, c]), importance[g], spec, _losses, _fits)
    return Grid(scales, zeros, spec, k)


Losses = Callable[[Array, Array, Array, Array, int, Array], None]
"""See `magr_onnx.core.compiled.grids`."""


def _search(part: Array, importance: Array, spec: WeightSpec, losses: Losses, fits: Losses) -> tuple[Array, Array]:
    """Return scales and zero points ``(G, n)`` of groups ``part (G, g, n)``; ``importance`` is ``(G, g)``."""
    b = backends.of(part)
    xp = b.xp
    low, high = xp.minimum(xp.min(part, axis=1), 0), xp.maximum(xp.max(part, axis=1), 0)

    def losses_of(scales: Array, zeros: Array) -> Array:
        result: Array = xp.empty_like(scales)
        losses(part, importance, scales, zeros, spec.top, result)
        return result

    factors = b.array(np.array(SHRINKS, np.float32)[:, None, None])
    scales, zeros = _from_range(factors * low, factors * high, spec)
    of_all = losses_of(scales, zeros)
    best = xp.argmin(of_all, axis=0)[None]
    loss, scale, zero = (xp.take_along_axis(values, best, axis=0)[0] for values in (of_all, scales, zeros))

    def take(scales: Array, zeros: Array) -> None:
        for candidate in zip(losses_of(scales, zeros), scales, zeros, strict=True):
            better = candidate[0] < loss
            for kept, value in zip((loss, scale, zero), candidate, strict=True):
                b.put(kept, value, better)

    near = b.cast(factors[:, 0, 0][best[0]] + b.array(np.array(NEAR, np.float32)[:, None, None]), "float32")
    take(*_from_range(near * low, near * high, spec))
    inner, power = products = b.empty((2, *scale.shape))
    fits(part, importance, scale, zero, spec.top, products)
    fitted = (power > 0) & (inner > 0)
    take(stored(scale * xp.where(fitted, inner / xp.where(power > 0, power, 1), 1), spec)[None], b.copy(zero)[None])
    return scale, zero


def _rounded(part: Array, scale: Array, zero: Array, top: int) -> tuple[Array, Array]:
    """Return weights ``(G, g, n)`` in units of their scale, and rounded."""
    b = backends.of(part)
    exact = part * (1 / scale)[:, None]
    rounded = b.rint(exact)
    b.xp.maximum(rounded, -zero[:, None], out=rounded)
    b.xp.minimum(rounded, (top - zero)[:, None], out=rounded)
    return exact, rounded


def _losses(part: Array, importance: Array, scales: Array, zeros: Array, top: int, result: Array) -> None:
    """Do what `magr_onnx.core.compiled.grids.losses` does, in whole arrays."""
    xp = backends.of(part).xp
    for scale, zero, out in zip(scales, zeros, result, strict=True):
        exact, error = _rounded(part, scale, zero, top)
        error -= exact
        error *= error
        xp.multiply((importance[:, None] @ error)[:, 0], xp.square(scale), out=out)


def _fits(part: Array, importance: Array, scale: Array, zero: Array, top: int, result: Array) -> None:
    """Do what `magr_onnx.core.compiled.grids.fits` does, in whole arrays."""
    exact, rounded = _rounded(part, scale, zero, top)
    result[0], result[1] = ((importance[:, None] @ (factor * rounded))[:, 0] for factor in (exact, rounded))


def choose(weights: Array, spec: WeightSpec, diagonal: Array, beta: float | None) -> Grid:
    """Return the min-max grid shrunk by ``beta``, or the searched one when ``beta`` is None."""
    return search(weights, spec, diagonal) if beta is None else minmax(weights, spec, beta)
