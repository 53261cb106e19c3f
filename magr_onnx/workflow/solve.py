"""The long work: statistics, and every layer through its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from magr_onnx.config import layer_options
from magr_onnx.core.types import ActivationGrid, Array, WeightSpec
from magr_onnx.errors import listed
from magr_onnx.passes import LinearLayer, Plan, Skip
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.instrument.segments import depths
from magr_onnx.passes.layer_passes import shared_weights
from magr_onnx.passes.layers.linear import find
from magr_onnx.passes.layers.recurrent import GATES
from magr_onnx.passes.layers.weighted import readers, skip_of
from magr_onnx.passes.rewrites.base import Context, Groups
from magr_onnx.report.data import megabytes
from magr_onnx.report.layer_row import LayerRow, with_unique_scopes
from magr_onnx.report.reasons import ConvReason, Reason
from magr_onnx.runtime.calibration import activation_ranges, fisher, moments, subgraphs
from magr_onnx.runtime.calibration.context import GridChoice, Grids
from magr_onnx.runtime.calibration.mask import excludes, masked_values
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.workflow import (
    conv_sensitivity,
    experts,
    growth,
    integer_convolutions,
    integer_speed,
    mixed_precision,
    non_linear,
    rounded_activations,
    tied_tables,
    trials,
    tuning,
    wide_inputs,
)
from magr_onnx.workflow.calibrate import Models, calibration_of, output_hessian, uncuttable, without_stages
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted
from magr_onnx.workflow.layer_round import Round, Setup, solve_layers
from magr_onnx.workflow.metric_search import MetricSearch
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
        emitted: Names of the nodes of linear layers, convolutions and recurrent operators.
        skips: What was left as it is.
        notes: Sentences for the report.
        search: Mixed precision, if it was asked for.
        may_widen: Whether a larger share of the work in 16 bits could change anything.
        rounds: Whether values between convolutions are rounded.
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
    may_widen: bool = True
    rounds: bool = False


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
    notes = list[str]()
    if context.fits_weights:
        notes += [*_rewrite(prepared, context), *integer_convolutions.equalize(prepared.model, prepared.plan, prepared.data, context)]
    if prepared.plan.input_grids == "static":  # values of this one are marked
        prepared = replace(prepared, model=prepared.model.clone())
    model = prepared.model
    fit = non_linear.data_to_fit(prepared.data, request.budget)
    floats = context.once("slower in integers", lambda: integer_speed.slower(model, prepared.plan, fit, request.options, context))
    notes += floats.notes
    measured = None if context.memory.large else fit
    rounding = rounded_activations.round_activations(model, prepared.plan, measured, context, floats.reasons, prepared.float_share)
    base = rounded_activations.rounded_copy(model, rounding.grids, prepared.plan)
    tied = tied_tables.tied_weights(base, prepared.plan, context.selection) if request.budget is None else frozenset()
    chosen = [] if context.memory.large else conv_sensitivity.choosable(model, prepared.plan, request, context.selection)
    mixtures = experts.select(base, prepared.plan, context.selection, context.provider)[0]
    own = layer_options.assign(request.patterns.tables, mixtures, request.options or {}, prepared.plan, context.provider)
    if chosen:  # by the budget, later
        begun = non_linear.convert(model, base, replace(prepared.plan, convolutions=None), fit, rounding, tied, context, own)
        begun.skips = [skip for skip in begun.skips if skip.reason != ConvReason.UNASKED]
    else:
        begun = non_linear.convert(model, base, prepared.plan, fit, rounding, tied, context, own)
    context.spill(base)
    context.report_layers(begun.rows)
    setup = replace(_set_up(prepared, base, begun, rounding.grids, tied, request, context), convolutions=chosen)
    notes += [*rounding.notes, *begun.notes, *setup.notes]
    search = _search(setup, prepared, request, context)
    if search is not None:
        setup = replace(setup, calibration=search.calibration)
    data = None if setup.calibration is None else setup.calibration.data
    with output_hessian(model, setup.layers, data, setup.plan, context, notes) as hessian:
        if hessian is not None:
            context.lap("differentiate")
        while True:
            done = solve_layers(setup, search, hessian, context)
            if search is None or search.accepts(search.measure(done.model)):
                break
            del done  # one quantized model at a time
    done = tuning.tuned(done, setup, search, prepared, context, notes)
    others = [*begun.rows, *done.convolutions.rows]
    rows = _rows(done, setup, others, model)
    emitted = {written.node for written in done.emitted.values()} | {str(row.emitted) for row in others if row.op in (*GATES, "Conv")}
    skips = [*setup.skips, *done.skips, *done.convolutions.skips]
    notes += [*_remarks(done, data, context), *context.device_notes(rows), *context.notes(done.model)]
    digests = done.digests | begun.digests | done.tables.digests | done.convolutions.digests
    return Solved(done.model, setup.plan, data, rows, digests, emitted, skips, notes, search, setup.may_widen, bool(rounding.grids))


def _rewrite(prepared: Prepared, context: RunContext) -> list[str]:
    """Carry out the rewrites of the plan; what they did."""
    if not prepared.plan.rewrites:
        return []

    def statistics(model: ir.Model, layers: Sequence[LinearLayer]) -> Groups:
        calibration = calibration_of(prepared.data, context)  # anew: names stand for other values after a rewrite
        if calibration is not None:
            masked_values(model, moments.readers_of(layers), calibration)
        for group in moments.grouped(layers, context.memory.gram_budget):
            yield group, {} if calibration is None else moments.collect(model, group, calibration).stats

    def gradients(model: ir.Model, layers: Sequence[LinearLayer]) -> Mapping[str, Array]:
        data, policy = prepared.data, prepared.plan.bias_policy
        return {} if data is None else fisher.diagonals(model, layers, data, policy, provider=context.provider)

    plan, notes, held_out = prepared.plan, list[str](), prepared.kept_back or prepared.data
    trial = None if context.memory.large else partial(trials.trial_of, data=held_out, context=context)
    spec, rounds = plan.spec or WeightSpec(), plan.activations is not None
    setting = Context(spec, plan.bias_policy, rounds, context.selection, statistics, trial, gradients, context.spill)
    for stage in plan.rewrites:
        nothing = [] if stage.silent else [f"{stage.name} changed nothing: no layer meets its conditions and gains by it"]
        notes += stage.rewrite(prepared.model, setting) or nothing
    context.spill(prepared.model)
    context.lap("rewrite")
    return notes


def _set_up(
    prepared: Prepared,
    base: ir.Model,
    begun: Converted,
    rounded: Mapping[str, ActivationGrid],
    tied: frozenset[str],
    request: OptimizeRequest,
    context: RunContext,
) -> Setup:
    """Decide which linear layers are converted how, and choose the grids of their inputs."""
    model, data, plan = prepared.model, prepared.data, prepared.plan
    layers, skips = find(base, context.selection)
    tapped = subgraphs.tap_subgraphs(model, layers, data, plan, context.provider, context.memory.large)
    needs_statistics = request.budget is not None or plan.input_grids == "static"
    layers, unreached = tapped.split(layers, needs_statistics)
    layers, larger = growth.without_growing(base, layers, plan, tied, request)
    skips += larger
    if plan.rules is not None:
        skips += [skip_of(layer.node, Reason.SUBGRAPH, "format qdq-full rounds the main graph only") for layer in layers if layer.nested]
        layers = [layer for layer in layers if not layer.nested]
    skips += [*prepared.unconverted, *begun.skips, *unreached]
    if not layers and not prepared.others:
        raise prepared.no_layer(skips)
    plan, notes = without_stages(base, layers, plan)
    if context.memory.large and data is not None and (names := uncuttable(base)):
        notes.append(
            f"the float model was run as a whole, in more memory than max_memory: {listed(names)} between layers is no tensor to be kept"
        )
    calibration = calibration_of(data, context)
    widens = plan.activations is not None and plan.activations.wide > 0 and plan.rules is None
    may_widen = plan.rules is not None
    if widens and not layers:
        notes.append(wide_inputs.NOTHING)
    if plan.activations is not None and calibration is not None and layers:
        reached, steps = tapped.reached(layers), context.stage("ranges")
        measured = context.once(("grids of inputs", calibration.data.labels), dict[tuple[str, ActivationGrid | None], GridChoice])
        missing = [layer for layer in reached if (layer.reads, rounded.get(layer.reads)) not in measured]
        new = activation_ranges.choose_grids(tapped.model, missing, calibration, plan, rounded, steps)
        measured |= {(name, rounded.get(name)): choice for name, choice in new.items()}
        grids: Grids = {name: choice for (name, grid), choice in measured.items() if grid == rounded.get(name)}
        may_widen = plan.rules is not None or bool(wide_inputs.may_widen(tapped.model, reached, grids, rounded))
        if widens:
            grids, remarks = wide_inputs.widen(tapped.model, reached, grids, plan, rounded, calibration, context)
            notes += remarks
            context.lap("sensitivities")
        calibration = replace(calibration, grids=grids)
        notes += activation_ranges.notes_of(grids)
        context.lap("ranges")
    options, tables = request.options or {}, request.patterns.tables
    if request.options is not None:
        tables = tied_tables.with_heads(tables, plan, tied, layers, options)
    assigned = layer_options.assign(tables, layers, options, plan, context.provider)
    assigned |= layer_options.of_rewrites(layers, plan)
    changed = {*begun.digests, *rounded}
    models = Models(model, base, tapped, changed, tied)
    return Setup(models, layers, plan, calibration, needs_statistics, assigned, tied, skips, notes, may_widen=may_widen)


def _search(setup: Setup, prepared: Prepared, request: OptimizeRequest, context: RunContext) -> mixed_precision.Search | None:
    """Measure what a budget is spent by, if there is one."""
    plans = setup.plans
    if not setup.convolutions:
        mixed_precision.check_layers(request.budget, setup.layers)
    if request.budget is None or setup.calibration is None:
        return None
    convolutions = None
    if setup.convolutions:
        split = mixed_precision.split_of(request.budget, setup.calibration.data)
        convolutions = conv_sensitivity.measure(prepared.model, setup.convolutions, setup.plan, split, context)
    source = mixed_precision.Source(
        setup.models.work,
        [layer for layer in setup.layers if layer.name not in plans],
        prepared.bytes,
        request.output is not None,
        len(str(setup.plan)) + len("; ".join(map(str, request.patterns.tables)).encode()) + mixed_precision.STAMP,
        prepared.model,
        setup.models.tapped.on(setup.models.work),
        plans,
        setup.calibration.grids,
        convolutions,
    )
    steps = context.stage("sensitivities")
    settings = (request.budget, request.options or {}, source, setup.calibration, request.gram_budget, steps)
    if request.budget.of_metric and prepared.judge is not None:
        search: mixed_precision.Search = MetricSearch(*settings, prepared.judge)
    else:
        search = mixed_precision.Search(*settings)
    context.lap("sensitivities")
    return search


def _rows(done: Round, setup: Setup, begun: Sequence[LayerRow], model: ir.Model) -> list[LayerRow]:
    """Rows of everything that was converted, with what is known only now that all of it is."""
    added = {name: emitted.bytes for name, emitted in done.emitted.items()}
    remarks = shared_weights.remarks(done.layers, added, done.stages)
    for name, (options, _) in setup.assigned.items():
        remarks[name].append(f"options of its own: {layer_options.described(options)}")
    rows, solved = [*begun, *done.tables.rows], {row.name: row for row in done.rows}
    for layer in done.layers:
        row, name = solved[layer.name], layer.name
        rows.append(replace(row, notes=(*row.notes, *remarks[name]), added=added.get(name) if readers(layer) else None))
    depth = depths(model, {row.name for row in rows})
    return with_unique_scopes(replace(row, depth=depth.get(row.name)) for row in rows)


def _remarks(done: Round, data: Batches | None, context: RunContext) -> list[str]:
    notes = []
    if done.spilled:
        cache = megabytes(context.memory.cache)
        notes.append(f"{megabytes(done.spilled)} of values between stages went through a temporary folder (cache {cache})")
    if floats := sum(row.bits is not None and row.emitted is None for row in done.rows):
        notes.append(
            f"no pass of the pipeline writes codes: {floats} weights are stored as the floats that their codes stand for, in as many bytes "
            f"as before; put one of {', '.join(form.emitter.name for form in FORMATS.values())} at its end for a smaller file"
        )
    written = ((layer.weight_name, done.emitted[layer.name]) for layer in done.layers if layer.name in done.emitted)
    if repeated := {weight: (e.stored_block, e.repeated_bytes) for weight, e in written if e.stored_block is not None}:
        blocks = " or ".join(map(str, sorted({block for block, _ in repeated.values()})))
        notes.append(
            f"{len(repeated)} weights have their scales in the file again for every block of {blocks} rows, though more rows share "
            f"one (about {sum(size for _, size in repeated.values())} bytes more): onnxruntime's kernels know blocks of 16, 32, 64, "
            "128 and 256 only"
        )
    if done.unmasked and data is not None and context.mask is not None and excludes(data, context.mask):
        names = list(dict.fromkeys(done.unmasked))
        notes.append(
            f"{listed(names)}: all input rows count, since there is not one for each element of the mask {context.mask!r} "
            "(pooled or reshaped before)"
        )
    return notes
