"""Mixtures of experts, converted before a model's linear layers, so that these see them quantized."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.config.layer_options import described
from magr_onnx.config.options import Options
from magr_onnx.core import threads
from magr_onnx.core.expert_packing import expert_block, stored_block
from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.canonical.routers import routers_of
from magr_onnx.passes.emit import experts as emitter
from magr_onnx.passes.layer_passes.experts import Solved, biases_of, join, notes_of, problems_of, written
from magr_onnx.passes.layers import experts, linear
from magr_onnx.passes.layers.experts import ExpertLayer
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import FLOATS, by_weight, split_shared
from magr_onnx.passes.providers import find_provider
from magr_onnx.report.reasons import ExpertReason
from magr_onnx.runtime.calibration.expert_tokens import FEW, Stats, Tokens, staged_tokens
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.workflow.calibrate import calibration_of
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted

Counts = npt.NDArray[np.intp]
INT8 = "onnxruntime from 1.31 on rounds inputs of 8-bit blocks to int8; with block size 'channel' it computes in float"
NESTED = "it is in the body of a node"
NAMED = 8  # experts that saw few tokens, at most, by their number


def select(model: ir.Model, plan: Plan, selection: Selection = ALL, provider: str = "cpu") -> tuple[list[ExpertLayer], list[Skip]]:
    """Mixtures of experts that will be converted, and all others with the reason."""
    layers, skips = experts.find(model, selection)
    faults = (
        (plan.emitter is None or not plan.emitter.experts, ExpertReason.FORMAT),
        (not find_provider(provider).experts, ExpertReason.PROVIDER),
        (plan.accumulator is not None, ExpertReason.ACCUMULATOR),
    )
    reason = next((reason for fault, reason in faults if fault), None)
    if reason is not None:
        return [], [*skips, *(_skip(layer, reason) for layer in layers)]
    if not selection.include:
        layers, shared = split_shared(layers, experts.readers)
        skips += shared
    return layers, skips


def _skip(layer: ExpertLayer, reason: ExpertReason) -> Skip:
    detail = f"{layer.weight.name}, {layer.second.name}: {layer.bytes / 1e6:.2f} MB"
    return Skip(layer.name, layer.op, reason, detail, layer.bytes)


@dataclass(frozen=True, slots=True)
class Plans:
    """How experts are solved.

    Attributes:
        usual: The plan of the run.
        assigned: Options and plan of layers that have their own, by name.
    """

    usual: Plan
    assigned: Mapping[str, tuple[Options, Plan]]

    def of(self, layer: ExpertLayer) -> tuple[Plan, list[str]]:
        """Return the plan of a layer, and a note if it has options of its own."""
        if layer.name not in self.assigned:
            return self.usual, []
        options, plan = self.assigned[layer.name]
        return plan, [f"options of its own: {described(options)}"]


def convert(result: Converted, model: ir.Model, work: ir.Model, plans: Plans, data: Batches | None, context: RunContext) -> None:
    """Quantize the experts of ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    layers, skips = select(work, plans.usual, context.selection, context.provider)
    result.skips += skips
    groups, first, steps = by_weight(layers), len(result.rows), context.stage("experts")
    waiting = {layer.name: group for group in map(_Group, groups) for layer in group.readers}

    def finish(group: _Group, stats: Iterable[Stats] | None, why: str) -> None:
        _write(result, group, stats, why, plans)
        context.spill(work)
        for layer in group.readers:
            waiting.pop(layer.name, None)
        steps(len(layers) - len(waiting), len(layers))

    why = ""
    try:
        for tokens in [] if data is None else _tokens(model, layers, data, context):
            group = waiting[tokens.layer.name]
            stats = group.take(tokens, context.memory.gram_budget)
            if stats is not None:
                finish(group, stats, "")
    except (ModelError, RuntimeFailure) as error:  # the model itself runs: this is about its parts
        why = f"its inputs cannot be gathered: {str(error).splitlines()[0]}"
    for readers in groups:
        if readers[0].name in waiting:
            unmeasured = why or (NESTED if data is not None else "")
            finish(waiting[readers[0].name], None, unmeasured)
    order = {layer.name: i for i, layer in enumerate(layers)}
    result.rows[first:] = sorted(result.rows[first:], key=lambda row: order[row.name])


def _tokens(model: ir.Model, layers: Sequence[ExpertLayer], data: Batches, context: RunContext) -> Iterator[Tokens]:
    """Yield what the ``layers``, as far as they are in the main graph, read in the float ``model``; a large one is cut at all layers."""
    names = {layer.name for layer in layers}
    mixtures = [layer for layer in experts.find(model)[0] if layer.name in names and not layer.nested]
    if not mixtures:
        return iter(())
    routers = set(routers_of(model))
    cuts = [layer for layer in linear.find(model)[0] if not layer.nested and layer.node not in routers] if context.memory.large else []
    calibration = calibration_of(data, context)
    assert calibration is not None
    return staged_tokens(model, mixtures, cuts, calibration, context.memory.cache, context.stage("calibrating experts"))


@dataclass(slots=True, eq=False)
class _Group:
    """Mixtures that share their weights.

    Attributes:
        readers: The mixtures.
        counts: Tokens that went to every expert so far, ``(E,)``.
        missing: Mixtures whose tokens have not been seen.
        stats: Of all mixtures that have been seen, where there are several.
    """

    readers: Sequence[ExpertLayer]
    counts: Counts = field(init=False)
    missing: int = field(init=False)
    stats: list[Stats] | None = None

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.readers[0].experts, np.intp)
        self.missing = sum(not layer.nested for layer in self.readers)

    def take(self, tokens: Tokens, budget: int) -> Iterable[Stats] | None:
        """Take the tokens of a mixture; return the moments of every expert once all mixtures have been seen, None before."""
        self.missing -= 1
        counts = tokens.counts()
        self.counts += counts
        added = _moments(tokens, counts, budget)
        if len(self.readers) == 1:
            return added
        self.stats = list(added) if self.stats is None else [_both(a, b) for a, b in zip(self.stats, added, strict=True)]
        return None if self.missing else self.stats


def _moments(tokens: Tokens, counts: Counts, budget: int) -> Iterator[Stats]:
    """Yield the moments of every expert, of as many at a time as a budget of bytes allows."""
    layer, numbers = tokens.layer, range(len(counts))
    size = 8 * HoldOut.of(tokens.data.samples).parts * (layer.k**2 + layer.units**2) + 4 * layer.k * layer.n
    at_a_time = max(budget // size, 1)
    for start in range(0, len(numbers), at_a_time):
        yield from tokens.moments(numbers[start : start + at_a_time], counts)


def _both(a: Stats, b: Stats) -> Stats:
    """Combine the moments of one expert in two mixtures."""
    first, second = (x if y is None else y if x is None else x.combine(y) for x, y in zip(a, b, strict=True))
    return first, second


def _write(result: Converted, group: _Group, stats: Iterable[Stats] | None, why: str, plans: Plans) -> None:
    """Solve the experts of a group and write them into all their readers; ``why`` they have no statistics, where there is data."""
    first = group.readers[0]
    plan, own = plans.of(first)
    block = block_of(plan, first)
    unknown: list[Stats] = [(None, None)] * first.experts
    solved = _solved(first, plan.for_experts(block), unknown if stats is None else stats)
    seen = ([f"data-free: {why}"] if why else []) if stats is None else _count_notes(group.counts)
    joined = join(first, solved, int(group.counts.sum()) if stats is not None else 0)
    notes = (*own, *notes_of(solved), *seen, *_grid_notes(first, plan, block, len(group.readers)))
    joined = replace(joined, record=joined.record.noting(*notes))
    attributes = {} if plan.emitter is None else plan.emitter.expert_attributes
    quantized = [[one.quantized for one in part] for part in solved]
    for layer, emitted in zip(group.readers, emitter.emit(group.readers, quantized, biases_of(solved), attributes), strict=True):
        result.add(layer, joined, emitted, written(solved), first.experts)


def _count_notes(counts: Counts) -> list[str]:
    """Say how many tokens experts saw, and which saw few."""
    few = [f"{expert} ({counts[expert]})" for expert in np.argsort(counts, kind="stable") if counts[expert] < FEW]
    notes = [f"experts saw {counts.min()} to {counts.max()} tokens"]
    if few:
        named = ", ".join(few[:NAMED]) + (f" and {len(few) - NAMED} more" if len(few) > NAMED else "")
        one = len(few) == 1
        notes.append(
            f"{'expert' if one else 'experts'} {named} saw fewer than {FEW} tokens; "
            f"tokens that came nearest to {'it' if one else 'them'} count too, for less"
        )
    return notes


def packed_bytes(plan: Plan, layer: ExpertLayer, calibrated: bool) -> int:
    """Return the size of the quantized experts of a layer; ``calibrated``, they get biases where the plan corrects any."""
    spec = plan.for_experts(block_of(plan, layer)).spec or WeightSpec()
    block, bits = stored_block(spec, [layer.k, layer.units]), container_bits(spec.bits)
    biased = calibrated and plan.bias_policy == "any"
    total, real = 0, np.dtype(FLOATS[layer.dtype]).itemsize
    for k, n in layer.shapes:
        blocks = k // (block or k)
        zeros = 0 if spec.symmetric else -(-blocks * bits // 8)
        total += layer.experts * n * (k * bits // 8 + blocks * real + zeros + real * biased)
    return total


def block_of(plan: Plan, layer: ExpertLayer) -> int | None:
    """Rows that share a scale in both layers of an expert; None for one scale a channel."""
    assert plan.quantize is not None
    return expert_block(plan.quantize.block_size, [layer.k, layer.units])


def _solved(layer: ExpertLayer, plan: Plan, stats: Iterable[Stats]) -> list[list[Solved]]:
    """Solve both layers of all experts, as many experts side by side as there are threads."""

    def solve(problem: LayerProblem) -> Solved:
        return Solved.of(problem, plan.solve(problem))

    problems, solved = problems_of(layer, stats), list[Solved]()
    while some := list(itertools.islice(problems, threads.count())):
        solved += threads.each(solve, itertools.chain.from_iterable(some))
    return [solved[::2], solved[1::2]]


def _grid_notes(layer: ExpertLayer, plan: Plan, block: int | None, readers: int) -> list[str]:
    """Say where the grid is another than was asked for, or the kernel rounds what it multiplies."""
    assert plan.quantize is not None
    wanted, notes = plan.quantize.block_size, list[str]()
    if block != wanted:
        how = "one scale a channel" if block is None else f"blocks of {block}"
        notes.append(f"{how}: blocks of {wanted} do not divide both {layer.k} and {layer.units} inputs, or are a whole column")
    if container_bits(plan.quantize.bits) == 8 and block is not None:
        notes.append(INT8)
    if readers > 1:
        notes.append(f"one pair of weights for {readers} operators: one solution for all")
    return notes
