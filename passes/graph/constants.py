"""Lazy constant folding: views of a constant through the Transpose, Reshape, Cast ... nodes between it and its reader.

A view is computed when it is read, and the graph is not changed. Only operators whose result is no larger than a cast of their input are
folded: Transpose, Reshape, Flatten, Squeeze, Unsqueeze, Split, Cast between float types, Identity, and QuantizeLinear and DequantizeLinear
marked with `FOLLOW`. Not Expand, Tile or ConstantOfShape: with these a file of a few bytes could allocate any amount of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.packing import broadcast_grid
from magr_onnx.model_io.writing import release_mmap
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, operand
from magr_onnx.report.reasons import IntegerReason

CASTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)

FOLLOW = "onnx_magr.follow"
"""Key of the ``meta`` store of a DequantizeLinear, or a QuantizeLinear before it, to fold as if its output were float weights."""

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Step:
    """The effect of one node on a constant.

    Attributes:
        key: Operator and parameters; equal for steps that do the same.
        shape: The shape after it.
        dtype: The type after it.
        apply: Function on the array.
    """

    key: tuple[Hashable, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ConstantView:
    """A constant and the steps from it to its reader.

    Attributes:
        source: The value of the constant.
        stored: Its tensor.
        steps: The operations on it, in order.
        exposed: Whether it, or the value after any step, is an output of the model.
    """

    source: ir.Value
    stored: ir.TensorProtocol
    steps: tuple[Step, ...]
    exposed: bool

    @property
    def overridable(self) -> bool:
        return self.source.is_graph_input()

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of the last step."""
        return self.steps[-1].shape if self.steps else tuple(int(d) for d in self.stored.shape.numpy())

    @property
    def dtype(self) -> ir.DataType:
        """Return that of the last step."""
        return self.steps[-1].dtype if self.steps else self.stored.dtype

    @property
    def name(self) -> str:
        return str(self.stored.name or self.source.name)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Return a key that is equal for constants of the same elements."""
        return (id(self.stored), tuple(step.key for step in self.steps))

    def before_transposes(self) -> tuple[ConstantView, bool]:
        """Strip the trailing 2-D Transposes; return the view and whether they transpose it."""
        steps, transposed = self.steps, False
        while steps and steps[-1].key == ("transpose", (1, 0)):
            steps, transposed = steps[:-1], not transposed
        return ConstantView(self.source, self.stored, steps, self.exposed), transposed

    def tensor(self) -> ir.TensorProtocol:
        """Return the constant as its reader sees it, computed at every read so that memory stays free."""
        if not self.steps:
            return self.stored

        def read() -> ir.TensorProtocol:
            array = self.stored.numpy()
            for step in self.steps:
                array = step.apply(array)
            result = ir.tensor(np.array(array, order="C"), dtype=self.dtype)
            del array
            release_mmap(self.stored)
            return result

        return ir.LazyTensor(read, self.dtype, ir.Shape(self.shape), name=self.name)


def constant_view(value: ir.Value | None) -> ConstantView | None:
    """Return the view of the constant a value is folded from, or None where it depends on anything else."""
    if value is None:
        return None
    nodes: list[tuple[ir.Node, int]] = []
    exposed = value.is_graph_output()
    while (node := value.producer()) is not None and is_step(node) and node.inputs[0] is not None:
        nodes.append((node, value.index() or 0))
        value = node.inputs[0]
        exposed |= value.is_graph_output()
    stored = constant_tensor(value)
    if stored is None:
        return None
    shape, dtype = tuple(int(d) for d in stored.shape.numpy()), stored.dtype
    steps: list[Step] = []
    for node, index in reversed(nodes):
        if node.op_type == "Identity":
            continue
        step = step_of(node, index, shape, dtype)
        if step is None:
            return None
        steps.append(step)
        shape, dtype = step.shape, step.dtype
    return ConstantView(value, stored, tuple(steps), exposed)


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or Constant node, else None."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type == "Constant" and node.domain == "":
        return ir.convenience.get_const_tensor(value)
    return None


def constant_array(value: ir.Value | None) -> Tensor | None:
    """Return the array of an initializer or Constant, through Identity, Transpose and Reshape; None for anything else.

    Raises:
        UnsupportedNode: A caller may override it, or an attribute refers to one of a function.
    """
    if value is None:
        return None
    if value.is_initializer() and value.is_graph_input():
        raise UnsupportedNode(IntegerReason.OVERRIDABLE, str(value.name))
    tensor = constant_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Identity", "Transpose", "Reshape"):
        return None
    inner = constant_array(node.inputs[0])
    if inner is None or node.op_type == "Identity":
        return inner
    if node.op_type == "Transpose":
        return inner.transpose(attribute_of(node, "perm", None))
    shape = constant_array(operand(node, 1))
    if shape is None or attribute_of(node, "allowzero", 0):
        return None
    return inner.reshape([inner.shape[i] if d == 0 else int(d) for i, d in enumerate(shape)])


def fixed_array(value: ir.Value | None) -> Tensor | None:
    """Return the array of a constant that no caller may override, folded as by `constant_view`; None for anything else."""
    view = constant_view(value)
    return None if view is None or view.overridable else view.tensor().numpy()


def clip_bounds(clip: ir.Node) -> tuple[float, float]:
    """Return the bounds of a Clip; NaN for what is known at run time only."""
    low, high = (
        default if (value := operand(clip, i)) is None else math.nan if (bound := fixed_array(value)) is None else bound.item()
        for i, default in ((1, -math.inf), (2, math.inf))
    )
    return float(low), float(high)


def source_of(value: ir.Value) -> ir.Value:
    """Return the first value of the chain of nodes that `constant_view` folds."""
    while (node := value.producer()) is not None and is_step(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def dequantized(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the constant input of the DequantizeLinear that a value comes from; a QuantizeLinear before it is skipped."""
    node = None if value is None else source_of(value).producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    source = source_of(node.inputs[0])
    maker = source.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and maker.inputs[0] is not None:
        source = source_of(maker.inputs[0])
    return constant_tensor(source)


def replace_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Replace or add an input of a node, and remove the former constant if nothing else reads it."""
    former = operand(node, index)
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, value)
    if former is not None:
        drop_if_unused(former)


def drop_if_unused(value: ir.Value) -> None:
    """Remove an unused initializer or constant node, and what only it read."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    producer = value.producer()
    if producer is None:
        if value.graph is not None and value.name is not None and value.name in value.graph.initializers:
            del value.graph.initializers[value.name]
    elif (producer.op_type == "Constant" or is_step(producer)) and producer.graph is not None:
        if any(v.uses() or v.is_graph_output() for v in producer.outputs):
            return
        sources = [v for v in producer.inputs if v is not None]
        producer.graph.remove(producer, safe=True)
        for source in sources:
            drop_if_unused(source)


def step_of(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    """Return what a node does to a constant, for its output ``index``; None for other nodes, and where it depends on anything else."""
    return _STEPS[node.op_type](node, index, shape, dtype) if node.op_type in _STEPS else None


def is_step(node: ir.Node) -> bool:
    """Return whether a node is one that `constant_view` folds."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return node.op_type == "Identity" or (
        node.op_type in _STEPS and (node.op_type not in ("DequantizeLinear", "QuantizeLinear") or node.meta.get(FOLLOW) is not None)
    )


def ints(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Read integers that are an attribute in old opsets and an input in newer ones; None where absent or computed."""
    if name in node.attributes:
        return [int(i) for i in node.attributes[name].as_ints()]
    value = operand(node, index)
    tensor = constant_tensor(value)
    if tensor is None or (value is not None and value.is_graph_input()):
        return None
    return [int(i) for i in tensor.numpy().reshape(-1)]


def _has_input(node: ir.Node, name: str, index: int) -> bool:
    return name in node.attributes or operand(node, index) is not None


def _reshaped(shape: Sequence[int], dtype: ir.DataType) -> Step:
    target = tuple(shape)
    return Step(("reshape", target), target, dtype, lambda a: a.reshape(target))


def _transpose(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    perm = tuple(ints(node, "perm", 1) or reversed(range(len(shape))))
    if sorted(perm) != list(range(len(shape))):
        return None
    return Step(("transpose", perm), tuple(shape[p] for p in perm), dtype, lambda a: a.transpose(perm))


def _reshape(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    requested = ints(node, "shape", 1)
    if requested is None or 0 in shape:
        return None
    copy = not node.attributes.get_int("allowzero", 0)
    if any(d == 0 and (not copy or i >= len(shape)) for i, d in enumerate(requested)) or requested.count(-1) > 1:
        return None
    target = [shape[i] if d == 0 else d for i, d in enumerate(requested)]
    if -1 in target:
        target[target.index(-1)] = math.prod(shape) // max(math.prod(d for d in target if d != -1), 1)
    return _reshaped(target, dtype) if min(target, default=1) > 0 and math.prod(target) == math.prod(shape) else None


def _flatten(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axis = node.attributes.get_int("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        return None
    axis += len(shape) if axis < 0 else 0
    return _reshaped((math.prod(shape[:axis]), math.prod(shape[axis:])), dtype)


def _squeeze(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axes = ints(node, "axes", 1)
    if axes is None:
        return None if _has_input(node, "axes", 1) else _reshaped([d for d in shape if d != 1], dtype)
    squeezed = {a % len(shape) for a in axes if -len(shape) <= a < len(shape)}
    if not axes or len(squeezed) != len(axes) or any(shape[a] != 1 for a in squeezed):
        return None
    return _reshaped([d for i, d in enumerate(shape) if i not in squeezed], dtype)


def _unsqueeze(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axes = ints(node, "axes", 1)
    if axes is None:
        return None
    rank = len(shape) + len(axes)
    inserted = {a % rank for a in axes if -rank <= a < rank}
    if len(inserted) != len(axes):
        return None
    remaining = iter(shape)
    return _reshaped([1 if i in inserted else next(remaining) for i in range(rank)], dtype)


def _cast(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    to = ir.DataType(node.attributes.get_int("to", 0))
    if dtype not in CASTS or to not in CASTS:
        return None

    def apply(array: Tensor) -> Tensor:
        with np.errstate(over="ignore"):  # overflows to infinity as onnxruntime does; readers check for it
            return array.astype(to.numpy())

    return Step(("cast", to), shape, to, apply)


def _split(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    sizes = ints(node, "split", 1)
    if sizes is None:
        if _has_input(node, "split", 1):
            return None
        each = -(-shape[axis] // count)
        sizes = [min(each, shape[axis] - i * each) for i in range(count)]
    if len(sizes) != count or sum(sizes) != shape[axis] or min(sizes) < 1:
        return None
    start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    index_of = (*(slice(None),) * axis, slice(start, stop))
    return Step(("slice", axis, start, stop), (*shape[:axis], stop - start, *shape[axis + 1 :]), dtype, lambda a: a[index_of])


def _grid(node: ir.Node) -> tuple[ir.TensorProtocol, ir.TensorProtocol | None, int, int] | None:
    """Read scales, zero points, axis and block of a QuantizeLinear or DequantizeLinear, where they are constant."""
    values = [v for v in node.inputs[1:3] if v is not None]
    tensors = [constant_tensor(v) for v in values]
    if not tensors or tensors[0] is None or tensors[-1] is None or any(v.is_graph_input() for v in values):
        return None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    return tensors[0], tensors[1] if len(tensors) > 1 else None, axis, block


def _broadcast(tensor: ir.TensorProtocol, shape: tuple[int, ...], axis: int, block: int) -> Tensor:
    """Broadcast scales or zero points to the codes, in float32."""
    return broadcast_grid(tensor.numpy().astype(np.float32), shape, axis % max(len(shape), 1), block)


def _dequantize(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    grid = _grid(node)
    if grid is None:
        return None
    scale, zero, axis, block = grid
    to = ir.DataType(node.attributes.get_int("output_dtype", 0)) or scale.dtype

    def apply(codes: Tensor) -> Tensor:
        real = codes.astype(np.float32)
        if zero is not None:
            real -= _broadcast(zero, shape, axis, block)
        result: Tensor = (real * _broadcast(scale, shape, axis, block)).astype(to.numpy())
        return result

    return Step(("dequantize", id(scale), id(zero), axis, block, to), shape, to, apply)


def _quantize(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    grid = _grid(node)
    if grid is None:
        return None
    scale, zero, axis, block = grid
    to = zero.dtype if zero is not None else ir.DataType(node.attributes.get_int("output_dtype", 0)) or ir.DataType.UINT8
    if to not in _CODES or dtype not in CASTS:
        return None
    high = 2 ** (to.bitwidth - to.is_signed()) - 1
    low = -high - 1 if to.is_signed() else 0

    def apply(real: Tensor) -> Tensor:
        codes = np.rint(real.astype(np.float32) / _broadcast(scale, shape, axis, block))
        if zero is not None:
            codes += _broadcast(zero, shape, axis, block)
        result: Tensor = np.clip(codes, low, high).astype(to.numpy())
        return result

    return Step(("quantize", id(scale), id(zero), axis, block, to), shape, to, apply)


_CODES = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16)
_STEPS: dict[str, Callable[[ir.Node, int, tuple[int, ...], ir.DataType], Step | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Cast": _cast,
    "Split": _split,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
}
