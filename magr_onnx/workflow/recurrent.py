"""Recurrent operators, converted before a model's linear layers, so that these see them quantized."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit import recurrent as emitter
from magr_onnx.passes.layer_passes.recurrent import join, problems_of
from magr_onnx.passes.layers import recurrent
from magr_onnx.passes.layers.conv import split_groups
from magr_onnx.passes.layers.recurrent import RecurrentLayer
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.report.reasons import Reason, RecurrentReason
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted


def select(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[RecurrentLayer], list[Skip]]:
    """Recurrent operators that will be converted, and all others with the reason."""
    layers, skips = recurrent.find(model, selection)
    stage, opset = plan.recurrent, model.opset_imports.get("", 0)
    if stage is not None and stage.opset(layers) <= opset:
        return layers, skips
    reason = Reason.RECURRENT if stage is None else RecurrentReason.OPSET
    return [], [*skips, *(_skip(layer, reason) for layer in layers)]


def _skip(layer: RecurrentLayer, reason: Reason | RecurrentReason) -> Skip:
    views = (layer.weight, layer.recurrence)
    size = sum(view.tensor().nbytes for view in views)
    return Skip(layer.name, layer.op, reason, f"{', '.join(view.name for view in views)}: {size / 1e6:.2f} MB", size)


def convert(result: Converted, work: ir.Model, plan: Plan, context: RunContext) -> None:
    """Quantize the recurrent operators of ``work``, in place."""
    layers, skips = select(work, plan, context.selection)
    result.skips += skips
    stage = plan.recurrent
    if stage is None:
        return
    for readers in by_weight(layers):
        problems = problems_of(readers[0])
        solutions = [plan.for_channels(stage).solve_groups(part) for part in problems]
        form, why = stage.form_of(readers, context.provider)
        notes = [why] if why else []
        if len(readers) > 1:
            notes.append(f"one pair of weights for {len(readers)} operators: one solution for all")
        joined = join(problems, solutions)
        joined = replace(joined, record=joined.record.noting(*notes))
        directions = readers[0].directions
        weight: Array = split_groups(joined.weight, directions)
        for layer, emitted in zip(readers, emitter.emit(readers, solutions, form), strict=True):
            result.add(layer, joined, emitted, weight, directions)
