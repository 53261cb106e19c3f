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
from magr_onnx.passes.layers.embedding import EmbeddingTable
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.workflow import convolutions, embeddings, mixed_precision
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted


def with_convolutions(plan: Plan, model: ir.Model, options: Options | None) -> Plan:
    """Add a stage for convolutions to a plan, if the model has some that can be converted and the options do not mention them.

    ``options`` are those the plan is made of; None for a plan written by hand, which is taken as it is.
    """
    if options is None or "conv_bits" in options or not conv.find(model)[0]:
        return plan
    return replace(plan, convolutions=plans.convolutions(options))


def select(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[EmbeddingTable | ConvLayer], list[Skip]]:
    """Tables and convolutions that will be converted, and all others with the reason."""
    tables, table_skips = embeddings.select(model, plan, selection)
    layers, layer_skips = convolutions.select(model, plan, selection)
    return [*tables, *layers], [*table_skips, *layer_skips]


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
    fit = data if data is None or goal is None or goal.loss is None else Split.of(data).rest
    calibration = None if context.memory.large else fit
    tables = embeddings.convert(work, plan, context.selection)
    if tables.rows:
        context.lap("embeddings")
    layers = convolutions.convert(model, work, plan, calibration, context)
    if layers.rows:
        context.lap("convolutions")
    notes = []
    if context.mask is not None and any(row.rows for row in layers.rows):
        notes.append(f"mask {context.mask!r} marks no positions of convolutions: all of theirs count")
    if context.memory.large and data is not None and layers.rows:
        notes.append("convolutions are data-free: the model is too large to be run as a whole in the memory there is (max_memory)")
    return Converted([*tables.rows, *layers.rows], [*tables.skips, *layers.skips], tables.digests | layers.digests, notes)
