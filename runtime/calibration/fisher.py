"""Output Hessians of layers: second moments of gradients at their outputs, computed inside the graph by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from magr_onnx.core.moments import weighted
from magr_onnx.core.types import Array
from magr_onnx.passes.instrument.gradients import fisher_taps, shaped_values
from magr_onnx.passes.instrument.taps import shape_taps
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.calibration.moments import DEFAULT_BUDGET, split_by_budget
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.sources import Batches, Steps, part_of, run_batches
from magr_onnx.runtime.measure.validate import is_logits

MAX_OUTPUTS = 8192  # of a layer; wider ones get no moments
MAX_BATCHES = 16


class Fisher(Cache):
    """Second moments ``E g g^T (N, N)`` by layer output, in temporary files, since they may exceed memory.

    Attributes:
        blocked: Operators without a derivative, which left some layers without moments.
    """

    def __init__(self) -> None:
        super().__init__(0, "second moments of gradients", "set TMPDIR")
        self.blocked: set[str] = set()

    def moments(self, name: str) -> Array | None:
        """Return the moments of the layer output of this name, or None."""
        return self.get(name, 0).astype(np.float64) if name in self.names(0) else None


def collect(
    model: ir.Model,
    layers: Iterable[LinearLayer],
    data: Batches,
    *,
    provider: str = "cpu",
    budget: int = DEFAULT_BUDGET,
    progress: Steps | None = None,
) -> Fisher:
    """Collect second moments of random gradients of the model's outputs (`magr_onnx.passes.instrument.gradients.fisher_taps`) at layer
    outputs.

    Every group of layers whose moments fit ``budget`` bytes costs a forward and a backward pass over at most `MAX_BATCHES` batches. Layers
    whose output is a model output are skipped: other outputs cannot compensate errors there, and gradients of improbable logits vanish.
    """
    moments = Fisher()
    model_outputs = {str(v.name) for v in model.graph.outputs}
    widths = {str(layer.output.name): layer.n for layer in layers if str(layer.output.name) not in model_outputs and layer.n <= MAX_OUTPUTS}
    if not widths:
        return moments
    data = data.limit(MAX_BATCHES)
    names = shaped_values(model)
    _, _, measured = next(run_batches(shape_taps(model, names), data, provider))
    shapes = {name: tuple(map(int, shape)) for name, shape in zip(names, measured, strict=True)}
    groups = split_by_budget(([name] for name in widths), lambda name: (name, 16 * widths[name] ** 2), budget)
    for index, group in enumerate(groups):
        tapped, reached, blocked = fisher_taps(model, {n: widths[n] for n in group}, shapes, is_logits)
        moments.blocked |= blocked
        sums = [np.zeros((widths[n], widths[n])) for n in reached]
        if reached:
            for _, weight, parts in run_batches(tapped, data, provider, part_of(progress, index, len(groups))):
                for total, part in zip(sums, parts, strict=True):
                    total += weighted(part, weight)
        for name, total in zip(reached, sums, strict=True):
            if np.isfinite(total).all() and total.trace() > 0:
                moments.put(name, 0, (total / sum(map(data.weight, range(len(data))))).astype(np.float32))
    return moments
