"""What a choice of bits and blocks costs in the written file: the emitter is asked, with blank codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import ActivationGrid, LayerStats, QuantizedWeight
from magr_onnx.model_io.files import initializer_bytes
from magr_onnx.passes.job import Job, Stored
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.shared import Key, sharing
from magr_onnx.passes.plan import Plan


def changes(model: ir.Model, items: Sequence[Sequence[str]], plan: Plan, calibrated: bool = True) -> list[int]:
    """By how many bytes the tensors of ``model`` grow when the layers of an item, by name, go through ``plan``.

    Items are converted one after the other in one copy of the model. Layers that share a weight belong in one item: its floats stay in the
    file until the last of them is converted, and for ever if another node reads them.
    """
    copy = model.clone()
    layers = {layer.name: layer for layer in find(copy)[0]}
    found, before = [], initializer_bytes(copy)
    stored: dict[Key, Stored] = {}
    shared = sharing(layers.values())
    for names in items:
        for name in names:
            _emit(layers[name], plan, calibrated, stored, name not in shared)
        after = initializer_bytes(copy)
        found.append(after - before)
        before = after
    return found


def blank(model: ir.Model, plans: Mapping[str, Plan], calibrated: bool = True) -> ir.Model:
    """A copy of ``model`` with every layer named in ``plans`` converted to blank codes: the size of the result, without the work."""
    copy = model.clone()
    stored: dict[Key, Stored] = {}
    layers = [layer for layer in find(copy)[0] if layer.name in plans]
    shared = sharing(layers)
    for layer in layers:
        _emit(layer, plans[layer.name], calibrated, stored, layer.name not in shared)
    return copy


def _emit(layer: LinearLayer, plan: Plan, calibrated: bool, stored: dict[Key, Stored], alone: bool) -> None:
    """Write the layer with codes of zero; zero points are there unless the grid is symmetric, as for nearly any real weight.

    ``stored`` holds the constants of weights that layers share; this one may have its own ``alone``.
    """
    nothing = np.zeros((0, 0), np.float32)
    stats = LayerStats(nothing, np.zeros(layer.k), int(calibrated), activation=ActivationGrid(1.0, 0))
    job = Job(layer, stats, nothing, nothing, nothing, np.zeros(layer.n) if layer.has_bias else None)
    job.stored, job.alone = stored.setdefault(layer.weight_key, {}), alone
    if plan.quantize is not None:
        spec = plan.quantize.spec(layer.dtype)
        grid = (spec.groups(layer.k), layer.n)
        zeros = np.full(grid, spec.middle if spec.symmetric else 0, np.uint8)
        job.quantized = QuantizedWeight(np.zeros((layer.k, layer.n), np.uint8), np.ones(grid, np.float32), zeros, spec)
    if plan.bias is not None and job.centred(plan.bias_policy):
        job.bias = np.zeros(layer.n)
    if plan.emitter is not None:
        plan.emitter.apply(job)
