"""A weight in a few dozen numbers, for the report: how its values are spread before and after MagR, and over the codes of its grid.

Groups have grids of their own, so that no one grid can be drawn over a histogram of a block-wise weight. In units of the grid,
``w / s + z``, all groups share one: the integers 0 to ``2^bits - 1``. The sketch has both: values, and values in units of their own grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.overflow.accumulator import Budget, log2_gap
from magr_onnx.core.types import Array, QuantizedWeight

BINS = 64  # at most, of every histogram
POINTS = 50  # at most, of every curve
SAMPLE = 1 << 17  # values looked at: more of a weight are subsampled to every so many columns
TINY = float(np.finfo(np.float32).tiny)  # a range below it is none: steps of it would be subnormal


def sketch(before: Array, after: Array | None, weight: QuantizedWeight | None) -> dict[str, Any]:
    """Histograms of a weight ``(K, N)``, as plain data. Whatever the weight, there is one: a report must not end a run.

    Args:
        before: The weight that MagR, or else the quantizer, was given.
        after: What MagR made of it; None where it did not run.
        weight: The codes; None where the weight stays float.

    Returns:
        ``of``, the number of values counted; ``low`` and ``high``, the range of the bins; ``before`` and ``after``, counts of values.
        With a ``weight`` also ``grid``: the same in units of each group's own grid (``low``, ``high``, ``before``, ``after``; values
        beyond are in the bins at the ends), ``top``, the largest code, and ``codes``, how often each is used (in at most `BINS` bins).
        NaN is in no bin.
    """
    columns = np.arange(0, before.shape[1], max(1, -(-before.size // SAMPLE)))
    tensors = [None if a is None else a[:, columns].astype(np.float64) for a in (before, after)]  # differences of floats may be no floats
    assert tensors[0] is not None
    low, high = _range(tensors[0])
    histograms: dict[str, Any] = {"of": tensors[0].size, "low": low, "high": high}
    histograms |= _counted(tensors, low, high, BINS)
    if weight is not None:
        histograms["grid"] = _on_grid(tensors, weight, columns)
    return histograms


def _range(values: Array) -> tuple[float, float]:
    """That of the finite values; where they are all the same, or there are none, one around them."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    pad = 0.0 if high - low >= TINY else max(0.5, 1e-6 * abs(low))
    return low - pad, high + pad


def _counted(tensors: Sequence[Array | None], low: float, high: float, bins: int) -> dict[str, Any]:
    """Histograms ``before`` and ``after``."""
    return {name: None if a is None else _counts(a, low, high, bins) for name, a in zip(("before", "after"), tensors, strict=True)}


def _counts(values: npt.NDArray[Any], low: float, high: float, bins: int) -> list[int]:
    """Values by bin; those beyond the range count in the bins at its ends."""
    numbers = values[~np.isnan(values)]
    bin_of = np.clip((numbers - low) * (bins / (high - low)), 0, bins - 1).astype(np.int64)
    counts: list[int] = np.bincount(bin_of, minlength=bins).tolist()
    return counts


def _on_grid(tensors: Sequence[Array | None], weight: QuantizedWeight, columns: npt.NDArray[np.intp]) -> dict[str, Any]:
    """Histograms in units of the grid: bins are a whole number a code, or codes a whole number a bin, so that none falls between."""
    spec = weight.spec
    rows = spec.group_of_row(len(weight.codes))
    scales, zeros = weight.scales[:, columns].astype(np.float64), weight.zero_points[:, columns].astype(np.float64)
    units = [None if a is None else a / scales[rows] + zeros[rows] for a in tensors]
    codes = spec.top + 1
    margin = max(1, codes // 8)
    span = codes + 2 * margin
    bins = span * (BINS // span) if span <= BINS else max(b for b in range(1, BINS + 1) if span % b == 0)
    low = -0.5 - margin
    histograms: dict[str, Any] = {"low": low, "high": low + span} | _counted(units, low, low + span, bins)
    code_counts = np.bincount(weight.codes[:, columns].ravel(), minlength=codes)
    return histograms | {"top": spec.top, "codes": code_counts.reshape(min(codes, BINS), -1).sum(axis=1).tolist()}


def subsample(curve: Sequence[float]) -> list[float]:
    """At most `POINTS` of a curve, its ends among them, to seven digits; `sampled_steps` has which."""
    return [_short(curve[i]) for i in sampled_steps(len(curve))]


def sampled_steps(count: int) -> list[int]:
    """Which points of a curve of ``count`` are kept: steps from its start."""
    steps: list[int] = np.linspace(0, count - 1, min(count, POINTS)).round().astype(int).tolist()
    return steps


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def tile_headroom(weight: QuantizedWeight, budget: Budget) -> dict[str, Any]:
    """Headroom of the inner register in every tile along K, of every order, in bits, over all columns and all inputs.

    Returns:
        ``bits`` and ``tile`` of the accumulator, ``tiles``, how many there are, and ``headroom``: the least of every tile, or of as many
        next to each other as leave `BINS`. None stands for tiles of zeros, which cannot overflow.
    """
    accumulator, bounds = budget.accumulator, list(budget.tile_extremes(weight.raw()))
    lows = np.min([low.min(axis=1) for low, _ in bounds], axis=0)
    highs = np.max([high.max(axis=1) for _, high in bounds], axis=0)
    headrooms = [log2_gap(int(low), int(high), accumulator.bits) for low, high in zip(lows, highs, strict=True)]
    least = [min(part) for part in np.array_split(headrooms, min(len(headrooms), BINS))]
    headroom = [_short(room) if np.isfinite(room) else None for room in least]
    return {"bits": accumulator.bits, "tile": accumulator.tile, "tiles": len(headrooms), "headroom": headroom}
