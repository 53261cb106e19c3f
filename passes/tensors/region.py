"""The part of a graph that is computed in integers: convolutions, and what a runtime computes in integers between them.

A convolution becomes an integer one if its input and its result are rounded to grids. Operators between convolutions follow where all
they read is on a grid and what they put out is read as integers again. Everything else stays float: what it reads of the region is
dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.passes.graph.constants import fixed_array
from magr_onnx.passes.graph.nodes import only_use, operand
from magr_onnx.passes.tensors.connected import connected
from magr_onnx.passes.tensors.rules import Rules


@dataclass(frozen=True, slots=True, eq=False)
class SharedGrid:
    """Values on one grid.

    Attributes:
        values: The values, in graph order.
        low: Least value that the grid should have, where an activation cuts off there; else -inf.
        high: Greatest value, likewise; else inf.
    """

    values: tuple[ir.Value, ...]
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """What is computed in integers.

    Attributes:
        grids: The values that are rounded, in groups that share a grid.
        nodes: Nodes that read integers.
        results: What these nodes put out, behind an activation that a grid replaces.
    """

    grids: tuple[SharedGrid, ...]
    nodes: frozenset[ir.Node]
    results: frozenset[ir.Value]


def region_of(graph: ir.Graph, convolutions: Collection[ir.Node], rules: Rules, *, all_moves: bool = False) -> Region:
    """Find the region around convolutions of a graph.

    Args:
        graph: The main graph.
        convolutions: Its convolutions that will have integer weights.
        rules: What the runtime computes in integers.
        all_moves: Whether nodes that only move rounded values belong to it even where nothing reads them as integers.
    """
    convs = set(convolutions)
    candidates = {node for node in graph if node not in convs and (rules.computes(node) or rules.moves(node))}

    def result(node: ir.Node) -> ir.Value:
        return node.outputs[0] if node not in convs and rules.moves(node) else _behind_activation(node, rules)[0]

    between = _between(convs, candidates, rules, result, all_moves)
    ordered = [node for node in graph if node in convs or node in between]
    moves = dict.fromkeys(node for node in ordered if node in between and rules.moves(node))
    limits = {result(node): _behind_activation(node, rules)[1:] for node in ordered if node not in moves}
    groups = connected(
        (value for node in ordered for value in (*_read(node, convs, rules), result(node))),
        ((_first(node), result(node)) for node in moves),
    )
    grids = [SharedGrid(tuple(values), *_common([limits.get(v) for v in values])) for values in groups]
    return Region(tuple(grids), frozenset(ordered), frozenset(map(result, ordered)))


def _between(
    convs: Collection[ir.Node], candidates: set[ir.Node], rules: Rules, result: Callable[[ir.Node], ir.Value], all_moves: bool
) -> set[ir.Node]:
    """Reduce candidates to those that read only integers and are read as such, or are moves."""
    while True:
        inputs = {value for node in (*convs, *candidates) for value in _read(node, convs, rules)}
        rounded = {_first(node) for node in convs} | {result(node) for node in (*convs, *candidates)}
        read = {node for node in candidates if result(node) in inputs or (all_moves and rules.moves(node))}
        left = {node for node in read if all(value in rounded for value in _read(node, convs, rules))}
        if left == candidates:
            return left
        candidates = left


def _read(node: ir.Node, convs: Collection[ir.Node], rules: Rules) -> Iterator[ir.Value]:
    """Yield the values that a node reads as integers."""
    if node in convs or rules.moves(node) or len(node.inputs) == 1:
        yield _first(node)
    else:
        yield from (value for value in node.inputs if value is not None)


def _first(node: ir.Node) -> ir.Value:
    value = operand(node, 0)
    assert value is not None
    return value


def _behind_activation(node: ir.Node, rules: Rules) -> tuple[ir.Value, float, float]:
    """Return what a node puts out, behind an activation that its grid replaces, and the range that this one allows."""
    value = node.outputs[0]
    reader, index = only_use(value)
    if reader is None or index != 0 or reader.domain != "" or reader.op_type not in rules.absorbed:
        return value, -math.inf, math.inf
    low, high = (0.0, math.inf) if reader.op_type == "Relu" else clip_bounds(reader)
    return (reader.outputs[0], low, high) if low == 0 < high else (value, -math.inf, math.inf)


def clip_bounds(clip: ir.Node) -> tuple[float, float]:
    """Return the bounds of a Clip; NaN for what is known at run time only."""
    low, high = (
        default if (value := operand(clip, i)) is None else math.nan if (bound := fixed_array(value)) is None else bound.item()
        for i, default in ((1, -math.inf), (2, math.inf))
    )
    return float(low), float(high)


def _common(limits: Collection[tuple[float, float] | None]) -> tuple[float, float]:
    """Return the limits of a grid, where all values that have any agree; those that a move makes have none."""
    different = {limit for limit in limits if limit is not None}
    return next(iter(different)) if len(different) == 1 else (-math.inf, math.inf)
