"""Layers of a graph and what solvers make of them.

Between the passes of a sequence (`ir.passes.Sequential`) a layer's problem and its solution so far are in the ``meta`` store of its node,
which is never serialized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx_ir as ir

from magr_onnx.core.checks import check_weight
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.types import LayerStats, ScaleType
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.layers.weighted import FLOATS

META = "magr_onnx.layer"


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """A layer, its problem, and its solution so far."""

    layer: LinearLayer
    problem: LayerProblem
    solution: LayerSolution

    def keep(self) -> None:
        """Remember problem and solution at the layer's node."""
        self.layer.node.meta[META] = (self.problem, self.solution)


def float_type(dtype: ir.DataType) -> ScaleType:
    """The name of a float type of weights."""
    return cast(ScaleType, np.dtype(FLOATS[dtype]).name)


def problem_of(layer: LinearLayer, stats: LayerStats | None = None) -> LayerProblem:
    """Read a layer; without statistics of its input it is to be solved data-free.

    Raises:
        NonFiniteError: The weight holds NaN or infinity.
    """
    weight = layer.read()
    check_weight(f"weight of {layer.name}", weight)
    stats = stats or LayerStats.data_free(layer.k)
    return LayerProblem(weight, layer.read_bias(), stats, float_type(layer.dtype), stats.activation)


def attach(layer: LinearLayer, stats: LayerStats | None) -> None:
    """Give a layer the statistics of its input, for the passes of a sequence."""
    problem = problem_of(layer, stats)
    LayerState(layer, problem, LayerSolution.unsolved(problem)).keep()


def states(model: ir.Model) -> list[LayerState]:
    """Every linear layer of a model in graph order, with its problem and solution; layers without statistics are data-free."""
    layers = find(model)[0]
    for layer in layers:
        if META not in layer.node.meta:
            attach(layer, None)
    return [LayerState(layer, *layer.node.meta[META]) for layer in layers]


def known_stats(model: ir.Model) -> dict[str, LayerStats]:
    """The statistics that the layers of the main graph have, by the name of what they read."""
    layers = [layer for layer in find(model)[0] if not layer.nested and META in layer.node.meta]
    return {layer.reads: layer.node.meta[META][0].stats for layer in layers}


def forget(model: ir.Model) -> None:
    """Drop what is known of the layers of the main graph, because they change."""
    for node in model.graph:
        node.meta.pop(META, None)


def write_floats(layer: LinearLayer, solution: LayerSolution, constants: WeightConstants) -> LayerSolution:
    """Put the float weight and bias of a solution into the graph, if they changed."""
    if not solution.changed:
        return solution
    layer.write(solution.weight, solution.bias, lambda suffix, array: constants.add(layer, suffix, array))
    return replace(solution, changed=False)
