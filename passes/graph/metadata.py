"""Annotations of a graph: node names, doc strings, metadata, denotations, quantization annotations.

The opset converters lose some of them where they create new nodes and values. Value names survive, so annotations are restored by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir


@dataclass(slots=True)
class Labels:
    """Annotations of a model: nodes by the name of their first output, values by name, and the graph itself."""

    nodes: dict[str, tuple[str | None, str | None, dict[str, str]]] = field(default_factory=dict)
    values: dict[str, tuple[str | None, dict[str, str], dict[str, Any], str | None, list[str | None]]] = field(default_factory=dict)
    graph: tuple[str | None, str | None, dict[str, str]] = (None, None, {})


def collect(model: ir.Model) -> Labels:
    """Collect the annotations that `restore` can restore."""
    labels = Labels(graph=(model.graph.name, model.graph.doc_string, dict(model.graph.metadata_props)))
    for node in model.graph.all_nodes():
        if node.outputs and node.outputs[0].name:
            labels.nodes[node.outputs[0].name] = node.name, node.doc_string, dict(node.metadata_props)
    for name, value in _values(model):
        shape = value.shape
        denotations = [] if shape is None else [shape.get_denotation(i) for i in range(len(shape))]
        kind = None if value.type is None else value.type.denotation
        labels.values[name] = value.doc_string, dict(value.metadata_props), dict(value.meta), kind, denotations
    return labels


def restore(model: ir.Model, labels: Labels) -> None:
    """Restore lost annotations of nodes and values; present ones are kept."""
    model.graph.name, model.graph.doc_string = labels.graph[:2]
    model.graph.metadata_props.update(labels.graph[2])
    node_names = {node.name for node in model.graph.all_nodes()}  # one node may have become several; names must be unique
    for node in model.graph.all_nodes():
        if node.outputs and (node_labels := labels.nodes.get(str(node.outputs[0].name))) is not None:
            name, doc_string, properties = node_labels
            if not node.name and name not in node_names:
                node.name = name
            node.doc_string = node.doc_string or doc_string
            _add(node.metadata_props, properties)
    for key, value in _values(model):
        if key in labels.values:
            doc_string, properties, meta, kind, denotations = labels.values[key]
            value.doc_string = value.doc_string or doc_string
            _add(value.metadata_props, properties)
            _add(value.meta, meta)
            if value.type is not None and kind and not value.type.denotation:
                value.type.denotation = kind
            if value.shape is not None and len(value.shape) == len(denotations):
                for i, denotation in enumerate(denotations):
                    value.shape.set_denotation(i, value.shape.get_denotation(i) or denotation)


def _add(entries: Any, missing: dict[str, Any]) -> None:
    for key, value in missing.items():
        entries.setdefault(key, value)


def _values(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)):
        if value.name:
            yield value.name, value
