"""Recurrent operators, converted before a model's linear layers, so that these see them quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.core.types import Array, LayerStats
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit import recurrent as emitter
from magr_onnx.passes.layer_passes.recurrent import join, problems_of
from magr_onnx.passes.layers import recurrent
from magr_onnx.passes.layers.conv import split_groups
from magr_onnx.passes.layers.recurrent import RecurrentLayer
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight, split_shared
from magr_onnx.report.reasons import Reason, RecurrentReason
from magr_onnx.runtime.calibration import recurrent_states
from magr_onnx.runtime.calibration.subgraphs import NEVER, TOO_LARGE
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted


def select(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[RecurrentLayer], list[Skip]]:
    """Recurrent operators that will be converted, and all others with the reason."""
    layers, skips = recurrent.find(model, selection)
    if plan.recurrent is not None and not selection.include:
        layers, shared = split_shared(layers, recurrent.float_readers)
        skips += shared
    stage, opset = plan.recurrent, model.opset_imports.get("", 0)
    if stage is not None and stage.opset(layers) <= opset:
        return layers, skips
    reason = Reason.RECURRENT if stage is None else RecurrentReason.OPSET
    return [], [*skips, *(_skip(layer, reason) for layer in layers)]


def _skip(layer: RecurrentLayer, reason: Reason | RecurrentReason) -> Skip:
    detail = f"{layer.weight.name}, {layer.recurrence.name}: {layer.bytes / 1e6:.2f} MB"
    return Skip(layer.name, layer.op, reason, detail, layer.bytes)


def convert(result: Converted, model: ir.Model, work: ir.Model, plan: Plan, data: Batches | None, context: RunContext) -> None:
    """Quantize the recurrent operators of ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
    """
    layers, skips = select(work, plan, context.selection)
    result.skips += skips
    stage, groups = plan.recurrent, by_weight(layers)
    if stage is None or not layers:
        return
    measured, unmeasured = _measured(model, groups, data, context)
    for readers, stats in zip(groups, measured, strict=True):
        problems = problems_of(readers[0], stats or ())
        form, why = stage.form_of(readers, context.provider)
        channels = plan.for_channels(stage, activation="dynamic" if form == "dynamic-quantize-lstm" else None)
        solutions = [channels.solve_groups(part) for part in problems]
        shared = f"one pair of weights for {len(readers)} operators: one solution for all" if len(readers) > 1 else ""
        joined = join(problems, solutions)
        notes = (why, shared, "" if stats else unmeasured)
        joined = replace(joined, record=joined.record.noting(*filter(None, notes)))
        directions = readers[0].directions
        weight: Array = split_groups(joined.weight, directions)
        for layer, emitted in zip(readers, emitter.emit(readers, solutions, form), strict=True):
            result.add(layer, joined, emitted, weight, directions)


def _measured(
    model: ir.Model, groups: Sequence[Sequence[RecurrentLayer]], data: Batches | None, context: RunContext
) -> tuple[Sequence[Sequence[Sequence[LayerStats]] | None], str]:
    """Statistics of every group of operators that share weights; and why there are none, where there is data."""
    if data is None or context.memory.large:
        return [None] * len(groups), "" if data is None else f"data-free: {TOO_LARGE}"
    try:
        return recurrent_states.collect(model, groups, data, context.provider), f"data-free: {NEVER}"
    except (ModelError, RuntimeFailure) as error:  # the model itself runs: this is about a copy that puts out sums
        return [None] * len(groups), f"data-free: its inputs and states cannot be gathered: {str(error).splitlines()[0]}"
