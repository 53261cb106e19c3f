"""Gram matrices of the inputs and states of recurrent operators, computed in the graph.

What multiplies ``R`` in a direction is the state before every step: the initial one, then all states but the last. A missing initial
state counts as one row of zeros, so that there always is a row. States of a GRU are taken as they are, before its gate scales them. Rows
after the end of a shorter sequence (``sequence_lens``) count as well; their states are zero.

In a subgraph of an If, Loop or Scan the sums are reduced to the main graph (`magr_onnx.passes.instrument.hoist.carry_out`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.nodes import operand, result_of
from magr_onnx.passes.graph.subgraphs import SubgraphPath, graph_of, walk
from magr_onnx.passes.instrument.hoist import carry_out
from magr_onnx.passes.instrument.taps import Extension
from magr_onnx.passes.layers.recurrent import GATES, RecurrentLayer

OPSET = 10  # Slice with inputs
END = np.iinfo(np.int64).max


def state_taps(model: ir.Model, layers: Sequence[RecurrentLayer]) -> ir.Model:
    """Copy the model with outputs ``X^T X (K, K)``, ``sum(X) (K,)`` and the number of elements of ``X (n, K)``.

    ``X`` is the input of a layer, then the states of each of its directions, layer by layer.
    """
    copy = Extension(model, opset=OPSET)
    placed = {str(result_of(node).name): (node, path) for node, path in walk(copy.model.graph) if node.op_type in GATES}
    for i, layer in enumerate(layers):
        node, path = placed[str(layer.output.name)]
        rows = [_rows(copy, node.inputs[0], layer.width, f"__recurrent_{i}_x", graph_of(node))]
        rows += [_states(copy, node, layer, direction, f"__recurrent_{i}_{direction}") for direction in range(layer.directions)]
        for value, width in zip(rows, [layer.width, *[layer.hidden] * layer.directions], strict=True):
            _sums(copy, value, width, path, graph_of(node))
    return copy.finish()


def _rows(copy: Extension, value: ir.Value | None, width: int, name: str, graph: ir.Graph) -> ir.Value:
    """Reshape a value to float32 rows."""
    real = copy.add("Cast", [value], f"{name}_real", graph, to=ir.DataType.FLOAT)
    return copy.add("Reshape", [real, copy.constant(f"{name}_shape", np.array([-1, width]))], f"{name}_rows", graph)


def _states(copy: Extension, node: ir.Node, layer: RecurrentLayer, direction: int, name: str) -> ir.Value:
    """The states before every step of one direction, as rows."""
    graph, states, initial = graph_of(node), node.outputs[0], operand(node, 5)
    states.name = states.name or copy.names.value(f"{name}_all")
    backwards = node.attributes.get_string("direction", "forward") == "reverse" or direction == 1
    first, last = (1, END) if backwards else (0, -1)
    bounds = [copy.constant(f"{name}_{part}", np.array(v)) for part, v in (("from", [first, direction]), ("to", [last, direction + 1]))]
    former = copy.add("Slice", [states, *bounds], f"{name}_former", graph)
    if initial is None:
        start = copy.constant(f"{name}_zero", np.zeros((1, layer.hidden), np.float32))
    else:
        bounds = [copy.constant(f"{name}_start_{part}", np.array([v])) for part, v in (("from", direction), ("to", direction + 1))]
        start = _rows(copy, copy.add("Slice", [initial, *bounds], f"{name}_start", graph), layer.hidden, f"{name}_start", graph)
    return copy.add("Concat", [start, _rows(copy, former, layer.hidden, name, graph)], f"{name}_before", graph, axis=0)


def _sums(copy: Extension, rows: ir.Value, width: int, path: SubgraphPath, graph: ir.Graph) -> None:
    """Put out the sums of rows, over all iterations if they are in a subgraph."""
    name = str(rows.name)
    turned = copy.add("Transpose", [rows], f"{name}_turned", graph, perm=[1, 0])
    size = copy.add("Cast", [copy.add("Size", [rows], f"{name}_size", graph)], f"{name}_count", graph, to=ir.DataType.FLOAT)
    sums = {
        (width, width): copy.add("MatMul", [turned, rows], f"{name}_gram", graph),
        (width,): copy.along("ReduceSum", rows, [0], f"{name}_sum", graph, keepdims=0),
        (): size,
    }
    for shape, value in sums.items():
        result = value
        if path:
            start = copy.constant(f"{value.name}_zero", np.zeros(shape, np.float32))
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
            result = carry_out(value, path, start, "Add", f"{value.name}_of_all")
        copy.output(result, shape=shape)
