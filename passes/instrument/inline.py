"""Inlining of functions with layers, so that all layers are in the main graph and its subgraphs.

1. A function is inlined if it, or a function it calls, contains one of the given operators; every call becomes nodes of the caller with
   its attributes, and weights passed as arguments are constants again. Other functions remain calls.
2. A function remains a call, with everything it calls, if it imports another version of a domain than the model (its nodes would change
   meaning), or if a call passes it a graph (onnx-ir's inliner does not support such attributes).
3. An output that is an input, or a repeated output, goes through an Identity first: the inliner renames a value to the call's output, and
   an input of the model must keep its name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from magr_onnx.errors import ModelError
from magr_onnx.passes.canonical import PATTERNS
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import operator_of
from magr_onnx.passes.graph.subgraphs import remember, unique_names
from magr_onnx.passes.layers.linear import OPERATORS

Id = tuple[str, str, str]

LAYER_OPERATORS = frozenset((*OPERATORS, "Conv", "ConvTranspose", *(operator for pattern in PATTERNS for operator in pattern.operators)))
"""Operators that are layers, or become layers by canonicalization, with their domain where that is not ONNX's."""


def inline_and_rename(model: ir.Model) -> list[str]:
    """Make the layers in functions and subgraphs visible to `find`, with unique names; return notes for the report.

    Functions with layers are inlined, and values in subgraphs get names that are unique in the model. Results do not change.

    Raises:
        ModelError: Functions call each other recursively.
    """
    notes = inline(model, LAYER_OPERATORS)
    unique_names(model, {*LAYER_OPERATORS, "Gather"})
    Names.rescan(model.graph)
    return notes


def inline(model: ir.Model, operators: Collection[str]) -> list[str]:
    """Inline functions; return notes for the report, none if nothing changed.

    Args:
        model: Changed in place.
        operators: Operators of layers, as in `LAYER_OPERATORS`.

    Raises:
        ModelError: Functions call each other recursively.
    """
    if not model.functions:
        return []
    calls = {id_: _called(model, f.all_nodes()) for id_, f in model.functions.items()}
    callers = {callee: {caller for caller, callees in calls.items() if callee in callees} for callee in calls}
    holding = _closure({i for i, f in model.functions.items() if any(operator_of(n) in operators for n in f.all_nodes())}, callers)
    excluded = _closure({i for i in model.functions if i in holding and not _fits(model, i)}, calls)
    chosen = holding - excluded
    for id_ in chosen:
        _separate_outputs(model.functions[id_])
        for node in model.functions[id_].all_nodes():
            if node.name and operator_of(node) in operators:
                remember(node, node.name)  # every call after the first renames it
    count = len(chosen & _closure(_called(model, model.graph.all_nodes()), calls))
    if not count:
        return []
    try:
        InlinePass(lambda function: function.identifier() in chosen)(model)
    except (ir.passes.InvariantError, ValueError) as error:
        raise ModelError(f"the model's functions cannot be inlined: {error}; inline them with another tool") from error
    return [f"{count} model-local function{'s' * (count > 1)} with layers inlined ({', '.join(sorted(i[1] for i in chosen)[:3])})"]


def _called(model: ir.Model, nodes: Iterable[ir.Node]) -> set[Id]:
    return {node.op_identifier() for node in nodes} & set(model.functions)


def _closure(start: set[Id], edges: dict[Id, set[Id]]) -> set[Id]:
    """Return all nodes reachable from ``start``."""
    reached, pending = set(start), list(start)
    while pending:
        neighbours = edges[pending.pop()] - reached
        reached |= neighbours
        pending += neighbours
    return reached


def _fits(model: ir.Model, id_: Id) -> bool:
    function = model.functions[id_]
    versions = model.graph.opset_imports
    if any(versions.get(domain, version) != version for domain, version in function.opset_imports.items()):
        return False
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    nodes = [*model.graph.all_nodes(), *(node for f in model.functions.values() for node in f.all_nodes())]
    return not any(a.type in graphs for node in nodes if node.op_identifier() == id_ for a in node.attributes.values())


def _separate_outputs(function: ir.Function) -> None:
    """Insert an Identity before every output that is an input or a repeated output."""
    outputs_before = set(function.inputs)
    for index, value in enumerate(function.outputs):
        if value in outputs_before:
            node = ir.node("Identity", [value], name=f"{function.name}_{value.name}_{index}")
            node.outputs[0].name = str(node.name)
            Names.rescan(function.graph).adopt([node])
            function.append(node)
            function.outputs[index] = node.outputs[0]
        outputs_before.add(value)
