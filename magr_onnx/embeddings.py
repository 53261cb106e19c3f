"""Tables of embeddings on their way to integer rows: a grid searched for every block, then rounding.

No calibration is needed: how often a token occurs weighs whole rows, and no row takes from another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.convolutions import Converted
from magr_onnx.grid import search
from magr_onnx.passes import LayerPass, Skip
from magr_onnx.passes.gather import Embeddings, Table, TableReason, emit, find
from magr_onnx.passes.readback import digest
from magr_onnx.report import LayerRow
from magr_onnx.sketch import sketch
from magr_onnx.types import Array, QuantizedWeight, WeightSpec

CHUNK = 1 << 22  # values treated at a time


def look(
    model: ir.Model, passes: Sequence[LayerPass], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[Table], list[Skip]]:
    """Tables that will be converted, and all others with the reason."""
    tables, skips = find(model, include, exclude)
    demand = _wanted(passes)
    if demand is None:
        return [], [*skips, *(Skip(t.name, t.op, TableReason.UNASKED) for t in tables)]
    unfit = {t.name: skip for t in tables if (skip := demand.fits_table(t)) is not None}
    return [t for t in tables if t.name not in unfit], [*skips, *unfit.values()]


def convert(work: ir.Model, passes: Sequence[LayerPass], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Converted:
    """Quantize the tables of ``work``, in place."""
    tables, skips = look(work, passes, include, exclude)
    result = Converted(skips=skips)
    demand = _wanted(passes)
    for unit in _units(tables) if demand is not None else ():
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
                )
            )
    return result


def quantize(table: Array, spec: WeightSpec) -> QuantizedWeight:
    """Nearest codes of every row of ``table (rows, width)`` on searched grids, as a weight ``(width, rows)``."""
    rows, width = table.shape
    step = max(1, CHUNK // width)
    parts = []
    for at in range(0, rows, step):
        part = np.ascontiguousarray(table[at : at + step].T.astype(np.float32))
        grid = search(part, spec, np.ones(width))
        parts.append(grid.weight(grid.codes(part)))
    codes, zeros = np.concatenate([p.codes for p in parts], axis=1), np.concatenate([p.zero_points for p in parts], axis=1)
    return QuantizedWeight(codes, np.concatenate([p.scales for p in parts], axis=1), zeros, spec)


def _wanted(passes: Sequence[LayerPass]) -> Embeddings | None:
    return next((p for p in passes if isinstance(p, Embeddings)), None)


def _units(tables: Iterable[Table]) -> list[list[Table]]:
    """Gathers of one table together."""
    found: dict[Hashable, list[Table]] = {}
    for table in tables:
        found.setdefault((id(table.held.stored), table.held.way), []).append(table)
    return list(found.values())
