"""Residual streams of a graph: the values that a rotation would turn, everything that writes to them, and everything that reads them.

Of a rotation ``Q (K, K)`` of a value's last axis, the graph decides what becomes of other values:

- A *stream* value x becomes x Q. Its writers are linear layers and constants (tables, vectors), whose last axis is rotated.
- What depends on the length of x alone stays as it is: means of squares, and their roots. The mean of x itself does where ``Q 1 = 1``.
- ``x r`` with one r for all channels of a row is a stream value again, and so is ``x + r`` where ``1 Q = 1``. So decomposed norms need no
  patterns: ``x / sqrt(mean(x^2))`` and ``x - mean(x)`` are stream values.
- A norm's gain g, a vector that a stream value is multiplied by, does not commute with Q. It has to be folded into the linear layers
  behind it, and what is added after it (`Gained`).
- Everything else that touches one of these values is a problem, and the stream cannot be rotated.

A stream grows from the input of a norm: forward through its readers, backward through sums to its writers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.canonical.norms import is_square
from magr_onnx.passes.graph.constants import ConstantView, constant_view, replace_input
from magr_onnx.passes.graph.names import add_initializer
from magr_onnx.passes.graph.nodes import layer_name, operand, operator_of
from magr_onnx.passes.graph.subgraphs import graph_of
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weighted import FLOATS, float_readers
from magr_onnx.passes.rewrites.axis_facts import CENTRED, NORMS, SKIP, SUMS, Facts


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A constant where a node reads it."""

    node: ir.Node
    index: int

    @property
    def view(self) -> ConstantView:
        view = constant_view(self.node.inputs[self.index])
        assert view is not None
        return view

    def read(self) -> Array:
        """Read the constant as a vector, float64."""
        return self.view.tensor().numpy().astype(np.float64).reshape(-1)

    def write(self, value: ir.Value | npt.NDArray[np.floating]) -> ir.Value:
        """Have the node read another constant: a value, or an array ``(K,)``, which takes the shape and type of the former."""
        view = self.view
        if not isinstance(value, ir.Value):
            array = value.reshape(view.shape).astype(view.dtype.numpy())
            value = add_initializer(graph_of(self.node), f"{view.name}_rotated", array)
        replace_input(self.node, self.index, value)
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Gained:
    """A norm's gain, and the shift behind it, each a vector of the stream's width."""

    scales: tuple[Slot, ...]
    shift: Slot | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """A residual stream.

    Attributes:
        width: Channels, K.
        start: Name of the norm that it was found from.
        values: Its values, by identity.
        writers: Linear layers that make its values.
        constants: Constants that are summands or tables of it.
        readers: Linear layers that read it, with the gain before them if there is one.
        norms: Names of its norms: what takes the mean of squares.
        tied: Of the readers, those whose weight is a table among the constants; a gain cannot be folded into it.
        keeps_ones: Whether a rotation has to keep the vector of ones.
        sums: Sums of two of its values.
        problems: What stands against a rotation, in words.
    """

    width: int
    start: str
    values: dict[int, ir.Value] = field(default_factory=dict)
    writers: dict[int, LinearLayer] = field(default_factory=dict)
    constants: list[Slot] = field(default_factory=list)
    readers: dict[int, tuple[LinearLayer, Gained | None]] = field(default_factory=dict)
    norms: dict[str, None] = field(default_factory=dict)
    tied: set[int] = field(default_factory=set)
    keeps_ones: bool = False
    sums: int = 0
    problems: dict[str, None] = field(default_factory=dict)


def find_streams(model: ir.Model) -> list[Stream]:
    """Find the residual streams of the main graph: what is normalized, and a sum of two values somewhere."""
    graph = Facts(model)
    streams: list[Stream] = []
    seen: set[int] = set()
    for node in list(model.graph):
        x = operand(node, 0)
        if x is None or id(x) in seen or not _begins_norm(node, graph):
            continue
        width = graph.last(x) or graph.gain_width(node)
        if width is None or width < 2:
            continue
        growth = _Growth(graph, Stream(width, layer_name(node)))
        growth.grow(x)
        seen |= growth.stream.values.keys()
        if growth.stream.sums:
            streams.append(growth.stream)
    return streams


def _begins_norm(node: ir.Node, graph: Facts) -> bool:
    """Whether a node is a norm, or takes the squares of one."""
    if operator_of(node) in NORMS:
        return True
    return is_square(node) and any(use.node.op_type in ("ReduceMean", "ReduceSum") for use in node.outputs[0].uses())


class _Growth:
    """The search for all of one stream."""

    def __init__(self, facts: Facts, stream: Stream) -> None:
        self.facts, self.stream = facts, stream
        self._pending: list[ir.Value] = []
        self._gained: set[int] = set()

    def grow(self, start: ir.Value) -> None:
        """Collect everything that a rotation of a value entails."""
        self._pending.append(start)
        while self._pending:
            value = self._pending.pop()
            if id(value) in self.stream.values:
                continue
            self.stream.values[id(value)] = value
            self._behind(value)
            for node, index in self._readers(value):
                self._ahead(value, node, index)
        self._check_constants()

    def _problem(self, node: ir.Node | None, text: str) -> None:
        self.stream.problems[text if node is None else f"{layer_name(node)} ({node.op_type}) {text}"] = None

    def _readers(self, value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
        """Yield the readers of a value that are not its shape alone, if all of them are nodes of the graph."""
        if value.is_graph_output():
            self._problem(None, f"{value.name} is an output of the model")
        for use in list(value.uses()):
            if use.node.graph is not self.facts.graph:
                self._problem(use.node, "reads it in a body")
            elif operator_of(use.node) not in ("Shape", "Size"):
                yield use.node, use.idx

    # What makes a value of the stream

    def _behind(self, value: ir.Value) -> None:
        node = value.producer()
        if node is None:
            self._problem(None, f"{value.name} is an input of the model")
            return
        kind, width = operator_of(node), self.stream.width
        if (layer := self.facts.made.get(id(value))) is not None:
            if self._usable(layer, layer.n):
                self.stream.writers[id(layer.node)] = layer
        elif kind in SUMS:
            moving = [self._operand(node, i) for i in range(len(node.inputs))]
            self.stream.sums += sum(moving) > 1
        elif kind in ("Mul", "Div"):
            self._factor_behind(node)
        elif kind in NORMS:
            if value is node.outputs[0]:
                if not self._is_plain(node):
                    self._problem(node, "is a norm whose gain would have to be turned: it stands behind the branch")
            elif kind in SKIP and value is node.outputs[-1]:
                self._summands(node)
        elif self.facts.keeps_rows(node, width):
            for i in range(len(node.inputs) if kind == "Concat" else 1):
                self._operand(node, i)
        else:
            self._problem(node, "writes to it")

    def _factor_behind(self, node: ir.Node) -> None:
        """Go back through a product with one number a row."""
        per_row = [self.facts.is_per_row(v) for v in node.inputs]
        if node.op_type == "Mul" and sum(per_row) == 1:
            self._operand(node, per_row.index(False))
        elif node.op_type == "Div" and per_row == [False, True]:
            self._operand(node, 0)
        else:
            self._problem(node, "scales its channels, so that the result could not be turned")

    def _operand(self, node: ir.Node, index: int) -> bool:
        """Take an input of a node for a part of the stream; return whether it is computed there."""
        value = node.inputs[index]
        view = constant_view(value)
        if value is None or value.name == "":
            return False
        if view is None and not self.facts.is_per_row(value):
            self._pending.append(value)
            return True
        if view is None or not view.shape or view.shape[-1] == 1:
            self.stream.keeps_ones = True
        elif view.overridable:
            self._problem(node, f"adds {view.name}, which a caller may override")
        elif view.shape[-1] != self.stream.width or view.dtype not in FLOATS:
            self._problem(node, f"adds the constant {view.name} of shape {list(view.shape)} and type {view.dtype}")
        elif not any(slot.node is node and slot.index == index for slot in self.stream.constants):
            self.stream.constants.append(Slot(node, index))
        return False

    # What reads a value of the stream

    def _ahead(self, value: ir.Value, node: ir.Node, index: int) -> None:
        kind, facts = operator_of(node), self.facts
        other = node.inputs[1 - index] if len(node.inputs) == 2 else None
        if (layer := facts.reading.get(id(node))) is not None and index == 0:
            self._read_by(layer, None)
        elif kind in SUMS:
            self._pending.append(node.outputs[0])
        elif is_square(node):
            self._squares(node.outputs[0])
        elif kind in ("Mul", "Div") and facts.is_per_row(other) and (kind == "Mul" or index == 0):
            self._pending.append(node.outputs[0])
        elif kind == "Mul" and self._is_vector(other):
            self._behind_gain(node.outputs[0], Gained((Slot(node, 1 - index),)))
        elif kind in NORMS:
            self._normalized(node, index)
        elif kind in ("ReduceMean", "ReduceSum") and facts.reduces_last(node):
            self.stream.keeps_ones = True
        elif kind in ("ReduceL2", "ReduceSumSquare") and facts.reduces_last(node):
            self.stream.norms[layer_name(node)] = None
        elif index == 0 and kind != "Concat" and facts.keeps_rows(node, self.stream.width):
            self._pending += node.outputs
        elif kind == "Concat" and facts.keeps_rows(node, self.stream.width):
            self._pending.append(node.outputs[0])
        else:
            self._problem(node, "reads it")

    def _squares(self, value: ir.Value) -> None:
        """Follow squares of the stream to their means."""
        for node, _ in self._readers(value):
            if operator_of(node) in ("ReduceMean", "ReduceSum") and self.facts.reduces_last(node):
                self.stream.norms[layer_name(node)] = None
            elif operator_of(node) in ("Cast", "Identity"):
                self._squares(node.outputs[0])
            else:
                self._problem(node, "reads squares of it")

    def _normalized(self, node: ir.Node, index: int) -> None:
        """Go on behind a norm that is one node."""
        kind, skip = operator_of(node), operator_of(node) in SKIP
        gain = 2 if skip else 1
        axis = self.facts.is_last(node.attributes.get_int("axis", -1), node.inputs[0]) if node.inputs[0] is not None else None
        if index >= gain or axis is not True:
            self._problem(node, "reads it, and not along its last axis alone" if index < gain else "reads it")
            return
        self.stream.norms[layer_name(node)] = None
        self.stream.keeps_ones |= kind in CENTRED
        if skip:
            self._summands(node)
            self._pending += node.outputs[3:4]
        if self._is_plain(node):
            self._pending.append(node.outputs[0])
        elif not self._is_vector(operand(node, gain)):
            self._problem(node, "has a gain that is no constant vector")
        else:
            shift = self._shift(node)
            if shift is not None and not self._is_vector(shift.node.inputs[shift.index]):
                self._problem(node, "has a shift that is no constant vector")
            else:
                self._behind_gain(node.outputs[0], Gained((Slot(node, gain),), shift))

    def _summands(self, node: ir.Node) -> None:
        """Take what a norm with a sum before it adds for parts of the stream."""
        bias = 4 if operator_of(node) in CENTRED else 3
        indices = [i for i in (0, 1, bias) if operand(node, i) is not None]
        self.stream.sums += sum(self._operand(node, i) for i in indices) > 1

    def _shift(self, node: ir.Node) -> Slot | None:
        """Return the shift of a norm that is one node, if it has one that is not 0."""
        kind = operator_of(node)
        index = {"LayerNormalization": 2, "com.microsoft.SkipLayerNormalization": 3}.get(kind)
        if index is None or operand(node, index) is None:
            return None
        return Slot(node, index)

    def _is_plain(self, node: ir.Node) -> bool:
        """Whether a norm has the same gain for all channels, and no shift."""
        gain, shift = constant_view(operand(node, 2 if operator_of(node) in SKIP else 1)), self._shift(node)
        if gain is None or gain.overridable:
            return False
        scale = gain.tensor().numpy()
        offset = None if shift is None else constant_view(shift.node.inputs[shift.index])
        no_shift = shift is None or (offset is not None and not offset.overridable and not offset.tensor().numpy().any())
        return no_shift and bool((scale == scale.reshape(-1)[0]).all())

    def _behind_gain(self, value: ir.Value, gained: Gained) -> None:
        """Follow a value behind a gain to the layers that read it."""
        if id(value) in self._gained:
            return
        self._gained.add(id(value))
        for node, index in self._readers(value):
            kind, result = operator_of(node), node.outputs[0]
            other = node.inputs[1 - index] if len(node.inputs) == 2 else None
            if (layer := self.facts.reading.get(id(node))) is not None and index == 0:
                self._read_by(layer, gained)
            elif kind == "Add" and gained.shift is None and self._is_vector(other):
                self._behind_gain(result, Gained(gained.scales, Slot(node, 1 - index)))
            elif kind == "Mul" and gained.shift is None and self._is_vector(other):
                self._behind_gain(result, Gained((*gained.scales, Slot(node, 1 - index)), None))
            elif index == 0 and kind != "Concat" and self.facts.keeps_rows(node, self.stream.width):
                for output in node.outputs:
                    self._behind_gain(output, gained)
            else:
                self._problem(node, f"reads it behind the gain of {layer_name(gained.scales[0].node)}, and is no linear layer")

    def _read_by(self, layer: LinearLayer, gained: Gained | None) -> None:
        if self._usable(layer, layer.k):
            self.stream.readers[id(layer.node)] = layer, gained

    def _usable(self, layer: LinearLayer, width: int) -> bool:
        """Whether a layer's weight can be rotated along an axis of ``width``."""
        if width != self.stream.width:
            self._problem(layer.node, f"has {width} channels there, not {self.stream.width}")
        elif layer.name in self.facts.shared:
            self._problem(layer.node, f"shares its weight {layer.weight_name} with other layers")
        else:
            return True
        return False

    def _is_vector(self, value: ir.Value | None) -> bool:
        """Whether a value is a constant with one number a channel."""
        view = constant_view(value)
        if view is None or view.overridable or view.dtype not in FLOATS or not view.shape:
            return False
        return view.shape[-1] == self.stream.width and all(d == 1 for d in view.shape[:-1])

    def _check_constants(self) -> None:
        """Large constants must not be read by anything but a head: there would be two of them, and the file would grow."""
        taken = {slot.node for slot in self.stream.constants}
        for slot in self.stream.constants:
            others = [node for node in float_readers(slot.view.source) if node not in taken]
            if all(self._is_head(node, slot) for node in others):
                self.stream.tied |= set(map(id, others))
            elif np.prod(slot.view.shape) > self.stream.width:
                names = ", ".join(f"{layer_name(node)} ({node.op_type})" for node in others[:3])
                self._problem(None, f"table {slot.view.name} is read by {names} too: turned for one, it would be stored twice")

    def _is_head(self, node: ir.Node, slot: Slot) -> bool:
        """Whether a node is a layer that multiplies by the rows of a constant, as it is stored."""
        layer, _ = self.stream.readers.get(id(node), (None, None))
        if layer is None:
            return False
        return layer.transposed and not slot.view.steps and not layer.weight.steps and layer.weight.source is slot.view.source
