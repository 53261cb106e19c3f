"""A step of MagR for every output channel: the loop of `magr_onnx.core.magr`, with the levels of `magr_onnx.core.prox`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.compiled.jit import compiled, compiled_sums

MARGIN = 0.95  # factor on the level of the step before, so that it is left of the root unless the root moved further
STEPS = 100  # of Newton's method, at most

Array = npt.NDArray[np.floating[Any]]


@compiled_sums
def _above(values: Array, metric: Array, level: np.float32) -> tuple[Any, Any]:
    """Return the sums of ``d |v|`` and of ``d`` over the values above a level."""
    total, slope = np.float64(0), np.float64(0)
    for i in range(len(values)):
        value = abs(values[i])
        weight = metric[i] if value > level else np.float32(0)
        total += weight * value
        slope += weight
    return total, slope


@compiled
def _level(values: Array, metric: Array, threshold: float, start: np.float32) -> np.float32:
    """Return the ``c`` at which ``sum_i d_i max(|v_i| - c, 0)`` is the threshold, or 0; by Newton's method from the left."""
    level = np.float32(start * MARGIN)
    total, slope = _above(values, metric, level)
    if level > 0 and total - slope * level < threshold:  # the start is right of the root
        level = np.float32(0)
        total, slope = _above(values, metric, level)
    for _ in range(STEPS):
        if slope <= 0:
            break
        solved = np.float32((total - threshold) / slope)
        if solved <= level:
            break
        level = solved
        before = slope
        total, slope = _above(values, metric, level)
        if slope == before:
            break
    return level


@compiled
def step(
    x: Array,
    product: Array,
    before: Array,
    momentum: Array,
    inverse: Array,
    metric: Array,
    levels: Array,
    threshold: float,
) -> None:
    """Take one step of accelerated proximal gradient at every output channel.

    Args:
        x: Weights ``(n, K)``, moved in place.
        product: ``(x - W0) H (n, K)``; receives the point of the gradient step.
        before: That point of the step before ``(n, K)``; what it holds afterwards has no meaning.
        momentum: ``(n,)``.
        inverse: One over the metric ``(K,)``.
        metric: ``(G, g)``.
        levels: Of the step before ``(n, G)``, or 0; brought up to date.
        threshold: The penalty.
    """
    groups, size = metric.shape
    k = groups * size
    for row in range(len(x)):
        values, m = x[row], momentum[row]
        for i in range(k):
            point = values[i] - product[row, i] * inverse[i]
            values[i] = point + m * (point - before[row, i])
            product[row, i] = point
        for g in range(groups):
            part = values[g * size : (g + 1) * size]
            level = _level(part, metric[g], threshold, levels[row, g])
            levels[row, g] = level
            for i in range(size):
                part[i] = min(max(part[i], -level), level)
