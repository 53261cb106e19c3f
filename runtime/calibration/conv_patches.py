"""Second moments of convolution patches, computed inside onnxruntime and summed in float64."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.gram import RowGram, dense, few
from magr_onnx.core.moments import MomentAccumulator, with_folds
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import MagrError, ModelError, NonFiniteError, RuntimeFailure, raise_all
from magr_onnx.passes.instrument.conv_patches import extent_taps, geometry, patch_taps
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.runtime.calibration.moments import DEFAULT_BUDGET, split_by_budget
from magr_onnx.runtime.calibration.subgraphs import NEVER
from magr_onnx.runtime.data.hold_out import NONE, HoldOut, Parts
from magr_onnx.runtime.data.sources import Batches, Steps, run_batches

PATCH_LIMIT = 1 << 30  # bytes of one sample's patches; at the peak there are two copies


def grouped(layers: Sequence[ConvLayer], budget: int = DEFAULT_BUDGET, hold_out: HoldOut = NONE) -> list[list[ConvLayer]]:
    """Split layers, in order, into groups whose Gram matrices fit ``budget`` bytes together (at least one layer each)."""

    def cost(layer: ConvLayer) -> tuple[Hashable, int]:  # bytes: a float32 batch and its sum; float64 sums
        return geometry(layer), (8 + 8 * hold_out.at_width(layer.k).parts) * layer.group * layer.k**2

    return split_by_budget(([layer] for layer in layers), cost, budget)


def unmeasured(model: ir.Model, layers: Sequence[ConvLayer], data: Batches, provider: str, limit: int) -> dict[str, str]:
    """Tell why layers get no statistics, by name: their patches exceed the limit of bytes, or the data does not reach them.

    Shapes are measured up to the first batch that reaches all layers, or on all batches if some are in bodies of If, Loop or Scan.
    """
    nested = [layer for layer in layers if layer.path]
    try:
        shapes = _extents(model, layers, data, provider)
    except (ModelError, RuntimeFailure) as error:
        if not nested:
            raise
        next(run_batches(model, data, provider))  # the model itself must run
        main = [layer for layer in layers if not layer.path]
        reasons = unmeasured(model, main, data, provider, limit) if main else {}
        return {layer.name: cannot_gather(error) for layer in nested} | reasons
    reasons = {}
    for layer, shape in zip(layers, shapes, strict=True):
        if not shape.all():
            reasons[layer.name] = f"data-free: {NEVER}"
            continue
        kernels = 4 * layer.channels * math.prod(layer.kernel) ** 2  # one one-hot kernel per tap
        size = kernels + 4 * layer.group * layer.k * math.prod(map(int, shape[2:]))
        if size > limit:
            sizes = f"{size / 1e6:.0f} MB a sample, kernels to gather them included, and the limit is {limit / 1e6:.0f} MB"
            reasons[layer.name] = f"data-free: its patches take {sizes}; calibrate on smaller inputs"
    return reasons


def _extents(model: ir.Model, layers: Sequence[ConvLayer], data: Batches, provider: str) -> list[npt.NDArray[Any]]:
    """Return the largest output shape of every layer; zeros where data does not reach it."""
    nested = any(layer.path for layer in layers)
    largest = [np.zeros(2 + len(layer.kernel), np.float32) for layer in layers]
    for _, _, shapes in run_batches(extent_taps(model, layers), data, provider):
        mismatched = [layer.name for layer, a, b in zip(layers, largest, shapes, strict=True) if len(a) != len(b)]
        if mismatched:  # onnxruntime trusts declared shapes
            names = ", ".join(mismatched[:5])
            raise ModelError(f"output of {names}: declared with a number of axes that it does not have; remove its shape")
        largest = [np.maximum(a, b) for a, b in zip(largest, shapes, strict=True)]
        if not nested and all(shape.all() for shape in largest):
            break
    return largest


def cannot_gather(error: MagrError) -> str:
    """Say that patches cannot be gathered: the opset of the copy cannot be raised, or onnxruntime does not run it."""
    return f"data-free: its patches cannot be gathered: {str(error).splitlines()[0]}"


def collect(
    model: ir.Model, layers: Sequence[ConvLayer], data: Batches, *, provider: str = "cpu", progress: Steps | None = None
) -> dict[str, list[LayerStats]]:
    """Collect the moments of every group's patches ``(n, K)``, by layer name, with those of held-out batches as folds.

    Raises:
        NonFiniteError: Activations are NaN or infinite (every layer that reads such a value is named).
    """
    hold_out = HoldOut.of(data.samples)
    tapped = {geometry(layer): layer for layer in reversed(layers)}
    of_few = few_patches(model, list(tapped.values()), data, provider)
    whole: dict[tuple[object, ...], Parts[MomentAccumulator]] = {}
    by_rows: dict[tuple[object, ...], list[Parts[MomentAccumulator]]] = {}  # of every group
    for key, layer in tapped.items():
        if layer.name in of_few:
            by_rows[key] = [Parts(hold_out, layer.k, partial(MomentAccumulator, layer.k, few=True)) for _ in range(layer.group)]
        else:
            whole[key] = Parts(hold_out, layer.k, partial(MomentAccumulator, layer.k, layer.group))
    bad: dict[tuple[object, ...], str] = {}
    copy = patch_taps(model, list(tapped.values()), of_few)
    for index, weight, results in run_batches(copy, data, provider, progress, fuses=False):
        for (key, layer), gram, total, count in zip(tapped.items(), results[::3], results[1::3], results[2::3], strict=True):
            power = np.square(gram).sum() if key in by_rows else np.trace(gram, axis1=1, axis2=2)
            if not np.isfinite(total).all() or not np.isfinite(power).all():
                names = ", ".join(reader.name for reader in layers if geometry(reader) == key)
                bad.setdefault(key, f"input of {names} ({layer.x.name}): NaN or infinite activations in {data.label(index)}")
            rows = float(count) / (layer.group * layer.k)
            if key in by_rows:
                for of_group, patches, group_total in zip(by_rows[key], gram, total, strict=True):
                    of_group.of(index).add(RowGram.of(patches), group_total, rows, weight=weight)
            else:
                whole[key].of(index).add(gram, total, rows, weight=weight)
    raise_all(NonFiniteError, bad.values())
    stats = {key: _by_group(parts) for key, parts in whole.items()}
    stats |= {key: [with_folds([p.stats() for p in parts.sums], parts.folds) for parts in groups] for key, groups in by_rows.items()}
    return {layer.name: stats[geometry(layer)] for layer in layers}


def few_patches(model: ir.Model, layers: Sequence[ConvLayer], data: Batches, provider: str) -> set[str]:
    """Select the layers of so few patches that their Gram matrices are kept by these, by the patches that they have in the first batch."""
    wide = [layer for layer in layers if few(1, layer.k) and not layer.path]
    shapes = _extents(model, wide, data, provider) if wide else []
    patches = (len(data) * int(shape[0]) * math.prod(map(int, shape[2:])) for shape in shapes)
    return {layer.name for layer, n in zip(wide, patches, strict=True) if few(n, layer.k)}


def _by_group(parts: Parts[MomentAccumulator]) -> list[LayerStats]:
    """Return the statistics of every group, with those of its folds. Consumes the sums."""
    measured = [
        [LayerStats(g, m, rows) for g, m in zip(dense(grams), means, strict=True)] for grams, means, rows in (p.means() for p in parts.sums)
    ]
    return [with_folds(group, parts.folds) for group in zip(*measured, strict=True)]
