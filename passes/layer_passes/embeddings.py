"""The pass that puts tables of embeddings on a grid: one searched for every block of a row, then rounding.

No calibration is needed: how often a token occurs weighs whole rows, and no row takes from another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.grid import search
from magr_onnx.core.histograms import sketch
from magr_onnx.core.layer import LayerProblem, LayerRecord, LayerSolution
from magr_onnx.core.types import Array, LayerStats, QuantizedWeight, ScaleType, WeightSpec
from magr_onnx.passes.base import ModelPass
from magr_onnx.passes.emit.embedding import emit
from magr_onnx.passes.layer_state import float_type
from magr_onnx.passes.layers.embedding import BITS, FORMS, EmbeddingTable, Form, block_of, find
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.report.reasons import Skip, TableReason

CHUNK = 1 << 22  # values treated at a time


@dataclass(frozen=True)
class Embeddings(ModelPass):
    """Tables of embeddings on an integer grid: rows rounded to grids searched for the least squared error.

    Attributes:
        form: ``gather-block-quantized`` or ``dequantize``; see `magr_onnx.passes.layers.embedding`.
        bits: 4 or 8; dequantize has 8.
    """

    name: ClassVar[str] = "embeddings"
    summary: ClassVar[str] = "write tables of embeddings with quantized rows"
    slot: ClassVar[str] = "embeddings"

    form: Form = "gather-block-quantized"
    bits: int = 8

    def problems(self, spec: WeightSpec | None) -> list[str]:
        del spec
        problems = []
        if self.form not in FORMS:
            problems.append(f"embeddings={self.form!r} is not known; choose one of {', '.join(FORMS)}, or none")
        if self.bits not in BITS:
            problems.append(f"embeddings: bits={self.bits} is not supported; choose 4 or 8")
        elif self.form == "dequantize" and self.bits != 8:
            problems.append("embeddings: dequantize has 8 bits; take gather-block-quantized for 4")
        return problems

    def spec(self, width: int, scale_type: ScaleType) -> WeightSpec:
        """The grid of a table of so many columns with scales of a type; a row of it is a column to the solvers."""
        block = block_of(self.bits, width) if self.form == "gather-block-quantized" else None
        return WeightSpec(self.bits, block, self.form == "dequantize", scale_type)

    def fits_table(self, table: EmbeddingTable) -> Skip | None:
        """Why this form cannot hold a table."""
        odd = self.bits == 4 and table.weight.shape[1] % 2
        return Skip(table.name, table.op, TableReason.WIDTH, f"{table.weight.shape[1]} columns") if odd else None

    def change(self, model: ir.Model) -> bool:
        tables = [t for t in find(model)[0] if self.fits_table(t) is None]
        for readers in by_weight(tables):
            emit(readers, self.solve(problem_of(readers[0])), self.form)
        return bool(tables)

    @property
    def shares_codes(self) -> bool:
        """Whether tables have the codes of block-wise linear layers."""
        return self.form == "gather-block-quantized"

    def solve(self, problem: LayerProblem, codes: QuantizedWeight | None = None) -> LayerSolution:
        """Round a table on searched grids, or take the ``codes (width, rows)`` that a linear layer has for it."""
        table = problem.weight.T
        quantized = quantize(table, self.spec(table.shape[1], problem.float_type)) if codes is None else codes
        weight, floats = quantized.dequantize(), table.astype(np.float32)
        difference, norm = float(np.linalg.norm(weight.T - floats)), float(np.linalg.norm(floats))
        record = LayerRecord(error=difference / norm if norm else 0.0, weights=sketch(problem.weight, None, quantized))
        return LayerSolution(weight, None, problem.weight, (), quantized, None, True, record)


def problem_of(table: EmbeddingTable) -> LayerProblem:
    """Read a table as a data-free problem: its rows are the columns of the weight ``(width, rows)``, in the table's own type."""
    weight = table.array().T
    return LayerProblem(weight, None, LayerStats.data_free(len(weight)), float_type(table.dtype))


def quantize(table: Array, spec: WeightSpec) -> QuantizedWeight:
    """Nearest codes of every row of ``table (rows, width)`` on searched grids, as a weight ``(width, rows)``."""
    rows, width = table.shape
    step = max(1, CHUNK // width)
    parts = []
    for at in range(0, rows, step):
        part = np.ascontiguousarray(table[at : at + step].T.astype(np.float32))
        grid = search(part, spec, np.ones(width))
        parts.append(grid.weight(grid.codes(part)))
    return QuantizedWeight.side_by_side(parts)
