"""Layers on their way through a plan, one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from magr_onnx.core import threads
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.types import LayerStats
from magr_onnx.passes.base import Emitted, LayerStage
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.layer_passes.shared_weights import SharedWeight, shared_weights
from magr_onnx.passes.layer_state import LayerState, problem_of, write_floats
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.plan import Plan

MOST_WEIGHTS = 1 << 20  # of a layer that is solved beside others


class Store(Protocol):
    """Where solutions are kept from one run to the next."""

    def restore(self, layer: LinearLayer) -> LayerSolution | None:
        """The solution of a layer; None where it is not here."""

    def keep(self, layer: LinearLayer, solution: LayerSolution) -> None:
        """Keep the solution of a layer."""


class Sent(Protocol):
    """A layer that is solved elsewhere."""

    def result(self) -> LayerSolution:
        """Wait for the solution."""


class Workers(Protocol):
    """Where layers are solved beside this process."""

    @property
    def ahead(self) -> int:
        """Count the layers that are sent before the first of them is collected."""

    def send(self, name: str, stages: Sequence[LayerStage], problem: LayerProblem) -> Sent:
        """Have a layer solved by stages of a plan."""


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
    workers: Workers | None = None,
) -> None:
    """Take layers through a plan, small ones side by side on all cores, so that few layers' arrays are alive at a time.

    Layers that share a weight and are here at once are solved together, in this process.

    Args:
        plan: The plan.
        layers: Layers of one graph; they are replaced in it.
        stats: Statistics of a layer's input; None for a data-free layer.
        finished: Called with every layer once it is written.
        complete: Adds to a problem what else is known of its layer.
        assigned: Plans of layers that have their own, by layer name.
        store: Solutions are taken from it where it has them, and given to it where not.
        workers: Where layers are solved; None for this process.
    """
    layers = list(layers)
    for graph in {layer.root for layer in layers}:
        Names.rescan(graph)
    shared = shared_weights(layers, stats)

    def task_of(layer: LinearLayer) -> _Task:
        problem = problem_of(layer, stats(layer))
        complete_problem = problem if complete is None else complete(layer, problem)
        return _Task(layer, complete_problem, (assigned or {}).get(layer.name, plan), shared.get(layer.weight_key))

    for task, solution in _here(layers, shared, task_of, store) if workers is None else _sent(map(task_of, layers), workers, store):
        finished(SolvedLayer(task.layer, task.problem, solution, task.emit(solution)))


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A layer to be solved: by its plan, or with the other readers of its weight."""

    layer: LinearLayer
    problem: LayerProblem
    plan: Plan
    shared: SharedWeight | None

    def solve(self) -> LayerSolution:
        if self.shared is None:
            return self.plan.solve(self.problem)
        return self.shared.solve(self.layer.name, self.problem, self.plan.solving)

    def emit(self, solution: LayerSolution) -> Emitted | None:
        """Write the solution to the graph."""
        constants = WeightConstants() if self.shared is None else self.shared.constants
        emitted = None if self.plan.emitter is None else self.plan.emitter.emit(self.layer, self.problem, solution, constants)
        if emitted is None:
            write_floats(self.layer, solution, constants)
        return emitted


def _here(
    layers: Sequence[LinearLayer], shared: Container[Hashable], task_of: Callable[[LinearLayer], _Task], store: Store | None
) -> Iterator[tuple[_Task, LayerSolution]]:
    """Yield all tasks with their solutions, by threads of this process."""
    for batch in _side_by_side(layers, shared):
        tasks = list(map(task_of, batch))
        solutions = {} if store is None else {task.layer.name: store.restore(task.layer) for task in tasks}
        unsolved = [task for task in tasks if solutions.get(task.layer.name) is None]
        for task, solution in zip(unsolved, threads.each(_Task.solve, unsolved), strict=True):
            solutions[task.layer.name] = solution
            if store is not None:
                store.keep(task.layer, solution)
        for task in tasks:
            result = solutions[task.layer.name]
            assert result is not None
            yield task, result


def _sent(tasks: Iterable[_Task], workers: Workers, store: Store | None) -> Iterator[tuple[_Task, LayerSolution]]:
    """Yield all tasks with their solutions, by workers; layers that share a weight by this process."""
    waiting: deque[tuple[_Task, LayerSolution | Callable[[], LayerSolution]]] = deque()

    def first() -> tuple[_Task, LayerSolution]:
        task, found = waiting.popleft()
        if isinstance(found, LayerSolution):
            return task, found
        solution = found()
        if store is not None:
            store.keep(task.layer, solution)
        return task, solution

    for task in tasks:
        restored = None if store is None else store.restore(task.layer)
        if restored is not None:
            waiting.append((task, restored))
        elif task.shared is not None:
            waiting.append((task, task.solve))
        else:
            waiting.append((task, workers.send(task.layer.name, task.plan.solving, task.problem).result))
        if len(waiting) > workers.ahead:
            yield first()
    while waiting:
        yield first()


def _side_by_side(layers: Sequence[LinearLayer], shared: Container[Hashable]) -> Iterator[list[LinearLayer]]:
    """Yield layers in batches that are solved at the same time: one a thread; large ones, and those that share a weight, alone."""
    for alone, run in groupby(layers, lambda layer: layer.k * layer.n > MOST_WEIGHTS or layer.weight_key in shared):
        members, size = list(run), 1 if alone else threads.count()
        yield from (members[at : at + size] for at in range(0, len(members), size))
