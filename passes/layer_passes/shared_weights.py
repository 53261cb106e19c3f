"""Layers that multiply by the very same matrix, or whose matrix is a table of embeddings, too: one solve, codes stored once.

Readers ``r`` of one ``W`` see inputs of their own. What all of them lose together, each relative to the power ``p_r`` of its output, is one
layer error under the sum of their Gram matrices,

    sum_r tr(D^T H_r D) / p_r ~ tr(D^T H D),     H ~ sum_r H_r / p_r,

with ``H_r - mu_r mu_r^T`` in place of ``H_r`` where r's bias takes up the mean. So the stages that choose a weight (`LayerStage.solves`)
run once, for the first reader, under ``H``; the others take its codes over. Bias compensation and emission stay each reader's own, from its
own mean and activation grid; constants made of the codes are shared.

A Gather of rows of ``W^T`` is one more reader, whose inputs are unit vectors: ``H_r = I``, and its power ``p_r`` is that of the weight.
Without it the errors of few bits go where the layer sees little of them, and are as large as the embeddings there.

Second moments of gradients differ between readers and do not add up to one matrix: a shared weight is rounded without them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerRecord, LayerSolution, absorbs_mean, relative_error
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.moments import pooled
from magr_onnx.core.types import Array, LayerStats
from magr_onnx.errors import listed
from magr_onnx.passes.base import LayerStage
from magr_onnx.passes.graph.nodes import layer_name
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.layers.weighted import by_weight, readers


class SharedWeight:
    """One weight on its way through a plan, for all layers that multiply by it.

    Attributes:
        constants: The constants made of it.
    """

    def __init__(self, readers: Sequence[tuple[LinearLayer, LayerStats | None]]) -> None:
        """Readers with the statistics of their inputs; None for none."""
        self.constants = WeightConstants(shared=True)
        self._readers = readers
        self._stats: dict[BiasPolicy | None, LayerStats] = {}
        self._solved: LayerSolution | None = None
        self._notes: tuple[str, ...] = ()

    def stats(self, policy: BiasPolicy | None, weight: Array) -> LayerStats:
        """The statistics of all readers of ``weight (K, N)`` together, under a policy of the bias compensation; see the module."""
        if policy not in self._stats:
            measured = [(s, absorbs_mean(policy, layer.has_bias)) for layer, s in self._readers if s is not None and not s.is_data_free]
            first = self._readers[0][0]
            if measured and first.embeds:
                measured.append((_of_rows(measured[0][0]), False))
            powers = [layer_error(weight, s.gram) for s, _ in measured]
            self._stats[policy] = pooled(measured, powers) if measured else LayerStats.data_free(first.k)
        return self._stats[policy]

    def solve(self, name: str, problem: LayerProblem, stages: Sequence[LayerStage]) -> LayerSolution:
        """Solve the problem of the reader ``name``: the first reader's stages choose the weight, the others take it over."""
        others = [layer.name for layer, _ in self._readers if layer.name != name]
        notes = [f"shares its weight with {listed(others)}: one solve for all, codes stored once"] if others else []
        solution, first, before = LayerSolution.unsolved(problem), self._solved is None, True
        for stage in stages:
            if not stage.solves:
                solution = stage.solve(problem, solution)
                continue
            policy: BiasPolicy | None = getattr(stage, "bias", None)
            if before:
                solution = replace(solution, record=solution.record.noting(*notes))
            if first:
                count = len(solution.record.notes)
                stats = self.stats(policy, problem.weight)
                pooled_problem = replace(problem, stats=stats, target_moments=None, output_hessian=None, adaptive_hessian=None)
                solution = stage.solve(pooled_problem, solution)
                self._solved, self._notes = solution, (*self._notes, *solution.record.notes[count:])
            elif before:
                solution = self._taken_over(solution)
            if solution.record.error is not None:
                solution = replace(solution, record=_with_errors(solution, problem, problem.centred(policy)))
            before = False
        return solution

    def _taken_over(self, solution: LayerSolution) -> LayerSolution:
        """The solution of another reader with the weight of the first one."""
        solved = self._solved
        assert solved is not None
        of_input = {name: getattr(solution.record, name) for name in ("rows", "bias_compensated", "activation", "feedback")}
        record = replace(solved.record, **of_input, notes=(*solution.record.notes, *self._notes))
        return replace(solved, bias=solution.bias, target=solution.target, fit_targets=solution.fit_targets, record=record)


def _with_errors(solution: LayerSolution, problem: LayerProblem, centred: bool) -> LayerRecord:
    """The record of one reader, whose errors are those on its own input."""
    error, low_rank = relative_error(solution.weight, problem, centred), solution.record.low_rank
    if low_rank is not None and solution.quantized is not None:
        low_rank = low_rank | {"error_before": relative_error(solution.quantized.dequantize(), problem, centred), "error_after": error}
    return replace(solution.record, error=error, fitted_error=error, low_rank=low_rank)


def _of_rows(like: LayerStats) -> LayerStats:
    """Return the statistics of who reads single rows of the transposed weight, with as many rows in every fold as those of a layer."""
    return replace(LayerStats.data_free(len(like.mean)), rows=like.rows, folds=tuple(map(_of_rows, like.folds)), backend=like.backend)


def shared_weights(layers: Iterable[LinearLayer], stats: Callable[[LinearLayer], LayerStats | None]) -> dict[Hashable, SharedWeight]:
    """Every weight that several of ``layers`` multiply by, or that is a table of embeddings, too, by `LinearLayer.weight_key`."""
    groups = [group for group in by_weight(layers) if len(group) > 1 or group[0].embeds]
    return {group[0].weight_key: SharedWeight([(layer, stats(layer)) for layer in group]) for group in groups}


def remarks(
    layers: Sequence[LinearLayer], added: Mapping[str, int], stages: Mapping[str, int] = MappingProxyType({})
) -> dict[str, list[str]]:
    """What there is to say of layers (as they were found, and converted by now) whose weight others read too, by layer name.

    ``added`` has the bytes of the codes that were written for each, ``stages`` the number of the stage it was solved in: those of different
    stages have a solution each.
    """
    notes: dict[str, list[str]] = {layer.name: [] for layer in layers}
    for layer in layers:
        others = [x for x in layers if stages.get(x.name) != stages.get(layer.name) and not (x.nested or layer.nested)]
        same = [x.name for x in others if x.weight_key == layer.weight_key]
        if same:
            notes[layer.name].append(f"{listed(same)} reads the same weight in another stage, and has codes of its own")
        transposed = [x.name for x in layers if x.weight_key != layer.weight_key and x.weight.key == layer.weight.key]
        if transposed:
            notes[layer.name].append(
                f"{listed(transposed)} reads the same weight transposed or scaled, so that their codes cannot be shared"
            )
        if nodes := readers(layer):
            names = listed([f"{layer_name(node)} ({node.op_type})" for node in nodes])
            ways = [f"leave it out (exclude={[scope_of(layer.node) or layer.name]})"]
            ways += ['convert the table as well (embeddings="gather-block-quantized")'] * any(node.op_type == "Gather" for node in nodes)
            stays = f"its float weight ({layer.weight.stored.nbytes} bytes) stays in the file for {names}"
            more = added.get(layer.name)
            cost = f"converting it saved nothing and added {more} bytes: {stays}; {' or '.join(ways)}"
            notes[layer.name].append(stays if more is None else cost)
    return notes
