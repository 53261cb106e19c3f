"""Candidate ranges of a static activation grid, from a histogram; which of them is best is decided by measuring their output error.

- *min-max*: everything seen.
- *percentile*: all but a fraction of 1e-3, 1e-4 or 1e-5 of the values at either end.
- *min-error*: the range whose rounding and clipping error of the tensor is least by the histogram, and min-max shrunk by constant factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Activation, ActivationGrid, Array

Method = Literal["auto", "min-max", "percentile", "min-error"]
METHODS: tuple[str, ...] = get_args(Method)

PERCENTILES = (99.9, 99.99, 99.999)
SHRINKS = (0.9, 0.8, 0.7, 0.55)
SENTINEL_RATIO = 1e5  # a gap this wide between magnitudes separates signal from values such as -1e9 that stand for "nothing"
_TRIED = 16


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Where the values of a tensor lie.

    Attributes:
        negative: Count of negative values by magnitude, ``(B,)``.
        positive: Count of positive values by magnitude, ``(B,)``.
        edges: Magnitudes between the bins, ``(B + 1,)``.
        low: Least value.
        high: Greatest value.
        cut: Whether values were left out as sentinels.
    """

    negative: Array
    positive: Array
    edges: Array
    low: float
    high: float
    cut: bool = False

    def without_sentinels(self) -> Histogram:
        """The histogram up to the first gap of `SENTINEL_RATIO` above 1 between occupied magnitudes.

        Masks write -1e9 or -1e30 where a softmax must see nothing; a range that spans them has no resolution left for the rest.
        """
        occupied = np.flatnonzero((self.negative + self.positive)[1:]) + 1  # the first bin holds zeros, which are no signal beside 1e6
        gaps = np.flatnonzero(self.edges[occupied[1:]] >= SENTINEL_RATIO * np.maximum(self.edges[occupied[:-1] + 1], 1))
        if not len(gaps):
            return self
        inside = np.arange(len(self.negative)) <= occupied[gaps[0]]
        kept = Histogram(self.negative * inside, self.positive * inside, self.edges, self.low, self.high, True)
        return replace(kept, low=kept.quantile(0)[0], high=kept.quantile(0)[1])

    def quantile(self, fraction: float) -> tuple[float, float]:
        """A range that leaves at most ``fraction`` of all values out at either end."""
        allowed = fraction * float(self.negative.sum() + self.positive.sum())

        def bound(counts: Array) -> float:
            beyond = np.cumsum(counts[::-1])[::-1]
            return float(self.edges[int((beyond > allowed).sum())])

        return max(self.low, -bound(self.negative)), min(self.high, bound(self.positive))

    def error(self, low: float, high: float) -> float:
        """Sum of squared errors of a grid over ``[low, high]``: clipping beyond it, rounding inside."""
        step = max((high - low) / 255, 1e-30)
        centre = np.sqrt(self.edges[:-1] * self.edges[1:])
        rounding = np.minimum(step**2 / 12, centre**2)
        total = 0.0
        for counts, bound in ((self.positive, high), (self.negative, -low)):
            total += float(counts @ np.where(centre > bound, (centre - bound) ** 2, rounding))
        return total

    def least_error(self) -> tuple[float, float]:
        """The range of least `error` among shrunk ones, each end by itself."""
        shrinks = np.geomspace(0.05, 1, _TRIED)
        tried = [(a * self.low, b * self.high) for a in shrinks for b in shrinks]
        return min(tried, key=lambda ends: self.error(*ends))


def candidates(histogram: Histogram, method: Method = "auto") -> dict[str, tuple[float, float]]:
    """Ranges by name; both ends are on either side of zero or on it."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    found: dict[str, tuple[float, float]] = {}
    if method in ("auto", "min-max"):
        found["min-max"] = low, high
    if method in ("auto", "percentile"):
        found |= {f"percentile {p}": histogram.quantile(1 - p / 100) for p in PERCENTILES}
    if method in ("auto", "min-error"):
        found["least tensor error"] = histogram.least_error()
        found |= {f"min-max x {f}": (f * low, f * high) for f in SHRINKS}
    return {name: (min(a, 0.0), max(b, 0.0)) for name, (a, b) in found.items()}


def rounded(x: npt.NDArray[Any], activation: Activation | None) -> npt.NDArray[Any]:
    """``x`` as a layer with 8-bit inputs reads it: on its grid, in float32, as QuantizeLinear or DynamicQuantizeLinear put it there."""
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
