"""Bodies of If, Loop and Scan: walking them, and names that are unique in the whole model.

ONNX lets two branches use one name for two values. Statistics, codes and reports go by names, so values in bodies whose name is taken get
another one first (`unique_names`); names in the main graph, which callers know, stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from magr_onnx.passes.graph.names import Names

BODIES = ("If", "Loop", "Scan")
"""Operators whose bodies onnxruntime runs as part of the graph around them."""

Place = tuple[tuple[ir.Node, str], ...]
"""Where a node is: the nodes that hold it, outermost first, each with the attribute of its body; empty in the main graph."""


def bodies_of(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs a node holds, with the names of their attributes."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((name, graph) for graph in attribute.as_graphs())


def walk(graph: ir.Graph, place: Place = ()) -> Iterator[tuple[ir.Node, Place]]:
    """Every node of a graph and of the bodies in it, with its place, in order."""
    for node in graph:
        yield node, place
        for name, body in bodies_of(node):
            yield from walk(body, (*place, (node, name)))


def opaque(place: Place) -> str | None:
    """The operator in the way where a body on the way is not one of `BODIES`."""
    return next((holder.op_type for holder, _ in place if holder.domain != "" or holder.op_type not in BODIES), None)


def seen_as(value: ir.Value, node: ir.Node, place: Place) -> str:
    """A name for a value that a node at ``place`` reads: the same for all nodes that read it equally often."""
    inside = not place or value.graph is node.graph
    return str(value.name) if inside else captured(value, place)


def captured(value: ir.Value, place: Place) -> str:
    """A name for what a body sees of a value from outside: none of it where the body is not run."""
    holder, attribute = place[-1]
    return f"{value.name}@{next((v.name for v in holder.outputs if v.name), holder.name)}.{attribute}"


def root_of(node: ir.Node, place: Place) -> ir.Graph:
    """The main graph around a node at ``place``."""
    graph = place[0][0].graph if place else node.graph
    assert isinstance(graph, ir.Graph)
    return graph


def values_of(graph: ir.Graph) -> list[ir.Value]:
    """The values a graph itself makes: inputs, initializers and outputs of its nodes."""
    return list(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]))


def unique_names(model: ir.Model, operators: Collection[str] = ()) -> None:
    """Give values in bodies names of their own, and so the nodes of ``operators`` in bodies; the main graph keeps its names."""
    inner = {node for node, place in walk(model.graph) if place and f"{node.domain}.{node.op_type}".removeprefix(".") in operators}
    names = Names((v.name for v in values_of(model.graph)), (node.name for node in model.graph.all_nodes() if node not in inner))
    for node in model.graph.all_nodes():
        if node in inner:
            name = node.name or f"{node.op_type}:{node.outputs[0].name}"
            node.name = names.node(name)
            if node.name != name:
                remember(node, name)
        for _, body in bodies_of(node):
            for value in values_of(body):
                if value.name or value.uses():
                    value.name = names.value(value.name or "value")


NAMES = "onnx_magr.names"
"""Key of a node's properties under which the names that a layer had before are kept for patterns, a line each."""


def remember(node: ir.Node, *names: str) -> None:
    """Keep names at a node, so that patterns find it by them."""
    known = node.metadata_props.get(NAMES, "").splitlines()
    node.metadata_props[NAMES] = "\n".join(dict.fromkeys([*known, *names]))
