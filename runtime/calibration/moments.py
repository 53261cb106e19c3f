"""Second moments of layer inputs, computed inside the graph by onnxruntime and summed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.gram import RowGram, few
from magr_onnx.core.moments import MomentAccumulator, split_stats
from magr_onnx.core.types import LayerStats, TargetMoments
from magr_onnx.errors import CalibrationError, NonFiniteError, raise_all
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.instrument.taps import Tap, gram_taps
from magr_onnx.passes.layer_state import attach
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.weighted import WeightedNode, by_weight
from magr_onnx.passes.plan import Plan
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.first_shapes import first_shapes
from magr_onnx.runtime.calibration.mask import masked_values
from magr_onnx.runtime.calibration.subgraphs import tap_subgraphs
from magr_onnx.runtime.data.hold_out import NONE, HoldOut, Parts
from magr_onnx.runtime.data.sources import Batches, Steps, run_batches

DEFAULT_BUDGET = 1 << 30
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """Statistics measured for a group or stage of layers.

    Attributes:
        stats: Moments of layer inputs, by value name.
        unmasked: Values that the mask was not applied to.
        targets: Target moments of layers behind quantized ones, by layer name.
        spilled: Bytes of values between stages written to a temporary folder so far.
    """

    stats: dict[str, LayerStats]
    unmasked: tuple[str, ...]
    targets: dict[str, TargetMoments] = field(default_factory=dict)
    spilled: int = 0


def split_by_budget(units: Iterable[Sequence[T]], cost: Callable[[T], tuple[Hashable, int]], budget: int) -> list[list[T]]:
    """Split units, elements that must stay together, in order, into groups that fit ``budget`` bytes, or are one unit that does not.

    ``cost`` returns the key of the matrix that an element needs, and its bytes; elements of a group share matrices of the same key.
    """
    groups: list[list[T]] = []
    used: dict[Hashable, int] = {}
    for unit in units:
        costs = dict(map(cost, unit))
        new = sum(size for key, size in costs.items() if key not in used)
        if not groups or (new and sum(used.values()) + new > budget):
            groups.append([])
            used = {}
        groups[-1] += unit
        used |= costs
    return groups


def grouped(layers: Sequence[LinearLayer], budget: int = DEFAULT_BUDGET, hold_out: HoldOut = NONE) -> list[list[LinearLayer]]:
    """Split layers, in order, into groups whose Gram matrices fit ``budget`` bytes together (at least the layers of one weight)."""

    def cost(layer: LinearLayer) -> tuple[str, int]:  # bytes: a float32 batch and a solver's copy; float64 sums
        return layer.reads, (8 + 8 * hold_out.at_width(layer.k).parts) * layer.k**2

    return split_by_budget(by_weight(layers), cost, budget)


def collect(
    model: ir.Model, layers: Iterable[LinearLayer], context: CalibrationContext, progress: Steps | None = None
) -> CalibrationResult:
    """Collect Gram matrices and means of the inputs of layers over all batches; inputs without rows get none.

    The layers are those of ``model``, the float model, or of a copy with the same value names. The model is not changed.

    Raises:
        NonFiniteError: Activations are NaN or infinite (every layer that reads such a value is named).
        CalibrationError: The mask leaves no rows.
    """
    readers, data, hold_out = readers_of(layers), context.data, context.hold_out
    if not readers:
        return CalibrationResult({}, ())
    widths = {name: group[0].k for name, group in readers.items()}
    of_few = few_rows(model, widths, context)
    taps = [replace(tap, few=tap.value in of_few) for tap in make_taps(model, widths, context)]
    sums = partial(MomentAccumulator, backend=context.backend)
    parts = [Parts(hold_out, t.width, partial(sums, t.width, float_mean=t.quantize is not None, few=t.few)) for t in taps]
    bad: dict[str, str] = {}
    unmasked = {t.value: None for t in taps if not t.masked}
    for index, weight, outputs in run_batches(gram_taps(model, taps, context.mask), data, context.provider, progress):
        results = iter(outputs)
        for tap, of_tap in zip(taps, parts, strict=True):
            gram, total, count = next(results), next(results), next(results)
            float_total = total if tap.quantize is None else next(results)
            masked = tap.masked and bool(next(results))
            if count[0] == 0:  # onnxruntime leaves the product of no rows uninitialized
                continue
            of_tap.of(index).add(RowGram.of(gram) if tap.few else gram, total, float(count[0]), float_total, weight)
            if not (np.isfinite(float_total).all() and np.isfinite(np.vdot(gram, gram) if tap.few else np.trace(gram))):
                bad.setdefault(tap.value, not_finite(tap.value, readers[tap.value], data.label(index)))
            if not masked:
                unmasked[tap.value] = None
    raise_all(NonFiniteError, bad.values())
    check_rows((sum(part.rows for part in of_tap.sums) for tap, of_tap in zip(taps, parts, strict=True) if tap.masked), context.mask)
    measured = {tap.value: split_stats(of_tap.sums, of_tap.folds, tap.quantize) for tap, of_tap in zip(taps, parts, strict=True)}
    stats = {name: s for name, s in measured.items() if s is not None}
    return CalibrationResult(stats, tuple(unmasked) if context.mask is not None else ())


def readers_of(layers: Iterable[LinearLayer]) -> dict[str, list[LinearLayer]]:
    """Group layers by the value they read, whose statistics they share."""
    readers: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        readers.setdefault(layer.reads, []).append(layer)
    return readers


def make_taps(model: ir.Model, widths: Mapping[str, int], context: CalibrationContext) -> list[Tap]:
    """Make a tap for every value, masked if the value follows the mask, and quantized if it has a grid."""
    masked, choices = masked_values(model, widths, context), context.grids
    return [Tap(n, k, n in masked, *((choices[n].grid, choices[n].bounds) if n in choices else ())) for n, k in widths.items()]


def few_rows(model: ir.Model, widths: Mapping[str, int], context: CalibrationContext) -> set[str]:
    """Select the values of so few rows that their Gram matrices are kept by these, by the rows that they have in the first batch."""
    wide = {name: k for name, k in widths.items() if few(1, k)}
    if not wide:
        return set()
    shapes = first_shapes(model, list(wide), context.data, context.provider)
    return {name for name, k in wide.items() if few(len(context.data) * math.prod(shapes[name][:-1]), k)}


def not_finite(value: str, readers: Sequence[WeightedNode], where: str) -> str:
    read = f"input of {', '.join(layer.name for layer in readers)} ({value})" if readers else value
    return f"{read}: NaN or infinite activations in {where}"


def check_rows(rows: Iterable[float], mask: str | None) -> None:
    """Refuse a mask that leaves no rows."""
    if any(r == 0 for r in rows):
        raise CalibrationError(f"the mask {mask!r} leaves no rows to calibrate with; pass another mask, or none")


def attach_stats(model: ir.Model, data: Batches, *, mask: str | None = None, provider: str = "cpu") -> None:
    """Attach its statistics to every layer of ``model``, for passes that run on the model one after the other.

    Functions are inlined and names in bodies made unique first (`magr_onnx.passes.instrument.inline.inline_and_rename`).
    """
    inline_and_rename(model)
    layers, _ = find(model)
    source = tap_subgraphs(model, layers, data, Plan(), provider)
    stats = collect(source.model, source.reached(layers), CalibrationContext(data, mask, provider)).stats
    for layer in layers:
        attach(layer, stats.get(layer.reads))
