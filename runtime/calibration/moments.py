"""Second moments of layer inputs, computed inside the graph by onnxruntime and summed in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Activation, Array, Goal, LayerStats, gram_type
from magr_onnx.errors import CalibrationError, NonFiniteError, raise_all
from magr_onnx.passes.graph.kv_cache import current_mask
from magr_onnx.passes.instrument.hoist import hoisted
from magr_onnx.passes.instrument.inline import open_up
from magr_onnx.passes.instrument.taps import Tap, gram_taps, shape_taps
from magr_onnx.passes.job import attach
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.shared import by_weight
from magr_onnx.runtime.calibration.subgraphs import tapped
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort.session import Session

DEFAULT_MASK = "attention_mask"
DEFAULT_BUDGET = 1 << 30
HELD_OUT = 4  # every fourth batch is held out for choosing

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was gathered.

    Attributes:
        stats: Statistics of values, by value name.
        unmasked: Values whose rows the mask did not fit.
        goals: What layers behind quantized ones should put out, by layer name.
        spilled: Bytes of values between stages that have gone to a temporary folder so far.
    """

    stats: dict[str, LayerStats]
    unmasked: tuple[str, ...]
    goals: dict[str, Goal] = field(default_factory=dict)
    spilled: int = 0


@dataclass(slots=True, eq=False)
class _Sums:
    """Sums over rows of one value."""

    gram: Array
    mean: Array
    float_mean: Array
    rows: float = 0

    @staticmethod
    def of(width: int) -> _Sums:
        return _Sums(np.zeros((width, width)), np.zeros(width), np.zeros(width))

    def stats(self, tap: Tap) -> LayerStats:
        n = max(self.rows, 1)
        self.gram /= n
        gram: Array = self.gram.astype(gram_type(len(self.mean)), copy=False)
        self.gram = np.zeros((0, 0))  # may be the largest thing in memory
        return LayerStats(gram, self.mean / n, round(self.rows), None if tap.quantize is None else self.float_mean / n, tap.quantize)


def input_name(layer: LinearLayer) -> str:
    """The name of the value a layer reads: layers with the same one share statistics."""
    return layer.reads


def plan(layers: Sequence[LinearLayer], budget: int = DEFAULT_BUDGET, hold_out: bool = False) -> list[list[LinearLayer]]:
    """Split layers, in order, into groups whose Gram matrices fit ``budget`` bytes together (those of one weight's readers at least).

    Each group costs one pass over the data; memory is bounded by the budget or the largest layer, or layers that share their weight.
    """
    groups: list[list[LinearLayer]] = []
    seen: set[str] = set()
    used = 0
    each = 24 if hold_out else 16  # float64 sum, float32 batch, solver copy; another sum
    for some in by_weight(layers):
        widths = {input_name(layer): layer.k for layer in some}
        cost = sum(each * k * k for name, k in widths.items() if name not in seen)
        if not groups or (cost and used + cost > budget):
            groups.append([])
            seen, used = set(), 0
            cost = sum(each * k * k for k in widths.values())
        groups[-1] += some
        seen |= set(widths)
        used += cost
    return groups


def resolve_mask(model: ir.Model, mask: str | None) -> str | None:
    """The name of the mask input: ``"auto"`` takes ``attention_mask`` if there is one; ``None`` or ``"none"`` takes none.

    Raises:
        CalibrationError: A named mask is not an input of the model.
    """
    names = [v.name for v in model.graph.inputs]
    if mask in (None, "none"):
        return None
    if mask == "auto":
        return DEFAULT_MASK if DEFAULT_MASK in names else None
    if mask not in names:
        raise CalibrationError(f"mask {mask!r} is not an input of the model; its inputs are {', '.join(map(str, names))}")
    return mask


def collect(
    model: ir.Model,
    layers: Iterable[LinearLayer],
    data: Batches,
    *,
    mask: str | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
    quantize: Mapping[str, Activation] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    hold_out: bool = False,
) -> Calibration:
    """Gram matrices and means of everything ``layers`` read, over all batches; nothing of a value without any rows.

    Args:
        model: The float model; it is not changed.
        layers: Layers of ``model`` (or of a copy with the same value names).
        data: Batches that fit the model.
        mask: Input whose zero elements mark rows to leave out, wherever it has one element a row.
        provider: Where to run.
        progress: Called with batches done and in total.
        quantize: What is done to values before their moments are taken (see `Tap.quantize`), by value name.
        bounds: What values are clipped to first (see `Tap.bounds`), by value name.
        hold_out: Also keep statistics of every `HELD_OUT`-th batch apart.

    Raises:
        NonFiniteError: Activations are NaN or infinite (every layer that reads such a value is named).
        CalibrationError: The mask leaves no rows.
    """
    quantize, bounds = quantize or {}, bounds or {}
    readers = readers_of(layers)
    if not readers:
        return Calibration({}, ())
    if not readers:
        return Calibration({}, ())
    taps = make_taps(model, {name: some[0].k for name, some in readers.items()}, data, mask, provider)
    taps = [replace(t, quantize=quantize.get(t.value), bounds=bounds.get(t.value)) for t in taps]
    parts = [[_Sums.of(t.width) for t in taps] for _ in range(2)]
    bad: dict[str, str] = {}
    with Session(gram_taps(model, taps, mask), provider) as session:
        for index, batch in enumerate(data):
            results = iter(session.run(batch))
            held = hold_out and index % HELD_OUT == HELD_OUT - 1
            for sums, tap in zip(parts[held], taps, strict=True):
                gram, total, count = next(results), next(results), next(results)
                float_total = total if tap.quantize is None else next(results)
                if count[0] == 0:  # onnxruntime leaves the product of no rows uninitialized
                    continue
                if not np.isfinite(float_total).all() or not np.isfinite(np.trace(gram)):
                    bad.setdefault(tap.value, not_finite(tap.value, readers[tap.value], data.label(index)))
                sums.gram += gram
                sums.mean += total
                sums.float_mean += float_total
                sums.rows += float(count[0])
            if progress is not None:
                progress(index + 1, len(data))
    raise_all(NonFiniteError, bad.values())
    check_rows((a.rows + b.rows for tap, a, b in zip(taps, *parts, strict=True) if tap.masked), mask)
    stats = {}
    for tap, a, b in zip(taps, *parts, strict=True):
        if a.rows and b.rows:
            kept, rest = a.stats(tap), b.stats(tap)
            stats[tap.value] = replace(kept.combine(rest), held_out=rest)
        elif a.rows or b.rows:
            stats[tap.value] = (a if a.rows else b).stats(tap)
    return Calibration(stats, tuple(t.value for t in taps if not t.masked) if mask is not None else ())


def readers_of(layers: Iterable[LinearLayer]) -> dict[str, list[LinearLayer]]:
    """Layers by the name of the value they read."""
    found: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        found.setdefault(input_name(layer), []).append(layer)
    return found


def make_taps(model: ir.Model, widths: Mapping[str, int], data: Batches, mask: str | None, provider: str) -> list[Tap]:
    """One tap for every value, masked where the mask fits."""
    masked = _masked(model, list(widths), data, mask, provider)
    return [Tap(n, k, n in masked) for n, k in widths.items()]


def not_finite(value: str, readers: Sequence[LinearLayer], where: str) -> str:
    return f"input of {', '.join(layer.name for layer in readers)} ({value}): NaN or infinite activations in {where}"


def check_rows(rows: Iterable[float], mask: str | None) -> None:
    """Refuse a mask that leaves no rows."""
    if any(r == 0 for r in rows):
        raise CalibrationError(f"the mask {mask!r} leaves no rows to calibrate with; pass another mask, or none")


def _masked(model: ir.Model, names: Sequence[str], data: Batches, mask: str | None, provider: str) -> set[str]:
    """Values with one row per element of the mask: all axes but the last have the mask's shape, on the first batch.

    None that was brought out of a body: its rows may fit one batch and not the next.
    """
    if mask is None:
        return set()
    first = next(iter(data))
    wanted = current_mask(first, mask).shape
    with Session(shape_taps(model, names), provider) as session:
        shapes = session.run(first)
    outside = hoisted(model)
    return {name for name, shape in zip(names, shapes, strict=True) if tuple(shape[:-1]) == wanted and name not in outside}


def attach_stats(model: ir.Model, data: Batches, *, mask: str | None = None, provider: str = "cpu") -> None:
    """Give every layer of ``model`` its statistics, so that passes can run on the whole model one after the other.

    Layers in functions and bodies are made ones of their own first (`magr_onnx.passes.instrument.inline.open_up`).
    """
    open_up(model)
    layers, _ = find(model)
    source = tapped(model, layers, data, (), provider)
    stats = collect(source.model, source.reached(layers), data, mask=mask, provider=provider).stats
    for layer in layers:
        attach(layer, stats.get(input_name(layer)))
