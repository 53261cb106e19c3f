"""Rounding without calibration data: nearest codes, refitted scales, and errors that cancel. No ``(K, K)`` matrix is needed.

Under ``E = ||W_hat - W||^2`` GPTQ is rounding to nearest (there is nothing to feed forward), and coordinate descent with scale refits is
Lloyd's iteration in every group: nearest codes for the scale, then the least-squares scale for the codes,

    s = sum w c / sum c^2,    c = q - z.

Neither step raises E. A scale is rounded to the stored type first, and replaced only where that lowers E.

Behind a Relu, a Sigmoid or a Softmax inputs are positive, and the errors of a column add up. Where inputs share a mean, the error of the
output is

    E_r = sum d^2 + r (sum d)^2,    d = w_hat - w,

with r their squared mean over their variance. At last, weights near the middle between two codes are therefore rounded the other way, the
cheapest first, as long as E_r falls. That takes the sum of K errors from about sqrt(K / 12) steps to half of one, and raises the sum of
their squares by one part in K: where the mean is zero it costs next to nothing. The idea is SQuant's (Guo et al., arXiv 2202.07471), which
rounds again until a sum is below half a step; here E_r decides, and steps may differ between groups.

In a convolution, neighbouring taps of one channel read nearly the same wherever an image is smooth, whatever the channel's mean. Their
errors are made to cancel first, channel by channel, with `NEIGHBOURS` for r: that takes the most of what channels of different means
leave of the sum over all of them.
"""

from __future__ import annotations

import numpy as np

from magr_onnx.core.grid import Grid, blocks, stored
from magr_onnx.core.quantizers.descent import Refined, descend, joined
from magr_onnx.core.types import NEIGHBOURS, Array, QuantizedWeight

_VALUES = 1 << 22  # weights processed at a time


def refine(
    target: Array,
    start: QuantizedWeight,
    sweeps: int,
    rescale: bool,
    common_mean: float = 0.0,
    taps: int = 1,
    tolerance: float = 2e-3,
) -> Refined:
    """Lower E of ``start`` against ``target (K, N)``, then let errors cancel. The trace of E is that before the last step.

    Args:
        target: The float weight.
        start: A quantized weight to begin from.
        sweeps: Most rounds.
        rescale: Refit the scales after every round but the last.
        common_mean: The r of E_r.
        taps: Consecutive rows that are taps of one channel.
        tolerance: Stop when a round lowers E by less than this fraction.
    """

    def refine_part(target: Array, start: QuantizedWeight) -> Refined:
        def sweep(weight: QuantizedWeight, last: bool) -> QuantizedWeight:
            grid = Grid.of(weight)
            weight = grid.weight(grid.codes(target))
            return _refit(target, weight) if rescale and not last else weight

        weight, errors = descend(start, sweep, lambda weight: _error(target, weight), sweeps, tolerance)
        return Refined(cancel(target, weight, common_mean, taps), errors)

    k, n = target.shape
    step = max(1, _VALUES // k)
    parts = (np.arange(at, min(at + step, n)) for at in range(0, n, step))
    return joined([refine_part(target[:, part], start.columns(part)) for part in parts])


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


def cancel(target: Array, weight: QuantizedWeight, common_mean: float, taps: int = 1) -> QuantizedWeight:
    """Round weights the other way until the errors of ``weight`` against ``target (K, N)`` cancel in every column.

    Of consecutive ``taps`` they cancel before. After that, E_r of no column rises, with ``common_mean`` for r.
    """
    k, n = target.shape
    steps = weight.scales[weight.spec.group_of_row(k)]

    def by_channel(values: Array) -> Array:
        return values.reshape(-1, taps, n).swapaxes(0, 1).reshape(taps, -1)

    if 1 < taps < k:
        error, codes = weight.dequantize() - target, weight.codes.astype(np.float32)
        moves = _moves(by_channel(error), by_channel(codes), by_channel(steps), weight.spec.top, NEIGHBOURS)
        weight = _moved(weight, moves.reshape(taps, -1, n).swapaxes(0, 1).reshape(k, n))
    if common_mean:
        error, codes = weight.dequantize() - target, weight.codes.astype(np.float32)
        weight = _moved(weight, _moves(error, codes, steps, weight.spec.top, common_mean))
    return weight


def _moved(weight: QuantizedWeight, moves: Array) -> QuantizedWeight:
    return QuantizedWeight((weight.codes + moves).astype(np.uint8), weight.scales, weight.zero_points, weight.spec)


def _moves(error: Array, codes: Array, steps: Array, top: int, common_mean: float) -> Array:
    """Return what to add to ``codes (K, N)``, -1, 0 or 1, for the least E_r: in every column the cheapest weights move against its sum."""
    k, n = error.shape
    total = error.sum(axis=0, dtype=np.float64)
    sign = np.where(total > 0, np.float32(1), np.float32(-1))
    moved = codes - sign
    # squared error for a unit of the sum
    price = np.where((moved >= 0) & (moved <= top), steps - 2 * error * sign, np.inf)
    most = min(k, 8 + int(2 * np.sqrt(k)))  # to be moved
    cheapest = np.argpartition(price, most - 1, axis=0)[:most]
    rows = np.take_along_axis(cheapest, np.argsort(np.take_along_axis(price, cheapest, axis=0), axis=0), axis=0)
    step, price = (np.take_along_axis(values, rows, axis=0).astype(np.float64) for values in (steps, price))
    change = np.cumsum(step * price, axis=0)
    change += common_mean * (np.square(np.abs(total) - np.cumsum(step, axis=0)) - np.square(total))
    best = change.argmin(axis=0)
    count = np.where(change[best, np.arange(n)] < 0, best + 1, 0)
    moves: Array = np.zeros((k, n), np.float32)
    np.put_along_axis(moves, rows, np.where(np.arange(most)[:, None] < count, -sign, 0), axis=0)
    return moves
