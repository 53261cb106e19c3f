"""Values of 16 bits among values of 8: which, at what cost, and where values are converted from one width to the other.

An operator has one width: 16 bits if a value that it reads or puts out has 16 bits, and 8 otherwise. Operands and results of the other
width are converted, by a DequantizeLinear and a QuantizeLinear between the two grids. From 8 to 16 bits that is exact. Operands that a
runtime takes in 8 bits only (`Rules.narrow`) do not count, and are converted where they have 16.

An operator takes about twice as long in 16 bits. Its time in 8 is estimated by `work`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from magr_onnx.core import knapsack
from magr_onnx.passes.graph.nodes import operand
from magr_onnx.passes.tensors.region import SharedGrid, Unit
from magr_onnx.passes.tensors.rules import Rules

ELEMENT = 16  # multiplications in 8 bits take as long as one value that is read or written


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """A value that some operators get on a grid of another width.

    Attributes:
        group: The values whose grid the value is on, or will be on.
        readers: Nodes and numbers of inputs. Of a result they are its mark: the value is on the other grid first.
        bits: Of the other grid.
        exact: Whether that has the steps of the grid that the value is on.
    """

    group: SharedGrid
    readers: tuple[tuple[ir.Node, int], ...]
    bits: int
    exact: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """The values around an operator, by the grids that they are on.

    Attributes:
        unit: The operator.
        reads: The operands, by the number of the input.
        makes: The results, each with the node that marks it.
        narrow: The number of the operand that is in 8 bits only; else None.
    """

    unit: Unit
    reads: Mapping[int, SharedGrid]
    makes: tuple[tuple[ir.Node, SharedGrid], ...]
    narrow: int | None

    @property
    def groups(self) -> Collection[SharedGrid]:
        """What decides the width of the operator, in an order that is the same in every run: of equal choices the first is taken."""
        read = (group for index, group in self.reads.items() if index != self.narrow)
        return dict.fromkeys((*read, *(group for _, group in self.makes)))

    def is_wide(self, wide: Collection[SharedGrid]) -> bool:
        """Whether the operator has 16 bits, where some values have."""
        return any(group in wide for group in self.groups)


def edges_of(units: Collection[Unit], marks: Mapping[str, SharedGrid], rules: Rules) -> list[Edges]:
    """Find the values around operators of a graph whose values are marked (`magr_onnx.passes.emit.tensors.mark`)."""
    result = []
    for unit in units:
        reads = {i: marks[str(value.name)] for i, value in enumerate(unit.node.inputs) if value is not None and value.name in marks}
        behind = [use.node for value in unit.makes for use in value.uses()]
        makes = tuple((node, marks[name]) for node in behind if node.outputs and (name := str(node.outputs[0].name)) in marks)
        result.append(Edges(unit, reads, makes, rules.narrow.get(unit.node.op_type)))
    return result


def may_be_wide(edges: Collection[Edges]) -> list[SharedGrid]:
    """List the values that 16 bits can make more accurate: all but those that every reader takes in 8 bits only."""
    readers: dict[SharedGrid, set[bool]] = {group: set() for each in edges for group in each.groups}
    for each in edges:
        for index, group in each.reads.items() if not each.unit.moves else ():
            readers.setdefault(group, set()).add(index == each.narrow)
    return [group for group, narrow in readers.items() if narrow != {True}]


def work(unit: Unit) -> int:
    """Estimate the time of an operator in 8 bits, in multiplications."""
    node, read, made = unit.node, sum(map(_elements, unit.reads)), sum(map(_elements, unit.makes))
    products = 0
    if node.op_type in ("MatMul", "Gemm"):
        products = made * (_sizes(operand(node, 0)) or (0,))[-1]
    elif node.op_type in ("Conv", "ConvTranspose"):
        products = (made if node.op_type == "Conv" else read) * math.prod(_sizes(operand(node, 1))[1:])
    return products + ELEMENT * (read + made)


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of a value; that of a scalar where it is not known."""
    shape = None if value is None else value.shape
    return tuple(map(int, shape.numpy())) if shape is not None and shape.is_static() else ()


def _elements(value: ir.Value) -> int:
    return math.prod(_sizes(value))


def choose_wide(edges: Collection[Edges], losses: Mapping[SharedGrid, float], share: float) -> set[SharedGrid]:
    """Choose the values of 16 bits.

    Args:
        edges: The operators.
        losses: What rounding the values to 8 bits costs; losses are assumed to add up.
        share: Of the work of all operators, what those of 16 bits may have, at most.

    Returns:
        Values of least loss for the rest, by a knapsack in which each costs the operators around it, repeated for the others as long as
        there is room: operators that have 16 bits already cost nothing.
    """
    works = {each: work(each.unit) for each in edges}
    around = {group: [each for each in edges if group in each.groups] for group in losses}
    room = share * sum(works.values())
    wide: set[SharedGrid] = set()
    while rest := [group for group in losses if group not in wide and around[group]]:
        used = {each for each in edges if each.is_wide(wide)}
        costs = [float(sum(works[each] for each in around[group] if each not in used)) for group in rest]
        items = [knapsack.Item(np.array([0.0, c]), np.array([losses[group], 0.0])) for group, c in zip(rest, costs, strict=True)]
        point = knapsack.least_loss(items, room - sum(works[each] for each in used))
        chosen = [group for group, choice in zip(rest, point.choices if point else (), strict=False) if choice]
        if not chosen:
            break
        wide |= set(chosen)
    return wide


def share_of(edges: Collection[Edges], wide: Collection[SharedGrid]) -> float:
    """Return the share of the work that is done in 16 bits."""
    works = [(work(each.unit), each.is_wide(wide)) for each in edges]
    return sum(w for w, is_wide in works if is_wide) / max(sum(w for w, _ in works), 1)


def stored_wide(edges: Collection[Edges], wide: Collection[SharedGrid]) -> set[SharedGrid]:
    """Find the values that are on grids of 16 bits: beside the wide ones, inputs of the graph that an operator of 16 bits reads.

    Qualcomm's compiler fails on inputs of 8 bits that are converted to 16, and takes those of 16 that are converted to 8.
    """
    made = {group for each in edges if not each.unit.moves for _, group in each.makes}
    read = {group for each in edges if each.is_wide(wide) for group in each.groups}
    return {*wide, *(read - made)}


def conversions(edges: Collection[Edges], wide: Collection[SharedGrid]) -> Iterator[Conversion]:
    """Find what must be converted where some values have 16 bits."""
    operands: dict[tuple[ir.Value, int], tuple[SharedGrid, list[tuple[ir.Node, int]]]] = {}
    stored = stored_wide(edges, wide)
    for each in edges:
        node, is_wide = each.unit.node, each.is_wide(wide)
        if each.unit.moves:  # one grid
            continue
        for index, group in each.reads.items():
            needs = 16 if is_wide and index != each.narrow else 8
            value = node.inputs[index]
            if needs != (16 if group in stored else 8) and value is not None:
                operands.setdefault((value, needs), (group, []))[1].append((node, index))
        if is_wide:
            yield from (Conversion(group, ((mark, 0),), 16) for mark, group in each.makes if group not in stored)
    for (_, bits), (group, readers) in operands.items():
        yield Conversion(group, tuple(readers), bits, exact=bits == 16)
