"""Fused operators of transformers in terms of ONNX's own, so that a copy of a model can be differentiated.

onnxruntime's GroupQueryAttention, MultiHeadAttention, RotaryEmbedding, SkipLayerNormalization, SkipSimplifiedLayerNormalization and
FastGelu, which onnxruntime-genai's model builder and onnxruntime's transformer optimizer write, have no gradient rules
(`magr_onnx.passes.instrument.gradients`); what they stand for has. A form that is not supported stays as it is, and is reported like any
operator without a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.errors import ModelError
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.nodes import operand
from magr_onnx.passes.graph.opset import raise_opset
from magr_onnx.passes.layers.weighted import FLOATS

DOMAIN = "com.microsoft"
OPSET = 17  # of LayerNormalization
_FAR = -30000.0  # of scores that do not count: float16 has it, too, and its exponential is 0
_LAST = np.iinfo(np.int64).max


def decomposed(model: ir.Model) -> ir.Model:
    """Return a copy of the model, of opset 17 at least, with fused operators written out.

    It is the model itself that has none of them, or cannot be converted to that opset.
    """
    if not any(_is_fused(node) for node in model.graph):
        return model
    copy = model.clone()
    try:
        raise_opset(copy, OPSET)
    except ModelError:
        return model
    Names.rescan(copy.graph)
    for node in list(copy.graph):
        if _is_fused(node):
            work = _Nodes(copy.graph, node)
            outputs = _FORMS[node.op_type](work, node)
            if outputs is not None:
                work.replace(outputs)
    return copy


def _is_fused(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in _FORMS


class _Nodes:
    """The nodes that take the place of one."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._nodes = graph, node, list[ir.Node]()

    def op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(name, list(inputs), attributes, name=f"{self._node.name}_{name}")
        node.outputs[0].name = f"{self._node.name}_{name}_{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]

    def integers(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def constant(self, array: Any) -> ir.Value:
        return add_initializer(self._graph, f"{self._node.name}_constant", array)

    def number(self, value: float) -> ir.Value:
        """Return a scalar of the float type of the node."""
        return self.constant(np.asarray(value, self._kind.numpy()))

    @property
    def _kind(self) -> ir.DataType:
        """The float type of what the node reads or puts out, or, where that is undeclared, of the model's weights."""
        near = (value for value in (*self._node.inputs, *self._node.outputs) if value is not None)
        return next((v.dtype for v in (*near, *self._graph.initializers.values()) if v.dtype in FLOATS), ir.DataType.FLOAT)

    def cast(self, value: ir.Value) -> ir.Value:
        """Return a value in the float type of the node."""
        return self.op("Cast", value, to=self._kind)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return a scalar, the length of an axis."""
        return self.op("Gather", self.op("Shape", value), self.constant(np.int64(axis)))

    def part(self, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        return self.op("Slice", value, self.integers(start), self.integers(end), self.integers(axis))

    def replace(self, outputs: Sequence[ir.Value | None]) -> None:
        old = [value for value, new in zip(self._node.outputs, outputs, strict=False) if new is not None]
        new = [value for value in outputs[: len(self._node.outputs)] if value is not None]
        for value, source in zip(new, old, strict=True):
            value.type, value.shape, value.name = source.type, source.shape, None  # it inherits the name
        names = Names.of(self._graph)
        names.adopt(self._nodes, [self._node])
        for source in old:
            names.value(str(source.name))
        ir.convenience.replace_nodes_and_values(self._graph, self._node, [self._node], self._nodes, old, new)


def _skip_norm(n: _Nodes, node: ir.Node) -> list[ir.Value | None] | None:
    """``Norm(x + skip + bias)``, and the sum as the fourth output."""
    if any(value.uses() for value in node.outputs[1:3]):
        return None
    x, skip, scale = node.inputs[:3]
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    shift, bias = (None, operand(node, 3)) if simplified else (operand(node, 3), operand(node, 4))
    total = n.op("Add", x, skip)
    if bias is not None:
        total = n.op("Add", total, bias)
    kind = "SimplifiedLayerNormalization" if simplified else "LayerNormalization"
    inputs = (total, scale) if shift is None else (total, scale, shift)
    normed = n.op(kind, *inputs, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-12))
    return [normed, None, None, total]


def _fast_gelu(n: _Nodes, node: ir.Node) -> list[ir.Value | None]:
    """``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    x, bias = node.inputs[0], operand(node, 1)
    assert x is not None
    if bias is not None:
        x = n.op("Add", x, bias)
    inner = n.op("Add", n.op("Mul", n.op("Mul", x, x), n.number(0.044715)), n.number(1))
    t = n.op("Tanh", n.op("Mul", n.op("Mul", x, inner), n.number(math.sqrt(2 / math.pi))))
    return [n.op("Mul", n.op("Mul", x, n.number(0.5)), n.op("Add", t, n.number(1)))]


_ATTENTION = {"num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved", "local_window_size", "softcap", "smooth_softmax"}


def _group_query_attention(n: _Nodes, node: ir.Node) -> list[ir.Value | None] | None:
    """Attention of queries ``(B, S, H D)`` to the past and to what comes before them; padding is taken to be at the end.

    Not supported: buffers of a fixed length as the past, positions of interleaved rotations, biases of scores, sinks.
    """
    past = operand(node, 3), operand(node, 4)
    buffer = past[0] is not None and past[0].shape is not None and isinstance(past[0].shape[2], int) and past[0].shape[2] > 0
    extra = [value for value in node.inputs[10:] if value is not None]
    given = {name for name, attribute in node.attributes.items() if name not in _ATTENTION and attribute.value}
    if buffer or extra or given or any(node.attributes.get_int(name, 0) > 0 for name in ("rotary_interleaved", "smooth_softmax")):
        return None
    heads, groups = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    q, k, v = (_split(n, value, count) for value, count in zip(_inputs(n, node, heads, groups), (heads, groups, groups), strict=True))
    before = n.constant(np.int64(0)) if past[0] is None else n.size(past[0], 2)
    rows = n.op("Add", n.op("Range", n.constant(np.int64(0)), n.size(q, 2), n.constant(np.int64(1))), before)
    if node.attributes.get_int("do_rotary", 0):
        tables, positions = node.inputs[7:9], operand(node, 9)
        q, k = (_rotated(n, value, tables, rows if positions is None else positions, positions is not None) for value in (q, k))
    keys, values = (new if old is None else n.op("Concat", old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
    sizes = n.op("Slice", n.op("Shape", q), n.integers(2), n.integers(4))
    grouped = n.op("Reshape", q, n.op("Concat", n.integers(0, groups, heads // groups), sizes, axis=0))
    turned = n.op("Transpose", n.op("Unsqueeze", keys, n.integers(2)), perm=[0, 1, 2, 4, 3])
    scores = n.op("MatMul", n.op("Mul", grouped, _scale(n, node, q)), turned)
    if softcap := node.attributes.get_float("softcap", 0.0):
        scores = n.op("Mul", n.op("Tanh", n.op("Div", scores, n.number(softcap))), n.number(softcap))
    seen = _seen(n, rows, keys, node.attributes.get_int("local_window_size", -1))
    weights = n.op("Softmax", n.op("Where", seen, scores, n.number(_FAR)), axis=-1)
    mixed = n.op("Transpose", n.op("MatMul", weights, n.op("Unsqueeze", values, n.integers(2))), perm=[0, 3, 1, 2, 4])
    return [n.op("Reshape", mixed, n.integers(0, 0, -1)), keys, values]


def _multi_head_attention(n: _Nodes, node: ir.Node) -> list[ir.Value | None] | None:
    """Attention of queries ``(B, S, H D)`` to keys and values ``(B, T, H D)``, behind those of the past.

    Not supported: queries, keys and values in one input, keys in heads already, masks but those of elements, tables of beams.
    """
    key, mask, past = operand(node, 1), operand(node, 4), (operand(node, 6), operand(node, 7))
    packed = key is None or any(v is not None and v.shape is not None and len(v.shape) != 3 for v in node.inputs[:3])
    other_mask = mask is not None and (mask.shape is None or len(mask.shape) != 2)
    if packed or other_mask or any(value is not None for value in node.inputs[8:]):
        return None
    heads, parts = node.attributes.get_int("num_heads", 0), list(node.inputs[:3])
    if (bias := operand(node, 3)) is not None:
        width = n.op("Slice", n.op("Shape", parts[0]), n.integers(2), n.integers(3))
        starts = [n.integers(0), width, n.op("Add", width, width)]
        ends = [width, n.op("Add", width, width), n.integers(_LAST)]
        parts = [n.op("Add", x, n.op("Slice", bias, a, b, n.integers(0))) for x, a, b in zip(parts, starts, ends, strict=True)]
    q, k, v = (_split(n, value, heads) for value in parts)
    keys, values = (new if old is None else n.op("Concat", old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
    scores = n.op("MatMul", n.op("Mul", q, _scale(n, node, q)), n.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if (added := operand(node, 5)) is not None:
        scores = n.op("Add", scores, added)
    if mask is not None:
        real = n.op("Unsqueeze", n.op("Cast", mask, to=ir.DataType.BOOL), n.integers(1, 2))
        scores = n.op("Where", real, scores, n.number(_FAR))
    if node.attributes.get_int("unidirectional", 0):
        before = n.op("Sub", n.size(keys, 2), n.size(q, 2))
        rows = n.op("Add", n.op("Range", n.constant(np.int64(0)), n.size(q, 2), n.constant(np.int64(1))), before)
        scores = n.op("Where", _seen(n, rows, keys), scores, n.number(_FAR))
    mixed = n.op("Transpose", n.op("MatMul", n.op("Softmax", scores, axis=-1), values), perm=[0, 2, 1, 3])
    return [n.op("Reshape", mixed, n.integers(0, 0, -1)), keys, values]


def _seen(n: _Nodes, rows: ir.Value, keys: ir.Value, window: int = -1) -> ir.Value:
    """Return which keys ``(..., T, D)`` the positions ``(S,)`` may look at: those before, and themselves; of a window, if there is one."""
    columns = n.op("Range", n.constant(np.int64(0)), n.size(keys, 2), n.constant(np.int64(1)))
    seen = n.op("LessOrEqual", columns, n.op("Unsqueeze", rows, n.integers(1)))
    if window > 0:
        first = n.op("Sub", n.op("Unsqueeze", rows, n.integers(1)), n.constant(np.int64(window)))
        seen = n.op("And", seen, n.op("Greater", columns, first))
    return seen


def _rotary_embedding(n: _Nodes, node: ir.Node) -> list[ir.Value | None] | None:
    """Heads of ``(B, S, H D)``, or of ``(B, H, S, D)``, turned by the angles of positions ``(B, S)``."""
    x, positions, *tables = node.inputs[:4]
    assert x is not None
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in (x, positions)]
    other = any(node.attributes.get_int(name, 0) for name in ("interleaved", "is_packed_batching"))
    heads, part = (node.attributes.get_int(name, 0) for name in ("num_heads", "rotary_embedding_dim"))
    known = all(table is not None and table.shape is not None and table.shape.is_static(1) for table in tables)
    if ranks[0] not in (3, 4) or ranks[1] != 2 or other or not known or (part and not heads):
        return None
    if ranks[0] == 4:
        return [_rotated(n, x, tables, positions, True)]
    size = 2 * int(tables[0].shape[1])  # type: ignore[index, union-attr, arg-type]
    split = n.op("Reshape", x, n.integers(0, 0, heads or -1, -1 if heads else size))
    turned = _rotated(n, n.op("Transpose", split, perm=[0, 2, 1, 3]), tables, positions, True)
    return [n.op("Reshape", n.op("Transpose", turned, perm=[0, 2, 1, 3]), n.integers(0, 0, -1))]


def _inputs(n: _Nodes, node: ir.Node, heads: int, groups: int) -> Sequence[ir.Value | None]:
    """Return queries, keys and values, which may be side by side in the first input."""
    q, k, v = node.inputs[:3]
    if k is not None:
        return q, k, v
    assert q is not None
    parts = n.op("Reshape", q, n.integers(0, 0, heads + 2 * groups, -1))
    ends = (0, heads, heads + groups, heads + 2 * groups)
    return [n.op("Reshape", n.part(parts, 2, a, b), n.integers(0, 0, -1)) for a, b in pairwise(ends)]


def _split(n: _Nodes, value: ir.Value | None, heads: int) -> ir.Value:
    """Return ``(B, S, H D)`` as ``(B, H, S, D)``."""
    return n.op("Transpose", n.op("Reshape", value, n.integers(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def _rotated(n: _Nodes, x: ir.Value, tables: Sequence[ir.Value | None], positions: ir.Value | None, by_sample: bool) -> ir.Value:
    """Turn the halves of the first part of every head ``(B, H, S, D)`` by the angles of its position; what is behind stays."""
    turns = [n.op("Gather", table, positions) for table in tables]
    if by_sample:
        turns = [n.op("Unsqueeze", turn, n.integers(1)) for turn in turns]
    cos, sin = turns
    assert tables[0] is not None
    assert tables[0].shape is not None
    half = int(tables[0].shape[1])  # type: ignore[arg-type]
    a, b, rest = n.part(x, 3, 0, half), n.part(x, 3, half, 2 * half), n.part(x, 3, 2 * half, _LAST)
    left = n.op("Sub", n.op("Mul", a, cos), n.op("Mul", b, sin))
    right = n.op("Add", n.op("Mul", b, cos), n.op("Mul", a, sin))
    return n.op("Concat", left, right, rest, axis=3)


def _scale(n: _Nodes, node: ir.Node, q: ir.Value) -> ir.Value:
    """Return the factor of scores, one over the root of the size of a head if none is given."""
    if scale := node.attributes.get_float("scale", 0.0):
        return n.number(scale)
    return n.op("Reciprocal", n.op("Sqrt", n.cast(n.size(q, 3))))


_FORMS: dict[str, Callable[[_Nodes, ir.Node], list[ir.Value | None] | None]] = {
    "FastGelu": _fast_gelu,
    "GroupQueryAttention": _group_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "RotaryEmbedding": _rotary_embedding,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
}
