"""Tables of embeddings on their way to integer rows, with what the report says of them."""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit.embedding import emit
from magr_onnx.passes.layer_passes.embeddings import problem_of
from magr_onnx.passes.layers.embedding import EmbeddingTable, find
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.report.reasons import TableReason
from magr_onnx.workflow.converted import Converted


def select(model: ir.Model, plan: Plan, selection: Selection = ALL) -> tuple[list[EmbeddingTable], list[Skip]]:
    """Tables that will be converted, and all others with the reason."""
    tables, skips = find(model, selection)
    stage = plan.embeddings
    if stage is None:
        return [], [*skips, *map(_unasked, tables)]
    unfit = {t.name: skip for t in tables if (skip := stage.fits_table(t)) is not None}
    return [t for t in tables if t.name not in unfit], [*skips, *unfit.values()]


def convert(work: ir.Model, plan: Plan, selection: Selection = ALL) -> Converted:
    """Quantize the tables of ``work``, in place."""
    tables, skips = select(work, plan, selection)
    result, stage = Converted(skips=skips), plan.embeddings
    if stage is None:
        return result
    for readers in by_weight(tables):
        solution = stage.solve(problem_of(readers[0]))
        for table, emitted in zip(readers, emit(readers, solution, stage.form), strict=True):
            result.add(table, solution, emitted, solution.weight.T)
    return result


def _unasked(table: EmbeddingTable) -> Skip:
    size = table.weight.stored.nbytes
    return Skip(table.name, table.op, TableReason.UNASKED, f"{table.weight_name}: {size / 1e6:.2f} MB", size)
