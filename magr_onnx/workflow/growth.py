"""Layers that would make a file larger: their scales, biases, nodes and names take more bytes than codes save."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from magr_onnx.config import layer_options
from magr_onnx.model_io import files
from magr_onnx.passes import LinearLayer, Plan, Skip
from magr_onnx.passes.layers.linear import find
from magr_onnx.passes.layers.weighted import split_shared
from magr_onnx.report.reasons import Reason
from magr_onnx.workflow import tied_tables
from magr_onnx.workflow.request import OptimizeRequest
from magr_onnx.workflow.size_model import Writer, by_tensor

FEW_ROWS, FEW_WEIGHTS = 8, 4096
"""Inputs, and weights, of layers that a file may grow by: 2 to 12 bytes for each output, and up to about a kilobyte for nodes."""


def without_growing(
    base: ir.Model, layers: Sequence[LinearLayer], plan: Plan, tied: frozenset[str], request: OptimizeRequest
) -> tuple[list[LinearLayer], list[Skip]]:
    """Leave out layers that would make the file larger, except those that have options of their own, or where layers to include are named.

    Args:
        base: The model of the layers.
        layers: The layers.
        plan: How they would be converted.
        tied: Names of weights that tables and layers will share.
        request: The run.

    Returns:
        The layers to convert, and the reason for every other one.
    """
    if request.options is None or request.patterns.selection.include:
        return list(layers), []
    tables = tied_tables.tables_of(base, plan, request.patterns.selection, tied)
    layers, shared = split_shared(layers, others=[table.node for table in tables])
    # quantized sources are larger in float, budgets have a rule of their own, and backends want all of a graph
    if request.requantize or request.budget is not None or plan.rules is not None:
        return layers, shared
    asked = layer_options.assign(request.patterns.tables, layers, request.options or {}, plan, request.provider)
    growing = _growing(base, [layer for layer in layers if layer.name not in asked], plan, request.calibration is not None)
    return [layer for layer in layers if layer.name not in growing], [*shared, *growing.values()]


def _growing(model: ir.Model, layers: Sequence[LinearLayer], plan: Plan, calibrated: bool) -> dict[str, Skip]:
    """Find layers that take no fewer bytes converted than in float; of those that share a tensor all, or none."""
    tiny = [group for group in by_tensor(layers) if _may_grow(group)]
    if not tiny:
        return {}
    copy = model.clone()
    copies = {layer.name: layer for layer in find(copy)[0]}
    writer, before, found = Writer(copies.values(), None, calibrated=calibrated), files.model_bytes(copy), dict[str, Skip]()
    for group in tiny:
        for layer in group:
            writer.write(copies[layer.name], plan)
        after = files.model_bytes(copy)
        if after >= before:
            detail = f"{after - before:,} bytes more; --include '*' converts this layer all the same"
            found |= {layer.name: Skip(layer.name, layer.op, Reason.GROWS, detail) for layer in group}
        before = after
    return found


def _may_grow(layers: Sequence[LinearLayer]) -> bool:
    """Whether scales and nodes can take more than codes save: of few weights, of few to a scale, or of a tensor with many views."""
    layer = layers[0]
    return layer.k <= FEW_ROWS or layer.weight.stored.nbytes <= len(layers) * 4 * FEW_WEIGHTS
