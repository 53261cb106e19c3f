"""Batched solver for many small problems: the groups of a convolution, each with few rows and its own Gram matrix.

A depthwise convolution is hundreds of problems of 9 x 1; one at a time, the overhead of NumPy calls dominates. Here every step handles
the same row of all groups together. Minimises, for every column ``w`` of every group,

    E(w_hat) = (w_hat - w)^T H_g (w_hat - w)

by GPTQ (the form of `magr_onnx.core.quantizers.gptq`, rows in natural order) and coordinate descent over the codes, on a ladder of grids of
which every column keeps the one that is best by E.

There is no MagR here: the scale of every column is chosen by its exact error, with error feedback. Under an accumulator larger scales
are tried too, and starts that are projected on its bound (`magr_onnx.core.quantizers.a2q.project`), every code is clipped to what still
fits. Scales are refitted by least squares.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from magr_onnx.core.grid import Grid, ladder, stored
from magr_onnx.core.linalg import damped
from magr_onnx.core.overflow.accumulator import Budget, RunningSums
from magr_onnx.core.quantizers import gptq
from magr_onnx.core.quantizers.a2q import project
from magr_onnx.core.types import Array, QuantizedWeight, WeightSpec
from magr_onnx.errors import NonFiniteError

MOST_ROWS, FEWEST_GROUPS = 64, 8  # limits within which batching pays
_SHRINKS = [float(x) for x in np.linspace(1.02, 0.5, 53)]
_REFITS = 2  # at last, of the best grids
_RETRIES = 8


class Grouped(NamedTuple):
    """Weights of every group, and their errors ``E`` summed over columns ``(G,)``."""

    weights: list[QuantizedWeight]
    errors: Array


def solve(weights: Array, grams: Array, spec: WeightSpec, damping: float, sweeps: int = 8, budget: Budget | None = None) -> Grouped:
    """Choose codes of ``weights (G, K, N)`` under ``grams (G, K, K)``, one grid per column; ``30 K^2 G N`` FLOPs in ``30 K^2`` NumPy calls.

    Groups whose codes could overflow the accumulator of a ``budget`` are solved again under it.

    Raises:
        NonFiniteError: A Gram matrix cannot be factored at any damping.
    """
    free = _solve(weights, grams, spec, damping, sweeps, None)
    if budget is None:
        return free
    low, high = budget.column_extremes(np.hstack([weight.raw() for weight in free.weights]))
    overflowing = np.flatnonzero(((low < budget.low) | (high > budget.high)).reshape(len(weights), -1).any(axis=1))
    if not len(overflowing):
        return free
    again = _solve(weights[overflowing], grams[overflowing], spec, damping, sweeps, budget)
    for index, weight, error in zip(overflowing, *again, strict=True):
        free.weights[index], free.errors[index] = weight, error
    return free


def _solve(weights: Array, grams: Array, spec: WeightSpec, damping: float, sweeps: int, budget: Budget | None) -> Grouped:
    g, k, n = weights.shape
    gram, factors = _factors(grams, damping)
    flat = weights.transpose(1, 0, 2).reshape(k, g * n)
    best: Array = np.full((g, n), np.inf)
    codes, scales, zeros = np.zeros(weights.shape), np.ones((g, n), np.float32), np.zeros((g, n), np.float32)

    def offer(start: Array, grid: _Grid) -> None:
        """Descend from codes on a grid, refit the scales, and keep the columns that are better so."""
        candidate = _descend(weights, gram, start, grid, sweeps)
        fitted = _refitted(candidate - grid.zeros[:, None], weights, gram, grid)
        error = _errors((candidate - grid.zeros[:, None]) * fitted[:, None] - weights, gram)
        better = error < best
        for kept, value in ((best, error), (scales, fitted), (zeros, grid.zeros), (codes, candidate)):
            np.copyto(kept, value, where=better[:, None] if kept.ndim == 3 else better)

    shrinks = _SHRINKS if budget is None else [*_SHRINKS, *_stretches(flat, spec, budget)]
    for s, z in zip(*ladder(flat, spec, shrinks), strict=True):
        grid = _Grid(s.reshape(g, n), z.reshape(g, n), spec, budget)
        for start in (weights,) if budget is None else (weights, grid.projected(weights)):
            offer(_feedback(start, factors, grid), grid)
    for _ in range(_REFITS):
        offer(codes.copy(), _Grid(scales.copy(), zeros.copy(), spec, budget))
    grids = codes.astype(np.uint8), scales.astype(np.float32), zeros.astype(np.uint8)
    return Grouped([QuantizedWeight(c, s[None], z[None], spec) for c, s, z in zip(*grids, strict=True)], best.sum(axis=1))


def _stretches(flat: Array, spec: WeightSpec, budget: Budget) -> list[float]:
    """Return factors on the range of columns ``(K, N)``, with the greatest of which all of them fit the budget unclipped."""
    scales, zeros = ladder(flat, spec, [1.0])
    most = float(gptq.excess(flat, Grid(scales, zeros, spec, len(flat)), budget).max())
    return [float(factor) for factor in most ** np.linspace(0, 1, gptq.rungs_of(most))[1:]]


class _Grid(NamedTuple):
    """Scales and zero points ``(G, N)``, and the bound on codes."""

    scales: Array
    zeros: Array
    spec: WeightSpec
    budget: Budget | None

    def projected(self, weights: Array) -> Array:
        """Return the nearest of ``weights (G, K, N)`` whose codes fit the budget before they are rounded."""
        assert self.budget is not None
        g, k, n = weights.shape
        shift = (self.zeros - self.spec.middle)[:, None]
        raw = (weights / self.scales[:, None] + shift).transpose(1, 0, 2).reshape(k, g * n)
        projected: Array = (project(raw, self.budget).reshape(k, g, n).transpose(1, 0, 2) - shift) * self.scales[:, None]
        return projected

    def nearest(self, row: int, values: Array, sums: RunningSums | None) -> Array:
        """Return the codes of ``values (G, N)`` at ``row`` that still fit, and add them to the sums."""
        codes: Array = np.clip(np.rint(values / self.scales) + self.zeros, 0, self.spec.top)
        if sums is not None:
            flat = codes.reshape(-1)
            sums.clip(row, flat, self.spec.middle)
            codes = flat.reshape(codes.shape)
        return codes


def _factors(grams: Array, damping: float) -> tuple[Array, Array]:
    """Return the damped matrices and the strictly lower feedback matrices of GPTQ, both ``(G, K, K)``."""
    for attempt in range(_RETRIES + 1):
        if attempt:
            damping = max(10 * damping, 1e-6)
        gram = damped(grams, damping)
        try:
            upper = np.linalg.cholesky(gram[:, ::-1, ::-1])[:, ::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        diagonal = np.diagonal(upper, axis1=1, axis2=2)
        return gram, np.tril((upper / diagonal[:, None, :]).transpose(0, 2, 1), -1)
    raise NonFiniteError(f"Gram matrices {grams.shape} are not positive definite even with damping {damping:g}")


def _feedback(weights: Array, factors: Array, grid: _Grid) -> Array:
    """Compute GPTQ's codes ``(G, K, N)`` with one grid per column."""
    difference = np.zeros_like(weights)
    codes = np.empty_like(weights)
    g, k, n = weights.shape
    sums = None if grid.budget is None else RunningSums(grid.budget, k, g * n)
    for row in range(k):
        corrected = weights[:, row] - np.einsum("gj,gjn->gn", factors[:, row, :row], difference[:, :row])
        codes[:, row] = grid.nearest(row, corrected, sums)
        difference[:, row] = (codes[:, row] - grid.zeros) * grid.scales - weights[:, row]
    return codes


def _descend(weights: Array, gram: Array, codes: Array, grid: _Grid, sweeps: int) -> Array:
    """Run coordinate descent over the codes until none changes."""
    difference = (codes - grid.zeros[:, None]) * grid.scales[:, None] - weights
    g, k, n = weights.shape
    raw = (codes - grid.spec.middle).transpose(1, 0, 2).reshape(k, g * n)
    sums = None if grid.budget is None else RunningSums(grid.budget, k, g * n, raw.astype(np.int64))
    for _ in range(sweeps):
        before = codes.copy()
        for row in range(k):
            if sums is not None:
                sums.take(row, (codes[:, row] - grid.spec.middle).reshape(-1), sign=-1)
            slope = np.einsum("gj,gjn->gn", gram[:, row], difference) / gram[:, row, row, None]
            minimum = difference[:, row] + weights[:, row] - slope
            codes[:, row] = grid.nearest(row, minimum, sums)
            difference[:, row] = (codes[:, row] - grid.zeros) * grid.scales - weights[:, row]
        if np.array_equal(before, codes):
            break
    return codes


def _refitted(levels: Array, weights: Array, gram: Array, grid: _Grid) -> Array:
    """Return the scales ``(G, N)`` of least error for ``levels (G, K, N)``; few small codes seldom fit the scale they were chosen with."""
    product = gram @ levels
    power, inner = (np.einsum("gkn,gkn->gn", product, other) for other in (levels, weights))
    return stored(np.where((power > 0) & (inner > 0), inner / np.where(power > 0, power, 1), grid.scales), grid.spec)


def _errors(difference: Array, gram: Array) -> Array:
    """Return ``d^T H d`` of every column ``d`` of every group, ``(G, N)``."""
    result: Array = np.einsum("gkn,gkn->gn", gram @ difference, difference)
    return result
