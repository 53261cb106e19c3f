"""Rounding without calibration data: ``H = I`` couples no weights, so no ``(K, K)`` matrix is needed.

Under ``E = ||W_hat - W||^2`` GPTQ is rounding to nearest (there is nothing to feed forward), and coordinate descent with scale refits is
Lloyd's iteration in every group: nearest codes for the scale, then the least-squares scale for the codes,

    s = sum w c / sum c^2,    c = q - z.

Neither step raises E. A scale is rounded to the stored type first, and replaced only where that lowers E.
"""

from __future__ import annotations

import numpy as np

from magr_onnx.core.grid import Grid, blocks, stored
from magr_onnx.core.quantizers.descent import Refined, by_columns, descend
from magr_onnx.core.types import Array, QuantizedWeight

_VALUES = 1 << 22  # weights processed at a time


def refine(target: Array, start: QuantizedWeight, sweeps: int, rescale: bool, tolerance: float = 2e-3) -> Refined:
    """Lower E of ``start`` against ``target (K, N)``.

    Args:
        target: The float weight.
        start: A quantized weight to begin from.
        sweeps: Most rounds.
        rescale: Refit the scales after every round but the last.
        tolerance: Stop when a round lowers E by less than this fraction.
    """

    def refine_part(target: Array, start: QuantizedWeight) -> Refined:
        def sweep(weight: QuantizedWeight, last: bool) -> QuantizedWeight:
            grid = Grid.of(weight)
            weight = grid.weight(grid.codes(target))
            return _refit(target, weight) if rescale and not last else weight

        return Refined(*descend(start, sweep, lambda weight: _error(target, weight), sweeps, tolerance))

    k, n = target.shape
    step = max(1, _VALUES // k)
    return by_columns([np.arange(at, min(at + step, n)) for at in range(0, n, step)], target, start, refine_part)


def _refit(target: Array, weight: QuantizedWeight) -> QuantizedWeight:
    spec = weight.spec
    grouped = blocks(target, spec)
    levels = blocks(weight.codes.astype(np.float32) - weight.zero_points.astype(np.float32)[spec.group_of_row(len(target))], spec)
    power = np.einsum("grn,grn->gn", levels, levels)
    inner = np.einsum("grn,grn->gn", levels, grouped)
    fitted = inner / np.where(power > 0, power, 1)
    scales = stored(np.where(fitted > 0, fitted, weight.scales), spec)

    def error(s: Array) -> Array:
        """Of every group, without ``sum w^2``."""
        result: Array = s.astype(np.float64) ** 2 * power - 2 * s.astype(np.float64) * inner
        return result

    return QuantizedWeight(weight.codes, np.where(error(scales) < error(weight.scales), scales, weight.scales), weight.zero_points, spec)


def _error(target: Array, weight: QuantizedWeight) -> float:
    difference = weight.dequantize()
    difference -= target
    return float(np.einsum("kn,kn->", difference, difference, dtype=np.float64))
