"""Embedding tables: Gathers of constant rows, and their quantized forms.

1. ``gather-block-quantized``: com.microsoft GatherBlockQuantized, 4 or 8 bits, a scale and a zero point for each block of a row; one node.
2. ``dequantize``: ``Mul(Cast(Gather(codes, i)), Gather(scales, i))``, int8, one scale a row: standard operators of any opset. Only the rows
   that are read become floats. (``Gather(DequantizeLinear(table))`` would dequantize the whole table in every run, and a blocked
   DequantizeLinear of gathered rows was four times slower and needs opset 21.)
3. Gathers of one table share its codes; other readers of the table keep the floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import CASTS, constant_view
from magr_onnx.passes.graph.nodes import attribute_of, layer_name, operand
from magr_onnx.passes.graph.subgraphs import SubgraphPath
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.unconverted import LEAST
from magr_onnx.passes.layers.weighted import WeightedNode, find_views, in_closed_body, refusal, skip_of
from magr_onnx.report.reasons import Skip, TableReason

Form = Literal["gather-block-quantized", "dequantize"]
FORMS: tuple[Form, ...] = ("gather-block-quantized", "dequantize")
BITS = (4, 8)
BLOCKS = {4: (32,), 8: (128, 64, 32)}
"""Values that share a scale, by bits. At 8 bits, blocks of 32 would add an eighth of the size."""


def block_of(bits: int, width: int) -> int:
    """Return the block of a table of ``width`` columns: the largest that divides it, or 32."""
    return next((block for block in BLOCKS[bits] if width % block == 0), BLOCKS[bits][-1])


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingTable(WeightedNode):
    """A safe view of one Gather of the rows of a constant table ``(rows, width)``."""

    @property
    def k(self) -> int:
        """Return the number of rows."""
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Return the width of a row."""
        return self.weight.shape[1]

    def array(self) -> npt.NDArray[Any]:
        """Read the table ``(rows, width)`` in its own type."""
        return self.weight.tensor().numpy()

    def read(self) -> Array:
        """Read the table ``(rows, width)`` float32."""
        return self.array().astype(np.float32)

    def read_bias(self) -> None:
        """Return None: tables have no bias."""


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[EmbeddingTable], list[Skip]]:
    """Find every Gather of rows of a constant float matrix of at least `LEAST` values, and skips for the others; see `find_views`."""
    return find_views(model, ("Gather",), _view, selection)


def _view(node: ir.Node, path: SubgraphPath) -> EmbeddingTable | Skip | None:
    table = constant_view(operand(node, 0))
    if table is None or math.prod(table.shape) < LEAST or table.dtype not in CASTS:
        return None
    if (refused := in_closed_body(node, path) or refusal(node, table, 2)) is not None:
        return refused
    if attribute_of(node, "axis", 0) not in (0, -2):
        return skip_of(node, TableReason.AXIS)
    return EmbeddingTable(layer_name(node), node, table, path=path)
