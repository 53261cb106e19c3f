"""Choice of a weight's integer grid: one scale and zero point per group and column.

``minmax`` spans the group's range, both ends shrunk by ``beta`` (MagR's authors shrink the scale and keep the lower end, so that only the
upper end is clipped; the scales are the same). ``search`` tries shrink factors from 1 downwards and keeps, per group,
the one whose rounding error weighted by ``diag(H)`` is smallest (the layer error with input correlations left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magr_onnx.core.types import Array, Columns, QuantizedWeight, WeightSpec

SHRINKS = np.linspace(1.0, 0.35, 27)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scales ``(G, N)`` float32 and zero points ``(G, N)`` float32 (integers), for columns of ``k`` rows."""

    scales: Array
    zeros: Array
    spec: WeightSpec
    k: int

    def codes(self, weights: Array) -> Array:
        """Round ``(K, N)`` weights to the nearest codes, as float32 integers."""
        rows = self.spec.group_of_row(self.k)
        return round_codes(weights, self.scales[rows], self.zeros[rows], self.spec.top)

    def columns(self, chosen: Columns) -> Grid:
        """Return the grid of the ``chosen`` columns."""
        return Grid(self.scales[:, chosen], self.zeros[:, chosen], self.spec, self.k)

    def weight(self, codes: Array) -> QuantizedWeight:
        """Combine codes on this grid into a `QuantizedWeight`."""
        return QuantizedWeight(codes.astype(np.uint8), self.scales, self.zeros.astype(np.uint8), self.spec)

    @staticmethod
    def of(weight: QuantizedWeight) -> Grid:
        return Grid(weight.scales, weight.zero_points.astype(np.float32), weight.spec, len(weight.codes))


def round_codes(weights: Array, scales: Array, zeros: Array, top: int) -> Array:
    """Return ``clip(round(w / s) + z, 0, top)``."""
    codes = np.rint(weights / scales)
    codes += zeros
    return np.clip(codes, 0, top, out=codes)


def stored(scales: Array, spec: WeightSpec) -> Array:
    """Round scales to the stored type ``spec.scale_dtype``, never zero or infinite, and return them as float32."""
    kind = np.dtype(spec.scale_dtype)
    smallest = float(np.finfo(kind).smallest_subnormal) if kind == np.float16 else float(np.finfo(kind).tiny)
    return np.clip(scales, smallest, float(np.finfo(kind).max)).astype(kind).astype(np.float32)


def blocks(array: Array, spec: WeightSpec) -> Array:
    """Reshape ``(K, N)`` to ``(G, g, N)``, the last group padded with zeros (which change no range and no error)."""
    k, n = array.shape
    rows, groups = spec.rows(k), spec.groups(k)
    if groups * rows != k:
        array = np.concatenate([array, np.zeros((groups * rows - k, n), array.dtype)])
    return array.reshape(groups, rows, n)


def _from_range(low: Array, high: Array, spec: WeightSpec) -> tuple[Array, Array]:
    """Return the scale and zero point of the grid over ``[low, high]``, ``low <= 0 <= high``."""
    if spec.symmetric:
        scale = np.maximum(-low / spec.middle, high / max(spec.middle - 1, 1))
        scales = stored(np.where(scale > 0, scale, 1), spec)
        return scales, np.full_like(scales, spec.middle)
    span = (high - low) / spec.top
    scales = stored(np.where(span > 0, span, 1), spec)
    return scales, np.clip(np.rint(-low / scales), 0, spec.top).astype(np.float32)


def ladder(group: Array, spec: WeightSpec, shrinks: Sequence[float]) -> tuple[Array, Array]:
    """Return scales and zero points ``(S, N)`` of one group ``(g, N)``, a row for each of S shrink factors of its range."""
    factors = np.array(shrinks, np.float32)[:, None]
    return _from_range(factors * np.minimum(group.min(axis=0), 0), factors * np.maximum(group.max(axis=0), 0), spec)


def minmax(weights: Array, spec: WeightSpec, beta: float = 1.0) -> Grid:
    """Return the grid over ``beta`` times the range of every group of ``weights (K, N)``."""
    grouped = blocks(weights, spec)
    low = np.minimum(grouped.min(axis=1), 0) * beta
    high = np.maximum(grouped.max(axis=1), 0) * beta
    scales, zeros = _from_range(low, high, spec)
    return Grid(scales, zeros, spec, len(weights))


def search(weights: Array, spec: WeightSpec, diagonal: Array) -> Grid:
    """Return the grid whose shrink factor minimises ``sum_k diagonal_k (w_k - w_hat_k)^2`` in every group.

    Args:
        weights: ``(K, N)`` float32.
        spec: The grid's specification.
        diagonal: ``diag(H) (K,)``.
    """
    k, n = weights.shape
    grouped = blocks(weights, spec)
    importance = blocks(np.repeat(np.maximum(diagonal, 0).astype(np.float32)[:, None], 1, axis=1), spec)[:, :, 0]
    low, high = np.minimum(grouped.min(axis=1), 0), np.maximum(grouped.max(axis=1), 0)
    best: Array = np.full(low.shape, np.inf)
    scales, zeros = np.ones_like(low), np.zeros_like(low)
    step = max(1, (1 << 20) // k)  # columns at a time: temporaries stay in cache
    for at in range(0, n, step):
        c = slice(at, at + step)
        part = np.ascontiguousarray(grouped[:, :, c])
        for shrink in SHRINKS.astype(np.float32):
            s, z = _from_range(low[:, c] * shrink, high[:, c] * shrink, spec)
            error = part * (1 / s)[:, None]
            np.rint(error, out=error)
            np.clip(error, -z[:, None], spec.top - z[:, None], out=error)
            error *= s[:, None]
            error -= part
            loss = np.einsum("gr,grn,grn->gn", importance, error, error)
            better = loss < best[:, c]
            best[:, c] = np.where(better, loss, best[:, c])
            scales[:, c] = np.where(better, s, scales[:, c])
            zeros[:, c] = np.where(better, z, zeros[:, c])
    return Grid(scales, zeros, spec, k)


def choose(weights: Array, spec: WeightSpec, diagonal: Array, beta: float | None) -> Grid:
    """Return the min-max grid shrunk by ``beta``, or the searched one when ``beta`` is None."""
    return search(weights, spec, diagonal) if beta is None else minmax(weights, spec, beta)
