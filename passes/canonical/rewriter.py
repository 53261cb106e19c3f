"""Graph rewriting for canonicalization: operators for every opset from 7 on, with shapes and names, and without duplicate nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.constants import CASTS, ConstantView, constant_view, drop_if_unused, ints
from magr_onnx.passes.graph.inference import inferred_values
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.nodes import layer_name
from magr_onnx.passes.graph.subgraphs import graph_of, remember
from magr_onnx.report.reasons import Reason

Dims = list[int | ir.SymbolicDim]

MOST_MATRICES = 512
"""Largest stack of matrices that is split into layers; a larger one is closer to an elementwise product."""


class Refusal(NamedTuple):
    """The reason why a node cannot be canonicalized."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Pattern:
    """An equivalent pattern and its rewrite.

    Attributes:
        summary: Description for the report.
        operators: Operators it matches, with their domain where that is not ONNX's.
        rewrite: Replaces the node of a `NodeRewriter`. Returns a `Refusal` if the node matches but cannot be replaced, None if it does not
            match; the graph must not be changed in either case.
    """

    summary: str
    operators: tuple[str, ...]
    rewrite: Callable[[NodeRewriter], Refusal | bool | None]


class RewriteContext:
    """State shared by the rewriters of one model.

    Attributes:
        graph: The main graph.
        opset: Opset of ONNX's own operators.
        names: The names used in the model.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.opset_imports.get("", 0)
        self.created: dict[Hashable, list[ir.Value]] = {}
        self._model = model
        self._inferred: dict[str, ir.Value] | None = None
        self.names = Names.rescan(model.graph)

    def shape(self, value: ir.Value) -> Dims | None:
        """Return the shape of a value, inferred where the file has none; None where unknown."""
        if value.shape is not None:
            return list(value.shape)
        inferred = self._infer(value)
        return None if inferred is None or inferred.shape is None else list(inferred.shape)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return the type of a value's elements, inferred where the file has none; None where unknown."""
        inferred = self._infer(value) if value.dtype is None else value
        return None if inferred is None else inferred.dtype

    def _infer(self, value: ir.Value) -> ir.Value | None:
        if self._inferred is None:
            self._inferred = _inferred(self._model)
        return self._inferred.get(str(value.name))


def _inferred(model: ir.Model) -> dict[str, ir.Value]:
    """Return the values with the shapes and types of ONNX's inference, by name, but for names of which there are different ones."""
    values: dict[str, ir.Value] = {}
    ambiguous = set()
    for value in inferred_values(model):  # subgraphs may reuse a name
        other = values.setdefault(str(value.name), value)
        if (other.shape, other.dtype) != (value.shape, value.dtype):
            ambiguous.add(str(value.name))
    return {name: value for name, value in values.items() if name not in ambiguous}


def known(dim: int | ir.SymbolicDim) -> int | None:
    """Return a dimension if it is a number, else None."""
    return dim if isinstance(dim, int) else None


class NodeRewriter:
    """Replacement of one node.

    Attributes:
        node: The node.
        name: The name of its layer.
        context: State shared by all rewriters.
    """

    def __init__(self, context: RewriteContext, node: ir.Node) -> None:
        self.node, self.context, self.name = node, context, layer_name(node)

    @property
    def graph(self) -> ir.Graph:
        """Return the graph of the node: the main graph or a subgraph."""
        return graph_of(self.node)

    @property
    def dtype(self) -> ir.DataType:
        """Return the type of the weight, and so of all floats of the node."""
        return next(view.dtype for v in self.node.inputs[:2] if (view := weight(v)) is not None)

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if len(self.node.inputs) > index else None

    def shape(self, value: ir.Value) -> Dims | None:
        return self.context.shape(value)

    # Operators: each sets the shape and type of its output; equal calls return the same value.

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        before = x.producer()
        if before is not None and before.op_type == "Transpose" and before.domain == "" and before.inputs[0] is not None:
            perm_before = ints(before, "perm", 1) or list(reversed(range(len(perm))))
            return self.transpose(before.inputs[0], [perm_before[p] for p in perm])  # merge consecutive Transposes
        if list(perm) == list(range(len(perm))):
            return x
        shape = self.shape(x)
        fits = shape is not None and len(shape) == len(perm)  # a declared shape may be wrong
        return self._node("Transpose", [x], [shape[p] for p in perm] if fits and shape is not None else None, perm=list(perm))

    def reshape(self, x: ir.Value, target: Sequence[int]) -> ir.Value:
        """Reshape to ``target`` as in ONNX: 0 keeps a dimension, -1 is inferred."""
        shape = self.shape(x)
        if shape == list(target):
            return x
        return self._node("Reshape", [x, self.ints(target)], _reshaped(shape, target))

    def unsqueeze(self, x: ir.Value, count: int) -> ir.Value:
        """Prepend ``count`` axes of 1."""
        if not count:
            return x
        axes, shape = list(range(count)), self.shape(x)
        return self._axes("Unsqueeze", x, "axes", axes, None if shape is None else [*[1] * count, *shape])

    def expand(self, x: ir.Value, dims: Sequence[int]) -> ir.Value:
        """Broadcast axes of 1 to ``dims``, aligned at the last axis."""
        shape = self.shape(x)
        after = None
        if shape is not None:
            start = len(shape) - len(dims)
            after = [*shape[:start], *(d if d > 1 else size for d, size in zip(dims, shape[start:], strict=True))]
        return self._node("Expand", [x, self.ints(dims)], after)

    def split(self, x: ir.Value, axis: int, count: int) -> list[ir.Value]:
        """Split an axis of size ``count`` into slices of size 1."""
        shape = self.shape(x)
        after = None if shape is None else [*shape[:axis], 1, *shape[axis + 1 :]]
        if self.context.opset < 18:
            return self._nodes("Split", [x], after, count, axis=axis)
        return self._nodes("Split", [x], after, count, axis=axis, num_outputs=count)

    def matrices(self, stack: ir.Value) -> list[ir.Value]:
        """Return the matrices ``(K, N)`` of a constant ``(E, K, N)``.

        Where they are contiguous in a tensor that only this node reads, they become initializers that view the same memory or file; else
        they are a Split and Reshapes, so that nothing is stored twice.
        """
        view = weight(stack)
        assert view is not None
        count, k, n = view.shape
        if any(step.key[0] != "reshape" for step in view.steps) or self._shared(stack):
            return [self.reshape(matrix, (k, n)) for matrix in self.split(stack, 0, count)]
        values = [self._constant(f"{view.name}[{i}]", matrix) for i, matrix in enumerate(_split_tensor(view.stored, count, k, n))]
        drop_if_unused(stack)
        return values

    def _shared(self, value: ir.Value) -> bool:
        """Return whether another node reads a constant, or a value it is folded from."""
        reader: ir.Node | None = None
        while True:
            if any(use.node not in (self.node, reader) for use in value.uses()):
                return True
            reader = value.producer()
            if reader is None or reader.op_type == "Constant" or reader.inputs[0] is None:
                return False
            value = reader.inputs[0]

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        shape = self.shape(values[0])
        after = None if shape is None else [*shape[:axis], len(values), *shape[axis + 1 :]]
        return self._node("Concat", list(values), after, axis=axis)

    def cast(self, x: ir.Value, to: ir.DataType) -> ir.Value:
        return x if x.dtype == to else self._node("Cast", [x], self.shape(x), dtype=to, to=to.value)

    def times(self, x: ir.Value, factor: float) -> ir.Value:
        """Multiply x by a number."""
        if factor == 1.0:
            return x
        number = self._constant(f"{self.name}_factor", np.asarray(factor, (x.dtype or self.dtype).numpy()))
        return self._node("Mul", [x, number], self.shape(x))

    def plus(self, x: ir.Value, y: ir.Value | None, factor: float) -> ir.Value:
        """Return ``x + factor y`` in the node's shape; x alone where y is None."""
        if y is None or factor == 0:
            return x
        return self._node("Add", [x, self.times(y, factor)], self.shape(self.node.outputs[0]))

    def sum(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Sum over axes and remove them."""
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
        """Add a layer with the name and properties of the node; one of several has its index appended to the name."""
        if op == "Gemm" and len(inputs) == 2 and self.context.opset < 11:  # where the addend is required
            inputs = [*inputs, self._constant(f"{self.name}_zero", np.zeros(1, self.dtype.numpy()))]
        output = self._nodes(op, list(inputs), shape, 1, fresh=True, **(attributes or {}))[0]
        layer = output.producer()
        assert layer is not None
        layer.metadata_props.update(self.node.metadata_props)
        layer.name = self.name if index is None else self.context.names.node(f"{self.name}[{index}]")
        if index is not None:
            remember(layer, self.name, weight)
        return output

    def finish(self, value: ir.Value) -> bool:
        """Replace the node's output by ``value``, which inherits its name, type and shape."""
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
        """Return a constant of integers."""
        key = ("ints", tuple(values))
        if not (constants := self.context.created.get(key, [])) or constants[0].graph is None:
            name = "onnx_magr_" + ("_".join(map(str, values)).replace("-", "minus") or "scalar")
            constants = self.context.created[key] = [self._constant(name[:80], np.asarray(values, np.int64).reshape(-1))]
        return constants[0]

    def _constant(self, name: str, array: Any) -> ir.Value:
        """Add an initializer to the main graph, where subgraphs see it too."""
        return add_initializer(self.context.graph, name, array)

    def _axes(self, op: str, x: ir.Value, name: str, axes: list[int], shape: Dims | None, **attributes: Any) -> ir.Value:
        if self.context.opset < 13:
            attributes[name] = axes
            return self._node(op, [x], shape, **attributes)
        return self._node(op, [x, self.ints(axes)], shape, **attributes)

    def _node(self, op: str, inputs: list[ir.Value], shape: Dims | None, dtype: ir.DataType | None = None, **attributes: Any) -> ir.Value:
        return self._nodes(op, inputs, shape, 1, dtype, **attributes)[0]

    def _nodes(
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
        if not fresh and _in_graph(existing := self.context.created.get(key, [])):
            return existing
        names = self.context.names
        node = ir.node(op, inputs, attributes, num_outputs=count, name=names.node(f"{self.name}_{op.lower()}"))
        for output in node.outputs:
            output.name = names.value(f"{node.name}_out")
            output.dtype = dtype or inputs[0].dtype or self.dtype
            output.shape = None if shape is None else ir.Shape(shape)
        self.graph.insert_before(self.node, node)
        if not fresh:
            self.context.created[key] = list(node.outputs)
        return list(node.outputs)


def _split_tensor(tensor: ir.TensorProtocol, count: int, k: int, n: int) -> list[ir.TensorProtocol]:
    """Split a tensor into ``count`` matrices ``(k, n)``: ranges of its data file, or views of its array."""
    shape, size = ir.Shape([k, n]), tensor.nbytes // count
    if isinstance(tensor, ir.ExternalTensor):
        path, start, folder = tensor.location, tensor.offset or 0, tensor.base_dir
        return [ir.ExternalTensor(path, start + i * size, size, tensor.dtype, shape=shape, name="", base_dir=folder) for i in range(count)]
    return [ir.Tensor(matrix, tensor.dtype, shape=shape) for matrix in tensor.numpy().reshape(count, k, n)]


def _in_graph(values: Sequence[ir.Value]) -> bool:
    """Return whether there are values and their nodes are still in a graph."""
    return bool(values) and all((node := v.producer()) is not None and node.graph is not None for v in values)


def _reshaped(shape: Dims | None, target: Sequence[int]) -> Dims | None:
    if shape is None:
        return None if 0 in target else [d if d > 0 else ir.SymbolicDim(None) for d in target]
    dims: Dims = [shape[i] if d == 0 else ir.SymbolicDim(None) if d < 0 else d for i, d in enumerate(target)]
    sizes = [d for d in shape if isinstance(d, int)]
    fixed = [d for i, d in enumerate(dims) if target[i] != -1]
    if -1 in target and len(sizes) == len(shape) and all(isinstance(d, int) for d in fixed):
        dims[list(target).index(-1)] = math.prod(sizes) // max(math.prod(d for d in fixed if isinstance(d, int)), 1)
    return dims


def weight(value: ir.Value | None) -> ConstantView | None:
    """Return the view of a constant value that may be a layer's weight, else None."""
    view = constant_view(value)
    if view is None or view.overridable or view.exposed or view.dtype not in CASTS or 0 in view.shape:
        return None
    return view
