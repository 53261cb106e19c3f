"""Which operators a runtime computes between integers; the facts of each runtime are in a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

Required = Mapping[str, tuple[object, ...]]
"""Values that attributes of a node must have, by name; an attribute that is left out counts as None."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Operators that a runtime fuses with the DequantizeLinear of their inputs and the QuantizeLinear of their output.

    Attributes:
        name: The runtime.
        source: Where the facts come from.
        computed: Operators whose output has a grid of its own, and what their attributes must be.
        moved: Operators that move values, whose output is on the grid of their first input.
        absorbed: Activations that need no node, where the grid of their output ends where they cut off.
    """

    name: str
    source: str
    computed: Mapping[str, Required]
    moved: Mapping[str, Required]
    absorbed: tuple[str, ...] = ("Relu", "Clip")

    def computes(self, node: ir.Node) -> bool:
        """Whether a node is computed in integers with an output grid of its own."""
        return _meets(node, self.computed)

    def moves(self, node: ir.Node) -> bool:
        """Whether a node moves integers."""
        return _meets(node, self.moved)


def _meets(node: ir.Node, operators: Mapping[str, Required]) -> bool:
    if node.domain != "" or node.op_type not in operators:
        return False
    return all(_value(node, name) in allowed for name, allowed in operators[node.op_type].items())


def _value(node: ir.Node, name: str) -> object:
    attribute = node.attributes.get(name)
    return None if attribute is None or attribute.is_ref() else attribute.value
