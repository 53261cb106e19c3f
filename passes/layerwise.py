"""Layers on their way through a plan, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.types import LayerStats
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.layer_passes.shared_weights import shared_weights
from magr_onnx.passes.layer_state import LayerState, problem_of, write_floats
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.plan import Plan


class Store(Protocol):
    """Where solutions are kept from one run to the next."""

    def restore(self, layer: LinearLayer) -> LayerSolution | None:
        """The solution of a layer; None where it is not here."""

    def keep(self, layer: LinearLayer, solution: LayerSolution) -> None:
        """Keep the solution of a layer."""


@dataclass(frozen=True, slots=True, eq=False)
class SolvedLayer(LayerState):
    """A layer, as it was found, that has been through a plan.

    Attributes:
        emitted: What the emitter wrote; None where the weight is a float one.
    """

    emitted: Emitted | None


def run_layers(
    plan: Plan,
    layers: Iterable[LinearLayer],
    stats: Callable[[LinearLayer], LayerStats | None],
    finished: Callable[[SolvedLayer], None],
    complete: Callable[[LinearLayer, LayerProblem], LayerProblem] | None = None,
    assigned: Mapping[str, Plan] | None = None,
    store: Store | None = None,
) -> None:
    """Take layers one by one through a plan, so that only one layer's arrays are alive at a time.

    Layers that share a weight and are here at once are solved together.

    Args:
        plan: The plan.
        layers: Layers of one graph; they are replaced in it.
        stats: Statistics of a layer's input; None for a data-free layer.
        finished: Called with every layer once it is written.
        complete: Adds to a problem what else is known of its layer.
        assigned: Plans of layers that have their own, by layer name.
        store: Solutions are taken from it where it has them, and given to it where not.
    """
    layers = list(layers)
    for graph in {layer.root for layer in layers}:
        Names.rescan(graph)
    shared = shared_weights(layers, stats)
    for layer in layers:
        problem = problem_of(layer, stats(layer))
        if complete is not None:
            problem = complete(layer, problem)
        weight = shared.get(layer.weight_key)
        constants = WeightConstants() if weight is None else weight.constants
        own_plan = (assigned or {}).get(layer.name, plan)
        solution = None if store is None else store.restore(layer)
        if solution is None:
            solution = own_plan.solve(problem) if weight is None else weight.solve(layer.name, problem, own_plan.solving)
            if store is not None:
                store.keep(layer, solution)
        emitted = None if own_plan.emitter is None else own_plan.emitter.emit(layer, problem, solution, constants)
        if emitted is None:
            write_floats(layer, solution, constants)
        finished(SolvedLayer(layer, problem, solution, emitted))
