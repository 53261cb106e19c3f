"""Inputs and attributes of nodes, or the reason why one cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from magr_onnx.report.reasons import IntegerReason


class UnsupportedNode(Exception):
    """A node that cannot be viewed, with the reason; caught in `view`."""

    def __init__(self, reason: IntegerReason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return input ``index`` of a node; None if absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def layer_name(node: ir.Node) -> str:
    """Name a node, which may have no name, stably between runs."""
    return node.name or f"{node.op_type}:{result_of(node).name}"


def result_of(node: ir.Node) -> ir.Value:
    """Return the first output of a node that has a name: recurrent operators may leave out the first."""
    return next((value for value in node.outputs if value.name), node.outputs[0])


def operator_of(node: ir.Node) -> str:
    """Name the operator of a node, with its domain if not ONNX's: ``Mul``, ``com.microsoft.Gelu``."""
    return f"{node.domain}.{node.op_type}".removeprefix(".").removeprefix("ai.onnx.")


def only_use(value: ir.Value) -> tuple[ir.Node | None, int]:
    """Return the only reader of a value that is no output of its graph, and which input reads it; None for any other value."""
    uses = list(value.uses())
    return uses[0] if len(uses) == 1 and not value.is_graph_output() else (None, 0)


def insert_behind(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Insert a node into the graph of a value, right behind the node that makes it, or first for an input or an initializer."""
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(maker, node)


def producers(value: ir.Value | None) -> Iterator[ir.Node]:
    """Yield the node a value comes from, the node that the first input of that one comes from, and so on."""
    while value is not None and (node := value.producer()) is not None:
        yield node
        value = operand(node, 0)


def attribute_of(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of an attribute, or ``default``.

    Raises:
        UnsupportedNode: The attribute refers to one of a function.
    """
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.is_ref():
        raise UnsupportedNode(IntegerReason.ATTRIBUTE, name)
    return attribute.value
