"""Weights that a Loop or Scan carries from turn to turn without a change, as the recurrent layers of TensorFlow do.

The body reads them from the graph around it instead, as it may: there they are constants, and so the weights of layers.
"""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.errors import listed
from magr_onnx.model_io.validate_proto import SCAN_OF_BATCHES
from magr_onnx.passes.canonical.rewriter import weight
from magr_onnx.passes.graph.nodes import operator_of
from magr_onnx.passes.graph.subgraphs import graph_of


def release(model: ir.Model) -> list[str]:
    """Let bodies read constant states from outside; return a note for the report if there were any."""
    batches = model.opset_imports.get("") == SCAN_OF_BATCHES  # where a body's state is a part of the one that a Scan starts from
    operators = ("Loop",) if batches else ("Loop", "Scan")
    names = [name for node in list(model.graph.all_nodes()) if operator_of(node) in operators for name in _release(node)]
    return [f"carried unchanged through a loop, now read from outside it: {listed(names)}"] if names else []


def _release(holder: ir.Node) -> list[str]:
    """Remove the constant states of one node; return their names."""
    body, scan = holder.attributes["body"].as_graph(), holder.op_type == "Scan"
    count = len(holder.inputs) - (holder.attributes["num_scan_inputs"].as_int() if scan else 2)
    extra = 0 if scan else 1  # a Loop reads the trip count and the condition first, its body the iteration number and the condition
    constants = {}
    for i in range(count):
        start, state = holder.inputs[2 * extra + i], body.inputs[2 * extra + i]
        end = body.outputs[extra + i]
        others = [v for at, v in enumerate(body.outputs) if at != extra + i]  # states, too, may be given the same value
        unread = not holder.outputs[i].is_graph_output() and all(v is not state and v is not end for v in others)
        if start is not None and weight(start) is not None and unread and _unchanged(end, state):
            constants[i] = start
    if not constants:
        return []
    for i in sorted(constants, reverse=True):
        end = body.outputs.pop(extra + i)
        if (identity := end.producer()) is not None and not end.uses():
            graph_of(identity).remove(identity, safe=True)
        state = body.inputs.pop(2 * extra + i)
        for value in (state, holder.outputs[i]):
            ir.convenience.replace_all_uses_with(value, constants[i])
    inputs = [v for at, v in enumerate(holder.inputs) if at - 2 * extra not in constants]
    outputs = [v for i, v in enumerate(holder.outputs) if i not in constants]
    attributes = list(holder.attributes.values())
    smaller = ir.Node(
        "", holder.op_type, inputs, attributes, num_outputs=len(outputs), name=holder.name, metadata_props=holder.metadata_props
    )
    ir.convenience.replace_nodes_and_values(graph_of(holder), holder, [holder], [smaller], outputs, smaller.outputs)
    return [str(value.name) for value in constants.values()]


def _unchanged(end: ir.Value, state: ir.Value) -> bool:
    """Whether a body returns a state as it reads it."""
    producer = end.producer()
    while producer is not None and operator_of(producer) == "Identity" and producer.inputs[0] is not None:
        end = producer.inputs[0]
        producer = end.producer()
    return end is state
