"""Tables of embeddings: finding Gathers of constant rows, and writing them with quantized ones.

1. ``gather-block-quantized``: com.microsoft GatherBlockQuantized, 4 or 8 bits, a scale and a zero point every 32 values of a row; one node.
2. ``dequantize``: ``Mul(Cast(Gather(codes, i)), Gather(scales, i))``, int8, one scale a row: standard operators of any opset. Only the rows
   that are read become floats. (``Gather(DequantizeLinear(table))`` would dequantize the whole table in every run, and a blocked
   DequantizeLinear of gathered rows was four times slower and needs opset 21.)
3. Gathers of one table share its codes; what else reads the table keeps its floats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.packing import pack_bits, pack_qdq, unpack_bits
from magr_onnx.core.types import Array, QuantizedWeight
from magr_onnx.passes.emit.matmulnbits import DOMAIN
from magr_onnx.passes.graph.constants import CASTS, Held, drop_if_unused, held
from magr_onnx.passes.graph.subgraphs import Place, opaque, walk
from magr_onnx.passes.integer.operands import NoView, attribute_of, constant, operand
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer, Reason, Skip, layer_name, left_out
from magr_onnx.passes.layers.unconverted import LEAST

Form = Literal["gather-block-quantized", "dequantize"]
FORMS: tuple[Form, ...] = ("gather-block-quantized", "dequantize")
BITS = (4, 8)
BLOCK = 32


class TableReason(StrEnum):
    """Why a table is left as it is, beside the reasons it shares with linear layers."""

    UNASKED = "tables of embeddings stay float (option embeddings quantizes them)"
    AXIS = "rows are not gathered along axis 0"
    WIDTH = "an odd number of columns has no 4-bit form"


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

    def array(self) -> npt.NDArray[Any]:
        """The table ``(rows, width)`` in its own type."""
        return self.held.tensor().numpy()

    def read(self) -> Array:
        """The table ``(rows, width)`` float32."""
        return self.array().astype(np.float32)

    def read_bias(self) -> None:
        """Tables have none."""


def find(model: ir.Model, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[list[Table], list[Skip]]:
    """Every Gather of rows of a constant float matrix of at least `LEAST` values, in graph order, and those that are not such.

    Args:
        model: The model; nothing in it is changed.
        include: Shell patterns on the node's or the table's name; empty for all.
        exclude: Patterns of those to leave as they are; wins over ``include``.
    """
    tables: list[Table] = []
    skips: list[Skip] = []
    names: set[str] = set()
    for node, place in walk(model.graph):
        if node.domain != "" or node.op_type != "Gather":
            continue
        found = _view(node, place)
        if isinstance(found, Table) and (why := left_out(node, found.name, found.weight_name, include, exclude)) is not None:
            found = Skip(found.name, found.op, why)
        if isinstance(found, Skip):
            skips.append(found)
        elif found is not None:
            if found.name in names:  # ONNX asks for unique value names only
                found = replace(found, name=f"{found.name}:{node.outputs[0].name}")
            names.add(found.name)
            tables.append(found)
    return tables, skips


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


def emit(tables: Sequence[Table], weight: QuantizedWeight, form: Form) -> list[str]:
    """Write one table, as ``(width, rows)`` codes, into all Gathers that read it; the names of the nodes that gather codes."""
    first = tables[0]
    kind = FLOATS[first.dtype]
    place = LinearLayer(first.name, first.node, first.held, first.held.stored, False, 1.0, None, None, 1.0, 1, 1, first.place)
    base, bits = first.weight_name, weight.spec.bits
    if form == "dequantize":
        packed = pack_qdq(weight)
        scales = packed.scales.astype(kind)[:, None]
        constants = [
            place.constant(f"_q{bits}", np.ascontiguousarray(packed.codes.T.astype(np.int8)), base=base),
            place.constant(f"_q{bits}_scales", scales, base=base),
        ]
    else:
        constants = [
            place.constant(f"_q{bits}", pack_bits(np.ascontiguousarray(weight.codes.T), bits), base=base),
            place.constant(f"_q{bits}_scales", np.ascontiguousarray(weight.scales.T).astype(kind), base=base),
            place.constant(f"_q{bits}_zero_points", pack_bits(np.ascontiguousarray(weight.zero_points.T), bits), base=base),
        ]
        place.root.opset_imports.setdefault(DOMAIN, 1)
    return [_replace(table, constants, bits, form) for table in tables]


def _replace(table: Table, constants: Sequence[ir.Value], bits: int, form: Form) -> str:
    node, name = table.node, f"{table.name}_q{bits}"
    source, index = node.inputs
    assert source is not None
    if form == "dequantize":
        codes = ir.node("Gather", [constants[0], index], {"axis": 0}, name=name)
        scales = ir.node("Gather", [constants[1], index], {"axis": 0}, name=f"{name}_scales")
        cast = ir.node("Cast", [codes.outputs[0]], {"to": table.dtype}, name=f"{name}_cast")
        nodes = [codes, scales, cast, ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}_scaled")]
        for inner in nodes[:-1]:
            inner.outputs[0].name = f"{table.output.name}_{str(inner.name).removeprefix(table.name)}"
    else:
        attributes = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        nodes = [ir.node("GatherBlockQuantized", [constants[0], index, *constants[1:]], attributes, domain=DOMAIN, version=1, name=name)]
    graph, result, value = node.graph, table.output, nodes[-1].outputs[0]
    assert isinstance(graph, ir.Graph)
    value.type, value.shape = result.type, result.shape
    nodes[-1].metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [result], [value])
    drop_if_unused(source)
    return name


def emitted_table(node: ir.Node, scaled: ir.Node | None) -> Array | None:
    """The dequantized table ``(rows, width)`` behind a node that gathers its codes, or None where it is no such node.

    ``scaled`` is the Mul behind the Cast of a plain Gather.
    """
    try:
        codes = constant(operand(node, 0))
        if codes is None:
            return None
        if node.op_type == "Gather":
            other = [v.producer() for v in scaled.inputs if v is not None] if scaled is not None else []
            scales = next((constant(n.inputs[0]) for n in other if n is not None and n.op_type == "Gather"), None)
            return None if codes.dtype != np.int8 or scales is None else codes.astype(np.float32) * scales.astype(np.float32)
        scales, zeros = constant(operand(node, 2)), constant(operand(node, 3))
    except NoView:
        return None
    bits, block = attribute_of(node, "bits", 4), attribute_of(node, "block_size", 128)
    if scales is None or codes.dtype != np.uint8 or codes.ndim != 2:
        return None
    width = codes.shape[1] * 8 // bits
    column = np.arange(width) // block
    levels = np.full(scales.shape, 2 ** (bits - 1), np.uint8) if zeros is None else unpack_bits(zeros, bits, scales.shape[1])
    difference = unpack_bits(codes, bits, width).astype(np.float32) - levels.astype(np.float32)[:, column]
    result: Array = difference * scales.astype(np.float32)[:, column]
    return result
