"""Second moments of the inputs and states of recurrent operators, computed inside onnxruntime and summed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from magr_onnx.core.moments import MomentAccumulator, split_stats
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import NonFiniteError, raise_all
from magr_onnx.passes.instrument.recurrent_states import state_taps
from magr_onnx.passes.layers.recurrent import RecurrentLayer
from magr_onnx.runtime.data.hold_out import HoldOut, Parts
from magr_onnx.runtime.data.sources import Batches, run_batches


def collect(
    model: ir.Model, groups: Sequence[Sequence[RecurrentLayer]], data: Batches, provider: str = "cpu"
) -> list[list[list[LayerStats]] | None]:
    """Collect the moments of what the operators of every group read, who share their weights.

    Returns:
        For every group the moments of the input, and those of the states, in each direction; None where the data reaches none of them.

    Raises:
        NonFiniteError: Activations are NaN or infinite (every operator that reads such a value is named).
    """
    layers = [layer for readers in groups for layer in readers]
    widths = [[readers[0].width, *[readers[0].hidden] * readers[0].directions] for readers in groups]
    hold_out = HoldOut.of(data.samples)
    sums = [[Parts(hold_out, width, partial(MomentAccumulator, width)) for width in each] for each in widths]
    owners = [number for number, readers in enumerate(groups) for _ in readers]
    bad: dict[str, str] = {}
    for index, weight, outputs in run_batches(state_taps(model, layers), data, provider):
        results = iter(outputs)
        for layer, owner in zip(layers, owners, strict=True):
            for parts in sums[owner]:
                gram, total, count = next(results), next(results), float(next(results))
                if count == 0:  # onnxruntime leaves the product of no rows uninitialized
                    continue
                if not (np.isfinite(total).all() and np.isfinite(np.trace(gram))):
                    text = f"input or states of {layer.name} ({layer.x.name}): NaN or infinite activations in {data.label(index)}"
                    bad.setdefault(layer.name, text)
                parts.of(index).add(gram, total, count / len(total), weight=weight)
    raise_all(NonFiniteError, bad.values())
    measured: list[list[list[LayerStats]] | None] = []
    for readers, values in zip(groups, sums, strict=True):
        stats = [known for parts in values if (known := split_stats(parts.sums, parts.folds, None)) is not None]
        measured.append([[stats[0]] * readers[0].directions, stats[1:]] if len(stats) == len(values) else None)
    return measured
