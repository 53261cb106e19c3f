"""Readers of node inputs, attributes and constants, or the reason why one cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.graph.constants import constant_tensor
from magr_onnx.report.reasons import IntegerReason

Array = npt.NDArray[Any]


class UnsupportedNode(Exception):
    """A node that cannot be viewed, with the reason; caught in `view`."""

    def __init__(self, reason: IntegerReason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return input ``index`` of a node; None if absent."""
    return node.inputs[index] if index < len(node.inputs) else None


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


def constant_array(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer or Constant, through Identity, Transpose and Reshape; None for anything else.

    Raises:
        UnsupportedNode: A caller may override it, or an attribute refers to one of a function.
    """
    if value is None:
        return None
    if value.is_initializer() and value.is_graph_input():
        raise UnsupportedNode(IntegerReason.OVERRIDABLE, str(value.name))
    tensor = constant_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Identity", "Transpose", "Reshape"):
        return None
    inner = constant_array(node.inputs[0])
    if inner is None or node.op_type == "Identity":
        return inner
    if node.op_type == "Transpose":
        return inner.transpose(attribute_of(node, "perm", None))
    shape = constant_array(operand(node, 1))
    if shape is None or attribute_of(node, "allowzero", 0):
        return None
    return inner.reshape([inner.shape[i] if d == 0 else int(d) for i, d in enumerate(shape)])
