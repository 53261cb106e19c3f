"""Second moments of gradients, at the outputs of layers or by their weights, computed inside the graph by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.adaptive_hessian import AdaptiveHessian
from magr_onnx.core.layer import BiasPolicy, LayerProblem, absorbs_mean
from magr_onnx.core.moments import weighted
from magr_onnx.core.types import Array
from magr_onnx.passes.instrument.decompose import decomposed
from magr_onnx.passes.instrument.gradients import Gradients, adaptive_taps, fisher_taps, shaped_values
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.calibration.first_shapes import first_shapes
from magr_onnx.runtime.calibration.moments import DEFAULT_BUDGET, split_by_budget
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.sources import Batches, Steps, part_of, run_batches
from magr_onnx.runtime.measure.validate import is_logits

MAX_WIDTH = 8192  # of a layer; wider ones get no moments
MAX_BATCHES = 16
Shapes = Mapping[str, Sequence[int]]


class Fisher(Cache):
    """Second moments by layer output, in temporary files, since they may exceed memory.

    Attributes:
        blocked: Operators without a derivative, which left some layers without moments.
        share: Of output-adaptive Hessians, if the moments are those (`collect_adaptive`); else None.
    """

    def __init__(self, share: float | None = None) -> None:
        super().__init__(0, "second moments of gradients", "set TMPDIR")
        self.blocked: set[str] = set()
        self.share = share

    def moments(self, name: str) -> Array | None:
        """Return the moments of the layer output of this name, or None."""
        return self.get(name, 0).astype(np.float64) if name in self.names(0) else None

    def adaptive(self, name: str) -> AdaptiveHessian | None:
        """Return the output-adaptive Hessian of the layer with the output of this name, of moments by `collect_adaptive`; or None."""
        moments = self.moments(name)
        return None if moments is None or self.share is None else AdaptiveHessian(moments, self.share)

    def completed(self, problem: LayerProblem, name: str) -> LayerProblem:
        """Return the problem of the layer with the output of this name, with what there is for it."""
        if self.share is None:
            return replace(problem, output_hessian=self.moments(name))
        return replace(problem, adaptive_hessian=self.adaptive(name))


def is_wide(layer: LinearLayer, adaptive: bool = False) -> bool:
    """Return whether a layer is too wide for moments of gradients at its outputs, or, ``adaptive``, by its weight."""
    return (max(layer.k, layer.n) if adaptive else layer.n) > MAX_WIDTH


def collect(
    model: ir.Model,
    layers: Iterable[LinearLayer],
    data: Batches,
    *,
    provider: str = "cpu",
    budget: int = DEFAULT_BUDGET,
    progress: Steps | None = None,
) -> Fisher:
    """Collect second moments ``E g g^T (N, N)`` of random gradients of the model's outputs
    (`magr_onnx.passes.instrument.gradients.fisher_gradients`) at layer outputs.

    Every group of layers whose moments fit ``budget`` bytes costs a forward and a backward pass over at most `MAX_BATCHES` batches. Layers
    whose output is a model output are skipped: other outputs cannot compensate errors there, and gradients of improbable logits vanish.
    """
    model = decomposed(model)
    outputs = {str(v.name) for v in model.graph.outputs}
    widths = {str(layer.output.name): layer.n for layer in layers if not is_wide(layer)}
    widths = {name: n for name, n in widths.items() if name not in outputs}

    def tapped(names: Sequence[str], shapes: Shapes) -> Gradients:
        return fisher_taps(model, {name: widths[name] for name in names}, shapes, is_logits)

    return _collect(Fisher(), model, widths, tapped, data.limit(MAX_BATCHES), provider, budget, progress)


def collect_adaptive(
    model: ir.Model,
    layers: Iterable[LinearLayer],
    data: Batches,
    share: float,
    *,
    provider: str = "cpu",
    budget: int = DEFAULT_BUDGET,
    progress: Steps | None = None,
) -> Fisher:
    """Collect the moments of `magr_onnx.core.adaptive_hessian.AdaptiveHessian` ``(K+1, K+1)``, by layer output, at the cost of `collect`.

    Layers of more than `MAX_WIDTH` inputs or outputs are skipped.
    """
    model = decomposed(model)
    chosen = {str(layer.output.name): (layer.reads, layer.k, layer.n) for layer in layers if not is_wide(layer, adaptive=True)}
    first = next(iter(data))
    lengths = {name: len(first[name]) for v in model.graph.inputs if (name := str(v.name)) in first and first[name].ndim}
    batch = next(((name, length) for name, length in lengths.items() if length), None)
    if batch is None:
        return Fisher(share)

    def tapped(names: Sequence[str], shapes: Shapes) -> Gradients:
        return adaptive_taps(model, {name: chosen[name] for name in names}, shapes, is_logits, batch)

    widths = {name: k + 1 for name, (_, k, _) in chosen.items()}
    return _collect(Fisher(share), model, widths, tapped, data.limit(MAX_BATCHES), provider, budget, progress)


def diagonals(
    model: ir.Model, layers: Sequence[LinearLayer], data: Batches, bias: BiasPolicy | None, *, provider: str = "cpu"
) -> dict[str, Array]:
    """Return the mean squares of the gradients of the weights of every input ``(K,)``, by layer; of layers without gradients nothing.

    ``bias`` is the later correction's policy: where a bias absorbs the mean of the inputs, it is left out.
    """
    centred = {layer.name: absorbs_mean(bias, layer.has_bias) for layer in layers}
    with collect_adaptive(model, layers, data, 1.0, provider=provider) as found:
        hessians = {layer.name: found.adaptive(str(layer.output.name)) for layer in layers}
        return {name: hessian.diagonal(centred[name]) for name, hessian in hessians.items() if hessian is not None}


def _collect(
    moments: Fisher,
    model: ir.Model,
    widths: Mapping[str, int],
    tapped: Callable[[Sequence[str], Shapes], Gradients],
    data: Batches,
    provider: str,
    budget: int,
    progress: Steps | None,
) -> Fisher:
    """Average over the batches of ``data`` what ``tapped`` puts out of every value, in groups of such values.

    Args:
        moments: Where to put it.
        model: The model.
        widths: Of the square matrices put out, by the name of the value.
        tapped: Makes the model of a group, given shapes of values on one batch.
        data: What to run it on.
        provider: Where to run it.
        budget: Bytes of the matrices of a group.
        progress: Called after every batch of every group.
    """
    if not widths:
        return moments
    shapes = first_shapes(model, shaped_values(model), data, provider)
    groups = split_by_budget(([name] for name in widths), lambda name: (name, 16 * widths[name] ** 2), budget)
    for index, group in enumerate(groups):
        taps = tapped(group, shapes)
        moments.blocked |= taps.blocked
        sums = [np.zeros((widths[n], widths[n])) for n in taps.values]
        if taps.values:
            for _, weight, parts in run_batches(taps.model, data, provider, part_of(progress, index, len(groups))):
                for total, part in zip(sums, parts, strict=True):
                    total += weighted(part, weight)
        for name, total in zip(taps.values, sums, strict=True):
            if np.isfinite(total).all() and total.trace() > 0:
                moments.put(name, 0, (total / sum(map(data.weight, range(len(data))))).astype(np.float32))
    return moments
