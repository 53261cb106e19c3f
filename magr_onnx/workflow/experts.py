"""Mixtures of experts, converted before a model's linear layers, so that these see them quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core import threads
from magr_onnx.core.expert_packing import expert_block
from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit import experts as emitter
from magr_onnx.passes.layer_passes.experts import Solved, biases_of, join, notes_of, problems_of, written
from magr_onnx.passes.layers import experts
from magr_onnx.passes.layers.experts import ExpertLayer
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight, split_shared
from magr_onnx.passes.providers import find_provider
from magr_onnx.report.reasons import ExpertReason
from magr_onnx.runtime.calibration.expert_tokens import FEW, Tokens
from magr_onnx.runtime.calibration.subgraphs import TOO_LARGE
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.data.sources import Batches
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


def convert(result: Converted, model: ir.Model, work: ir.Model, plan: Plan, data: Batches | None, context: RunContext) -> None:
    """Quantize the experts of ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    layers, skips = select(work, plan, context.selection, context.provider)
    result.skips += skips
    groups, steps = by_weight(layers), context.stage("experts")
    measured = _Measured.of(model, groups, data, context)
    for number, readers in enumerate(groups):
        first = readers[0]
        block = _block(plan, first)
        own = plan.for_experts(block)
        solved = _solved(first, own, measured.stats(number))
        joined = join(first, solved, int(measured.counts[number].sum()))
        notes = (*notes_of(solved), *measured.notes(number), *_grid_notes(first, plan, block, len(readers)))
        joined = replace(joined, record=joined.record.noting(*notes))
        attributes = {} if plan.emitter is None else plan.emitter.expert_attributes
        quantized, weights = [[one.quantized for one in part] for part in solved], written(solved)
        for layer, emitted in zip(readers, emitter.emit(readers, quantized, biases_of(solved), attributes), strict=True):
            result.add(layer, joined, emitted, weights, first.experts)
        steps(number + 1, len(groups))


def _block(plan: Plan, layer: ExpertLayer) -> int | None:
    """Rows that share a scale in both layers of an expert; None for one scale a channel."""
    assert plan.quantize is not None
    return expert_block(plan.quantize.block_size, [layer.k, layer.units])


def _solved(layer: ExpertLayer, plan: Plan, stats: Iterable[Sequence[LayerStats | None]]) -> list[list[Solved]]:
    """Solve both layers of all experts, several at a time."""

    def solve(problem: LayerProblem) -> Solved:
        return Solved.of(problem, plan.solve(problem))

    both: list[list[Solved]] = [[], []]
    for number, known in enumerate(stats):
        for solved, one in zip(both, threads.each(solve, problems_of(layer, number, known)), strict=True):
            solved.append(one)
    return both


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """What is known of what experts read.

    Attributes:
        groups: The layers, by the weights that they share.
        tokens: What the experts that can be measured are measured on; None without data.
        reached: Those layers of every group that can be measured.
        counts: Tokens that go to every expert of a group, ``(E,)``.
        why: Why groups are not measured, where there is data.
        budget: Bytes of second moments held at a time.
    """

    groups: Sequence[Sequence[ExpertLayer]]
    tokens: Tokens | None
    reached: Sequence[Sequence[ExpertLayer]]
    counts: Sequence[Counts]
    why: str
    budget: int

    @staticmethod
    def of(model: ir.Model, groups: Sequence[Sequence[ExpertLayer]], data: Batches | None, context: RunContext) -> _Measured:
        """Count the tokens of every expert."""
        nothing = [np.zeros(readers[0].experts, np.intp) for readers in groups]
        unmeasured = _Measured(groups, None, [()] * len(groups), nothing, "", context.memory.gram_budget)
        reached = [[layer for layer in readers if not layer.nested] for readers in groups]
        if data is None or not any(reached):
            return replace(unmeasured, why="" if data is None else NESTED)
        if context.memory.large:
            return replace(unmeasured, why=TOO_LARGE)
        tokens = Tokens(model, [layer for readers in reached for layer in readers], data, context.mask, context.provider)
        try:
            found = tokens.counts()
        except (ModelError, RuntimeFailure) as error:  # the model itself runs: this is about a copy that puts out scores
            return replace(unmeasured, why=f"its inputs cannot be gathered: {str(error).splitlines()[0]}")
        counts = [sum((found[layer.name] for layer in of), zero) for of, zero in zip(reached, nothing, strict=True)]
        return replace(unmeasured, tokens=tokens, reached=reached, counts=counts, why=NESTED)

    def stats(self, number: int) -> Iterator[Sequence[LayerStats | None]]:
        """Yield the moments of what both layers of every expert of a group read, None where they are unknown."""
        readers, counts = self.reached[number], self.counts[number]
        experts = range(len(counts))
        if self.tokens is None or not readers:
            yield from ((None, None) for _ in experts)
            return
        layer = readers[0]
        parts = HoldOut.of(self.tokens.data.samples).parts
        size = 8 * parts * (layer.k**2 + layer.units**2) + 4 * layer.k * layer.n
        at_a_time = max(self.budget // size, 1)
        for start in range(0, len(experts), at_a_time):
            chosen = experts[start : start + at_a_time]
            yield from self.tokens.moments([(readers, expert) for expert in chosen], [int(counts[expert]) for expert in chosen])

    def notes(self, number: int) -> list[str]:
        """Say which experts of a group saw how many tokens, or why none."""
        counts = self.counts[number]
        if self.tokens is None or not self.reached[number]:
            return [f"data-free: {self.why}"] * bool(self.why)
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


def _grid_notes(layer: ExpertLayer, plan: Plan, block: int | None, readers: int) -> list[str]:
    """Say where the grid is another than was asked for, or the kernel rounds what it multiplies."""
    assert plan.quantize is not None
    wanted, notes = plan.quantize.block_size, list[str]()
    if block != wanted:
        how = "one scale a channel" if block is None else f"blocks of {block}"
        notes.append(f"{how}: blocks of {wanted} do not divide both {layer.k} and {layer.units} inputs")
    if container_bits(plan.quantize.bits) == 8 and block is not None:
        notes.append(INT8)
    if readers > 1:
        notes.append(f"one pair of weights for {readers} operators: one solution for all")
    return notes
