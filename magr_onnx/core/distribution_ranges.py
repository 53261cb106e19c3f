"""DAQ (Hong et al., arXiv 2012.11230): the range of an activation from the mean and the deviation of each of its channels.

Networks for super-resolution have no batch normalization: means and spreads of their channels differ, and rare pixels go far beyond
them. DAQ takes every channel for normal, with a step that is optimal for the number of bits. A grid of a static activation serves all
channels, so its range is the least that holds

    [mean_c - k deviation_c, mean_c + k deviation_c]

of every channel c, within the values seen; k is the bound of the uniform quantizer of least squared error for a normal value
(`normal_bound`; Max 1960 has a table).

Deviation from the paper: it quantizes channels one by one, by statistics that are computed for each image at run time. Integer kernels have
one scale for all channels of an input, known beforehand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from magr_onnx.core.types import Array

_MOST_BOUND, _NARROWINGS = 8.0, 60  # of the search for the best bound, in deviations
_MANY_STEPS = 1023
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, eq=False)
class ChannelSums:
    """What the mean and the deviation of channels are made of.

    Attributes:
        count: Values in each channel.
        total: Their sums ``(C,)``.
        squares: Sums of their squares ``(C,)``.
    """

    count: float
    total: Array
    squares: Array

    def plus(self, other: ChannelSums) -> ChannelSums:
        """Return those of the values of both, of the same channels."""
        return ChannelSums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def ends(self, deviations: float) -> tuple[float, float]:
        """Return the least range that holds so many deviations on both sides of the mean of every channel."""
        mean = self.total / max(self.count, 1)
        deviation = np.sqrt(np.maximum(self.squares / max(self.count, 1) - np.square(mean), 0))
        return float((mean - deviations * deviation).min()), float((mean + deviations * deviation).max())


def spread(sums: Iterable[ChannelSums], steps: int) -> tuple[float, float]:
    """Return the range of a grid of so many steps for channels with these statistics."""
    lows, highs = zip(*(each.ends(normal_bound(steps)) for each in sums), strict=True)
    return min(lows), max(highs)


@functools.cache
def normal_bound(steps: int) -> float:
    """Return the end of the symmetric grid of ``steps + 1`` codes of least squared error for a standard normal value."""
    low, high = 0.0, _MOST_BOUND
    for _ in range(_NARROWINGS):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, b) if _normal_error(a, steps) < _normal_error(b, steps) else (a, high)
    return (low + high) / 2


def _normal_error(bound: float, steps: int) -> float:
    """Compute the squared error of a standard normal value on the grid of so many steps from ``-bound`` to ``bound``.

    A code c stands for the values between two edges; with their probability p and first moment m, the error is 1 - 2 sum m c + sum p c^2.
    Of very many, it is that of uniform rounding inside and of what lies beyond the bound.
    """
    if steps > _MANY_STEPS:
        beyond, height = 0.5 * math.erfc(bound / math.sqrt(2)), math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
        return (2 * bound / steps) ** 2 / 12 + 2 * ((1 + bound**2) * beyond - bound * height)
    codes = np.linspace(-bound, bound, steps + 1)
    edges = np.concatenate([[-np.inf], (codes[1:] + codes[:-1]) / 2, [np.inf]])
    below = np.array([0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges])
    density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
    return float(1 - 2 * (density[:-1] - density[1:]) @ codes + np.diff(below) @ np.square(codes))
