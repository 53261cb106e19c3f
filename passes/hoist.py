"""Hoisting: values in the bodies of If, Loop and Scan as values of the main graph, in a copy of the model made to be tapped.

A value ``(..., K)`` leaves its body as float32 rows ``(n, K)``:

1. If: one more output of both branches; the branch without the value gives no rows, ``(0, K)``.
2. Loop and Scan: one more scan output, the rows of every iteration, flattened outside; onnxruntime stacks them, so every iteration must
   have as many rows as the first (`magr_onnx.runtime.bodies` finds out).
3. Bodies in bodies: the same again, outwards.

The hoisted rows take the value's name, so that taps of `magr_onnx.passes.taps` find them by it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.bodies import Place, bodies_of, values_of, walk

_HOISTED = "magr_onnx.hoisted"


def hoisted(model: ir.Model) -> set[str]:
    """Names of the values that were brought out of bodies: what is known of a batch's rows says nothing of theirs."""
    return {str(v.name) for node in model.graph for v in node.outputs if v.meta.get(_HOISTED)}


def inside(model: ir.Model) -> dict[str, tuple[ir.Value, Place]]:
    """The values of all bodies by name (`unique_names` first), each with the place of the graph that makes it."""
    found: dict[str, tuple[ir.Value, Place]] = {}
    for node, place in walk(model.graph):
        for attribute, body in bodies_of(node):
            found.update({str(v.name): (v, (*place, (node, attribute))) for v in values_of(body)})
    return found


def hoist(model: ir.Model, widths: Mapping[str, int]) -> ir.Model:
    """A copy of the model in which the values named in ``widths`` (with their K) are rows ``(n, K)`` of the main graph."""
    copy = model.clone()
    values = inside(copy)
    for name, width in widths.items():
        value, place = values[name]
        value.name = f"{name}__inside"
        body = place[-1][0].attributes[place[-1][1]].as_graph()
        rows = _rows(body, value, width, name)
        for depth in range(len(place) - 1, -1, -1):
            holder, attribute = place[depth]
            rows = _out(holder, attribute, rows, width, f"{name}__{depth}")
        rows.name = name
        rows.meta[_HOISTED] = True
    return copy


def _rows(graph: ir.Graph, value: ir.Value, width: int, name: str) -> ir.Value:
    """``value`` as float32 rows, made at the end of its graph."""
    shape = ir.node("Constant", [], {"value": ir.tensor(np.array([-1, width]))})
    real = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    rows = ir.node("Reshape", [real.outputs[0], shape.outputs[0]])
    for node, suffix in ((shape, "shape"), (real, "real"), (rows, "rows")):
        node.outputs[0].name = f"{name}__{suffix}"
    graph.extend([shape, real, rows])
    return _typed(rows.outputs[0], width)


def _typed(value: ir.Value, width: int) -> ir.Value:
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([None, width])
    return value


def _out(holder: ir.Node, attribute: str, rows: ir.Value, width: int, name: str) -> ir.Value:
    """Rows of a body in the graph around it."""
    for other, body in bodies_of(holder):
        body.outputs.append(rows if other == attribute else _none(body, width, f"{name}_none"))
    if holder.op_type == "Scan":
        _one_more(holder)
    holder.resize_outputs(len(holder.outputs) + 1)
    result = holder.outputs[-1]
    result.name = f"{name}_out"
    if holder.op_type == "If":
        return _typed(result, width)
    graph = holder.graph
    assert isinstance(graph, ir.Graph)
    return _rows(graph, result, width, name)


def _none(graph: ir.Graph, width: int, name: str) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(np.zeros((0, width), np.float32))})
    node.outputs[0].name = name
    graph.append(node)
    return _typed(node.outputs[0], width)


def _one_more(scan: ir.Node) -> None:
    """Axis and direction of one more output, where a Scan gives those of each."""
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in scan.attributes:
            scan.attributes[name] = ir.AttrInt64s(name, [*scan.attributes[name].as_ints(), 0])
