"""The long work: statistics, and every layer through the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import onnx_ir as ir

from magr_onnx.config import layer_options
from magr_onnx.core.types import LayerStats
from magr_onnx.passes import LinearLayer, Plan, Skip, SolvedLayer
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.emit.readback import digest
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.instrument.segments import depths
from magr_onnx.passes.layer_passes import shared_weights
from magr_onnx.passes.layers.shared import readers
from magr_onnx.passes.layerwise import run_layers
from magr_onnx.report.data import LayerRow, megabytes, told_apart
from magr_onnx.runtime.calibration import activation_ranges, moments, rewrites, subgraphs
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.sensitivity import Inputs
from magr_onnx.workflow import mixed_precision, non_linear
from magr_onnx.workflow.calibrate import Models, calibration_of, completing, gather, output_hessian, uncuttable, without_stages
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import layer_row
from magr_onnx.workflow.prepare import Prepared
from magr_onnx.workflow.request import OptimizeRequest


@dataclass(slots=True, eq=False)
class Solved:
    """A converted model, and what is to be said of it.

    Attributes:
        model: The result.
        plan: The plan as it was carried out.
        data: What it was calibrated on.
        rows: A row for every converted layer, in the order of the report.
        digests: Hashes of the dequantized weights, by the output of their layers.
        emitted: Names of the nodes of linear layers.
        skips: What was left as it is.
        notes: Sentences for the report.
        search: Mixed precision, if it was asked for.
    """

    model: ir.Model
    plan: Plan
    data: Batches | None
    rows: list[LayerRow]
    digests: dict[str, str]
    emitted: set[str]
    skips: list[Skip]
    notes: list[str]
    search: mixed_precision.Search | None


@dataclass(slots=True, eq=False)
class _Progress:
    """What the layers of one round through the pipeline have come to."""

    rows: dict[str, LayerRow] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    unmasked: list[str] = field(default_factory=list)
    spilled: int = 0
    repeated: dict[str, tuple[int, int]] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)

    def add(self, solved: SolvedLayer) -> None:
        layer, emitted, quantized = solved.layer, solved.emitted, solved.solution.quantized
        self.rows[layer.name] = layer_row(layer, solved.solution, emitted)
        if emitted is None:
            return
        self.added[layer.name] = emitted.bytes
        if emitted.stored_block is not None:
            self.repeated[layer.weight_name] = emitted.stored_block, emitted.repeated_bytes
        if quantized is not None:
            self.digests[str(layer.output.name)] = digest(quantized.dequantize())


def solve(prepared: Prepared, request: OptimizeRequest, context: RunContext) -> Solved:
    """Convert everything that can be converted.

    Args:
        prepared: The float model and its calibration data; rewrites of the plan change the model.
        request: What is asked for.
        context: What the steps of the run share.

    Raises:
        ModelError: Nothing can be converted after all.
        MagrError: Whatever goes wrong on the way.
    """
    data, goal, options = prepared.data, request.budget, request.options or {}
    model, plan, provider = prepared.model, prepared.plan, context.provider
    notes: list[str] = []
    if plan.rewrites:
        notes += rewrites.rewrite(
            model,
            plan,
            calibration_of(data, context),
            include=context.include,
            exclude=context.exclude,
            gram_budget=context.memory.gram_budget,
        )
        context.spill(model)
        context.lap("rewrite")
    base = model.clone()
    begun = non_linear.convert(model, base, plan, data, goal, context)
    context.spill(base)
    notes += begun.notes
    context.report_layers(begun.rows)

    work = base.clone()
    layers, skips = context.find(work)
    skips += [*prepared.unconverted, *begun.skips]
    source = subgraphs.tapped(model, layers, data, plan, provider, context.memory.large)
    layers, lost = source.split(layers, needed=goal is not None or plan.input_grids == "static")
    skips += lost
    if not layers and not begun.rows:
        raise prepared.nothing(skips)
    plan, missing = without_stages(work, layers, plan)
    notes += missing
    if context.memory.large and data is not None and (whole := uncuttable(work)):
        some = ", ".join(whole[:3])
        notes.append(f"the float model was run as a whole, in more memory than max_memory: {some} between layers is no tensor to be kept")
    grids = activation_ranges.Grids()
    if plan.activations is not None and (calibration := calibration_of(data, context)) is not None and layers:
        grids = activation_ranges.choose_grids(source.model, source.reached(layers), calibration, plan, context.stage("ranges"))
        notes += grids.notes
        context.lap("ranges")
    own = layer_options.assign(request.patterns.tables, layers, options, plan, provider)
    search = None
    if goal is not None and data is not None and layers:
        room = len(str(plan)) + mixed_precision.STAMP
        chosen = [layer for layer in layers if layer.name not in own.plans]
        integer = None if plan.activations is None else Inputs(grids.inputs, grids.bounds, grids.products)
        written = None if plan.activations is None else grids
        to_file = context.output is not None
        floats = mixed_precision.Source(base, chosen, prepared.bytes, to_file, room, model, source.on(base), own.plans, written)
        search = mixed_precision.Search(
            goal, options, floats, data, integer, context.mask, provider, request.gram_budget, context.stage("sensitivities")
        )
        data = search.data
        context.lap("sensitivities")

    with output_hessian(model, layers, data, plan, context, notes) as hessian:
        if hessian is not None:
            context.lap("differentiate")
        while True:
            left: list[Skip] = []
            assigned: Mapping[str, Plan] = own.plans
            if search is not None:
                assigned = search.allocation.assigned()
                layers, left = search.allocation.select(layers)
            context.store_plan(plan, assigned)
            done = _Progress()
            reader_names = {name: scope_of(some[0].node) or some[0].name for name, some in moments.readers_of(layers).items()}
            finished = partial(_finished, done, len(layers), work, context)
            feedback, hold_out = plan.error_feedback is not None, any(p.holds_out for p in (plan, *assigned.values()))
            models, calibration = Models(model, work, source, begun.digests), calibration_of(data, context, grids, hold_out)
            for group, result in gather(models, layers, calibration, feedback, context):
                done.unmasked += [reader_names[name] for name in result.unmasked if name in reader_names]
                done.spilled = max(done.spilled, result.spilled)
                context.lap("calibrate")
                if not done.rows:
                    context.stage("quantizing")(0, len(layers))  # the stage begins before its first layer is finished
                stats, complete = result.stats, completing(result, source, grids, hessian, data)
                run_layers(plan, group, partial(_known, stats), finished, complete, assigned, context.store)
                stats.clear()  # the next ones are made while this loop still holds these
                result.goals.clear()
                context.lap("quantize")
            if search is None or search.accepts(work):
                break
            work = base.clone()
            layers, _ = source.split(context.find(work)[0], bool(lost))
    notes += _remarks(done, context)
    said = shared_weights.remarks(layers, done.added, context.memory.large)
    for name, given in own.options.items():
        said[name].append(f"options of its own: {layer_options.described(given)}")
    rows = [
        replace(
            done.rows[layer.name],
            notes=(*done.rows[layer.name].notes, *said[layer.name]),
            added=done.added.get(layer.name) if readers(layer) else None,
        )
        for layer in layers
    ]
    emitted = {row.emitted for row in rows if row.emitted}
    rows = [*begun.rows, *rows]
    depth = depths(model, {row.name for row in rows})
    rows = told_apart(replace(row, depth=depth.get(row.name)) for row in rows)
    return Solved(work, plan, data, rows, done.digests | begun.digests, emitted, [*skips, *left], [*notes, *context.notes(work)], search)


def _finished(done: _Progress, count: int, work: ir.Model, context: RunContext, solved: SolvedLayer) -> None:
    """Take note of a layer that has been through the pipeline."""
    done.add(solved)
    context.spill(work)
    context.report_layers([done.rows[solved.layer.name]])
    context.stage("quantizing")(len(done.rows), count)


def _known(stats: Mapping[str, LayerStats], layer: LinearLayer) -> LayerStats | None:
    """The statistics of what a layer reads, where they were gathered."""
    return stats.get(layer.reads)


def _remarks(done: _Progress, context: RunContext) -> list[str]:
    found = []
    if done.spilled:
        cache = megabytes(context.memory.cache)
        found.append(f"{megabytes(done.spilled)} of values between stages went through a temporary folder (cache {cache})")
    if floats := sum(row.bits is not None and row.emitted is None for row in done.rows.values()):
        found.append(
            f"no pass of the pipeline writes codes: {floats} weights are stored as the floats that their codes stand for, in as many bytes "
            f"as before; put one of {', '.join(form.emitter.name for form in FORMATS.values())} at its end for a smaller file"
        )
    if done.repeated:
        blocks = " or ".join(map(str, sorted({block for block, _ in done.repeated.values()})))
        found.append(
            f"{len(done.repeated)} weights have their scales in the file again for every block of {blocks} rows, though more rows share "
            f"one (about {sum(size for _, size in done.repeated.values())} bytes more): onnxruntime's kernels know blocks of 16, 32, 64, "
            "128 and 256 only"
        )
    if done.unmasked:
        names = list(dict.fromkeys(done.unmasked))
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        found.append(
            f"{some}: all input rows count, since there is not one for each element of the mask {context.mask!r} "
            "(pooled or reshaped before)"
        )
    return found
