"""Tables of embeddings on their way to integer rows, with what the report says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.histograms import sketch
from magr_onnx.passes import Plan, Skip
from magr_onnx.passes.emit.embedding import emit
from magr_onnx.passes.emit.readback import digest
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.layer_passes.embeddings import quantize
from magr_onnx.passes.layers.embedding import Table, find
from magr_onnx.passes.layers.shared import by_weight
from magr_onnx.report.data import LayerRow
from magr_onnx.report.reasons import TableReason
from magr_onnx.workflow.convolutions import Converted


def look(model: ir.Model, plan: Plan, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[list[Table], list[Skip]]:
    """Tables that will be converted, and all others with the reason."""
    tables, skips = find(model, include, exclude)
    demand = plan.embeddings
    if demand is None:
        return [], [*skips, *map(_unasked, tables)]
    unfit = {t.name: skip for t in tables if (skip := demand.fits_table(t)) is not None}
    return [t for t in tables if t.name not in unfit], [*skips, *unfit.values()]


def convert(work: ir.Model, plan: Plan, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Converted:
    """Quantize the tables of ``work``, in place."""
    tables, skips = look(work, plan, include, exclude)
    result = Converted(skips=skips)
    demand = plan.embeddings
    for unit in by_weight(tables) if demand is not None else ():
        assert demand is not None
        names, spec, array = [t.weight_name for t in unit], demand.spec(unit[0].dtype), unit[0].array()
        weight = quantize(array, spec)
        whole = weight.dequantize().T
        difference = float(np.linalg.norm(whole - array.astype(np.float32)))
        power = float(np.linalg.norm(array.astype(np.float32)))
        emitted = emit(unit, weight, demand.form)
        written = digest(whole)
        for table, name, node in zip(unit, names, emitted, strict=True):
            rows, width = array.shape
            error = difference / power if power else 0.0
            result.digests[str(table.output.name)] = written
            result.rows.append(
                LayerRow(
                    table.name,
                    table.op,
                    name,
                    rows,
                    width,
                    demand.bits,
                    spec.rows(width),
                    0,
                    error,
                    None,
                    None,
                    False,
                    node,
                    weights=sketch(array.T, None, weight),
                    output=table.output.name,
                    scope=scope_of(table.node),
                )
            )
    return result


def _unasked(table: Table) -> Skip:
    size = table.held.stored.nbytes
    return Skip(table.name, table.op, TableReason.UNASKED, f"{table.weight_name}: {size / 1e6:.2f} MB", size)
