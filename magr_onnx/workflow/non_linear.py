"""What is converted before a model's linear layers, so that these see it quantized: tables of embeddings, and convolutions.

Everything here is written into one copy of the float model, which linear layers then start from.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from magr_onnx.config import plans
from magr_onnx.config.options import Options
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.layers import conv
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.embedding import Table
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.workflow import convolutions, embeddings, mixed_precision
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted


def with_convolutions(plan: Plan, model: ir.Model, options: Options | None) -> Plan:
    """The plan with a stage for convolutions, if the model has some that can be converted and nothing was said of them.

    ``given`` are the options the plan is made of; None where it was written by hand, and says all there is to say.
    """
    if options is None or "conv_bits" in options or not conv.find(model)[0]:
        return plan
    return replace(plan, convolutions=plans.convolutions(options))


def look(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[Table | ConvLayer], list[Skip]]:
    """What will be converted, and what will not and why."""
    tables, untouched = embeddings.look(model, plan, selection)
    layers, skips = convolutions.look(model, plan, selection)
    return [*tables, *layers], [*untouched, *skips]


def convert(
    model: ir.Model,
    work: ir.Model,
    plan: Plan,
    data: Batches | None,
    goal: mixed_precision.Goal | None,
    context: RunContext,
) -> Converted:
    """Convert ``work``, in place, by the statistics of ``model``, of which it is a copy.

    Batches that a budget of loss will be measured on have no part in it. A large model cannot be run as a whole, so that its
    convolutions are solved without data.
    """
    seen = None if context.memory.large else data if data is None or goal is None or goal.loss is None else Split.of(data).rest
    tables = embeddings.convert(work, plan, context.selection)
    if tables.rows:
        context.lap("embeddings")
    layers = convolutions.convert(model, work, plan, seen, context)
    if layers.rows:
        context.lap("convolutions")
    notes = []
    if context.mask is not None and any(row.rows for row in layers.rows):
        notes.append(f"mask {context.mask!r} marks no positions of convolutions: all of theirs count")
    if context.memory.large and data is not None and layers.rows:
        notes.append("convolutions are data-free: the model is too large to be run as a whole in the memory there is (max_memory)")
    return Converted([*tables.rows, *layers.rows], [*tables.skips, *layers.skips], tables.digests | layers.digests, notes)
