"""Constants behind shapes and types: what a weight is after the Transpose, Reshape, Cast ... nodes between it and its reader.

Nothing is computed until somebody reads, and the graph is not changed. Only operators whose result is no larger than a cast of their input
are followed: Transpose, Reshape, Flatten, Squeeze, Unsqueeze, Split, Cast between float types, Identity, and QuantizeLinear and
DequantizeLinear where a caller asked for that (`FOLLOW`). Not Expand, Tile or ConstantOfShape: a file of a few bytes could ask for any
amount of memory with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.model_io.writing import release_mmap

CASTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)

FOLLOW = "onnx_magr.follow"
"""Key of the ``meta`` store of a DequantizeLinear, or a QuantizeLinear before it, whose values are to be taken for float weights."""

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Step:
    """What one node does to a constant.

    Attributes:
        key: What it is, and more; equal for steps that do the same.
        shape: The shape after it.
        dtype: The type after it.
        apply: Does it.
    """

    key: tuple[Hashable, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Held:
    """A constant and the way from it to its reader.

    Attributes:
        source: The value that holds the constant.
        stored: Its tensor.
        steps: What is done to it, in order.
        exposed: Whether the model's caller sees it, or a value on the way, as an output.
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
        """As its reader sees it."""
        return self.steps[-1].shape if self.steps else tuple(int(d) for d in self.stored.shape.numpy())

    @property
    def dtype(self) -> ir.DataType:
        """As its reader sees it."""
        return self.steps[-1].dtype if self.steps else self.stored.dtype

    @property
    def name(self) -> str:
        return str(self.stored.name or self.source.name)

    @property
    def way(self) -> tuple[Hashable, ...]:
        return tuple(step.key for step in self.steps)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal for constants of the very same elements."""
        return (id(self.stored), self.way)

    def before_transposes(self) -> tuple[Held, bool]:
        """This constant without the 2-D Transposes at the end of its way, and whether they turn it."""
        steps, turned = self.steps, False
        while steps and steps[-1].key == ("transpose", (1, 0)):
            steps, turned = steps[:-1], not turned
        return Held(self.source, self.stored, steps, self.exposed), turned

    def tensor(self) -> ir.TensorProtocol:
        """The constant as its reader sees it; computed at every read, so that nothing is kept."""
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


def held(value: ir.Value | None) -> Held | None:
    """The constant behind a value, or None where the value depends on anything else."""
    if value is None:
        return None
    nodes: list[tuple[ir.Node, int]] = []
    exposed = value.is_graph_output()
    while (node := value.producer()) is not None and _steps(node) and node.inputs[0] is not None:
        nodes.append((node, value.index() or 0))
        value = node.inputs[0]
        exposed |= value.is_graph_output()
    stored = constant(value)
    if stored is None:
        return None
    shape, dtype = tuple(int(d) for d in stored.shape.numpy()), stored.dtype
    steps: list[Step] = []
    for node, index in reversed(nodes):
        if node.op_type == "Identity":
            continue
        step = _STEPS[node.op_type](node, index, shape, dtype)
        if step is None:
            return None
        steps.append(step)
        shape, dtype = step.shape, step.dtype
    return Held(value, stored, tuple(steps), exposed)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant node, else None."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type == "Constant" and node.domain == "":
        return ir.convenience.get_const_tensor(value)
    return None


def behind(value: ir.Value) -> ir.Value:
    """The value in front of the nodes that `held` may go through."""
    while (node := value.producer()) is not None and _steps(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def dequantized(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that a DequantizeLinear makes a value of, or what the value is a view of; it may be quantized in the graph."""
    node = None if value is None else behind(value).producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    source = behind(node.inputs[0])
    maker = source.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and maker.inputs[0] is not None:
        source = behind(maker.inputs[0])
    return constant(source)


def drop_if_unused(value: ir.Value) -> None:
    """Remove an initializer or constant-making node nobody reads any more, and what only it read."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    producer = value.producer()
    if producer is None:
        if value.graph is not None and value.name is not None and value.name in value.graph.initializers:
            del value.graph.initializers[value.name]
    elif (producer.op_type == "Constant" or _steps(producer)) and producer.graph is not None:
        if any(v.uses() or v.is_graph_output() for v in producer.outputs):
            return
        sources = [v for v in producer.inputs if v is not None]
        producer.graph.remove(producer, safe=True)
        for source in sources:
            drop_if_unused(source)


def is_step(node: ir.Node) -> bool:
    """Whether a node is no more than a part of the way from a constant to its reader."""
    return _steps(node)


def _steps(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    return node.op_type == "Identity" or (
        node.op_type in _STEPS and (node.op_type not in ("DequantizeLinear", "QuantizeLinear") or node.meta.get(FOLLOW) is not None)
    )


def ints(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Integers that are an attribute in old opsets and an input since; None where they are left out or computed."""
    if name in node.attributes:
        return [int(i) for i in node.attributes[name].as_ints()]
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = constant(value)
    if tensor is None or (value is not None and value.is_graph_input()):
        return None
    return [int(i) for i in tensor.numpy().reshape(-1)]


def _given(node: ir.Node, name: str, index: int) -> bool:
    return name in node.attributes or (len(node.inputs) > index and node.inputs[index] is not None)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _reshaped(shape: Sequence[int], dtype: ir.DataType) -> Step:
    target = tuple(shape)
    return Step(("reshape", target), target, dtype, lambda a: a.reshape(target))


def _transpose(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    perm = tuple(ints(node, "perm", 1) or reversed(range(len(shape))))
    if sorted(perm) != list(range(len(shape))):
        return None
    return Step(("transpose", perm), tuple(shape[p] for p in perm), dtype, lambda a: a.transpose(perm))


def _reshape(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    wanted = ints(node, "shape", 1)
    if wanted is None or 0 in shape:
        return None
    copy = not _integer(node, "allowzero", 0)
    if any(d == 0 and (not copy or i >= len(shape)) for i, d in enumerate(wanted)) or wanted.count(-1) > 1:
        return None
    target = [shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    if -1 in target:
        target[target.index(-1)] = math.prod(shape) // max(math.prod(d for d in target if d != -1), 1)
    return _reshaped(target, dtype) if min(target, default=1) > 0 and math.prod(target) == math.prod(shape) else None


def _flatten(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axis = _integer(node, "axis", 1)
    if not -len(shape) <= axis <= len(shape):
        return None
    axis += len(shape) if axis < 0 else 0
    return _reshaped((math.prod(shape[:axis]), math.prod(shape[axis:])), dtype)


def _squeeze(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axes = ints(node, "axes", 1)
    if axes is None:
        return None if _given(node, "axes", 1) else _reshaped([d for d in shape if d != 1], dtype)
    gone = {a % len(shape) for a in axes if -len(shape) <= a < len(shape)}
    if not axes or len(gone) != len(axes) or any(shape[a] != 1 for a in gone):
        return None
    return _reshaped([d for i, d in enumerate(shape) if i not in gone], dtype)


def _unsqueeze(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axes = ints(node, "axes", 1)
    if axes is None:
        return None
    rank = len(shape) + len(axes)
    new = {a % rank for a in axes if -rank <= a < rank}
    if len(new) != len(axes):
        return None
    left = iter(shape)
    return _reshaped([1 if i in new else next(left) for i in range(rank)], dtype)


def _cast(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    to = ir.DataType(_integer(node, "to", 0))
    if dtype not in CASTS or to not in CASTS:
        return None

    def apply(array: Tensor) -> Tensor:
        with np.errstate(over="ignore"):  # infinite where onnxruntime's is; who reads it checks that
            return array.astype(to.numpy())

    return Step(("cast", to), shape, to, apply)


def _split(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    axis, parts = _integer(node, "axis", 0), len(node.outputs)
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    sizes = ints(node, "split", 1)
    if sizes is None:
        if _given(node, "split", 1):
            return None
        each = -(-shape[axis] // parts)
        sizes = [min(each, shape[axis] - i * each) for i in range(parts)]
    if len(sizes) != parts or sum(sizes) != shape[axis] or min(sizes) < 1:
        return None
    start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    part = (*(slice(None),) * axis, slice(start, stop))
    return Step(("slice", axis, start, stop), (*shape[:axis], stop - start, *shape[axis + 1 :]), dtype, lambda a: a[part])


def _grid(node: ir.Node) -> tuple[ir.TensorProtocol, ir.TensorProtocol | None, int, int] | None:
    """Scales, zero points, axis and block of a QuantizeLinear or DequantizeLinear, where they are constant."""
    values = [v for v in node.inputs[1:3] if v is not None]
    tensors = [constant(v) for v in values]
    if not tensors or tensors[0] is None or tensors[-1] is None or any(v.is_graph_input() for v in values):
        return None
    return tensors[0], tensors[1] if len(tensors) > 1 else None, _integer(node, "axis", 1), _integer(node, "block_size", 0)


def _spread(tensor: ir.TensorProtocol, shape: tuple[int, ...], axis: int, block: int) -> Tensor:
    """Scales or zero points along ``shape``: one in all, one an index of the axis, or one a block; in float32."""
    array = tensor.numpy().astype(np.float32)
    if array.size == 1:
        return array.reshape(())
    if array.ndim == 1 and not block:
        return array.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return np.repeat(array, block, axis=axis).take(range(shape[axis]), axis=axis) if block else array


def _dequantize(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    grid = _grid(node)
    if grid is None:
        return None
    scale, zero, axis, block = grid
    to = ir.DataType(_integer(node, "output_dtype", 0)) or scale.dtype

    def apply(codes: Tensor) -> Tensor:
        real = codes.astype(np.float32)
        if zero is not None:
            real -= _spread(zero, shape, axis, block)
        result: Tensor = (real * _spread(scale, shape, axis, block)).astype(to.numpy())
        return result

    return Step(("dequantize", id(scale), id(zero), axis, block, to), shape, to, apply)


def _quantize(node: ir.Node, index: int, shape: tuple[int, ...], dtype: ir.DataType) -> Step | None:
    grid = _grid(node)
    if grid is None:
        return None
    scale, zero, axis, block = grid
    to = zero.dtype if zero is not None else ir.DataType(_integer(node, "output_dtype", 0)) or ir.DataType.UINT8
    if to not in _CODES or dtype not in CASTS:
        return None
    low, high = _CODES[to]

    def apply(real: Tensor) -> Tensor:
        codes = np.rint(real.astype(np.float32) / _spread(scale, shape, axis, block))
        if zero is not None:
            codes += _spread(zero, shape, axis, block)
        result: Tensor = np.clip(codes, low, high).astype(to.numpy())
        return result

    return Step(("quantize", id(scale), id(zero), axis, block, to), shape, to, apply)


_CODES = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
}
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
