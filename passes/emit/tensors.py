"""Emit rounded activations: QuantizeLinear and DequantizeLinear behind a value, one pair for all that read it.

An Identity marks the place first, in the float model too, so that what is behind it has the same name in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.activation_ranges import FINITE
from magr_onnx.core.grid_type import GridType
from magr_onnx.core.int32_bias import bias_codes
from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.graph.constants import clip_bounds, constant_array, fixed_array, replace_input
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.nodes import insert_behind, only_use, operand
from magr_onnx.passes.tensors.region import SOFTMAX, Region, SharedGrid
from magr_onnx.passes.tensors.rules import Rules
from magr_onnx.passes.tensors.widths import Conversion

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose constants are weights, which other emitters write."""
NORMALIZATIONS = ("InstanceNormalization", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def mark(graph: ir.Graph, region: Region) -> dict[str, SharedGrid]:
    """Put an Identity behind every value of a region of the main graph; return the grids by the name of its output.

    Values keep their names, except for outputs of the graph: there what is behind takes the name. What comes from outside the region is
    marked for the nodes of the region only.
    """
    nodes, results = {unit.node for unit in region.units}, {value for unit in region.units for value in unit.makes}
    marks = {}
    for shared in region.grids:
        for value in shared.values:
            inside = value in results
            uses = [(use.node, use.idx) for use in value.uses() if inside or use.node in nodes]
            rounded = mark_value(graph, value, uses, "rounded")
            if inside and value.is_graph_output():
                index, base = list(graph.outputs).index(value), str(value.name)
                value.name, rounded.name = Names.of(graph).value(f"{base}_float"), base
                graph.outputs[index] = rounded
            marks[str(rounded.name)] = shared
    return marks


def mark_conversions(graph: ir.Graph, conversions: Sequence[Conversion]) -> dict[str, Conversion]:
    """Put an Identity before operands that get a value on a grid of their own; return the conversions by the name of its output."""
    marks = {}
    for conversion in conversions:
        value = operand(*conversion.readers[0])
        assert value is not None
        marks[str(mark_value(graph, value, conversion.readers, f"in_{conversion.bits}_bits").name)] = conversion
    return marks


def mark_value(graph: ir.Graph, value: ir.Value, uses: Sequence[tuple[ir.Node, int]], suffix: str) -> ir.Value:
    """Put an Identity behind a value of a graph, for some of its ``uses``, nodes and numbers of inputs; return what it puts out."""
    names, base = Names.of(graph), str(value.name)
    rounded = ir.val(names.value(f"{base}_{suffix}"), value.dtype or ir.DataType.FLOAT, value.shape)
    insert_behind(graph, value, ir.node("Identity", [value], outputs=[rounded], name=names.node(f"{base}_{suffix}_mark")))
    for reader, index in uses:
        replace_input(reader, index, rounded)
    return rounded


def emit(graph: ir.Graph, grids: Mapping[str, ActivationGrid]) -> None:
    """Round values of the main graph that were marked to grids, which are given by the name of what is behind the mark.

    A Relu or Clip before a grid that ends where it cuts off is removed: rounding does the same.
    """
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
    activation = value.producer()
    if activation is not None and only_use(value)[0] is nodes[0] and _cuts_off_as(activation, grid):
        source = operand(activation, 0)
        assert source is not None
        nodes[0].replace_input_with(0, source)
        graph.remove(activation, safe=True)


def _cuts_off_as(node: ir.Node, grid: ActivationGrid) -> bool:
    """Whether a node is a Relu or Clip that cuts off nothing but what is beyond a grid."""
    if node.domain != "" or node.op_type not in ("Relu", "Clip"):
        return False
    low, high = (0.0, math.inf) if node.op_type == "Relu" else clip_bounds(node)
    least, most = grid.range
    return low == least and bool(np.float32(most) <= np.float32(high))


def emit_constants(graph: ir.Graph, rules: Rules, kind: GridType) -> None:
    """Write constant operands of operators whose other operands are rounded as codes of as many bits, each on a grid of its own."""
    for node in list(graph):
        if not rules.computes(node) or node.op_type in WEIGHTED:
            continue
        rounded = [value.producer() for value in node.inputs if value is not None and is_rounded(value)]
        if rounded:
            of_node, least = replace(kind, bits=_bits(rounded[0])), -_span_of_scores(node)
            for index, value in enumerate(node.inputs[: 1 if node.op_type == "Resize" else None]):  # the others are no values
                array = fixed_array(value)
                if array is not None and array.dtype == np.float32 and array.size and not np.isnan(array).any():
                    round_constant(graph, node, index, np.maximum(array, least), of_node)


def _span_of_scores(node: ir.Node) -> float:
    """Return the range of the grid of the scores that a node adds to: what is lowered by so much is masked. Infinite for other nodes."""
    quantize, _ = only_use(node.outputs[0])
    real = None if quantize is None or quantize.op_type != "QuantizeLinear" else only_use(quantize.outputs[0])[0]
    if node.op_type != "Add" or quantize is None or real is None:
        return math.inf
    scale, zero = constant_array(operand(quantize, 1)), constant_array(operand(quantize, 2))
    if scale is None or zero is None or not any(use.node.op_type in SOFTMAX for use in real.outputs[0].uses()):
        return math.inf
    return float(scale.item()) * float(2 ** (8 * zero.dtype.itemsize) - 1)


def _bits(dequantize: ir.Node | None) -> int:
    """Return the bits of the codes that a DequantizeLinear with a zero point reads."""
    zero = None if dequantize is None else constant_array(operand(dequantize, 2))
    return 8 if zero is None else 8 * zero.dtype.itemsize


def is_rounded(value: ir.Value) -> bool:
    """Whether a value comes from a DequantizeLinear."""
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def round_constant(graph: ir.Graph, node: ir.Node, index: int, array: npt.NDArray[Any], kind: GridType) -> None:
    """Write the constant ``array`` that a node reads as codes on a grid of its own and a DequantizeLinear."""
    base = str(node.inputs[index].name)  # type: ignore[union-attr]
    array = np.clip(array, *FINITE)  # masks of minus infinity
    if node.op_type in NORMALIZATIONS and index == 2:  # a bias, in units of the scales of input and factor
        scale = np.asarray(_scale(node, 0) * _scale(node, 1), np.float32)
        codes, zero = np.clip(bias_codes(array, scale), -(2**31), 2**31 - 1).astype(np.int32), None
    else:
        small = replace(kind, bits=8) if node.op_type in NORMALIZATIONS else kind  # factors are weights
        grid = small.of_range(float(array.min()), float(array.max()))
        scale, zero = np.asarray(grid.scale, np.float32), np.array(grid.zero_point, grid.dtype)
        codes = np.clip(np.rint(array / scale) + grid.zero_point, *grid.limits).astype(grid.dtype)
    inputs = [add_initializer(graph, f"{base}_codes", codes), add_initializer(graph, f"{base}_scale", scale)]
    if zero is not None:
        inputs.append(add_initializer(graph, f"{base}_zero_point", zero))
    real = ir.val(f"{base}_dequantized", ir.DataType.FLOAT, ir.Shape(array.shape))
    step = ir.node("DequantizeLinear", inputs, outputs=[real], name=f"{base}_dequantize")
    Names.of(graph).adopt([step])
    graph.insert_before(node, step)
    replace_input(node, index, real)


def _scale(node: ir.Node, index: int) -> float:
    """Read the scale of a rounded operand."""
    maker = node.inputs[index].producer()  # type: ignore[union-attr]
    array = None if maker is None else constant_array(operand(maker, 1))
    return 1.0 if array is None else float(array.item(0))
