"""Second moments of layer inputs, computed inside the graph by onnxruntime and summed in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.errors import CalibrationError, NonFiniteError, raise_all
from magr_onnx.passes.job import attach
from magr_onnx.passes.linear import LinearLayer, find
from magr_onnx.passes.taps import Tap, gram_taps, shape_taps
from magr_onnx.runtime.data import Batches
from magr_onnx.runtime.session import Session
from magr_onnx.types import Activation, Array, LayerStats

DEFAULT_MASK = "attention_mask"
DEFAULT_BUDGET = 1 << 30

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Statistics of a set of values, by value name, and the values whose rows the mask did not fit."""

    stats: dict[str, LayerStats]
    unmasked: tuple[str, ...]


def input_name(layer: LinearLayer) -> str:
    """The name of the value a layer reads: layers with the same one share statistics."""
    return str(layer.x.name)


def plan(layers: Sequence[LinearLayer], budget: int = DEFAULT_BUDGET) -> list[list[LinearLayer]]:
    """Split layers, in order, into groups whose Gram matrices fit ``budget`` bytes together (one value at least).

    Each group costs one pass over the data; memory is bounded by the budget or the largest layer.
    """
    groups: list[list[LinearLayer]] = []
    seen: set[str] = set()
    used = 0
    for layer in layers:
        cost = 0 if input_name(layer) in seen else 16 * layer.k * layer.k  # float64 sum, float32 batch, solver copy
        if not groups or (cost and used + cost > budget):
            groups.append([])
            seen, used = set(), 0
            cost = 16 * layer.k * layer.k
        groups[-1].append(layer)
        seen.add(input_name(layer))
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
) -> Calibration:
    """Gram matrices and means of everything ``layers`` read, over all batches.

    Args:
        model: The float model; it is not changed.
        layers: Layers of ``model`` (or of a copy with the same value names).
        data: Batches that fit the model.
        mask: Input whose zero elements mark rows to leave out, wherever it has one element a row.
        provider: Where to run.
        progress: Called with batches done and in total.
        quantize: What is done to values before their moments are taken (see `Tap.quantize`), by value name.
        bounds: What values are clipped to first (see `Tap.bounds`), by value name.

    Raises:
        NonFiniteError: Activations are NaN or infinite (every layer that reads such a value is named).
        CalibrationError: The mask leaves no rows.
    """
    quantize, bounds = quantize or {}, bounds or {}
    readers = readers_of(layers)
    taps = make_taps(model, {name: some[0].k for name, some in readers.items()}, data, mask, provider)
    taps = [replace(t, quantize=quantize.get(t.value), bounds=bounds.get(t.value)) for t in taps]
    grams: list[Array] = [np.zeros((t.width, t.width)) for t in taps]
    sums: list[Array] = [np.zeros(t.width) for t in taps]
    float_sums: list[Array] = [np.zeros(t.width) for t in taps]
    rows = [0.0] * len(taps)
    bad: dict[str, str] = {}
    with Session(gram_taps(model, taps, mask), provider) as session:
        for index, batch in enumerate(data):
            results = iter(session.run(batch))
            for i, tap in enumerate(taps):
                gram, total, count = next(results), next(results), next(results)
                float_total = total if tap.quantize is None else next(results)
                if not np.isfinite(float_total).all() or not np.isfinite(np.trace(gram)):
                    bad.setdefault(tap.value, not_finite(tap.value, readers[tap.value], data.label(index)))
                grams[i] += gram
                sums[i] += total
                float_sums[i] += float_total
                rows[i] += float(count[0])
            if progress is not None:
                progress(index + 1, len(data))
    raise_all(NonFiniteError, bad.values())
    check_rows(rows, mask)
    stats = {}
    for t, g, s, f, r in zip(taps, grams, sums, float_sums, rows, strict=True):
        stats[t.value] = LayerStats(g / r, s / r, round(r), None if t.quantize is None else f / r, t.quantize)
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
    """Values with one row per element of the mask: all axes but the last have the mask's shape, on the first batch."""
    if mask is None:
        return set()
    first = next(iter(data))
    wanted = tuple(first[mask].shape)
    with Session(shape_taps(model, names), provider) as session:
        shapes = session.run(first)
    return {name for name, shape in zip(names, shapes, strict=True) if tuple(shape[:-1]) == wanted}


def attach_stats(model: ir.Model, data: Batches, *, mask: str | None = None, provider: str = "cpu") -> None:
    """Give every layer of ``model`` its statistics, so that passes can run on the whole model one after the other."""
    layers, _ = find(model)
    stats = collect(model, layers, data, mask=mask, provider=provider).stats
    for layer in layers:
        attach(layer, stats[input_name(layer)])
