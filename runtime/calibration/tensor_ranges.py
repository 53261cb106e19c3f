"""Choice of the grids of rounded activations, from histograms of one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import onnx_ir as ir

from magr_onnx.core.activation_ranges import (
    FINITE,
    LEAST_LEVELS,
    MOST_LEVELS,
    Histogram,
    Method,
    candidates,
    grid_near_levels,
    grid_of_levels,
)
from magr_onnx.core.grid_type import GridType
from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.instrument.taps import Tap
from magr_onnx.passes.layers.weighted import WeightedNode
from magr_onnx.passes.tensors.region import SharedGrid
from magr_onnx.runtime.calibration.activation_ranges import histograms_of, hold_out_of
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.first_shapes import first_shapes
from magr_onnx.runtime.data.sources import Steps

INPUTS, SAME_END = 8, 0.02  # batches that tell whether an input is on a grid, and what parts of a range may lack of it
MASK_RATIO, MASKED = 8.0, 20.0
"""Gap between the scores that a Softmax reads and masks such as -10000, and how far below the scores masks end: exp(-20) is nothing."""
WIDER = 2.0  # than the values seen is a grid of 16 bits: it has steps to spare for those that calibration has not seen
SAMPLE = 1 << 16  # elements of a value in a batch that its histogram is made of


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What is known of values that share a grid.

    Attributes:
        group: The values.
        parts: Histograms of their values in the parts of the data; those that do not reach them are empty.
        levels: The grid of 8 bits that they are on already, or the nearest if they have few levels; else None.
        reach: Of masks, the range of the scores that they are added to, masked ones aside; else 0.
    """

    group: SharedGrid
    parts: tuple[Histogram, ...]
    levels: ActivationGrid | None
    reach: float = 0.0

    def without(self, part: int) -> Measured:
        """Return what is known without a part of the data; all of it if there is one part only."""
        rest = self.parts[:part] + self.parts[part + 1 :]
        return replace(self, parts=rest) if rest else self


def measure(
    model: ir.Model,
    shared: Sequence[SharedGrid],
    layers: Sequence[WeightedNode],
    context: CalibrationContext,
    *,
    kind: GridType,
    by_channel: bool = False,
    progress: Steps | None = None,
) -> list[Measured]:
    """Measure values of the main graph that will be rounded. Few samples are measured in parts, so that ranges can be cross-validated.

    Args:
        model: The float model; not changed.
        shared: Values that share a grid, and what it is limited to.
        layers: Layers that read some of them, for messages.
        context: Data and where to run.
        kind: What grids have in common.
        by_channel: Whether ranges will be made from the mean and the deviation of channels.
        progress: Called after every batch.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    values = [value for group in shared for value in group.values]
    names = [str(value.name) for value in values]
    others = _others(model, values, context) if by_channel else [None] * len(names)
    limits = [None if _is_output(value) else FINITE for value in values]
    taps = [Tap(name, 1, bounds=bounds, others=axes) for name, bounds, axes in zip(names, limits, others, strict=True)]
    readers = [[layer for layer in layers if str(layer.x.name) == name] for name in names]
    parts = histograms_of(model, taps, readers, context, hold_out_of(context.data), sample=SAMPLE, progress=progress)
    of_values = iter(zip(*parts, strict=True))
    measured = []
    for group in shared:
        of_group = [reduce(Histogram.plus, of_part) for of_part in zip(*(next(of_values) for _ in group.values), strict=True)]
        first = group.values[0]
        levels = _of_levels(str(first.name), of_group, context, kind) if first.is_graph_input() else None
        measured.append(Measured(group, tuple(of_group), levels))
    of_value = {value: each for each in measured for value in each.group.values}
    return [replace(each, reach=max((_width(of_value[scores]) for scores in each.group.masks), default=0.0)) for each in measured]


def _width(scores: Measured) -> float:
    """Return the range of scores without those that are masked."""
    seen = [part.without_sentinels(MASK_RATIO) for part in scores.parts if part.low <= part.high]
    return max((part.high for part in seen), default=0.0) - min((part.low for part in seen), default=0.0)


def _is_output(value: ir.Value) -> bool:
    """Whether a value, or its mark, is an output of the model: its infinities mean something to whoever reads them, and are refused."""
    marks = (use.node.outputs[0] for use in value.uses() if use.node.op_type == "Identity")
    return value.is_graph_output() or any(mark.is_graph_output() for mark in marks)


def _others(model: ir.Model, values: Sequence[ir.Value], context: CalibrationContext) -> list[tuple[int, ...] | None]:
    """Return the axes of values other than that of their channels, by the shapes that they have in the first batch.

    Channels are the second axis of matrices and images, and the last one of sequences where its length is known; None without any.
    """
    shapes = first_shapes(model, [str(value.name) for value in values], context.data, context.provider)
    found: list[tuple[int, ...] | None] = []
    for value, rank in zip(values, map(len, shapes.values()), strict=True):
        known = rank != 3 or (value.shape is not None and value.shape.is_static(2))
        channels = 2 if rank == 3 else 1
        found.append(tuple(axis for axis in range(rank) if axis != channels) if rank > 1 and known else None)
    return found


def grid_of(measured: Measured, method: Method, clipping: float, kind: GridType, stretch: float = 0.0) -> ActivationGrid:
    """Choose a grid.

    Of the candidate ranges of `magr_onnx.core.activation_ranges`, the one of least error according to the histograms is chosen. Of several
    parts, each is measured under ranges made of the others.

    Args:
        measured: What is known of the values.
        method: Which candidates to try.
        clipping: Weight of the error outside a range. It is the same for whole neighbourhoods, so that layers behind do not average it out
            as they do with rounding errors.
        kind: What grids have in common.
        stretch: Factor of the range of all values, which is taken instead; 0 for none.
    """
    if measured.levels is not None and kind.bits == 8:
        return measured.levels
    if measured.group.exact is not None:
        return kind.exactly(*measured.group.exact)
    reached = [part for part in measured.parts if part.low <= part.high]
    if not stretch and method == "auto" and kind.bits > 8:
        stretch = WIDER
    masked = MASKED + measured.reach if measured.group.scores or measured.group.masks else 0.0
    return kind.of_range(*_range(reached, measured.group, method, clipping, kind.steps, stretch, masked), measured.group.high)


def _of_levels(name: str, parts: Sequence[Histogram], context: CalibrationContext, kind: GridType) -> ActivationGrid | None:
    """Return the grid that an input of the model is on already, as images of 8 bits are; or the nearest to its levels, where all parts of
    the data reach the ends of one range."""
    if kind.bits > 8 or kind.symmetric or kind.power_of_two:
        return None
    counts: dict[float, int] = {}
    for batch in context.data.limit(INPUTS):
        for level, count in zip(*np.unique(np.asarray(batch[name]), return_counts=True), strict=True):
            counts[float(level)] = counts.get(float(level), 0) + int(count)
        if len(counts) > MOST_LEVELS:
            return None
    levels, numbers = np.array(sorted(counts.items())).T
    if len(levels) < LEAST_LEVELS:
        return None
    best = grid_of_levels(levels)
    if best is None:
        low, high = min(part.low for part in parts), max(part.high for part in parts)
        if max(max(part.low - low, high - part.high) for part in parts) > SAME_END * (high - low):
            return None
        best = grid_near_levels(levels, numbers, low, high)
    return ActivationGrid(float(np.float32(best[0])), best[1] - 128 * kind.signed, kind.signed)


def _range(
    parts: Sequence[Histogram], group: SharedGrid, method: Method, clipping: float, steps: int, stretch: float, masked: float
) -> tuple[float, float]:
    """Choose a range by its errors on every part; of several parts, under ranges from the others.

    Where there are masks, it goes as far below what they leave as ``masked`` says, if it is not 0.
    """
    if not parts:
        return 0.0, 1.0
    if masked:
        unmasked = [part.without_sentinels(MASK_RATIO, zeros=bool(group.masks)) for part in parts]
        if any(cut.cut for cut in unmasked) and all(part.high == cut.high for part, cut in zip(parts, unmasked, strict=True)):
            if not any(part.low < part.high for part in unmasked):  # of 0 and masks alone
                return -masked, 0.0
            low, high = _range(unmasked, group, method, clipping, steps, stretch, 0.0)
            return low - masked, high
    full = reduce(Histogram.plus, parts).without_sentinels()
    if stretch:
        return max(stretch * min(full.low, 0.0), group.low), min(stretch * max(full.high, 0.0), group.high)
    trials = [(full, full)]
    if len(parts) > 1:
        trials = [(reduce(Histogram.plus, [*parts[:i], *parts[i + 1 :]]).without_sentinels(), part) for i, part in enumerate(parts)]

    def ranges(histogram: Histogram) -> dict[str, tuple[float, float]]:
        named = candidates(histogram, method, len(parts) > 1, clipping, steps)
        return {name: (max(low, group.low), min(high, group.high)) for name, (low, high) in named.items()}

    errors: dict[str, float] = {}
    for rest, part in trials:
        tried = ranges(rest)
        low, high = np.array(list(tried.values())).T
        for name, error in zip(tried, part.errors(low, high, clipping, steps), strict=True):
            errors[name] = errors.get(name, 0.0) + error
    return ranges(full)[min(errors, key=lambda name: errors[name])]
