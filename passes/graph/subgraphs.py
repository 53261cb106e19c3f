"""Subgraphs of If, Loop and Scan: traversal, and names that are unique in the whole model.

Two branches may use one name for two values. Statistics, codes and reports use names as keys, so duplicate names in subgraphs are
replaced first (`unique_names`); names in the main graph are part of the interface and stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import layer_name, operator_of

BODIES = ("If", "Loop", "Scan")
"""Operators whose bodies onnxruntime runs as part of the graph around them."""

SubgraphPath = tuple[tuple[ir.Node, str], ...]
"""Path to a node: the nodes that contain it, outermost first, each with the attribute of its subgraph; empty in the main graph."""


def bodies_of(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the subgraphs of a node, with the names of their attributes."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((name, graph) for graph in attribute.as_graphs())


def walk(graph: ir.Graph, path: SubgraphPath = ()) -> Iterator[tuple[ir.Node, SubgraphPath]]:
    """Yield every node of a graph and its subgraphs with its path, in order."""
    for node in graph:
        yield node, path
        for name, body in bodies_of(node):
            yield from walk(body, (*path, (node, name)))


def unsupported_parent(path: SubgraphPath) -> str | None:
    """Return the first operator on the path that is not one of `BODIES`, if any."""
    return next((holder.op_type for holder, _ in path if holder.domain != "" or holder.op_type not in BODIES), None)


def calibration_key(value: ir.Value, node: ir.Node, path: SubgraphPath) -> str:
    """Return the key of a value read at ``path``: the same for all nodes that read it equally often."""
    local = not path or value.graph is node.graph
    return str(value.name) if local else captured_key(value, path)


def captured_key(value: ir.Value, path: SubgraphPath) -> str:
    """Return the key of an outer value as a subgraph reads it: never where the subgraph does not run."""
    holder, attribute = path[-1]
    return f"{value.name}@{next((v.name for v in holder.outputs if v.name), holder.name)}.{attribute}"


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph or subgraph of a node, which is in no function."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def values_of(graph: ir.Graph) -> list[ir.Value]:
    """Return the values a graph defines: inputs, initializers and outputs of its nodes."""
    return list(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]))


def unique_names(model: ir.Model, operators: Collection[str] = ()) -> None:
    """Make the names of values in subgraphs unique, and those of nodes of ``operators`` in subgraphs; the main graph keeps its names."""
    inner = {node for node, path in walk(model.graph) if path and operator_of(node) in operators}
    names = Names((v.name for v in values_of(model.graph)), (node.name for node in model.graph.all_nodes() if node not in inner))
    for node in model.graph.all_nodes():
        if node in inner:
            name = layer_name(node)
            node.name = names.node(name)
            if node.name != name:
                remember(node, name)
        for _, body in bodies_of(node):
            for value in values_of(body):
                if value.name or value.uses():
                    value.name = names.value(value.name or "value")


NAMES = "onnx_magr.names"
"""Key of a node's properties with the former names of a layer, for name patterns, one per line."""


def remember(node: ir.Node, *names: str) -> None:
    """Record former names of a node, so that name patterns still match it."""
    previous = node.metadata_props.get(NAMES, "").splitlines()
    node.metadata_props[NAMES] = "\n".join(dict.fromkeys([*previous, *names]))
