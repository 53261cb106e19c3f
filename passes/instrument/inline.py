"""Opening a model up: its functions with linear layers are inlined, so that there is one graph to look for layers in.

1. A function is inlined where it, or a function it calls, holds one of the operators asked for; every call becomes nodes of the caller,
   with its attributes, and weights handed to it are constants again. Functions without such an operator stay calls.
2. A function stays a call, with everything it calls, where it imports another version of a domain than the model (its nodes would change
   their meaning), or where a call hands it a graph (onnx-ir's inliner knows no such attribute).
3. An output that only hands an input on, or another output, goes through an Identity first: the inliner gives a value the name of the
   call's output, and an input of the model must keep its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from magr_onnx.errors import ModelError
from magr_onnx.passes.canonical import PATTERNS
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.subgraphs import remember, unique_names
from magr_onnx.passes.layers.linear import OPERATORS

Id = tuple[str, str, str]

HOLDING = frozenset((*OPERATORS, "Conv", "ConvTranspose", *(operator for pattern in PATTERNS for operator in pattern.operators)))
"""Operators that are layers, or become layers in a canonical form, with their domain where that is not ONNX's."""


def inline_and_rename(model: ir.Model) -> list[str]:
    """Make the layers in functions and bodies ones that `find` sees, under names of their own; sentences for the report.

    Functions with layers are inlined, and values in bodies get names that are unique in the model. Nothing that is computed changes.

    Raises:
        ModelError: Functions call each other in a circle.
    """
    notes = inline(model, HOLDING)
    unique_names(model, {*HOLDING, "Gather"})
    Names.rescan(model.graph)
    return notes


def inline(model: ir.Model, operators: Collection[str]) -> list[str]:
    """Inline in place; sentences for the report, none where nothing changed.

    Args:
        model: Changed in place.
        operators: Operators that make layers, as in `HOLDING`.

    Raises:
        ModelError: Functions call each other in a circle.
    """
    if not model.functions:
        return []
    calls = {id_: _called(model, f.all_nodes()) for id_, f in model.functions.items()}
    holding = _closure({i for i, f in model.functions.items() if any(_is(n, operators) for n in f.all_nodes())}, _callers(calls))
    kept = _closure({i for i in model.functions if i in holding and not _fits(model, i)}, calls)
    chosen = holding - kept
    for id_ in chosen:
        _part_outputs(model.functions[id_])
        for node in model.functions[id_].all_nodes():
            if node.name and _is(node, operators):
                remember(node, node.name)  # every call but the first renames it
    count = len(chosen & _closure(_called(model, model.graph.all_nodes()), calls))
    if not count:
        return []
    try:
        InlinePass(lambda function: function.identifier() in chosen)(model)
    except (ir.passes.InvariantError, ValueError) as error:
        raise ModelError(f"the model's functions cannot be inlined: {error}; inline them with another tool") from error
    return [f"{count} model-local function{'s' * (count > 1)} with layers inlined ({', '.join(sorted(i[1] for i in chosen)[:3])})"]


def _is(node: ir.Node, operators: Collection[str]) -> bool:
    return f"{node.domain}.{node.op_type}".removeprefix(".") in operators


def _called(model: ir.Model, nodes: Iterable[ir.Node]) -> set[Id]:
    return {node.op_identifier() for node in nodes} & set(model.functions)


def _callers(calls: dict[Id, set[Id]]) -> dict[Id, set[Id]]:
    return {called: {caller for caller, some in calls.items() if called in some} for called in calls}


def _closure(start: set[Id], edges: dict[Id, set[Id]]) -> set[Id]:
    """Everything that can be reached."""
    found, left = set(start), list(start)
    while left:
        more = edges[left.pop()] - found
        found |= more
        left += more
    return found


def _fits(model: ir.Model, id_: Id) -> bool:
    function = model.functions[id_]
    versions = model.graph.opset_imports
    if any(versions.get(domain, version) != version for domain, version in function.opset_imports.items()):
        return False
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    nodes = [*model.graph.all_nodes(), *(node for f in model.functions.values() for node in f.all_nodes())]
    return not any(a.type in graphs for node in nodes if node.op_identifier() == id_ for a in node.attributes.values())


def _part_outputs(function: ir.Function) -> None:
    """An Identity before every output that is an input, or an output twice."""
    seen = set(function.inputs)
    for index, value in enumerate(function.outputs):
        if value in seen:
            node = ir.node("Identity", [value], name=f"{function.name}_{value.name}_{index}")
            node.outputs[0].name = str(node.name)
            Names.rescan(function.graph).adopt([node])
            function.append(node)
            function.outputs[index] = node.outputs[0]
        seen.add(value)
