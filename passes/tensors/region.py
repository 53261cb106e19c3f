"""The part of a graph that is computed in integers: convolutions, and what a runtime computes in integers between them.

A convolution becomes an integer one if its input and its result are rounded to grids. Operators between convolutions follow where all
they read is on a grid and what they put out is read as integers again. Everything else stays float: what it reads of the region is
dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.passes.graph.constants import clip_bounds
from magr_onnx.passes.graph.nodes import only_use
from magr_onnx.passes.tensors.connected import connected
from magr_onnx.passes.tensors.rules import Rules

SOFTMAX = ("Softmax", "LogSoftmax")


@dataclass(frozen=True, slots=True, eq=False)
class SharedGrid:
    """Values on one grid.

    Attributes:
        values: The values, in graph order.
        low: Least value that the grid should have, where an activation cuts off there; else -inf.
        high: Greatest value, likewise; else inf.
        exact: The range ``[low, high)`` of the grid, where the runtime knows no other; else None.
        scores: Whether a Softmax reads them.
        masks: The scores that they are added to, if nothing else reads them.
    """

    values: tuple[ir.Value, ...]
    low: float = -math.inf
    high: float = math.inf
    exact: tuple[float, float] | None = None
    scores: bool = False
    masks: tuple[ir.Value, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """What is computed in integers.

    Attributes:
        grids: The values that are rounded, in groups that share a grid.
        units: The operators that read integers, in graph order.
    """

    grids: tuple[SharedGrid, ...]
    units: tuple[Unit, ...]

    @staticmethod
    def of(units: Sequence[Unit]) -> Region:
        """Make the region of operators in graph order."""
        groups = connected(
            (value for unit in units for value in (*unit.reads, *unit.makes)),
            ((unit.reads[0], value) for unit in units if unit.moves for value in unit.makes),
        )
        made = {value: unit for unit in units if not unit.moves for value in unit.makes}
        grids = []
        for values in groups:
            makers = [made[value] for value in values if value in made]
            limits, exact = {(unit.low, unit.high) for unit in makers}, {unit.exact for unit in makers}
            low, high = limits.pop() if len(limits) == 1 else (-math.inf, math.inf)
            scores = _are_scores(values)
            masks = () if scores else _masked_by(values, made)
            grids.append(SharedGrid(tuple(values), low, high, exact.pop() if len(exact) == 1 else None, scores, masks))
        return Region(tuple(grids), tuple(units))


def _are_scores(values: Iterable[ir.Value]) -> bool:
    return any(use.node.op_type in SOFTMAX for value in values for use in value.uses())


def _masked_by(values: Sequence[ir.Value], made: Mapping[ir.Value, Unit]) -> tuple[ir.Value, ...]:
    """Return the sums that values of one grid are summands of, if these are scores and nothing but moves reads the values elsewhere."""
    moved = set(values)
    readers = {use.node for value in values for use in value.uses() if moved.isdisjoint(use.node.outputs)}
    sums = [node.outputs[0] for node in readers if node.op_type == "Add" and node.outputs[0] in made and _are_scores(node.outputs)]
    return tuple(sums) if len(sums) == len(readers) else ()


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """An operator between roundings.

    Attributes:
        node: The operator.
        reads: The values that it reads as integers.
        makes: What it puts out, behind an activation that a grid replaces.
        moves: Whether its output is on the grid of the first of ``reads``.
        low: Least value that the activation, or the operator, allows; else -inf.
        high: Greatest value, likewise; else inf.
        exact: See `SharedGrid`.
    """

    node: ir.Node
    reads: tuple[ir.Value, ...]
    makes: tuple[ir.Value, ...]
    moves: bool = False
    low: float = -math.inf
    high: float = math.inf
    exact: tuple[float, float] | None = None

    @staticmethod
    def computing(node: ir.Node, reads: Iterable[ir.Value], makes: Sequence[ir.Value], rules: Rules) -> Unit:
        """Make the unit of an operator whose output has a grid of its own."""
        exact = rules.ranges.get(node.op_type)
        if len(makes) != 1:
            return Unit(node, tuple(reads), tuple(makes), exact=exact)
        value, low, high = _behind_activation(makes[0], rules)
        if value is makes[0] and node.op_type == "HardSigmoid":
            low, high = 0.0, 1.0
        return Unit(node, tuple(reads), (value,), False, low, high, exact)


def region_of(
    graph: ir.Graph, convolutions: Collection[ir.Node], rules: Rules, left_out: Collection[ir.Node] = (), *, all_moves: bool = False
) -> Region:
    """Find the region around convolutions of a graph.

    Args:
        graph: The main graph.
        convolutions: Its convolutions that will have integer weights.
        rules: What the runtime computes in integers.
        left_out: Other nodes that stay float.
        all_moves: Whether nodes that only move rounded values belong to it even where nothing reads them as integers.
    """
    convs = set(convolutions)
    units = [unit for node in graph if node not in left_out and (unit := _unit(node, convs, rules)) is not None]
    while True:  # those that read only integers and are read as such, or are moves, are left
        inputs = {value for unit in units for value in unit.reads}
        rounded = {value for unit in units for value in (unit.makes if unit.node not in convs else (*unit.reads, *unit.makes))}
        read = [u for u in units if u.node in convs or inputs.issuperset(u.makes) or (all_moves and u.moves)]
        left = [u for u in read if u.node in convs or rounded.issuperset(u.reads)]
        if len(left) == len(units):
            return Region.of(units)
        units = left


def _unit(node: ir.Node, convs: Collection[ir.Node], rules: Rules) -> Unit | None:
    if node not in convs and rules.moves(node):
        return Unit(node, tuple(_inputs(node)[:1]), tuple(node.outputs[:1]), True)
    if node not in convs and not rules.computes(node):
        return None
    return Unit.computing(node, _inputs(node)[: 1 if node in convs else None], node.outputs[:1], rules)


def _inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _behind_activation(value: ir.Value, rules: Rules) -> tuple[ir.Value, float, float]:
    """Return a value, or what is behind an activation that its grid replaces, and the range that this one allows."""
    reader, index = only_use(value)
    if reader is None or index != 0 or reader.domain != "" or reader.op_type not in rules.absorbed:
        return value, -math.inf, math.inf
    low, high = (0.0, math.inf) if reader.op_type == "Relu" else clip_bounds(reader)
    return (reader.outputs[0], low, high) if low == 0 < high else (value, -math.inf, math.inf)
