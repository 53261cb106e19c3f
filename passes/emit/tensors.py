"""Emit rounded activations: QuantizeLinear and DequantizeLinear behind a value, one pair for all that read it.

An Identity marks the place first, in the float model too, so that what is behind it has the same name in both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.graph.constants import replace_input
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.tensors.region import Region


def mark(graph: ir.Graph, region: Region) -> dict[str, ir.Value]:
    """Put an Identity behind every value of a region of the main graph; return the values by the name of its output.

    Values keep their names, except for outputs of the graph: there what is behind takes the name. What comes from outside the region is
    marked for the nodes of the region only.
    """
    return {_mark(graph, value, region): value for shared in region.grids for value in shared.values}


def _mark(graph: ir.Graph, value: ir.Value, region: Region) -> str:
    names, base, inside = Names.of(graph), str(value.name), value in region.results
    uses = [use for use in value.uses() if inside or use.node in region.nodes]
    rounded = ir.val(names.value(f"{base}_rounded"), ir.DataType.FLOAT, value.shape)
    node = ir.node("Identity", [value], outputs=[rounded], name=names.node(f"{base}_round"))
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], [node])
    else:
        graph.insert_after(maker, [node])
    for use in uses:
        replace_input(use.node, use.idx, rounded)
    if inside and value.is_graph_output():
        index = list(graph.outputs).index(value)
        value.name, rounded.name = names.value(f"{base}_float"), base
        graph.outputs[index] = rounded
    return str(rounded.name)


def emit(graph: ir.Graph, grids: Mapping[str, ActivationGrid]) -> None:
    """Round values of the main graph that were marked to grids, which are given by the name of what is behind the mark."""
    for node in [node for node in graph if node.op_type == "Identity" and node.outputs[0].name in grids]:
        _round(graph, node, grids[str(node.outputs[0].name)])


def _round(graph: ir.Graph, mark: ir.Node, grid: ActivationGrid) -> None:
    value, rounded = mark.inputs[0], mark.outputs[0]
    assert value is not None
    base, dtype = str(value.name), ir.DataType.from_numpy(grid.dtype)
    scale = add_initializer(graph, f"{base}_scale", np.float32(grid.scale))
    zero = add_initializer(graph, f"{base}_zero_point", np.array(grid.zero_point, grid.dtype))
    codes, result = ir.val(f"{base}_codes", dtype, value.shape), ir.val(None, ir.DataType.FLOAT, value.shape)
    nodes = [
        ir.node("QuantizeLinear", [value, scale, zero], outputs=[codes], name=f"{base}_quantize"),
        ir.node("DequantizeLinear", [codes, scale, zero], outputs=[result], name=f"{base}_dequantize"),
    ]
    Names.of(graph).adopt(nodes, [mark], rounded)
    ir.convenience.replace_nodes_and_values(graph, mark, [mark], nodes, [rounded], [result])
