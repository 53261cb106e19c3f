"""What people and tools write beside a graph: names, doc strings, metadata, denotations, quantization annotations.

The opset converters lose some of it where they make nodes and values anew; names of values stay, so it is found again by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir


@dataclass(slots=True)
class Labels:
    """Of a model: nodes by the name of their first output, values by name, and the graph itself."""

    nodes: dict[str, tuple[str | None, str | None, dict[str, str]]] = field(default_factory=dict)
    values: dict[str, tuple[str | None, dict[str, str], dict[str, Any], str | None, list[str | None]]] = field(default_factory=dict)
    graph: tuple[str | None, str | None, dict[str, str]] = (None, None, {})


def collect(model: ir.Model) -> Labels:
    """All that `restore` can bring back."""
    found = Labels(graph=(model.graph.name, model.graph.doc_string, dict(model.graph.metadata_props)))
    for node in model.graph.all_nodes():
        if node.outputs and node.outputs[0].name:
            found.nodes[node.outputs[0].name] = node.name, node.doc_string, dict(node.metadata_props)
    for name, value in _values(model):
        shape = value.shape
        denotations = [] if shape is None else [shape.get_denotation(i) for i in range(len(shape))]
        kind = None if value.type is None else value.type.denotation
        found.values[name] = value.doc_string, dict(value.metadata_props), dict(value.meta), kind, denotations
    return found


def restore(model: ir.Model, kept: Labels) -> None:
    """Give nodes and values back what they have lost; what they have stays."""
    model.graph.name, model.graph.doc_string = kept.graph[:2]
    model.graph.metadata_props.update(kept.graph[2])
    taken = {node.name for node in model.graph.all_nodes()}  # one node may have become several, and names must differ
    for node in model.graph.all_nodes():
        if node.outputs and (found := kept.nodes.get(str(node.outputs[0].name))) is not None:
            name, doc_string, properties = found
            if not node.name and name not in taken:
                node.name = name
            node.doc_string = node.doc_string or doc_string
            _add(node.metadata_props, properties)
    for key, value in _values(model):
        if key in kept.values:
            doc_string, properties, meta, kind, denotations = kept.values[key]
            value.doc_string = value.doc_string or doc_string
            _add(value.metadata_props, properties)
            _add(value.meta, meta)
            if value.type is not None and kind and not value.type.denotation:
                value.type.denotation = kind
            if value.shape is not None and len(value.shape) == len(denotations):
                for i, denotation in enumerate(denotations):
                    value.shape.set_denotation(i, value.shape.get_denotation(i) or denotation)


def _add(held: Any, more: dict[str, Any]) -> None:
    for key, value in more.items():
        held.setdefault(key, value)


def _values(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)):
        if value.name:
            yield value.name, value
