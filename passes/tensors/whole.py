"""The whole main graph between roundings: every operator of a runtime's table reads and puts out values on grids.

Unlike in `magr_onnx.passes.tensors.region`, an operator needs no neighbours in integers: accelerators take each with the DequantizeLinear
before it and the QuantizeLinear behind it. What they do not take stays float.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from magr_onnx.passes.graph.constants import constant_view
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.tensors.region import Region, Unit
from magr_onnx.passes.tensors.rules import Rules, operators

_ARITHMETIC = operators(
    "Abs Add Cast Ceil Clip Concat CumSum Div Exp Expand Floor Identity Log MatMul Max Min Mul Neg Pow Range Reciprocal Reshape Round "
    "ScatterElements ScatterND Slice Split Sqrt Squeeze Sub Tile Transpose Trilu Unsqueeze Where"
)


def whole_graph(
    graph: ir.Graph,
    layers: Sequence[ConvLayer | LinearLayer],
    rules: Rules,
    dtypes: Mapping[str, ir.DataType],
    left_out: Collection[ir.Node] = (),
) -> Region:
    """Find everything in a main graph that a runtime computes between roundings.

    Args:
        graph: The main graph.
        layers: Its convolutions and linear layers that will have integer weights.
        rules: What the runtime takes.
        dtypes: Types of values, by name.
        left_out: Nodes that stay float.
    """
    last = {layer.node: layer.last for layer in layers}
    covered = {*left_out, *(node for node in last.values() if node not in last)}  # a bias belongs to its layer
    units: list[Unit] = []

    def real(values: Sequence[ir.Value | None]) -> tuple[ir.Value, ...]:
        floats = (value for value in values if value is not None and dtypes.get(str(value.name), value.dtype) == ir.DataType.FLOAT)
        return tuple(value for value in floats if constant_view(value) is None)

    for node in graph:
        is_layer, moves = node in last, rules.moves(node)
        if node in covered or not (is_layer or moves or rules.computes(node)):
            continue
        reads, makes = real(node.inputs[:1] if is_layer or moves else node.inputs), real(last.get(node, node).outputs)
        if not reads or not makes:
            continue
        moves &= not is_layer
        unit = Unit(node, reads, makes, True) if moves else Unit.computing(node, reads, makes, rules)
        covered |= {maker for value in unit.makes if (maker := value.producer()) is not None}  # an activation that a grid replaces
        units.append(unit)
    return Region.of(_without_positions(graph, units, last, dtypes))


def _without_positions(
    graph: ir.Graph, units: Sequence[Unit], layers: Collection[ir.Node], dtypes: Mapping[str, ir.DataType]
) -> list[Unit]:
    """Leave out the arithmetic of positions and masks whose results nothing reads as integers: rounded, it would choose other rows of a
    table or other angles of a rotation, or have grids that span numbers such as -1e38."""
    counted = _of_integers(graph, dtypes)
    left = {unit.node: unit for unit in units}
    for unit in reversed(units):
        read = [use.node for value in unit.makes for use in value.uses()]
        ends = any(value.is_graph_output() for value in unit.makes)
        if unit.node not in layers and counted.issuperset(unit.makes) and read and not ends and left.keys().isdisjoint(read):
            del left[unit.node]
    return list(left.values())


def _of_integers(graph: ir.Graph, dtypes: Mapping[str, ir.DataType]) -> set[ir.Value]:
    """Return the values that are computed from integers and constants alone, by arithmetic and moves."""
    found: set[ir.Value] = set()

    def is_one(value: ir.Value) -> bool:
        dtype = dtypes.get(str(value.name), value.dtype)
        is_constant = value.const_value is not None or constant_view(value) is not None
        return value in found or is_constant or (dtype is not None and not dtype.is_floating_point())

    for node in graph:
        if node.domain == "" and node.op_type in _ARITHMETIC and all(is_one(value) for value in node.inputs if value is not None):
            found.update(node.outputs)
    return found
