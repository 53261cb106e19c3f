"""Batched solver for many small problems: the groups of a convolution, each with few rows and its own Gram matrix.

A depthwise convolution is hundreds of problems of 9 x 1; one at a time, the overhead of NumPy calls dominates. Here every step handles
the same row of all groups together. Minimises, for every column ``w`` of every group,

    E(w_hat) = (w_hat - w)^T H_g (w_hat - w)

by GPTQ (the form of `magr_onnx.core.quantizers.gptq`, rows in natural order) and coordinate descent over the codes, on a ladder of grids of
which every column keeps the one that is best by E.

There is no MagR here: the scale of every column is chosen by its exact error, with error feedback.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from magr_onnx.core.grid import ladder
from magr_onnx.core.linalg import damped
from magr_onnx.core.types import Array, QuantizedWeight, WeightSpec
from magr_onnx.errors import NonFiniteError

MOST_ROWS, FEWEST_GROUPS = 64, 8  # limits within which batching pays
_SHRINKS = [float(x) for x in np.linspace(1.02, 0.5, 53)]
_RETRIES = 8


class Grouped(NamedTuple):
    """Weights of every group, and their errors ``E`` summed over columns ``(G,)``."""

    weights: list[QuantizedWeight]
    errors: Array


def solve(weights: Array, grams: Array, spec: WeightSpec, damping: float, sweeps: int = 8) -> Grouped:
    """Choose codes of ``weights (G, K, N)`` under ``grams (G, K, K)``, one grid per column; ``30 K^2 G N`` FLOPs in ``30 K^2`` NumPy calls.

    Raises:
        NonFiniteError: A Gram matrix cannot be factored at any damping.
    """
    g, k, n = weights.shape
    gram, factors = _factors(grams, damping)
    flat = weights.transpose(1, 0, 2).reshape(k, g * n)
    best: Array = np.full((g, n), np.inf)
    codes, scales, zeros = np.zeros(weights.shape), np.ones((g, n), np.float32), np.zeros((g, n), np.float32)
    for s, z in zip(*ladder(flat, spec, _SHRINKS), strict=True):
        scale, zero = s.reshape(g, n), z.reshape(g, n)
        candidate = _descend(weights, gram, _feedback(weights, factors, scale, zero, spec.top), scale, zero, spec.top, sweeps)
        error = _errors((candidate - zero[:, None]) * scale[:, None] - weights, gram)
        better = error < best
        best = np.where(better, error, best)
        codes = np.where(better[:, None], candidate, codes)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    grids = codes.astype(np.uint8), scales.astype(np.float32), zeros.astype(np.uint8)
    return Grouped([QuantizedWeight(c, s[None], z[None], spec) for c, s, z in zip(*grids, strict=True)], best.sum(axis=1))


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


def _feedback(weights: Array, factors: Array, scales: Array, zeros: Array, top: int) -> Array:
    """Compute GPTQ's codes ``(G, K, N)`` with one grid per column."""
    difference = np.zeros_like(weights)
    codes = np.empty_like(weights)
    for row in range(weights.shape[1]):
        corrected = weights[:, row] - np.einsum("gj,gjn->gn", factors[:, row, :row], difference[:, :row])
        codes[:, row] = np.clip(np.rint(corrected / scales) + zeros, 0, top)
        difference[:, row] = (codes[:, row] - zeros) * scales - weights[:, row]
    return codes


def _descend(weights: Array, gram: Array, codes: Array, scales: Array, zeros: Array, top: int, sweeps: int) -> Array:
    """Run coordinate descent over the codes until none changes."""
    difference = (codes - zeros[:, None]) * scales[:, None] - weights
    for _ in range(sweeps):
        before = codes.copy()
        for row in range(weights.shape[1]):
            slope = np.einsum("gj,gjn->gn", gram[:, row], difference) / gram[:, row, row, None]
            minimum = difference[:, row] + weights[:, row] - slope
            codes[:, row] = np.clip(np.rint(minimum / scales) + zeros, 0, top)
            difference[:, row] = (codes[:, row] - zeros) * scales - weights[:, row]
        if np.array_equal(before, codes):
            break
    return codes


def _errors(difference: Array, gram: Array) -> Array:
    """Return ``d^T H d`` of every column ``d`` of every group, ``(G, N)``."""
    result: Array = np.einsum("gkn,gkn->gn", gram @ difference, difference)
    return result
