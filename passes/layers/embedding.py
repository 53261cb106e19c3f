"""Tables of embeddings: finding Gathers of constant rows, and writing them with quantized ones.

1. ``gather-block-quantized``: com.microsoft GatherBlockQuantized, 4 or 8 bits, a scale and a zero point every 32 values of a row; one node.
2. ``dequantize``: ``Mul(Cast(Gather(codes, i)), Gather(scales, i))``, int8, one scale a row: standard operators of any opset. Only the rows
   that are read become floats. (``Gather(DequantizeLinear(table))`` would dequantize the whole table in every run, and a blocked
   DequantizeLinear of gathered rows was four times slower and needs opset 21.)
3. Gathers of one table share its codes; what else reads the table keeps its floats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import CASTS, Held, held
from magr_onnx.passes.graph.nodes import attribute_of, operand
from magr_onnx.passes.graph.subgraphs import Place, opaque, root_of
from magr_onnx.passes.layers.linear import FLOATS, find_views, layer_name
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.unconverted import LEAST
from magr_onnx.report.reasons import Reason, Skip, TableReason

Form = Literal["gather-block-quantized", "dequantize"]
FORMS: tuple[Form, ...] = ("gather-block-quantized", "dequantize")
BITS = (4, 8)
BLOCK = 32


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A safe view of one Gather of constant rows.

    Attributes:
        name: Node name, or a name made from its output.
        node: The Gather.
        held: The constant table ``(rows, width)``.
        place: The nodes whose bodies the Gather is in; empty in the main graph.
    """

    name: str
    node: ir.Node
    held: Held
    place: Place = ()

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def root(self) -> ir.Graph:
        """The main graph."""
        return root_of(self.node, self.place)

    @property
    def weight_name(self) -> str:
        """The name of the constant that holds the table."""
        return self.held.name

    @property
    def dtype(self) -> ir.DataType:
        return self.held.dtype

    @property
    def weight_key(self) -> Hashable:
        """Equal for Gathers of the very same table."""
        return self.held.key

    @property
    def k(self) -> int:
        """Rows of the table."""
        return self.held.shape[0]

    @property
    def n(self) -> int:
        """Values of a row."""
        return self.held.shape[1]

    def array(self) -> npt.NDArray[Any]:
        """The table ``(rows, width)`` in its own type."""
        return self.held.tensor().numpy()

    def read(self) -> Array:
        """The table ``(rows, width)`` float32."""
        return self.array().astype(np.float32)

    def read_bias(self) -> None:
        """Tables have none."""


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[Table], list[Skip]]:
    """Every Gather of rows of a constant float matrix of at least `LEAST` values, in graph order, and those that are not such.

    Args:
        model: The model; nothing in it is changed.
        selection: Those to convert; others are left as they are.
    """
    return find_views(model, ("Gather",), _view, selection)


def _view(node: ir.Node, place: Place) -> Table | Skip | None:
    name, table = layer_name(node), held(operand(node, 0))
    if table is None or math.prod(table.shape) < LEAST or table.dtype not in CASTS:
        return None

    def skip(reason: StrEnum, detail: str = "") -> Skip:
        return Skip(name, node.op_type, reason, detail)

    if (closed := opaque(place)) is not None:
        return skip(Reason.SUBGRAPH, f"body of {closed}")
    if table.overridable:
        return skip(Reason.OVERRIDABLE)
    if table.exposed:
        return skip(Reason.GRAPH_OUTPUT)
    if table.dtype not in FLOATS:
        return skip(Reason.WEIGHT_DTYPE, str(table.dtype))
    if len(table.shape) != 2:
        return skip(Reason.WEIGHT_RANK, f"shape {list(table.shape)}")
    if attribute_of(node, "axis", 0) not in (0, -2):
        return skip(TableReason.AXIS)
    return Table(name, node, table, place)
