"""What a choice of bits and blocks costs in the written file: the emitter is asked, with placeholders for the solutions.

Every stage of a plan says what it adds to a file (`magr_onnx.passes.base.LayerStage.placeholder`), so that codes, scales, biases and
low-rank branches are counted as they will be written.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.types import ActivationGrid, LayerStats
from magr_onnx.model_io.writing import tensor_bytes
from magr_onnx.passes.layer_state import float_type
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.layers.weighted import sharing
from magr_onnx.passes.plan import Plan
from magr_onnx.runtime.calibration.activation_ranges import with_grids
from magr_onnx.runtime.calibration.context import Grids


def changes(model: ir.Model, items: Sequence[Sequence[str]], plan: Plan, grids: Grids | None = None) -> list[int]:
    """By how many bytes the tensors of ``model`` grow when the layers of an item, by name, are converted as ``plan`` says.

    Items are converted one after the other in one copy of the model. Layers that share a weight belong in one item: its floats stay in the
    file until the last of them is converted, and for ever if another node reads them.
    """
    copy = model.clone()
    layers = {layer.name: layer for layer in find(copy)[0]}
    writer = Writer(layers.values(), grids)
    sizes = [tensor_bytes(copy)]
    for names in items:
        for name in names:
            writer.write(layers[name], plan)
        sizes.append(tensor_bytes(copy))
    return [after - before for before, after in pairwise(sizes)]


def by_tensor(layers: Iterable[LinearLayer]) -> list[list[LinearLayer]]:
    """Group layers by the tensor that their weights are in, whose floats stay in the file until the last of them is converted."""
    groups: dict[int, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.weight.stored), []).append(layer)
    return list(groups.values())


def converted(model: ir.Model, plans: Mapping[str, Plan], grids: Grids | None = None, *, calibrated: bool = True) -> ir.Model:
    """A copy of ``model`` with every layer named in ``plans`` converted to placeholders: the size of the result, without the work.

    ``calibrated`` says whether there are data, without which no bias is added.
    """
    copy = model.clone()
    layers = [layer for layer in find(copy)[0] if layer.name in plans]
    writer = Writer(layers, grids, calibrated=calibrated)
    for layer in layers:
        writer.write(layer, plans[layer.name])
    return copy


class Writer:
    """Writes layers of one graph as their placeholders."""

    def __init__(self, layers: Iterable[LinearLayer], grids: Grids | None, *, calibrated: bool = True) -> None:
        """Begin, with all layers of the graph, the 8-bit grids of what they read where these are known, and whether there are data."""
        self._shared = sharing(layers)
        self._grids = grids
        self._rows = int(calibrated)
        self._constants: dict[Hashable, WeightConstants] = {}

    def write(self, layer: LinearLayer, plan: Plan) -> None:
        """Write a layer as a plan would."""
        if plan.emitter is None:
            return
        constants = self._constants.setdefault(layer.weight_key, WeightConstants(layer.name in self._shared))
        problem = self._problem(layer)
        plan.emitter.emit(layer, problem, plan.placeholder(problem), constants)

    def _problem(self, layer: LinearLayer) -> LayerProblem:
        """A problem of the layer's shape, without its elements."""
        weight = np.broadcast_to(np.float32(0), (layer.k, layer.n))
        bias = np.zeros(layer.n) if layer.has_bias else None
        stats = replace(LayerStats.data_free(layer.k), rows=self._rows)
        problem = LayerProblem(weight, bias, stats, float_type(layer.dtype), ActivationGrid(1.0, 0))
        return with_grids(problem, layer, self._grids) if self._grids else problem
