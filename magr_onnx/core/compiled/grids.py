"""Errors of grids, weighted by importance: the loops of `magr_onnx.core.grid`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.compiled.jit import compiled

WIDTH = 256  # output channels at a time

Array = npt.NDArray[np.floating[Any]]


@compiled
def losses(weights: Array, importance: Array, scales: Array, zeros: Array, top: int, result: Array) -> None:
    """Compute ``sum_k importance_k (w_k - w_hat_k)^2`` of every group on each of several grids.

    Args:
        weights: ``(G, g, N)``.
        importance: ``(G, g)``.
        scales: ``(S, G, N)``.
        zeros: ``(S, G, N)`` float32.
        top: The largest code.
        result: ``(S, G, N)``, written.
    """
    groups, size, n = weights.shape
    total, inverse = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32)
    for g in range(groups):
        for at in range(0, n, WIDTH):
            width = min(WIDTH, n - at)
            for s in range(len(scales)):
                scale, zero = scales[s, g], zeros[s, g]
                for x in range(width):
                    total[x] = 0
                    inverse[x] = np.float32(1) / scale[at + x]
                for i in range(size):
                    row, weight = weights[g, i], importance[g, i]
                    for x in range(width):
                        exact = row[at + x] * inverse[x]
                        error = min(max(np.rint(exact), -zero[at + x]), np.float32(top) - zero[at + x]) - exact
                        total[x] += weight * (error * error)
                for x in range(width):
                    result[s, g, at + x] = total[x] * (scale[at + x] * scale[at + x])


@compiled
def fits(weights: Array, importance: Array, scale: Array, zero: Array, top: int, result: Array) -> None:
    """Compute the weighted products of codes with weights, in units of the scale, and with themselves.

    Args:
        weights: ``(G, g, N)``.
        importance: ``(G, g)``.
        scale: ``(G, N)``.
        zero: ``(G, N)`` float32.
        top: The largest code.
        result: ``(2, G, N)``, written.
    """
    groups, size, n = weights.shape
    for g in range(groups):
        inner, power, s, z = result[0, g], result[1, g], scale[g], zero[g]
        for x in range(n):
            inner[x] = 0
            power[x] = 0
        for i in range(size):
            row, weight = weights[g, i], importance[g, i]
            for x in range(n):
                exact = row[x] / s[x]
                code = min(max(np.rint(exact), -z[x]), np.float32(top) - z[x])
                inner[x] += weight * (exact * code)
                power[x] += weight * (code * code)
