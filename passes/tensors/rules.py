"""Which operators a runtime computes between integers; the facts of each runtime are in a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from magr_onnx.core.grid_type import GridType

Required = Mapping[str, tuple[object, ...]]
"""Values that attributes of a node must have, by name; an attribute that is left out counts as None."""

ANY: Required = {}


def operators(names: str) -> dict[str, Required]:
    """List operators, separated by spaces, that are taken whatever their attributes."""
    return dict.fromkeys(names.split(), ANY)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a runtime computes between the DequantizeLinear of an operator's inputs and the QuantizeLinear of its output.

    Attributes:
        name: The runtime.
        source: Where the facts come from.
        computed: Operators whose output has a grid of its own, and what their attributes must be.
        moved: Operators that move values, whose output is on the grid of their first input.
        absorbed: Activations that need no node, where the grid of their output ends where they cut off.
        ranges: Ranges ``[low, high)`` of outputs that must have the grid of just this range, by operator.
        types: Types that activations may have; the first is the default.
        symmetric: Whether zero points of activations are in the middle.
        power_of_two: Whether scales of activations are powers of two.
        narrow: Number of an operand that is at most of 8 bits, by operator, where activations have 16.
        gemm_only: Whether a product with a bias is one operator only as a Gemm, so that others are reshaped to it.
        fixed_shapes: Whether all shapes must be known.
        int4: Whether weights of 3 and 4 bits are stored in int4; ``cast`` where kernels have int8, so that a Cast makes int8 of them.
        lowered: Whether HardSigmoid and HardSwish are written as other operators (`magr_onnx.passes.emit.hard_activations`).
    """

    name: str
    source: str
    computed: Mapping[str, Required]
    moved: Mapping[str, Required]
    absorbed: tuple[str, ...] = ("Relu", "Clip")
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    types: tuple[str, ...] = ("uint8", "int8")
    symmetric: bool = False
    power_of_two: bool = False
    narrow: Mapping[str, int] = field(default_factory=dict)
    gemm_only: bool = False
    fixed_shapes: bool = False
    int4: Literal["", "stored", "cast"] = ""
    lowered: bool = False

    def grid_type(self, name: str) -> GridType:
        """Return what grids of activations of a type have in common."""
        return GridType.named(name, self.symmetric, self.power_of_two)

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
