"""Hoisting: values in the bodies of If, Loop and Scan as values of the main graph, in a copy of the model made to be tapped.

A value ``(..., K)`` leaves its body as float32 rows ``(n, K)``:

1. If: one more output of both branches; the branch without the value gives no rows, ``(0, K)``.
2. Loop and Scan: one more scan output, the rows of every iteration, flattened outside. onnxruntime stacks them, so every iteration must
   have as many rows as the first. Where that is not so, a Loop (not a Scan) can carry the rows along and append to them, which copies
   them at every turn (``growing``).
3. Bodies in bodies: the same again, outwards.

The hoisted rows take the value's name, so that taps of `magr_onnx.passes.instrument.taps` find them by it.

What is summed inside a body (`carry_out`) has one shape at every turn, so that a Loop or Scan can always carry it along as a state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.subgraphs import SubgraphPath, bodies_of, captured_key, graph_of, values_of, walk

_HOISTED = "magr_onnx.hoisted"


def hoisted(model: ir.Model) -> set[str]:
    """Return the names of hoisted values: their rows do not correspond to the rows of a batch."""
    return {str(v.name) for node in model.graph for v in node.outputs if v.meta.get(_HOISTED)}


def subgraph_values(model: ir.Model) -> dict[str, tuple[ir.Value, SubgraphPath]]:
    """Map the values of subgraphs by name (after `unique_names`), and captured ones by `captured_key`, each with the subgraph's path."""
    values: dict[str, tuple[ir.Value, SubgraphPath]] = {}
    for node, path in walk(model.graph):
        for attribute, body in bodies_of(node):
            inner_path = (*path, (node, attribute))
            values.update({str(v.name): (v, inner_path) for v in values_of(body)})
            captured = {v for n in body for v in n.inputs if v is not None and v.graph is not body}
            values.update({captured_key(v, inner_path): (v, inner_path) for v in captured})
    return values


def hoist(model: ir.Model, widths: Mapping[str, int], growing: Collection[str] = ()) -> ir.Model:
    """Copy the model so that the values named in ``widths`` (with their K) are rows ``(n, K)`` of the main graph.

    Values in ``growing`` may have a different number of rows in every iteration of a Loop.
    """
    copy = model.clone()
    values, names = subgraph_values(copy), Names.of(copy.graph)
    for name, width in widths.items():
        value, path = values[name]
        body = path[-1][0].attributes[path[-1][1]].as_graph()
        if value.graph is body:
            value.name = names.value(f"{name}__inside")
        rows = _rows(names, body, value, width, name)
        for depth in range(len(path) - 1, -1, -1):
            holder, attribute = path[depth]
            if holder.op_type == "Loop" and name in growing:
                rows = _carried(names, holder, attribute, rows, width, f"{name}__{depth}")
            else:
                rows = _out(names, holder, attribute, rows, width, f"{name}__{depth}")
        rows.name = name
        rows.meta[_HOISTED] = True
    return copy


def carry_out(value: ir.Value, path: SubgraphPath, start: ir.Value, op: str, name: str) -> ir.Value:
    """Reduce a value of a subgraph over all iterations to a value of the main graph; the model is changed in place.

    Args:
        value: A value of the subgraph, of the same type and shape in every iteration.
        path: Path of the subgraph.
        start: A constant of the main graph of that type and shape: the result where the subgraph does not run.
        op: The reduction: Add, or another operator with ``start`` as its neutral element.
        name: Name of the result, and prefix of the names in between.
    """
    names = Names.of(graph_of(path[0][0]))
    for depth in range(len(path) - 1, -1, -1):
        holder, attribute = path[depth]
        if holder.op_type != "If":
            value = _state(names, holder, attribute, value, start, op, {}, f"{name}__{depth}")
            continue
        for name_of_body, body in bodies_of(holder):
            body.outputs.append(value if name_of_body == attribute else _same(body, start, names.value(f"{name}__{depth}_none")))
        holder.resize_outputs(len(holder.outputs) + 1)
        value = _like(holder.outputs[-1], start, names.value(f"{name}__{depth}_out"))
    value.name = names.value(name)
    return value


def _same(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Add an Identity of an outer value to a subgraph."""
    return _like(_append(graph, "Identity", [value], name), value, name)


def _append(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
    graph.append(ir.node(op, inputs, attributes, outputs=[value := ir.val(name)]))
    return value


def _like(value: ir.Value, template: ir.Value, name: str) -> ir.Value:
    value.name, value.type, value.shape = name, template.type, template.shape
    return value


def _rows(names: Names, graph: ir.Graph, value: ir.Value, width: int, name: str) -> ir.Value:
    """Append nodes that reshape ``value`` to float32 rows."""
    shape = _append(graph, "Constant", [], names.value(f"{name}__shape"), value=ir.tensor(np.array([-1, width])))
    real = _append(graph, "Cast", [value], names.value(f"{name}__real"), to=ir.DataType.FLOAT)
    return _typed(_append(graph, "Reshape", [real, shape], names.value(f"{name}__rows")), width)


def _typed(value: ir.Value, width: int) -> ir.Value:
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([None, width])
    return value


def _out(names: Names, holder: ir.Node, attribute: str, rows: ir.Value, width: int, name: str) -> ir.Value:
    """Return rows of a subgraph as a value of the outer graph."""
    for name_of_body, body in bodies_of(holder):
        body.outputs.append(rows if name_of_body == attribute else _none(body, width, names.value(f"{name}_none")))
    if holder.op_type == "Scan":
        _one_more(holder)
    holder.resize_outputs(len(holder.outputs) + 1)
    result = holder.outputs[-1]
    result.name = names.value(f"{name}_out")
    if holder.op_type == "If":
        return _typed(result, width)
    return _rows(names, graph_of(holder), result, width, name)


def _none(graph: ir.Graph, width: int, name: str) -> ir.Value:
    return _typed(_append(graph, "Constant", [], name, value=ir.tensor(np.zeros((0, width), np.float32))), width)


def _carried(names: Names, loop: ir.Node, attribute: str, rows: ir.Value, width: int, name: str) -> ir.Value:
    """Return rows of a Loop's body as a value of the outer graph, concatenated over iterations as a state."""
    none = ir.node("Constant", [], {"value": ir.tensor(np.zeros((0, width), np.float32))})
    none.outputs[0].name = names.value(f"{name}_none")
    graph_of(loop).insert_before(loop, none)
    return _state(names, loop, attribute, rows, _typed(none.outputs[0], width), "Concat", {"axis": 0}, name)


def _state(
    names: Names, holder: ir.Node, attribute: str, value: ir.Value, start: ir.Value, op: str, attributes: Mapping[str, int], name: str
) -> ir.Value:
    """Add a state to a Loop or Scan that starts at ``start`` and applies ``op`` with ``value`` every iteration; return its final value."""
    body, scan = holder.attributes[attribute].as_graph(), holder.op_type == "Scan"
    states = len(holder.inputs) - (holder.attributes["num_scan_inputs"].as_int() if scan else 2)
    extra = 0 if scan else 1  # a Loop's body outputs the condition first, and reads it and the iteration number; so does the node
    before = _like(ir.Value(), start, names.value(f"{name}_before"))
    after = ir.node(op, [before, value], attributes)
    body.append(after)
    body.inputs.insert(2 * extra + states, before)
    body.outputs.insert(extra + states, _like(after.outputs[0], start, names.value(f"{name}_after")))
    inputs = [*holder.inputs[: 2 * extra + states], start, *holder.inputs[2 * extra + states :]]
    holder.resize_inputs(len(inputs))
    for index, value_in in enumerate(inputs):
        holder.replace_input_with(index, value_in)
    holder.resize_outputs(len(holder.outputs) + 1)
    for i in range(len(holder.outputs) - 1, states, -1):  # states come before scan outputs, which move by one
        previous, moved = holder.outputs[i - 1], holder.outputs[i]
        moved.type, moved.shape = previous.type, previous.shape
        ir.convenience.replace_all_uses_with(previous, moved, replace_graph_outputs=True)
        name_of, previous.name = previous.name, names.value(f"{name}_moved")
        moved.name = name_of
    return _like(holder.outputs[states], start, names.value(f"{name}_out"))


def _one_more(scan: ir.Node) -> None:
    """Append the axis and direction of another output, where a Scan lists them."""
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in scan.attributes:
            scan.attributes[name] = ir.AttrInt64s(name, [*scan.attributes[name].as_ints(), 0])
