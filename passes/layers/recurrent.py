"""Views of recurrent operators, and their weights as matrices.

A `RecurrentLayer` is a view of an LSTM, GRU or RNN whose weights are constant. In each of its ``D`` directions, with ``G`` gates of ``H``
hidden units, it computes at every step ``x_t W + h_{t-1} R`` with ``W (I, G H)`` and ``R (H, G H)``: two matrices a direction, each with
an input of its own. (GRU multiplies a part of R by a state that a gate has scaled.)

Exporters that reorder gates leave Slice, Concat and Unsqueeze between the parameters and the operator. They are folded when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.graph.constants import ConstantView, Step, constant_view, dequantized, drop_if_unused, ints
from magr_onnx.passes.graph.nodes import layer_name, operand
from magr_onnx.passes.graph.subgraphs import SubgraphPath
from magr_onnx.passes.layers.conv import is_made_of_codes
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import WeightedNode, find_views, in_closed_body, in_functions, refusal, skip_of
from magr_onnx.report.reasons import Reason, RecurrentReason, Skip

RecurrentForm = Literal["dynamic-quantize-lstm", "fold", "dequantize"]
FORMS: tuple[RecurrentForm, ...] = ("dynamic-quantize-lstm", "fold", "dequantize")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Gates by operator."""


@dataclass(frozen=True, slots=True, eq=False)
class RecurrentLayer(WeightedNode):
    """A safe view of one recurrent operator.

    Attributes:
        weight: ``W (D, G H, I)``, for the input.
        recurrence: ``R (D, G H, H)``, for the state.
        operator: LSTM, GRU or RNN.
    """

    recurrence: ConstantView
    operator: str

    @property
    def op(self) -> str:
        """Return the operator in the float model."""
        return self.operator

    @property
    def directions(self) -> int:
        """Return ``D``."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Return the input width ``I``."""
        return self.weight.shape[2]

    @property
    def hidden(self) -> int:
        """Return the hidden units ``H``."""
        return self.recurrence.shape[2]

    @property
    def k(self) -> int:
        """Return the rows of both matrices of a direction, ``I + H``."""
        return self.width + self.hidden

    @property
    def n(self) -> int:
        """Return the columns of a direction, ``G H``."""
        return self.weight.shape[1]

    @property
    def weight_key(self) -> Hashable:
        return (*self.weight.key, *self.recurrence.key)

    @property
    def bytes(self) -> int:
        """Return the size of both weights as the operator reads them."""
        return sum(view.tensor().nbytes for view in (self.weight, self.recurrence))

    def matrices(self) -> tuple[Array, Array]:
        """Read the matrices of all directions, ``(D, I, G H)`` and ``(D, H, G H)`` float32."""
        w, r = (to_matrices(view.tensor().numpy().astype(np.float32)) for view in (self.weight, self.recurrence))
        return w, r

    def read(self) -> Array:
        """Read the matrices of all directions, one above the other: ``(D, I + H, G H)`` float32."""
        return np.concatenate(self.matrices(), axis=1)

    def read_bias(self) -> None:
        """Return None: biases stay as they are."""


def to_matrices(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Turn a weight ``(D, G H, K)`` into matrices ``(D, K, G H)``, or back."""
    return np.ascontiguousarray(weight.transpose(0, 2, 1))


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[RecurrentLayer], list[Skip]]:
    """Find every recurrent operator with constant weights, in subgraphs too, and skips for the others; see `find_views`."""
    layers, skips = find_views(model, GATES, _view, selection)
    return layers, skips + in_functions(model, GATES)


def _view(node: ir.Node, path: SubgraphPath) -> RecurrentLayer | Skip:
    if (refused := in_closed_body(node, path)) is not None:
        return refused
    views = []
    for value in (operand(node, 1), operand(node, 2)):
        view = None if operand(node, 0) is None else packed_view(value)
        if view is None:
            quantized = value is not None and (dequantized(value) is not None or is_made_of_codes(value))
            return skip_of(node, Reason.QUANTIZED if quantized else RecurrentReason.DYNAMIC_WEIGHT)
        if (refused := refusal(node, view)) is not None:
            return refused
        views.append(view)
    weight, recurrence = views
    shapes = weight.shape, recurrence.shape
    hidden = shapes[1][-1]
    if any(len(shape) != 3 or shape[:2] != (shapes[0][0], GATES[node.op_type] * hidden) for shape in shapes):
        return skip_of(node, RecurrentReason.SHAPE, f"W {list(shapes[0])}, R {list(shapes[1])}")
    return RecurrentLayer(layer_name(node), node, weight, recurrence, node.op_type, path=path)


# --- Weights that are put together in the graph ---------------------------------------------------------------------------

PACKING = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Identity", "Transpose", "Reshape", "Split", "Cast")
"""Operators between the parameters of a module and a recurrent operator."""


def packed_view(value: ir.Value | None) -> ConstantView | None:
    """Return the view of a constant, or of one that is put together of constants by Slice and Concat; None for any other value."""
    if (view := constant_view(value)) is not None or value is None:
        return view
    packed = _packed(value)
    if packed is None or len(dtypes := {view.dtype for view in packed.views}) > 1 or any(view.overridable for view in packed.views):
        return None
    step = Step(("packed", packed.key), packed.shape, dtypes.pop(), lambda _: packed.read())
    return ConstantView(value, packed.views[0].stored, (step,), any(view.exposed for view in packed.views))


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A value that is put together of constants.

    Attributes:
        views: The constants.
        key: Equal for values of the same elements.
        shape: Its shape.
        read: Computes it.
    """

    views: list[ConstantView]
    key: tuple[Hashable, ...]
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]


def _packed(value: ir.Value | None) -> _Packed | None:
    """How a value is put together of constants; None where it depends on anything else."""
    if value is None or value.is_graph_output():
        return None
    if (view := constant_view(value)) is not None:
        return _Packed([view], view.key, view.shape, lambda: view.tensor().numpy())
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Concat", "Slice", "Unsqueeze"):
        return None
    sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    parts = [part for source in sources if (part := _packed(source)) is not None]
    if not parts or len(parts) < len(sources):
        return None
    first = parts[0]
    if node.op_type == "Concat":
        axis = node.attributes.get_int("axis", 0) % len(first.shape)
        shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
        key = ("concat", axis, *(part.key for part in parts))
        return _Packed([v for part in parts for v in part.views], key, shape, lambda: np.concatenate([p.read() for p in parts], axis))
    index = _index(node, first.shape)
    if index is None:
        return None
    shape = np.broadcast_to(np.int8(0), first.shape)[index].shape
    return _Packed(first.views, (node.op_type, str(index), first.key), shape, lambda: first.read()[index])


def _index(node: ir.Node, shape: tuple[int, ...]) -> tuple[Any, ...] | None:
    """The index that does what a Slice or Unsqueeze does; None where that is not constant."""
    if node.op_type == "Unsqueeze":
        axes = ints(node, "axes", 1)
        new = set() if axes is None else {axis % (len(shape) + len(axes)) for axis in axes}
        return None if axes is None else tuple(None if i in new else slice(None) for i in range(len(shape) + len(axes)))
    starts, ends = ints(node, "starts", 1), ints(node, "ends", 2)
    if starts is None or ends is None:
        return None
    axes, steps = ints(node, "axes", 3), ints(node, "steps", 4)
    if (axes is None and operand(node, 3) is not None) or (steps is None and operand(node, 4) is not None):
        return None
    index = [slice(None)] * len(shape)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if steps is not None and steps[i] != 1:
            return None
        index[i if axes is None else axes[i]] = slice(start, end)
    return tuple(index)


def float_readers(layer: RecurrentLayer) -> Iterator[ir.Node]:
    """Yield the nodes that read a constant that the weights of a layer are put together of."""
    for view in (layer.weight, layer.recurrence):
        for source in dict.fromkeys(_sources(view.source)):
            yield from _readers(source)


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None or node.op_type not in PACKING:
        yield value
        return
    for source in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
        if source is not None:
            yield from _sources(source)


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    for use in value.uses():
        if use.node.domain != "" or use.node.op_type not in PACKING:
            yield use.node
        else:
            for output in use.node.outputs:
                yield from _readers(output)


def drop_packing(value: ir.Value) -> None:
    """Remove what put a weight together that nothing reads any more, with constants that only it read."""
    node = value.producer()
    if node is None or node.op_type not in PACKING or node.graph is None:
        return drop_if_unused(value)
    if any(v.uses() or v.is_graph_output() for v in node.outputs):
        return None
    sources = [v for v in node.inputs if v is not None]
    node.graph.remove(node, safe=True)
    for source in dict.fromkeys(sources):
        drop_packing(source)
    return None


def packing_nodes(value: ir.Value | None) -> Iterator[ir.Node]:
    """Yield the nodes that put a weight together, repeatedly where several parts come from one."""
    node = None if value is None or constant_view(value) is not None else value.producer()
    if node is not None and node.domain == "" and node.op_type in PACKING:
        yield node
        for source in node.inputs:
            yield from packing_nodes(source)
