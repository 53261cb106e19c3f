"""What is known of the last axis of a graph's values, and of the nodes that leave it as it is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import RewriteContext, known
from magr_onnx.passes.graph.constants import constant_view, fixed_array, ints, step_of
from magr_onnx.passes.graph.nodes import operand, operator_of
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.weighted import sharing

_SIMPLIFIED = ("RMSNormalization", "SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
SKIP = ("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization")
CENTRED = ("LayerNormalization", "com.microsoft.SkipLayerNormalization")
NORMS = ("LayerNormalization", *_SIMPLIFIED, *SKIP)
"""Operators that are norms; all others are nodes of decomposed ones."""

SUMS = ("Add", "Sub", "Sum")
_ELEMENTWISE = ("Sqrt", "Reciprocal", "Cast", "Identity", "Div", "Mul", "Pow", "Max", "Neg")
_ALONG = ("Identity", "Cast", "Dropout", "Neg", "Squeeze", "Expand")
"""Operators that never change the last axis, if that is longer than 1."""


class Facts:
    """What is known of a model's values, and its linear layers."""

    def __init__(self, model: ir.Model) -> None:
        self._shapes = RewriteContext(model)
        layers, _ = find(model)
        self.graph = model.graph
        self.shared = sharing(layers)
        layers = [layer for layer in layers if not layer.nested]
        self.made: Mapping[int, LinearLayer] = {id(layer.output): layer for layer in layers}
        self.reading: Mapping[int, LinearLayer] = {id(layer.node): layer for layer in layers}
        self._ranks: dict[int, int | None] = {}
        self._per_row: dict[int, bool] = {}
        for node in model.graph:  # in order, so that what one is computed from is known
            for value in node.outputs:
                self._ranks[id(value)], self._per_row[id(value)] = self._rank_of(value), self._is_per_row(value)

    def last(self, value: ir.Value | None) -> int | None:
        """Return the length of the last axis; None where it is unknown."""
        view = constant_view(value)
        shape = list(view.shape) if view is not None else None if value is None else self._shapes.shape(value)
        return known(shape[-1]) if shape else None

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the rank; where no shape is known, behind operators of onnxruntime say, that of what the value is computed from."""
        return self._ranks[id(value)] if id(value) in self._ranks else self._rank_of(value)

    def _rank_of(self, value: ir.Value | None) -> int | None:
        view = constant_view(value)
        shape = view.shape if view is not None else None if value is None else self._shapes.shape(value)
        node = None if value is None else value.producer()
        if shape is not None or node is None:
            return None if shape is None else len(shape)
        kind = operator_of(node)
        if kind == "Gather":
            data, indices = (self.rank(v) for v in node.inputs)
            return None if data is None or indices is None else data + indices - 1
        if kind in (*_ELEMENTWISE, *SUMS):
            return max((rank for v in node.inputs if (rank := self.rank(v)) is not None), default=None)
        return self.rank(node.inputs[0]) if kind in (*NORMS, "MatMul", "Dropout") else None

    def sizes(self, value: ir.Value) -> list[int] | None:
        """Return the lengths of a value's axes, 1 where one is unknown; None where the rank is unknown."""
        shape, rank = self._shapes.shape(value), self.rank(value)
        return None if rank is None else [known(d) or 1 for d in shape] if shape is not None else [1] * rank

    def gain_width(self, node: ir.Node) -> int | None:
        """Return the length of the gain of a norm that is one node."""
        kind = operator_of(node)
        return self.last(operand(node, 2 if kind in SKIP else 1)) if kind in NORMS else None

    def is_per_row(self, value: ir.Value | None) -> bool:
        """Whether a value is the same for all channels: its last axis has length 1, or it is a number."""
        return self._per_row[id(value)] if id(value) in self._per_row else self._is_per_row(value)

    def _is_per_row(self, value: ir.Value | None) -> bool:
        view = constant_view(value)
        if value is None:
            return False
        if view is not None:
            return not view.overridable and (not view.shape or view.shape[-1] == 1)
        if self.last(value) == 1 or self.rank(value) == 0:
            return True
        node = value.producer()
        if node is None or operator_of(node) not in (*_ELEMENTWISE, "Add"):
            return node is not None and node.op_type.startswith("Reduce") and self.reduces_last(node, keeps=True)
        return all(self.is_per_row(v) for v in node.inputs)

    def reduces_last(self, node: ir.Node, keeps: bool = False) -> bool:
        """Whether a reduction is over the last axis alone (and that ``keeps`` it, with length 1)."""
        axes, x = ints(node, "axes", 1), operand(node, 0)
        if axes is None or x is None or len(axes) != 1 or (keeps and not node.attributes.get_int("keepdims", 1)):
            return False
        return self.is_last(axes[0], x) is True

    def is_last(self, axis: int, value: ir.Value) -> bool | None:
        """Whether an axis of a value is the last; None where that is unknown."""
        if axis < 0:
            return axis == -1
        rank = self.rank(value)
        return None if rank is None else axis == rank - 1

    def keeps_rows(self, node: ir.Node, width: int) -> bool:
        """Whether a node moves rows of ``width`` numbers as they are: every row of its outputs is one of its (first) input."""
        kind, x = operator_of(node), operand(node, 0)
        if x is None or kind in _ALONG:
            return x is not None
        if kind == "Transpose":
            perm = ints(node, "perm", len(node.inputs))
            return perm is not None and perm[-1] == len(perm) - 1
        if kind == "Reshape":
            sizes = (self.row_width(x), self._target(node))
            return all(size is not None and size % width == 0 for size in sizes)
        if kind in ("Gather", "Split", "Concat"):
            axis = node.attributes.get_int("axis", 0)
            return self.is_last(axis, x) is False
        if kind == "Slice":
            axes = ints(node, "axes", 3)
            return axes is not None and all(self.is_last(a, x) is False for a in axes)
        if kind == "Unsqueeze":
            axes, rank = ints(node, "axes", 1), self.rank(x)
            return axes is not None and all(a < -1 or 0 <= a < (rank or 0) + len(axes) - 1 for a in axes)
        if kind == "Tile":
            repeats = operand(node, 1)
            maker = None if repeats is None else repeats.producer()
            array = fixed_array(maker.inputs[-1] if maker is not None and operator_of(maker) == "Concat" else repeats)
            return array is not None and array.size > 0 and array.reshape(-1)[-1] == 1
        return False

    def row_width(self, value: ir.Value | None) -> int | None:
        """Return the length of the last axis, also where only a node further back tells it; None where none does."""
        while value is not None and (size := self.last(value)) is None:
            node = value.producer()
            if node is None or operator_of(node) not in ("Reshape", "Transpose", *_ALONG, "Unsqueeze", "Tile"):
                return None
            if operator_of(node) == "Reshape" and (size := self._target(node)) is not None:
                return size
            if operator_of(node) != "Reshape" and not self.keeps_rows(node, 1):
                return None
            value = node.inputs[0]
        return None if value is None else size

    def _target(self, node: ir.Node) -> int | None:
        """Return the length of the last axis that a Reshape makes."""
        if (size := self.last(node.outputs[0])) is not None:
            return size
        shape = operand(node, 1)
        maker = None if shape is None else shape.producer()
        if maker is not None and operator_of(maker) == "Concat":
            shape = maker.inputs[-1]
        array = fixed_array(shape)
        return None if array is None or array.size == 0 or array.reshape(-1)[-1] < 1 else int(array.reshape(-1)[-1])

    def moved(self, node: ir.Node, array: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
        """Move an array as a node moves its first input, of which it has one row of axes of unknown length; nothing where that fails."""
        kind = operator_of(node)
        try:
            if kind == "Reshape":
                target = ints(node, "shape", 1)
                if target is None or 0 in target or -1 in target:
                    target = self.sizes(node.outputs[0])
                return [] if target is None else [array.reshape(target)]
            if kind == "Identity":
                return [array]
            step = step_of(node, 0, array.shape, ir.DataType.FLOAT) if kind != "Split" else None
            if step is not None:
                return [step.apply(array)]
            if kind == "Split":
                steps = [step_of(node, i, array.shape, ir.DataType.FLOAT) for i in range(len(node.outputs))]
                return [step.apply(array) for step in steps if step is not None]
            return _selected(node, array)
        except (ValueError, IndexError):  # a shape is not what was declared
            return []


def _selected(node: ir.Node, array: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Apply a Slice or a Gather with constant positions."""
    if operator_of(node) == "Gather":
        indices = fixed_array(operand(node, 1))
        return [] if indices is None else [np.take(array, indices, axis=node.attributes.get_int("axis", 0))]
    starts, ends = ints(node, "starts", 1), ints(node, "ends", 2)
    if operator_of(node) != "Slice" or starts is None or ends is None:
        return []
    axes = ints(node, "axes", 3) or list(range(len(starts)))
    steps = ints(node, "steps", 4) or [1] * len(starts)
    index = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(start, end, step)
    return [array[tuple(index)]]
