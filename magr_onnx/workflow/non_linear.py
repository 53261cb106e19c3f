"""What is converted before a model's linear layers, so that these see it quantized: tables of embeddings, convolutions and
recurrent operators.

Everything here is written into one copy of the float model, which linear layers then start from. A group of a convolution's channels is a
problem like that of any linear layer; convolutions that share a weight are solved together, under the moments of all their patches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.config import plans
from magr_onnx.config.options import Options
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.moments import pooled
from magr_onnx.core.types import LayerStats, TargetMoments
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit import conv as conv_emitter
from magr_onnx.passes.emit import embedding as table_emitter
from magr_onnx.passes.layer_passes.bias_compensation import compensate_groups
from magr_onnx.passes.layer_passes.convolutions import Convolutions, problems_of
from magr_onnx.passes.layer_passes.embeddings import problem_of
from magr_onnx.passes.layers import conv, embedding
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.embedding import EmbeddingTable
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.report.reasons import ConvReason, TableReason
from magr_onnx.runtime.calibration import conv_patches
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.workflow import conv_statistics, experts, integer_convolutions, recurrent
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted
from magr_onnx.workflow.goal import Goal
from magr_onnx.workflow.integer_convolutions import Rounding


def with_convolutions(plan: Plan, model: ir.Model, options: Options | None) -> Plan:
    """Add a stage for convolutions to a plan, if the model has some that can be converted and the options do not mention them.

    ``options`` are those the plan is made of; None for a plan written by hand, which is taken as it is.
    """
    if options is None or "conv_bits" in options or not conv.find(model)[0]:
        return plan
    return replace(plan, convolutions=plans.convolutions(options))


def data_to_fit(data: Batches | None, goal: Goal | None) -> Batches | None:
    """Select the batches that a budget of loss will not be measured on."""
    return data if data is None or goal is None or goal.loss is None or goal.of_metric else Split.of(data).rest


def convert(
    model: ir.Model,
    work: ir.Model,
    plan: Plan,
    fit: Batches | None,
    rounding: Rounding,
    tied: Collection[str],
    context: RunContext,
    assigned: Mapping[str, tuple[Options, Plan]] | None = None,
) -> Converted:
    """Convert ``work``, in place, by the statistics of ``model``, of which it is a copy with values rounded.

    Experts that are ``assigned`` options of their own have their plan. Tables whose weights are ``tied`` to linear layers are converted
    with these. A large model cannot be run as a whole, so that its convolutions are solved without data.
    """
    result = Converted()
    convert_tables(result, work, plan, tied, context.selection)
    tables = len(result.rows)
    if tables:
        context.lap("embeddings")
    convert_convolutions(result, model, work, plan, None if context.memory.large else fit, rounding, context)
    layers = result.rows[tables:]
    if layers:
        context.lap("convolutions")
    convolutions = len(result.rows)
    recurrent.convert(result, model, work, plan, fit if context.fits_weights else None, context)
    if len(result.rows) > convolutions:
        context.lap("recurrent")
    operators = len(result.rows)
    plans = experts.Plans(plan, assigned or {})
    experts.convert(result, model, work, plans, fit if context.fits_weights else None, context)
    if len(result.rows) > operators:
        context.lap("experts")
    for what, rows in (("convolutions", layers), ("recurrent operators", result.rows[convolutions:operators])):
        if context.mask is not None and any(row.rows for row in rows):
            result.notes.append(f"mask {context.mask!r} marks no positions of {what}: all of theirs count")
    if context.memory.large and fit is not None and layers:
        result.notes.append("convolutions are data-free: the model is too large to be run as a whole in the memory there is (max_memory)")
    return result


def select_tables(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[EmbeddingTable], list[Skip]]:
    """Tables that will be converted, and all others with the reason."""
    tables, skips = embedding.find(model, selection)
    stage = plan.embeddings
    if stage is None:
        return [], [*skips, *map(_unasked, tables)]
    unfit = {t.name: skip for t in tables if (skip := stage.fits_table(t)) is not None}
    return [t for t in tables if t.name not in unfit], [*skips, *unfit.values()]


def _unasked(table: EmbeddingTable) -> Skip:
    size = table.weight.stored.nbytes
    return Skip(table.name, table.op, TableReason.UNASKED, f"{table.weight_name}: {size / 1e6:.2f} MB", size)


def convert_tables(result: Converted, work: ir.Model, plan: Plan, tied: Collection[str], selection: Selection = ALL) -> None:
    """Quantize the tables of ``work`` that are not ``tied`` to linear layers, in place."""
    tables, skips = select_tables(work, plan, selection)
    result.skips += skips
    for readers in by_weight([table for table in tables if table.weight_name not in tied]):
        assert plan.embeddings is not None
        solution = plan.embeddings.solve(problem_of(readers[0]))
        for table, emitted in zip(readers, table_emitter.emit(readers, solution, plan.embeddings.form), strict=True):
            result.add(table, solution, emitted, solution.weight.T)


def select_convolutions(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[ConvLayer], list[Skip]]:
    """Convolutions that will be converted, and all others with the reason."""
    layers, skips = conv.find(model, selection)
    stage = _stage_for(model, plan)
    reason, detail = None, ""
    if stage is None:
        reason = ConvReason.UNASKED
    elif (needed := stage.opset(layers)) > (opset := model.opset_imports.get("", 0)):
        reason, detail = ConvReason.OPSET, f"from {opset} to {needed}; export it with a newer opset"
    if reason is None:
        return layers, skips
    return [], [*skips, *(Skip(layer.name, layer.op, reason, detail) for layer in layers)]


def _stage_for(model: ir.Model, plan: Plan) -> Convolutions | None:
    """The plan's stage for convolutions, if it has one, in the form that this model needs.

    Beside static integer activations it is not ``fold``: onnxruntime would fold the weight, round it anew in its own way and compute the
    convolution in integers.
    """
    stage = plan.convolutions
    return replace(stage, form="dequantize") if stage is not None and stage.form == "fold" and computes_integers(model, plan) else stage


def computes_integers(model: ir.Model, plan: Plan) -> bool:
    """Whether onnxruntime could make integer operators of the result's convolutions."""
    return plan.input_grids == "static" or any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())


def convert_convolutions(
    result: Converted,
    model: ir.Model,
    work: ir.Model,
    plan: Plan,
    data: Batches | None,
    rounding: Rounding,
    context: RunContext,
    patch_limit: int = conv_patches.PATCH_LIMIT,
) -> None:
    """Quantize the convolutions of ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Args:
        result: Takes note of them.
        model: The float model.
        work: Its copy, in which values are rounded.
        plan: The whole plan.
        data: Batches that fit the model; None works data-free.
        rounding: The grids of these values, and which convolutions stay float between others in integers.
        context: What is converted, where to run, in how much memory, and who hears of progress.
        patch_limit: Bytes of one sample's patches; convolutions that need more are solved data-free, and the report says so.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    layers, skips = select_convolutions(work, plan, context.selection)
    result.skips += skips
    stage = _stage_for(model, plan)
    if stage is None or not layers:
        return
    rounded, integer, first = rounding.grids, computes_integers(model, plan), len(result.rows)
    ordered = [layer for readers in by_weight(layers) for layer in readers]
    integers = [layer for layer in ordered if str(layer.x.name) in rounded and integer_convolutions.may_be_integer(layer, plan.rules)]
    grids = {layer.name: rounded[str(layer.x.name)] for layer in integers}
    source = work.clone() if rounded else model  # what convolutions read is rounded there
    unmeasured: dict[str, str] = {}
    fit = data if context.fits_weights else None
    if fit is not None:
        unmeasured |= conv_patches.unmeasured(source, ordered, fit, context.provider, patch_limit)
    models = conv_statistics.ConvModels(model, work, source, {*rounded})
    for readers, stats, targets in conv_statistics.gather(models, ordered, fit, stage.feedback, context, unmeasured):
        multiplied = any(layer.name in grids for layer in readers)
        solved = solve_weight(readers, stats, plan, multiplied, targets)
        solutions = integer_convolutions.with_room_for_biases(readers, solved, grids)
        assert solutions[0].quantized is not None
        weight = conv.split_groups(solutions[0].quantized.dequantize(), readers[0].group)
        form, stays_float = form_of(readers, stage, rounding, multiplied, integer)
        if form == "integer" and plan.rules is not None and plan.rules.int4 == "stored":
            form = "integer-int4"
        written = conv_emitter.emit(readers, solutions, form, stays_float, grids)
        for layer, solution, emitted in zip(readers, solutions, written, strict=True):
            notes = [reason for reasons in (rounding.floats, unmeasured) if (reason := reasons.get(layer.name)) is not None]
            if len(readers) > 1:
                notes.append(f"one weight for {len(readers)} convolutions: one solution for all")
            result.add(layer, replace(solution, record=solution.record.noting(*notes)), emitted, weight, layer.group)
        context.stage("convolutions")(len(result.rows) - first, len(ordered))
    if stage.form == "integer" and (reason := integer_convolutions.why_float(stage, data)) is not None:
        result.notes.append(f"convolutions are computed in float: {reason}")
    elif grids and any(grid.signed for grid in grids.values()):
        result.notes.append("int8 activations that several nodes read are not fused on x86, and run as floats there; uint8 are")
    order = {layer.name: i for i, layer in enumerate(layers)}
    result.rows[first:] = sorted(result.rows[first:], key=lambda row: order[row.name])


def form_of(
    readers: Sequence[ConvLayer], stage: Convolutions, rounding: Rounding, multiplied: bool, integer: bool
) -> tuple[conv.Form, bool]:
    """Return how the weight of convolutions is dequantized, and whether onnxruntime must be prevented from computing them in integers.

    Those that are left float for speed have no rounded neighbours, so that onnxruntime will not.
    """
    if all(layer.name in rounding.floats for layer in readers):
        return "fold", False
    form = stage.form if stage.form != "integer" or multiplied else "dequantize"
    return form, integer and form != "integer"


def solve_weight(
    readers: Sequence[ConvLayer],
    stats: Sequence[list[LayerStats] | None],
    plan: Plan,
    integers: bool,
    targets: Sequence[TargetMoments] = (),
) -> list[LayerSolution]:
    """One weight for all convolutions that read it, under the moments of all their patches; for each the bias that its own mean needs.

    Where some of them multiply ``integers``, its codes fit the accumulator of the plan. A single convolution may have ``targets``, what its
    groups should put out.
    """
    first, policy = readers[0], plan.bias_policy
    takes_bias, has_bias = (all(getattr(layer, name) for layer in readers) for name in ("takes_bias", "has_bias"))
    absorbs = (policy == "any" and takes_bias) or (policy == "existing" and has_bias)
    assert plan.convolutions is not None
    activation = plan.activations.type if plan.activations is not None and integers else None
    conv_plan, measured = plan.for_channels(plan.convolutions, absorbs, activation), [groups for groups in stats if groups]
    if len(readers) == 1 or not measured:
        return [conv_plan.solve_groups(problems_of(first, measured[0] if measured else [], targets))] * len(readers)
    matrices = first.read()
    powers = [sum(layer_error(w, s.gram) for w, s in zip(matrices, groups, strict=True)) for groups in measured]
    groups = [pooled([(s, absorbs) for s in of_group], powers) for of_group in zip(*measured, strict=True)]
    solution = conv_plan.solve_groups(problems_of(first, groups))
    solution = replace(solution, bias=None, record=replace(solution.record, bias_compensated=False))
    return [solution if not own or not absorbs else compensate_groups(problems_of(first, own), solution) for own in stats]
