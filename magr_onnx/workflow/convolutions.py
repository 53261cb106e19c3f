"""Convolutions on their way through a plan, before its linear layers: patches gathered, groups solved, codes written.

A group of channels is a problem like that of any linear layer. Convolutions that share a weight are solved together, under the moments of
all their patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit.conv import emit
from magr_onnx.passes.layer_passes.convolutions import Convolutions, problems_of
from magr_onnx.passes.layers.conv import ConvLayer, find, split_groups
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.report.reasons import ConvReason
from magr_onnx.runtime.calibration import conv_patches
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted


def stage_for(model: ir.Model, plan: Plan) -> Convolutions | None:
    """The plan's stage for convolutions, if it has one, in the form that this model needs.

    Beside static integer activations it is DequantizeLinear: onnxruntime would fold the other, round the weight anew in its own way and
    compute the convolution in integers.
    """
    stage = plan.convolutions
    return replace(stage, form="dequantize") if stage is not None and computes_integers(model, plan) else stage


def computes_integers(model: ir.Model, plan: Plan) -> bool:
    """Whether onnxruntime could make integer operators of the result's convolutions."""
    return plan.input_grids == "static" or any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())


def select(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[ConvLayer], list[Skip]]:
    """Convolutions that will be converted, and all others with the reason."""
    layers, skips = find(model, selection)
    stage = stage_for(model, plan)
    reason, detail = None, ""
    if stage is None:
        reason = ConvReason.UNASKED
    elif (needed := stage.opset(layers)) > (opset := model.opset_imports.get("", 0)):
        reason, detail = ConvReason.OPSET, f"from {opset} to {needed}; export it with a newer opset"
    if reason is None:
        return layers, skips
    return [], [*skips, *(Skip(layer.name, layer.op, reason, detail) for layer in layers)]


def convert(
    model: ir.Model,
    work: ir.Model,
    plan: Plan,
    data: Batches | None,
    context: RunContext,
    patch_limit: int = conv_patches.PATCH_LIMIT,
) -> Converted:
    """Quantize the convolutions of ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Args:
        model: The float model.
        work: Its copy.
        plan: The whole plan.
        data: Batches that fit the model; None works data-free.
        context: What is converted, where to run, in how much memory, and who hears of progress.
        patch_limit: Bytes of one sample's patches; convolutions that need more are solved data-free, and the report says so.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    layers, skips = select(work, plan, context.selection)
    result = Converted(skips=skips)
    stage = stage_for(model, plan)
    if stage is None or not layers:
        return result
    integer, progress = computes_integers(model, plan), context.stage("convolutions")
    unmeasured: dict[str, str] = {}
    ordered = [layer for readers in by_weight(layers) for layer in readers]
    if data is not None:
        unmeasured |= conv_patches.unmeasured(model, ordered, data, context.provider, patch_limit)
    for readers, stats in _measured(model, ordered, data, context, unmeasured):
        solution = _solve(readers, stats, plan)
        assert solution.quantized is not None
        weight = split_groups(solution.quantized.dequantize(), readers[0].group)
        for layer, emitted in zip(readers, emit(readers, solution, stage.form, integer), strict=True):
            notes = [unmeasured[layer.name]] if layer.name in unmeasured else []
            if len(readers) > 1:
                notes.append(f"one weight for {len(readers)} convolutions: one solution for all")
            noted = replace(solution, record=solution.record.noting(*notes))
            result.add(layer, noted, emitted, weight, layer.group)
        progress(len(result.rows), len(ordered))
    order = {layer.name: i for i, layer in enumerate(layers)}
    result.rows.sort(key=lambda row: order[row.name])
    return result


def _measured(
    model: ir.Model, layers: Sequence[ConvLayer], data: Batches | None, context: RunContext, unmeasured: dict[str, str]
) -> Iterator[tuple[list[ConvLayer], list[list[LayerStats]]]]:
    """Convolutions of one weight with the statistics of those that have some; ``unmeasured`` gets the reason of those that have not."""
    units = iter(by_weight(layers))
    readers = next(units, None)
    gathered: dict[str, list[LayerStats] | None] = {}
    for group in conv_patches.grouped(layers, context.memory.gram_budget):
        measured = [layer for layer in group if layer.name not in unmeasured]
        stats: dict[str, list[LayerStats]] = {}
        if data is not None and measured:
            try:
                stats = conv_patches.collect(model, measured, data, provider=context.provider)
            except (ModelError, RuntimeFailure) as error:  # the model itself runs: this is about a copy with patches
                unmeasured |= dict.fromkeys((layer.name for layer in measured), conv_patches.cannot_gather(error))
        gathered |= {layer.name: stats.get(layer.name) for layer in group}
        while readers is not None and all(layer.name in gathered for layer in readers):
            yield readers, [known for layer in readers if (known := gathered.pop(layer.name)) is not None]
            readers = next(units, None)


def _solve(readers: Sequence[ConvLayer], stats: Sequence[list[LayerStats]], plan: Plan) -> LayerSolution:
    """One solution for all convolutions of a weight, under the moments of all their patches."""
    first, policy = readers[0], plan.bias_policy
    groups = [reduce(_pooled, parts) for parts in zip(*stats, strict=True)]
    takes_bias, has_bias = (all(getattr(layer, name) for layer in readers) for name in ("takes_bias", "has_bias"))
    absorbs = (policy == "any" and takes_bias) or (policy == "existing" and has_bias)
    return plan.for_convolutions(absorbs).solve_groups(problems_of(first, groups))


def _pooled(a: LayerStats, b: LayerStats) -> LayerStats:
    """The statistics of the rows of both, held-out rows included."""
    held_out = None if a.held_out is None or b.held_out is None else a.held_out.combine(b.held_out)
    return replace(a.combine(b), held_out=held_out)
