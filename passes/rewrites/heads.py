"""Values of attentions: what a rotation of every head's values turns.

Attention mixes values over time, head by head, so that an orthogonal ``R (d, d)`` of the d channels of a head passes through it: if the
layer that makes the values is multiplied by R, head by head, and the layer behind the heads by ``R^T``, the same comes out (QuaRot, R2).
All heads have the same R, so that heads that share values (grouped queries) may do so in whatever order.

Values are followed from the product with attention's probabilities: back to the layer that makes them, and on to the layers that read
them, through nodes that move heads as a whole. Where one layer makes queries, keys and values, its columns are followed by number through
what takes them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.graph.nodes import layer_name, operand, operator_of
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.rewrites.axis_facts import Facts

_FUSED = ("Attention", *(f"com.microsoft.{name}" for name in ("Attention", "MultiHeadAttention", "GroupQueryAttention")))
_SELECTING = ("Slice", "Split", "Gather")
_MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", *_SELECTING)
_BEHIND_SOFTMAX = ("Cast", "Dropout", "Identity", "Where", "Mul")

Columns = npt.NDArray[np.intp]


@dataclass(slots=True, eq=False)
class Heads:
    """The values of an attention.

    Attributes:
        width: Channels of a head, d.
        start: Name of the product that mixes them.
        writers: Layers that make values, and the first columns of their heads.
        readers: Layers that read them.
        problems: What stands against a rotation, in words.
    """

    width: int
    start: str
    writers: dict[int, tuple[LinearLayer, Columns]] = field(default_factory=dict)
    readers: dict[int, LinearLayer] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)


def find_heads(model: ir.Model) -> list[Heads]:
    """Find the values of every attention of the main graph: what is multiplied by a Softmax."""
    facts, found, seen = Facts(model), list[Heads](), set[int]()
    for node in model.graph:
        if operator_of(node) == "MatMul" and id(node) not in facts.reading and _is_probabilities(node.inputs[0]):
            if id(node.inputs[1]) in seen:  # attentions that share their values are one
                continue
            width = facts.row_width(node.inputs[1])
            search = _Search(facts, Heads(width or 0, layer_name(node)))
            if width is None:
                search.problem(node, "has values of unknown width")
            elif width > 1 and node.inputs[1] is not None:
                seen |= search.follow(node.inputs[1])
            found.append(search.heads)
        elif operator_of(node) in _FUSED:
            search = _Search(facts, Heads(0, layer_name(node)))
            search.problem(node, "is one operator, whose values are not followed")
            found.append(search.heads)
    return found


def _is_probabilities(value: ir.Value | None) -> bool:
    """Whether a value comes from a Softmax, through nodes that leave it or mask it."""
    for _ in range(8):
        node = None if value is None else value.producer()
        if node is None or operator_of(node) not in ("Softmax", *_BEHIND_SOFTMAX):
            return False
        if operator_of(node) == "Softmax":
            return True
        sources = [v for v in node.inputs if v is not None and v.producer() is not None]
        value = sources[-1] if sources else None
    return False


class _Search:
    """The search for all that depends on the basis of the values of an attention."""

    def __init__(self, facts: Facts, heads: Heads) -> None:
        self.facts, self.heads = facts, heads
        self._seen: dict[int, ir.Value] = {}

    def problem(self, node: ir.Node | None, text: str) -> None:
        self.heads.problems[text if node is None else f"{layer_name(node)} ({node.op_type}) {text}"] = None

    def follow(self, start: ir.Value) -> set[int]:
        """Collect everything that a rotation of a value entails; the identities of all values that it turns."""
        pending = [start]
        while pending:
            value = pending.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                pending += [*self._behind(value), *self._ahead(value)]
        return set(self._seen)

    def _behind(self, value: ir.Value) -> Iterator[ir.Value]:
        """Record what makes a value, or yield what it is made of."""
        node = value.producer()
        layer = self.facts.made.get(id(value))
        if node is None:
            self.problem(None, f"{value.name} is an input of the model")
        elif layer is not None:
            if self._usable(layer, layer.n):
                self.heads.writers[id(layer.node)] = layer, np.arange(0, layer.n, self.heads.width)
        elif operator_of(node) in _SELECTING:
            self._taken_apart(value)
        elif operator_of(node) == "MatMul" and id(node) not in self.facts.reading:
            yield from (v for v in node.inputs[1:] if v is not None)
        elif self.facts.keeps_rows(node, self.heads.width) and node.inputs[0] is not None and operator_of(node) != "Concat":
            yield node.inputs[0]
        else:
            self.problem(node, "makes them")

    def _ahead(self, value: ir.Value) -> Iterator[ir.Value]:
        """Record what reads a value, or yield what is made of it."""
        for node, index in self._readers(value):
            layer = self.facts.reading.get(id(node))
            if layer is not None and index == 0:
                if self._usable(layer, layer.k):
                    self.heads.readers[id(node)] = layer
            elif layer is None and operator_of(node) == "MatMul" and index == 1:
                yield node.outputs[0]
            elif index == 0 and self.facts.keeps_rows(node, self.heads.width) and operator_of(node) != "Concat":
                yield from node.outputs
            else:
                self.problem(node, "reads them")

    def _readers(self, value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
        if value.is_graph_output():
            self.problem(None, f"{value.name} is an output of the model")
        for use in list(value.uses()):
            if use.node.graph is not self.facts.graph:
                self.problem(use.node, "reads them in a body")
            elif operator_of(use.node) not in ("Shape", "Size"):
                yield use.node, use.idx

    def _usable(self, layer: LinearLayer, width: int) -> bool:
        """Whether a layer's weight can be rotated, head by head, along an axis of ``width``."""
        if width % self.heads.width:
            self.problem(layer.node, f"has {width} channels there, no multiple of {self.heads.width}")
        elif layer.name in self.facts.shared:
            self.problem(layer.node, f"shares its weight {layer.weight_name} with other layers")
        else:
            return True
        return False

    def _taken_apart(self, value: ir.Value) -> None:
        """Find the columns of the layer that a part of its output comes from, which nothing else may read."""
        source, chain = value, list[ir.Node]()
        while (layer := self.facts.made.get(id(source))) is None:
            node = source.producer()
            if node is None or operator_of(node) not in _MOVING or node.inputs[0] is None:
                break
            chain.append(node)
            source = node.inputs[0]
        if layer is None or layer.name in self.facts.shared:
            self.problem(source.producer(), "makes them, and is no layer with a weight of its own")
            return
        numbers = self._numbers(source, layer.n)
        for node in reversed(chain):
            numbers |= self._moved(node, numbers)
        mine = numbers.get(id(value))
        width = self.heads.width
        rows = None if mine is None or not mine.size or mine.size % width else mine.reshape(-1, width)
        if rows is None or not (rows == rows[:, :1] + np.arange(width)).all():
            self.problem(value.producer(), "takes them from what cannot be followed")
        elif self._reads_others(source, value, numbers, np.unique(rows)):
            self.heads.writers[id(layer.node)] = layer, np.unique(rows[:, 0])

    def _reads_others(self, source: ir.Value, value: ir.Value, numbers: dict[int, Columns], mine: Columns) -> bool:
        """Whether all that reads what a value is taken from, but through the value, reads other columns."""
        pending = [source]
        while pending:
            current = pending.pop()
            if current is value:
                continue
            for node, index in self._readers(current):
                if index == 0 and operator_of(node) in _MOVING:
                    moved = self._moved(node, numbers)
                    numbers |= {id(output): moved.get(id(output), numbers[id(current)]) for output in node.outputs}  # those at most
                    pending += node.outputs
                elif np.isin(numbers[id(current)], mine).any():
                    self.problem(node, "reads them together with others")
                    return False
        return True

    def _numbers(self, source: ir.Value, n: int) -> dict[int, Columns]:
        """Number the columns of a layer's output, in one row of every axis of unknown length."""
        sizes = self.facts.sizes(source)
        return {} if sizes is None else {id(source): np.broadcast_to(np.arange(n), [*sizes[:-1], n])}

    def _moved(self, node: ir.Node, numbers: dict[int, Columns]) -> dict[int, Columns]:
        """Move numbers as a node moves what they stand for; nothing where that is unknown."""
        x = operand(node, 0)
        array = None if x is None else numbers.get(id(x))
        if array is None:
            return {}
        moved = self.facts.moved(node, array)
        return {id(value): part for value, part in zip(node.outputs, moved, strict=False) if part.size}  # an axis of unknown length has 1
