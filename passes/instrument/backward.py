"""Reverse-mode traversal of a graph: gradients of outputs with respect to inner values, with one rule per operator.

Only nodes between the requested values and the outputs are differentiated. Values before an operator without a rule have no gradient, and
`Backward.blocked` names the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.instrument.segments import reads
from magr_onnx.passes.instrument.taps import Extension

Maybe = ir.Value | None
Grads = Sequence[Maybe]
Rule = Callable[["Backward", ir.Node, Grads], Grads | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Backward:
    """A copy of the model while its backward graph is added.

    Attributes:
        graph: The copy.
        blocked: Operators without a rule between the values and the outputs.
    """

    def __init__(self, graph: Extension, shapes: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        self.blocked: set[str] = set()
        self._shapes = shapes
        self._count = 0
        self._gradients: dict[str, list[ir.Value]] = {}
        self._lost: set[str] = set()
        self._active: set[str] = set()

    def run(self, seeds: Mapping[str, ir.Value], targets: Iterable[str]) -> dict[str, ir.Value]:
        """Differentiate ``sum over outputs <seed, output>`` with respect to ``targets``; return the gradients that exist."""
        targets = list(targets)
        nodes = list(self.graph.model.graph)
        active = self._active = set(targets)
        for node in nodes:
            if not _flat(node) and any(name in active for name in reads(node)):
                active.update(str(v.name) for v in node.outputs)
        for name, seed in seeds.items():
            self._gradients.setdefault(name, []).append(seed)
        for node in reversed(nodes):
            integers_read = {str(v.name) for v in node.inputs if v is not None and v.dtype not in FLOATS}
            inputs = set() if _flat(node) else {name for name in reads(node) if name in active} - integers_read
            reached = [self.gradient(str(v.name)) for v in node.outputs]
            lost = any(v.name in self._lost for v in node.outputs)
            if not inputs or not (lost or any(g is not None for g in reached)):
                continue
            input_gradients: Grads | None = None
            if not lost and node.op_type in RULES and node.domain in ("", "com.microsoft"):
                input_gradients = RULES[node.op_type](self, node, reached)
            if input_gradients is None:
                if not lost:
                    self.blocked.add(node.op_type)
                self._lost.update(inputs)
                continue
            for value, gradient in zip_longest(node.inputs, input_gradients):
                if value is None or value.name not in inputs:
                    continue
                if gradient is None:  # the rule does not support this operand
                    self.blocked.add(node.op_type)
                    self._lost.add(str(value.name))
                else:
                    self._gradients.setdefault(str(value.name), []).append(gradient)
        return {name: g for name in targets if name not in self._lost and (g := self.gradient(name)) is not None}

    def gradient(self, name: str) -> ir.Value | None:
        """Return the sum of a value's gradients so far; complete once all its readers are visited."""
        terms = self._gradients.get(name)
        if not terms:
            return None
        total = terms[0]
        for term in terms[1:]:
            total = self.op("Add", total, term)
        self._gradients[name] = [total]
        return total

    # --- Operators for rules ------------------------------------------------------------------------------------

    def op(self, name: str, *inputs: Maybe, **attributes: Any) -> ir.Value:
        return self.graph.add(name, inputs, self._name(), **attributes)

    def microsoft(self, name: str, *inputs: Maybe, **attributes: Any) -> ir.Value:
        """Add an operator of onnxruntime's own domain."""
        self.graph.model.opset_imports.setdefault("com.microsoft", 1)
        return self.graph.append(self.graph.model.graph, ir.node(name, inputs, attributes, domain="com.microsoft", name=self._name()))[0]

    def _name(self) -> str:
        self._count += 1
        return f"__grad_{self._count}"

    def number(self, value: float, like: Maybe) -> ir.Value:
        kind = None if like is None else like.dtype
        constant = self.graph.constant(self._name(), np.array(value, (kind or ir.DataType.FLOAT).numpy()))
        return constant if like is None or kind is not None else self.cast(constant, like)

    def cast(self, value: Maybe, like: Maybe) -> ir.Value:
        """Cast ``value`` to the type of another value, which may be undeclared from opset 15 on."""
        if self.graph.opset >= 15:
            return self.op("CastLike", value, like)
        return self.op("Cast", value, to=(None if like is None else like.dtype) or ir.DataType.FLOAT)

    def integers(self, values: Sequence[int]) -> ir.Value:
        return self.graph.constant(self._name(), np.array(values, np.int64))

    def shape(self, value: Maybe) -> tuple[int, ...]:
        """Return the shape on one batch; rules may use only its rank and axes of size 1."""
        assert value is not None
        if value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape.numpy())
        return tuple(self._shapes[str(value.name)])

    def sum(self, gradient: Maybe, axes: Sequence[int], keepdims: bool = True) -> ir.Value:
        return self.graph.along("ReduceSum", gradient, axes, self._name(), keepdims=int(keepdims))

    def mean(self, value: Maybe, axis: int = -1) -> ir.Value:
        return self.graph.along("ReduceMean", value, [axis], self._name(), since=18, keepdims=1)

    def maximum(self, value: Maybe, axis: int = -1) -> ir.Value:
        return self.graph.along("ReduceMax", value, [axis], self._name(), since=18, keepdims=1)

    def unsqueeze(self, value: Maybe, axes: Sequence[int]) -> ir.Value:
        return self.graph.along("Unsqueeze", value, axes, self._name())

    def to_shape_of(self, gradient: Maybe, value: Maybe, result: Sequence[int]) -> Maybe:
        """Sum the gradient of a broadcast operand over the axes along which it was broadcast to ``result``."""
        if value is None or value.name not in self._active:  # never read
            return gradient
        shape = self.shape(value)
        leading = len(result) - len(shape)
        if leading:
            gradient = self.sum(gradient, list(range(leading)), keepdims=False)
        axes = [i for i, size in enumerate(shape) if size == 1 and result[leading + i] != 1]
        return self.sum(gradient, axes) if axes else gradient


FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, None)
# Piecewise constant or not float: inner types are often undeclared, so integers are recognized by their producer.
_FLAT = frozenset(
    (
        *("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "IsNaN", "IsInf", "Not", "And", "Or"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Sign", "Floor", "Ceil", "Round"),
    )
)


def _flat(node: ir.Node) -> bool:
    """Return whether no output of a node has a gradient."""
    if node.op_type == "Cast" and "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int()) not in FLOATS
    return node.op_type in _FLAT and node.domain == ""
