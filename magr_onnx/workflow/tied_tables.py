"""Tables of embeddings whose rows a linear layer, mostly the last, multiplies by: one tensor in the file, which both read.

1. The layer is solved for both (`magr_onnx.passes.layer_passes.shared_weights`), in the bits and blocks of the tables unless it has options
   of its own, and towards the weight of the model: error feedback would move it away from that, and the embeddings with it.
2. Its codes, scales and zero points become those of the table, where kernels for both can read them. Otherwise the table gets its own.
3. Under a budget the two are converted apart, since the budget is spent layer by layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.options import Options
from magr_onnx.core.packing import container_bits
from magr_onnx.core.types import QuantizedWeight
from magr_onnx.passes import Emitted, Plan
from magr_onnx.passes.emit import embedding as table_emitter
from magr_onnx.passes.layer_passes.embeddings import problem_of
from magr_onnx.passes.layers.embedding import EmbeddingTable, block_of
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.workflow import non_linear
from magr_onnx.workflow.converted import Converted


def tied_weights(model: ir.Model, plan: Plan, selection: Selection) -> frozenset[str]:
    """Return the names of weights that are both a table and a linear layer's, where the plan can write one tensor for both.

    All layers and tables with that name have to read one matrix: its rows, and products with them.
    """
    if plan.embeddings is None or not plan.embeddings.shares_codes or plan.emitter is None or not plan.emitter.shares_codes:
        return frozenset()
    layers, tables = find(model, selection)[0], non_linear.select_tables(model, plan, selection)[0]
    matrices = defaultdict[str, set[Hashable]](set)
    for table in tables:
        view, transposed = table.weight.before_transposes()
        matrices[table.weight_name].add((*view.key, not transposed, 1.0))
    for layer in layers:
        matrices[layer.weight_name].add(layer.weight_key)
    names = {layer.weight_name for layer in layers} & {table.weight_name for table in tables}
    return frozenset(name for name in names if len(matrices[name]) == 1)


def embedding(layers: Sequence[LinearLayer], plan: Plan, plans: Mapping[str, Plan], tied: Collection[str]) -> list[LinearLayer]:
    """Mark layers whose codes a table will have: what has a low-rank branch, or bits that no table has, is solved for itself."""
    return [
        replace(layer, embeds=True) if layer.weight_name in tied and _fits(layer, plans.get(layer.name, plan)) else layer
        for layer in layers
    ]


def _fits(layer: LinearLayer, plan: Plan) -> bool:
    """Return whether a table can have the codes that a plan makes of a layer."""
    spec = plan.spec
    return plan.low_rank is None and spec is not None and table_emitter.reads(container_bits(spec.bits), spec.rows(layer.k), layer.k)


def tables_of(model: ir.Model, plan: Plan, selection: Selection, tied: frozenset[str]) -> list[EmbeddingTable]:
    """Find the Gathers of tied weights."""
    return [t for t in non_linear.select_tables(model, plan, selection)[0] if t.weight_name in tied] if tied else []


def with_heads(
    tables: Sequence[LayerOptions], plan: Plan, tied: frozenset[str], layers: Sequence[LinearLayer], options: Options
) -> tuple[LayerOptions, ...]:
    """Add options of layers with tied weights, the bits and the block of the tables of embeddings, to the options of single layers.

    Later ones win: those of single layers, but a preset's for the last layer only where no bits of tables were asked for.
    """
    heads = _head_options(plan, tied, layers)
    if options.get("embedding_bits") is None:
        return (*heads, *tables)
    return (*(table for table in tables if table.optional), *heads, *(table for table in tables if not table.optional))


def _head_options(plan: Plan, tied: frozenset[str], layers: Sequence[LinearLayer]) -> tuple[LayerOptions, ...]:
    """Return the options of layers with tied weights: the bits and the block of the tables."""
    if plan.embeddings is None:
        return ()
    bits, widths = plan.embeddings.bits, {layer.weight_name: layer.k for layer in layers if layer.weight_name in tied}
    return tuple(LayerOptions((name,), {"bits": bits, "block_size": block_of(bits, width)}) for name, width in sorted(widths.items()))


def convert(tables: Sequence[EmbeddingTable], plan: Plan, nodes: Mapping[str, tuple[ir.Node, QuantizedWeight]]) -> Converted:
    """Write tables whose linear layers have been written.

    Args:
        tables: Gathers of tied weights, in the model with the layers.
        plan: What they are converted by.
        nodes: What multiplies by a tied weight, and its codes ``(width, rows)``, by the name of the weight.

    Returns:
        The tables, with notes on those that share.
    """
    result = Converted()
    for readers in by_weight(tables):
        first, stage = readers[0], plan.embeddings
        assert stage is not None
        codes, written = None, list[Emitted]()
        if first.weight_name in nodes:
            node, codes = nodes[first.weight_name]
            written = table_emitter.emit_shared(readers, node)
        solution = stage.solve(problem_of(first), codes if written else None)
        if written:
            solution = replace(solution, record=solution.record.noting(f"one tensor with {node.name}"))
        for table, emitted in zip(readers, written or table_emitter.emit(readers, solution, stage.form), strict=True):
            result.add(table, solution, emitted, solution.weight.T)
    return result
