"""What the forms of this folder write graphs with: operators as every opset from 7 has them, shapes, names, and no node twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from magr_onnx.passes.graph.constants import CASTS, ConstantView, constant_view, drop_if_unused, ints
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.subgraphs import remember
from magr_onnx.passes.layers.linear import layer_name
from magr_onnx.report.reasons import Reason

Dims = list[int | ir.SymbolicDim]

MOST_MATRICES = 512
"""Of a stack that becomes layers of their own: more would be no layers but an elementwise product."""


class Refusal(NamedTuple):
    """Why a node is not brought into its canonical form."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Form:
    """One rewrite of this folder.

    Attributes:
        summary: For the report: what layers of this form were.
        operators: Nodes it looks at, with their domain where that is not ONNX's.
        rewrite: Replaces the node of an `Edit`; a `Refusal` if it is of this form and cannot be replaced, None if it is not of this form.
            Nothing may be written before that is clear.
    """

    summary: str
    operators: tuple[str, ...]
    rewrite: Callable[[Edit], Refusal | bool | None]


class Canvas:
    """What the edits of one model share.

    Attributes:
        graph: The main graph.
        opset: Of ONNX's own operators.
        names: The names taken in the model.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 0)
        self.made: dict[Hashable, list[ir.Value]] = {}
        self._model = model
        self._inferred: dict[str, Dims] | None = None
        self.names = Names.rescan(model.graph)

    def shape(self, value: ir.Value) -> Dims | None:
        """The shape of a value, inferred where the file does not say; None where it has none."""
        if value.shape is not None:
            return list(value.shape)
        if self._inferred is None:
            self._inferred = _inferred(self._model)
        return self._inferred.get(str(value.name))


def _inferred(model: ir.Model) -> dict[str, Dims]:
    """Shapes that ONNX's own inference finds, by value name."""
    copy, logger = model.clone(), logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a model it cannot follow has fewer shapes, and forms that need them say so
    try:
        ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    finally:
        logger.setLevel(level)
    found: dict[str, Dims | None] = {}
    for value in (v for node in copy.graph.all_nodes() for v in node.outputs):
        name, shape = str(value.name), None if value.shape is None else list(value.shape)
        found[name] = shape if found.get(name, shape) == shape else None  # bodies may use a name twice
    return {name: shape for name, shape in found.items() if shape is not None}


def known(dim: int | ir.SymbolicDim) -> int | None:
    """A dimension, where it is a number."""
    return dim if isinstance(dim, int) else None


class Edit:
    """One node being replaced.

    Attributes:
        node: The node.
        name: The name of its layer.
        canvas: What all edits share.
    """

    def __init__(self, canvas: Canvas, node: ir.Node) -> None:
        self.node, self.canvas, self.name = node, canvas, layer_name(node)

    @property
    def graph(self) -> ir.Graph:
        """The main graph, or the body the node is in."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        return graph

    @property
    def dtype(self) -> ir.DataType:
        """Of the weight, and so of all floats of the node."""
        return next(found.dtype for v in self.node.inputs[:2] if (found := weight(v)) is not None)

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if len(self.node.inputs) > index else None

    def integer(self, name: str, default: int = 0) -> int:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else int(attribute.as_int())

    def real(self, name: str, default: float = 1.0) -> float:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else float(attribute.as_float())

    def shape(self, value: ir.Value) -> Dims | None:
        return self.canvas.shape(value)

    # Operators. Each sets the shape and the type of what it makes; asked twice for the same, it gives the first.

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        before = x.producer()
        if before is not None and before.op_type == "Transpose" and before.domain == "" and before.inputs[0] is not None:
            first = ints(before, "perm", 1) or list(reversed(range(len(perm))))
            return self.transpose(before.inputs[0], [first[p] for p in perm])  # two in a row are one
        if list(perm) == list(range(len(perm))):
            return x
        shape = self.shape(x)
        fits = shape is not None and len(shape) == len(perm)  # what a file declares may be wrong
        return self._make("Transpose", [x], [shape[p] for p in perm] if fits and shape is not None else None, perm=list(perm))

    def reshape(self, x: ir.Value, target: Sequence[int]) -> ir.Value:
        """``target`` as in ONNX: 0 keeps the dimension at its place, -1 is what is left."""
        shape = self.shape(x)
        if shape == list(target):
            return x
        return self._make("Reshape", [x, self.ints(target)], _reshaped(shape, target))

    def unsqueeze(self, x: ir.Value, count: int) -> ir.Value:
        """``count`` leading axes of one."""
        if not count:
            return x
        axes, shape = list(range(count)), self.shape(x)
        return self._axes("Unsqueeze", x, "axes", axes, None if shape is None else [*[1] * count, *shape])

    def expand(self, x: ir.Value, dims: Sequence[int]) -> ir.Value:
        """Axes of one stretched to ``dims``, counted from the last axis; the others as they are."""
        shape = self.shape(x)
        after = None
        if shape is not None:
            start = len(shape) - len(dims)
            after = [*shape[:start], *(d if d > 1 else old for d, old in zip(dims, shape[start:], strict=True))]
        return self._make("Expand", [x, self.ints(dims)], after)

    def split(self, x: ir.Value, axis: int, count: int) -> list[ir.Value]:
        """Parts of length one along an axis that has ``count`` of them."""
        shape = self.shape(x)
        after = None if shape is None else [*shape[:axis], 1, *shape[axis + 1 :]]
        if self.canvas.opset < 18:
            return self._made("Split", [x], after, count, axis=axis)
        return self._made("Split", [x], after, count, axis=axis, num_outputs=count)

    def matrices(self, stack: ir.Value) -> list[ir.Value]:
        """The matrices ``(K, N)`` of a constant ``(E, K, N)``.

        Where they lie one behind the other in a tensor that only this node reads, they become initializers, parts of the same memory or
        file; else a Split and Reshapes, so that nothing is stored twice.
        """
        found = weight(stack)
        assert found is not None
        count, k, n = found.shape
        if any(step.key[0] != "reshape" for step in found.steps) or self._shared(stack):
            return [self.reshape(part, (k, n)) for part in self.split(stack, 0, count)]
        values = [self._constant(f"{found.name}[{i}]", part) for i, part in enumerate(_parts(found.stored, count, k, n))]
        drop_if_unused(stack)
        return values

    def _shared(self, value: ir.Value) -> bool:
        """Whether another node reads a constant, or what it is a view of."""
        below: ir.Node | None = None
        while True:
            if any(use.node not in (self.node, below) for use in value.uses()):
                return True
            below = value.producer()
            if below is None or below.op_type == "Constant" or below.inputs[0] is None:
                return False
            value = below.inputs[0]

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        shape = self.shape(values[0])
        after = None if shape is None else [*shape[:axis], len(values), *shape[axis + 1 :]]
        return self._make("Concat", list(values), after, axis=axis)

    def cast(self, x: ir.Value, to: ir.DataType) -> ir.Value:
        return x if x.dtype == to else self._make("Cast", [x], self.shape(x), dtype=to, to=to.value)

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        """``factor x``."""
        if factor == 1.0:
            return x
        number = self._constant(f"{self.name}_factor", np.asarray(factor, (x.dtype or self.dtype).numpy()))
        return self._make("Mul", [x, number], self.shape(x))

    def plus(self, x: ir.Value, y: ir.Value | None, factor: float) -> ir.Value:
        """``x + factor y``, of the node's shape; x alone where y is none."""
        if y is None or factor == 0:
            return x
        return self._make("Add", [x, self.scaled(y, factor)], self.shape(self.node.outputs[0]))

    def total(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Sums over axes, which are gone."""
        if not axes:
            return x
        shape = self.shape(x)
        after = None if shape is None else [d for i, d in enumerate(shape) if i not in axes]
        return self._axes("ReduceSum", x, "axes", list(axes), after, keepdims=0)

    def product(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        shape: Dims | None,
        attributes: Mapping[str, Any] | None = None,
        index: int | None = None,
        weight: str = "",
    ) -> ir.Value:
        """A layer, with the name and the properties of the node; one of several has its index behind its name."""
        if op == "Gemm" and len(inputs) == 2 and self.canvas.opset < 11:  # where its addend is not optional yet
            inputs = [*inputs, self._constant(f"{self.name}_zero", np.zeros(1, self.dtype.numpy()))]
        found = self._made(op, list(inputs), shape, 1, fresh=True, **(attributes or {}))[0]
        made = found.producer()
        assert made is not None
        made.metadata_props.update(self.node.metadata_props)
        made.name = self.name if index is None else self.canvas.names.node(f"{self.name}[{index}]")
        if index is not None:
            remember(made, self.name, weight)
        return found

    def finish(self, value: ir.Value) -> bool:
        """Let ``value`` take the place, name, type and shape of the node's output."""
        result = self.node.outputs[0]
        value.type = value.type if result.type is None else result.type
        value.shape = value.shape if result.shape is None else result.shape
        value.metadata_props.update(result.metadata_props)
        inputs = [v for v in self.node.inputs if v is not None]
        ir.convenience.replace_nodes_and_values(self.graph, self.node, [self.node], [], [result], [value])
        for unread in inputs:
            drop_if_unused(unread)
        return True

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant of integers."""
        key = ("ints", tuple(values))
        if not (found := self.canvas.made.get(key, [])) or found[0].graph is None:
            name = "onnx_magr_" + ("_".join(map(str, values)).replace("-", "minus") or "scalar")
            found = self.canvas.made[key] = [self._constant(name[:80], np.asarray(values, np.int64).reshape(-1))]
        return found[0]

    def _constant(self, name: str, array: Any) -> ir.Value:
        """In the main graph, which its bodies see too."""
        return add_initializer(self.canvas.graph, name, array)

    def _axes(self, op: str, x: ir.Value, name: str, axes: list[int], shape: Dims | None, **attributes: Any) -> ir.Value:
        if self.canvas.opset < 13:
            attributes[name] = axes
            return self._make(op, [x], shape, **attributes)
        return self._make(op, [x, self.ints(axes)], shape, **attributes)

    def _make(self, op: str, inputs: list[ir.Value], shape: Dims | None, dtype: ir.DataType | None = None, **attributes: Any) -> ir.Value:
        return self._made(op, inputs, shape, 1, dtype, **attributes)[0]

    def _made(
        self,
        op: str,
        inputs: list[ir.Value],
        shape: Dims | None,
        count: int,
        dtype: ir.DataType | None = None,
        fresh: bool = False,
        **attributes: Any,
    ) -> list[ir.Value]:
        key = (op, id(self.graph), *map(id, inputs), *((n, tuple(v) if isinstance(v, list) else v) for n, v in sorted(attributes.items())))
        if not fresh and _there(found := self.canvas.made.get(key, [])):
            return found
        names = self.canvas.names
        node = ir.node(op, inputs, attributes, num_outputs=count, name=names.node(f"{self.name}_{op.lower()}"))
        for output in node.outputs:
            output.name = names.value(f"{node.name}_out")
            output.dtype = dtype or inputs[0].dtype or self.dtype
            output.shape = None if shape is None else ir.Shape(shape)
        self.graph.insert_before(self.node, node)
        if not fresh:
            self.canvas.made[key] = list(node.outputs)
        return list(node.outputs)


def _parts(tensor: ir.TensorProtocol, count: int, k: int, n: int) -> list[ir.TensorProtocol]:
    """A tensor as ``count`` matrices ``(k, n)``: places in its data file, or parts of one array."""
    shape, size = ir.Shape([k, n]), tensor.nbytes // count
    if isinstance(tensor, ir.ExternalTensor):
        place, start, folder = tensor.location, tensor.offset or 0, tensor.base_dir
        return [ir.ExternalTensor(place, start + i * size, size, tensor.dtype, shape=shape, name="", base_dir=folder) for i in range(count)]
    return [ir.Tensor(part, tensor.dtype, shape=shape) for part in tensor.numpy().reshape(count, k, n)]


def _there(values: Sequence[ir.Value]) -> bool:
    """Whether values were made, and are still in their graph."""
    return bool(values) and all((node := v.producer()) is not None and node.graph is not None for v in values)


def _reshaped(shape: Dims | None, target: Sequence[int]) -> Dims | None:
    if shape is None:
        return None if 0 in target else [d if d > 0 else ir.SymbolicDim(None) for d in target]
    dims: Dims = [shape[i] if d == 0 else ir.SymbolicDim(None) if d < 0 else d for i, d in enumerate(target)]
    sizes = [d for d in shape if isinstance(d, int)]
    others = [d for i, d in enumerate(dims) if target[i] != -1]
    if -1 in target and len(sizes) == len(shape) and all(isinstance(d, int) for d in others):
        dims[list(target).index(-1)] = math.prod(sizes) // max(math.prod(d for d in others if isinstance(d, int)), 1)
    return dims


def weight(value: ir.Value | None) -> ConstantView | None:
    """The constant behind a value, if a layer may have it for its weight."""
    found = constant_view(value)
    if found is None or found.overridable or found.exposed or found.dtype not in CASTS or 0 in found.shape:
        return None
    return found
