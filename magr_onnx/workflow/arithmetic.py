"""Whether layers with float inputs compute with them as they are, or round them to int8 in the kernel: what is faster, and as accurate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.passes import Emitter
from magr_onnx.passes.graph.kv_cache import pairs_of
from magr_onnx.passes.graph.nodes import attribute_of
from magr_onnx.passes.providers import find_provider
from magr_onnx.report.validation import Latency
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.int8_inputs import is_causal, time_int8
from magr_onnx.runtime.measure.layer_errors import some_for
from magr_onnx.runtime.measure.validate import comparing_with
from magr_onnx.runtime.ort.session import Arithmetic
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.prepare import Prepared
from magr_onnx.workflow.solve import Solved

LEAST_WEIGHTS = 4_000_000  # of all layers: a pass of fewer takes about a millisecond
FASTER = 0.8  # times the time with float inputs, from which int8 ones are worth their error
MOST_LOSS = 0.5  # dB that rounding inputs may cost at an output, where that was measured
UNMEASURED_BITS = 4  # of weights whose own errors dwarf those of int8 inputs, where that was not
MOST_ROWS = 1024  # that layers are timed on


def choose(solved: Solved, prepared: Prepared, context: RunContext) -> Solved:
    """Have the layers that may compute with int8 inputs do so where that is faster here and costs little.

    Decoders are timed on one row, which is a step of theirs, other models on the rows of a calibration sample; models without data that
    are no decoders stay as they are. The loss is measured on a few batches: those kept back from calibration, if there are any.
    """
    emitter = solved.plan.emitter
    nodes = [] if emitter is None else emitter.undecided(solved.model, solved.emitted)
    weights = sum(attribute_of(node, "K", 0) * attribute_of(node, "N", 0) for node in nodes)
    if emitter is None or weights < LEAST_WEIGHTS or not find_provider(context.provider).host_memory:
        return solved
    data = None if context.memory.large else prepared.kept_back or solved.data
    rows = _rows(solved, prepared, data, context.provider)
    times = _times(emitter, [node for node in nodes if node.name in rows], rows, context)
    faster = [node for node in nodes if node.name in times and times[str(node.name)].interval[2] < FASTER]
    chosen, loss = _accurate(emitter, faster, solved, prepared, data, context)
    context.lap("arithmetic")
    if not chosen:
        return solved
    names = [str(node.name) for node in chosen]
    ratio = sum(times[name].quantized_ms for name in names) / sum(times[name].float_ms for name in names)
    cost = "" if math.isnan(loss) else f", and cost {max(loss, 0):.2f} dB"
    layers = f"{len(chosen)} of {len(nodes)} layers round their inputs to int8 (accuracy level 4)"
    note = f"{layers}: they take {ratio:.2f} times as long here{cost}"
    return replace(solved, plan=replace(solved.plan, emitter=emitter.decide(chosen, True)), notes=[*solved.notes, note])


def _rows(solved: Solved, prepared: Prepared, data: Batches | None, provider: str) -> dict[str, int]:
    """Rows to time layers on, by the name of their node; nothing where they are unknown."""
    names = [str(row.emitted) for row in solved.rows]
    if pairs_of(prepared.model) or (data is not None and is_causal(prepared.reference, data, provider)):
        return dict.fromkeys(names, 1)
    if solved.data is None:
        return {}
    samples = solved.data.samples or len(solved.data)
    return {str(row.emitted): min(max(row.rows // samples, 1), MOST_ROWS) for row in solved.rows}


def _times(emitter: Emitter, nodes: Sequence[ir.Node], rows: Mapping[str, int], context: RunContext) -> dict[str, Latency]:
    """Time layers, one of each shape, by the name of their node."""
    shapes: dict[tuple[int, ...], list[ir.Node]] = {}
    for node in nodes:
        shape = *(attribute_of(node, name, 0) for name in ("K", "N", "bits", "block_size")), rows[str(node.name)]
        shapes.setdefault(shape, []).append(node)
    times: dict[str, Latency] = {}
    for i, ((*_, count), alike) in enumerate(shapes.items()):
        context.stage("timing layers")(i, len(shapes))
        measured = time_int8(alike[0], count, context.provider, lambda node, int8: emitter.decide([node], int8))
        times |= dict.fromkeys((str(node.name) for node in alike), measured)
    return times


def _accurate(
    emitter: Emitter, nodes: Sequence[ir.Node], solved: Solved, prepared: Prepared, data: Batches | None, context: RunContext
) -> tuple[Sequence[ir.Node], float]:
    """Leave out layers with many bits as far as int8 inputs cost too much there; the others, and what they cost (dB), or NaN."""

    bits = sorted({attribute_of(node, "bits", 4) for node in nodes}, reverse=True)
    if data is None:
        return [node for node in nodes if attribute_of(node, "bits", 4) <= UNMEASURED_BITS], math.nan
    if not nodes:
        return [], math.nan
    few = some_for(prepared.model, data)
    with comparing_with(prepared.reference, few, context.provider, context.mask, losses=False) as compare:

        def decibels() -> dict[str, float]:
            compared = compare(solved.model, Arithmetic.DEFAULT, None)
            return {m.output: m.sqnr_db for m in compared.outputs}

        before = decibels()
        for most in bits:
            fewer = [node for node in nodes if attribute_of(node, "bits", 4) <= most]
            emitter.decide(fewer, True)
            after = decibels()
            emitter.decide(fewer, False)
            loss = max((before[name] - after[name] for name in before), default=0.0)
            if loss <= MOST_LOSS:
                return fewer, loss
    return [], math.nan
