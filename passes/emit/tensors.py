"""Emit rounded activations: QuantizeLinear and DequantizeLinear behind a value, one pair for all that read it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.graph.constants import replace_input
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.tensors.region import Region


def emit(graph: ir.Graph, region: Region, grids: Mapping[str, ActivationGrid]) -> None:
    """Round the values of a region of the main graph to grids, which are given by value name.

    Values keep their names, except for outputs of the graph: there the rounded one takes the name. What comes from outside the region is
    read rounded by the nodes of the region only.
    """
    for value in [value for shared in region.grids for value in shared.values]:
        _round(graph, value, grids[str(value.name)], region)


def _round(graph: ir.Graph, value: ir.Value, grid: ActivationGrid, region: Region) -> None:
    base, inside = str(value.name), value in region.results
    uses = [use for use in value.uses() if inside or use.node in region.nodes]
    dtype = ir.DataType.INT8 if grid.signed else ir.DataType.UINT8
    scale = add_initializer(graph, f"{base}_scale", np.float32(grid.scale))
    zero = add_initializer(graph, f"{base}_zero_point", np.array(grid.zero_point, dtype.numpy()))
    codes = ir.val(f"{base}_codes", dtype, value.shape)
    rounded = ir.val(f"{base}_rounded", ir.DataType.FLOAT, value.shape)
    nodes = [
        ir.node("QuantizeLinear", [value, scale, zero], outputs=[codes], name=f"{base}_quantize"),
        ir.node("DequantizeLinear", [codes, scale, zero], outputs=[rounded], name=f"{base}_dequantize"),
    ]
    Names.of(graph).adopt(nodes)
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(maker, nodes)
    for use in uses:
        replace_input(use.node, use.idx, rounded)
    if inside and value.is_graph_output():
        index = list(graph.outputs).index(value)
        value.name, rounded.name = Names.of(graph).value(f"{base}_float"), base
        graph.outputs[index] = rounded
