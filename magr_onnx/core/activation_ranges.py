"""Candidate ranges of a static activation grid, from a histogram. The caller picks the one of least measured output error.

- *min-max*: all values.
- *percentile*: all but a fraction of 1e-3, 1e-4 or 1e-5 of the values at either end.
- *min-error*: the range of least rounding and clipping error according to the histogram, and min-max times constant factors.
- *daq*: from the mean and the deviation of each channel (`magr_onnx.core.distribution_ranges`); not among those of *auto*.
- *headroom*: wider than the values seen, which of few samples do not include the largest ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from magr_onnx.core.distribution_ranges import ChannelSums, spread
from magr_onnx.core.types import Activation, ActivationGrid, Array

Method = Literal["auto", "min-max", "percentile", "min-error", "daq"]
METHODS: tuple[str, ...] = get_args(Method)

PERCENTILES = (99.9, 99.99, 99.999)
SHRINKS = (0.9, 0.8, 0.7, 0.55)
HEADROOM = (1.15, 1.35, 1.7, 2.2, 3.0)
SENTINEL_RATIO = 1e5  # a gap this wide between magnitudes separates signal from values such as -1e9 that stand for "nothing"
FINITE = (-float(np.finfo(np.float32).max), float(np.finfo(np.float32).max))
"""Range of float32, to which infinities are clipped: a mask of minus infinity is as good as one of the least number."""
TAIL = 5  # of the largest values, to say how far the next one may go
_SHRINK_STEPS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Histogram of the magnitudes of a tensor, by sign.

    Attributes:
        negative: Count of negative values by magnitude, ``(B,)``.
        positive: Count of positive values by magnitude, ``(B,)``.
        edges: Magnitudes between the bins, ``(B + 1,)``.
        low: Least value.
        high: Greatest value.
        cut: Whether sentinels were left out.
        channels: Sums by channel of each value counted, by its name, where they were measured.
    """

    negative: Array
    positive: Array
    edges: Array
    low: float
    high: float
    cut: bool = False
    channels: Mapping[str, ChannelSums] = field(default_factory=dict)

    def plus(self, other: Histogram) -> Histogram:
        """Return the histogram of the values of both."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        channels = {**self.channels, **other.channels}
        channels |= {name: sums.plus(other.channels[name]) for name, sums in self.channels.items() if name in other.channels}
        return Histogram(self.negative + other.negative, self.positive + other.positive, self.edges, low, high, channels=channels)

    def without_sentinels(self, ratio: float = SENTINEL_RATIO, *, zeros: bool = False) -> Histogram:
        """Return the histogram up to the first gap of a ratio above 1 between occupied magnitudes.

        Attention masks hold -1e9 or -1e30; a range that spans them has no resolution left for the signal. ``zeros``, which are in the first
        bin, are signal in a mask, but not beside 1e6.
        """
        occupied = np.flatnonzero((self.negative + self.positive)[not zeros :]) + (not zeros)
        gaps = np.flatnonzero(self.edges[occupied[1:]] >= ratio * np.maximum(self.edges[occupied[:-1] + 1], 1))
        if not len(gaps):
            return self
        below_gap = np.arange(len(self.negative)) <= occupied[gaps[0]]
        signal = Histogram(self.negative * below_gap, self.positive * below_gap, self.edges, self.low, self.high, True, self.channels)
        return replace(signal, low=signal.quantile(0)[0], high=signal.quantile(0)[1])

    def spread(self, steps: int) -> tuple[float, float]:
        """Return DAQ's range for a grid of so many steps: of the channels that were measured, else of all values as one channel."""
        counts, signed = np.concatenate([self.negative, self.positive]), np.concatenate([-self._centres, self._centres])
        pooled = ChannelSums(float(counts.sum()), np.array([counts @ signed]), np.array([counts @ np.square(signed)]))
        low, high = spread(self.channels.values() or [pooled], steps)
        return max(low, self.low), min(high, self.high)

    def quantile(self, fraction: float) -> tuple[float, float]:
        """Return the range that excludes at most ``fraction`` of all values at either end."""
        allowed = fraction * float(self.negative.sum() + self.positive.sum())

        def bound(counts: Array) -> float:
            beyond = np.cumsum(counts[::-1])[::-1]
            return float(self.edges[int((beyond > allowed).sum())])

        return max(self.low, -bound(self.negative)), min(self.high, bound(self.positive))

    def clipped(self, low: float, high: float) -> float:
        """Return the sum of the squared errors of what lies outside a range."""
        centres, total = self._centres, 0.0
        for counts, bound, largest in ((self.negative, -low, -self.low), (self.positive, high, self.high)):
            total += float(np.square(np.maximum(np.minimum(centres, max(largest, 0.0)) - bound, 0)) @ counts)
        return total

    def unseen(self, low: float, high: float, rows: float) -> float:
        """Estimate the mean squared error of values beyond all that were seen in so many rows, clipped to a range.

        One in ``rows`` rows has such a value. Its excess over the largest seen is taken as exponential, with the mean excess of the `TAIL`
        largest values over the least of them: peaks over a threshold (Balkema and de Haan 1974, Pickands 1975), with the shape 0, which
        so few values do not tell from others.
        """
        total, centres = 0.0, self._centres
        for counts, bound, largest in ((self.negative, -low, -self.low), (self.positive, high, self.high)):
            if largest <= 0 or not math.isfinite(bound):
                continue
            first = np.flatnonzero(np.cumsum(counts[::-1])[::-1] >= min(TAIL, counts.sum()))[-1]
            excess = np.minimum(centres[first:], largest) - min(self.edges[first], largest)
            scale = max(float(excess @ counts[first:] / counts[first:].sum()), 1e-30)
            beyond = largest - bound
            total += (beyond + scale) ** 2 + scale**2 if beyond >= 0 else 2 * scale**2 * math.exp(beyond / scale)
        return total / rows

    @property
    def _centres(self) -> Array:
        return np.sqrt(np.maximum(self.edges[:-1], 1e-30) * self.edges[1:])

    def least_error(self, clipping: float = 1.0, steps: int = 255) -> tuple[float, float]:
        """Return the range of the least of `errors`, each end shrunk independently."""
        shrinks = np.geomspace(0.05, 1, _SHRINK_STEPS)
        low, high = np.repeat(shrinks, len(shrinks)) * self.low, np.tile(shrinks, len(shrinks)) * self.high
        best = np.argmin(self.errors(low, high, clipping, steps))
        return float(low[best]), float(high[best])

    def errors(self, low: Array, high: Array, clipping: float = 1.0, steps: int = 255) -> Array:
        """Estimate the squared errors ``(R,)`` of grids of so many steps over ranges with the ends ``(R,)``: ``clipping`` times those
        outside, and rounding."""
        occupied = np.flatnonzero(self.negative + self.positive)
        centre = np.sqrt(self.edges[occupied] * self.edges[occupied + 1])
        rounding = np.minimum(np.square(np.maximum((high - low) / steps, 1e-30))[:, None] / 12, centre**2)
        total = np.zeros(len(low))
        for counts, bound, largest in ((self.positive, high, self.high), (self.negative, -low, -self.low)):
            beyond = np.minimum(centre, max(largest, 0.0)) - bound[:, None]  # nothing in the last bin is larger
            total += np.where(beyond > 0, clipping * beyond**2, rounding) @ counts[occupied]
        return total


def candidates(
    histogram: Histogram, method: Method = "auto", headroom: bool = False, clipping: float = 1.0, steps: int = 255
) -> dict[str, tuple[float, float]]:
    """Return candidate ranges by name, with ``headroom`` also wider ones; every range contains zero.

    ``clipping`` and ``steps`` are those of `Histogram.errors`.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    ranges: dict[str, tuple[float, float]] = {}
    if method in ("auto", "min-max"):
        ranges["min-max"] = low, high
    if method in ("auto", "percentile"):
        ranges |= {f"percentile {p}": histogram.quantile(1 - p / 100) for p in PERCENTILES}
    if method in ("auto", "min-error"):
        ranges["least tensor error"] = histogram.least_error(clipping, steps)
        ranges |= {f"min-max x {f}": (f * low, f * high) for f in SHRINKS}
    if method == "daq":
        ranges["mean and deviation of channels"] = histogram.spread(steps)
    if method == "auto" and headroom:
        ranges |= {f"min-max x {f}": (f * low, f * high) for f in HEADROOM}
    return {name: (min(a, 0.0), max(b, 0.0)) for name, (a, b) in ranges.items()}


LEAST_LEVELS, MOST_LEVELS = 32, 1024  # distinct values that show that a tensor is on a grid, or on one for every channel
STRETCHES = np.linspace(1, 1.06, 61)  # of a range, to find the grid that is nearest to some values


def grid_of_levels(values: npt.NDArray[Any]) -> tuple[float, int] | None:
    """Return step and zero point (of uint8) of the grid that all values are on, as those of scaled 8-bit images are; None without one.

    The codes that no value uses are left on both sides of them alike.

    Args:
        values: Distinct values, in rising order.
    """
    if len(values) < LEAST_LEVELS:
        return None
    levels = values.astype(np.float64)
    span = float(levels[-1] - levels[0])
    gaps = np.diff(levels)
    step = float(np.median(gaps[gaps < 1.5 * gaps[gaps > span / 1000].min(initial=span)]))
    positions = np.rint((levels - levels[0]) / step)
    if positions[-1] > 255:
        return None
    step = span / positions[-1]
    first = levels[0] / step
    if np.abs(levels - levels[0] - positions * step).max() > 1e-3 * step or abs(first - np.rint(first)) > 1e-3:
        return None
    zero = -int(np.rint(first)) + int(255 - positions[-1]) // 2
    return (step, zero) if 0 <= zero <= 255 else None


def grid_near_levels(levels: npt.NDArray[Any], counts: npt.NDArray[Any], low: float, high: float) -> tuple[float, int]:
    """Return step and zero point (of uint8) of the grid over a range that values of few levels are nearest to.

    Zero is on every grid. The levels of an image that was scaled to ``[-1, 1]`` are not: on a grid of their own step all of them are half a
    step away, and on a slightly wider one half as far.

    Args:
        levels: Distinct values.
        counts: How often they occur.
        low: Least value.
        high: Greatest value.
    """
    low, high, x = min(low, 0.0), max(high, 0.0), levels.astype(np.float64)
    grids = [(step, zero) for step in STRETCHES * (high - low) / 255 for zero in {math.floor(-low / step), math.ceil(-low / step)}]

    def error(grid: tuple[float, int]) -> float:
        step, zero = grid
        codes = np.clip(np.rint(x / step) + zero, 0, 255)
        return float((np.square((codes - zero) * step - x) * counts).sum())

    return min((grid for grid in grids if grid[1] <= 255), key=error)


@np.errstate(over="ignore")  # values far outside the grid are clipped to its ends
def rounded(x: npt.NDArray[Any], activation: Activation | None) -> npt.NDArray[Any]:
    """Round ``x`` to the grid of a layer's input, in float32, as QuantizeLinear or DynamicQuantizeLinear does."""
    if activation is None:
        return x
    real = x.astype(np.float32, copy=False)
    if isinstance(activation, ActivationGrid):
        low, high = activation.limits
        scale, zero = np.float32(activation.scale), np.float32(activation.zero_point)
    else:
        real = np.clip(real, np.float32(activation.low), np.float32(activation.high))
        least, most = min(float(real.min(initial=0)), 0.0), max(float(real.max(initial=0)), 0.0)
        low, high, scale = 0, 255, np.float32((np.float32(most) - np.float32(least)) / np.float32(255))
        if scale == 0:
            return real
        zero = np.clip(np.rint(np.float32(-least) / scale), 0, 255)
    codes = np.clip(np.rint(real / scale) + zero, low, high)
    result: npt.NDArray[Any] = (codes - zero) * scale
    return result
