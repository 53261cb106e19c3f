"""Layer norms and RMS norms in several operators, for `magr_onnx.passes.canonical.compounds`.

    y = d / sqrt(mean(d^2) + eps) * gain + shift      with d = x - mean(x), or with d = x and no shift

torch writes layer norms so before opset 17, and RMS norms to this day. TensorFlow writes ``x r + (shift - mean(x) r)`` with
``r = gain / sqrt(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.canonical.compound import Compound
from magr_onnx.passes.canonical.rewriter import RewriteContext, known
from magr_onnx.passes.graph.constants import constant_view, ints
from magr_onnx.passes.graph.nodes import operand, operator_of


def ending_at(node: ir.Node, context: RewriteContext, operators: Collection[str]) -> Compound | None:
    """Return the norm whose result a node puts out, if there is one and it may be written."""
    return _plain(node, context, operators) or _of_tensorflow(node, context, operators)


def is_square(node: ir.Node) -> bool:
    """Whether a node squares its first input."""
    if operator_of(node) == "Mul":
        return node.inputs[0] is node.inputs[1]
    return operator_of(node) == "Pow" and number(operand(node, 1)) == 2


def number(value: ir.Value | None) -> float | None:
    """Return a constant of one element that no caller may override, as a number; None for anything else."""
    array = _constant(value, 1)
    return None if array is None else float(array.item(0))


def _constant(value: ir.Value | None, size: int | None) -> Array | None:
    """Return a constant of ``size`` elements that no caller may override; of None, a vector along the last axis with more than one."""
    view = constant_view(value)
    if view is None or view.overridable or math.prod(view.shape) != (view.shape[-1] if size is None and view.shape else size):
        return None
    return None if size is None and view.shape[-1] == 1 else view.tensor().numpy()


def _plain(node: ir.Node, context: RewriteContext, operators: Collection[str]) -> Compound | None:
    """Return a norm ``d / sqrt(...)`` from its last node: its quotient, gain or shift."""
    normalized: ir.Node | None = node
    shift, gain = None, None
    if operator_of(node) == "Add" and (taken := _with_vector(node)) is not None:
        normalized, shift = _producer(taken[0]), taken[1]
    if normalized is not None and operator_of(normalized) == "Mul" and (taken := _with_vector(normalized)) is not None:
        normalized, gain = _producer(taken[0]), taken[1]
    found = None if normalized is None else _normalized(normalized, context)
    if found is None:
        return None
    d, epsilon = found
    x = _centred(d, context)
    if x is None and shift is not None:
        return None
    return _compound(node, x or d, epsilon, (gain, shift), context, operators, centred=x is not None)


def _of_tensorflow(node: ir.Node, context: RewriteContext, operators: Collection[str]) -> Compound | None:
    """Return a norm ``x r + (shift - mean r)`` from its sum."""
    for first, second in ((0, 1), (1, 0)):
        scaled, rest = (_producer(operand(node, i)) for i in (first, second))
        if operator_of(node) != "Add" or scaled is None or rest is None or (operator_of(scaled), operator_of(rest)) != ("Mul", "Sub"):
            continue
        shift, product = _constant(operand(rest, 0), None), _producer(operand(rest, 1))
        if shift is None or product is None or operator_of(product) != "Mul":
            continue
        for x, r in (scaled.inputs, scaled.inputs[::-1]):
            means = [v for v in product.inputs if v is not r]
            factor = _producer(r)
            taken = None if factor is None or operator_of(factor) != "Mul" else _with_vector(factor)
            found = None if taken is None else _inverse_root(taken[0], context)
            if found is None or taken is None or len(means) != 1 or x is None:
                continue
            d, epsilon = found
            if _mean_of(means[0], context) is _centred(d, context) is _original(x):
                return _compound(node, _original(x), epsilon, (taken[1], shift), context, operators, centred=True)
    return None


def _compound(
    root: ir.Node,
    x: ir.Value,
    epsilon: float,
    vectors: tuple[Array | None, Array | None],
    context: RewriteContext,
    operators: Collection[str],
    *,
    centred: bool,
) -> Compound | None:
    operator, shape = "LayerNormalization" if centred else "RMSNormalization", context.shape(x)
    k = None if not shape else known(shape[-1])
    gain, shift = vectors
    if operator not in operators or k is None or context.dtype(x) != ir.DataType.FLOAT:
        return None
    constants = {"gain": np.ones(k) if gain is None else gain} | ({} if shift is None else {"shift": shift})
    if any(vector.size != k or vector.ndim > len(shape or ()) for vector in constants.values()):  # more axes would be those of the result
        return None
    flat = {name: vector.reshape(-1) for name, vector in constants.items()}
    return Compound(root, operator, x, flat, {"axis": -1, "epsilon": epsilon})


def _normalized(node: ir.Node, context: RewriteContext) -> tuple[ir.Value, float] | None:
    """Return the ``d`` and the ``eps`` of a node that computes ``d / sqrt(mean(d^2) + eps)``."""
    kind = operator_of(node)
    pairs = {"Div": [(0, 1)], "Mul": [(0, 1), (1, 0)]}.get(kind, [])
    for i, j in pairs:
        d, other = operand(node, i), operand(node, j)
        found = _root(other, context) if kind == "Div" else _inverse_root(other, context)
        if d is not None and found is not None and _same(d, found[0]):
            return found
    return None


def _inverse_root(value: ir.Value | None, context: RewriteContext) -> tuple[ir.Value, float] | None:
    """Return ``d`` and ``eps`` of ``1 / sqrt(mean(d^2) + eps)``."""
    node = _producer(value)
    if node is None:
        return None
    kind = operator_of(node)
    if kind == "Reciprocal":
        return _root(operand(node, 0), context)
    if kind == "Div" and number(operand(node, 0)) == 1:
        return _root(operand(node, 1), context)
    return _variance(operand(node, 0), context) if kind == "Pow" and number(operand(node, 1)) == -0.5 else None


def _root(value: ir.Value | None, context: RewriteContext) -> tuple[ir.Value, float] | None:
    """Return ``d`` and ``eps`` of ``sqrt(mean(d^2) + eps)``."""
    node = _producer(value)
    if node is None:
        return None
    is_root = operator_of(node) == "Sqrt" or (operator_of(node) == "Pow" and number(operand(node, 1)) == 0.5)
    return _variance(operand(node, 0), context) if is_root else None


def _variance(value: ir.Value | None, context: RewriteContext) -> tuple[ir.Value, float] | None:
    """Return ``d`` and ``eps`` of ``mean(d^2) + eps``."""
    node = _producer(value)
    if node is None or operator_of(node) != "Add":
        return None
    for mean, constant in (node.inputs, node.inputs[::-1]):
        epsilon, squares = number(constant), _mean_of(mean, context)
        square = _producer(squares)
        if epsilon is not None and square is not None and is_square(square) and square.inputs[0] is not None:
            return _original(square.inputs[0]), epsilon
    return None


def _centred(d: ir.Value, context: RewriteContext) -> ir.Value | None:
    """Return ``x`` of ``d = x - mean(x)``."""
    node = _producer(d)
    if node is None or operator_of(node) != "Sub":
        return None
    x = operand(node, 0)
    return None if x is None or _mean_of(operand(node, 1), context) is not _original(x) else _original(x)


def _mean_of(value: ir.Value | None, context: RewriteContext) -> ir.Value | None:
    """Return what a value is the mean of over the last axis, which stays."""
    node = _producer(value)
    if node is None or operator_of(node) != "ReduceMean" or not node.attributes.get_int("keepdims", 1):
        return None
    x, axes = operand(node, 0), ints(node, "axes", 1)
    if x is None or axes is None or len(axes) != 1:
        return None
    shape = context.shape(x)
    return _original(x) if axes[0] == -1 or (shape is not None and axes[0] == len(shape) - 1) else None


def _same(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values are one, or differences of the same values: some exporters subtract the mean twice."""
    first, second = _producer(a), _producer(b)
    if _original(a) is _original(b) or first is None or second is None:
        return _original(a) is _original(b)
    return operator_of(first) == operator_of(second) == "Sub" and all(v is w for v, w in zip(first.inputs, second.inputs, strict=True))


def _with_vector(node: ir.Node) -> tuple[ir.Value, Array] | None:
    """Return the operands of a product or sum of a computed value and a constant vector along the last axis."""
    for value, constant in (node.inputs, node.inputs[::-1]) if len(node.inputs) == 2 else ():
        array = _constant(constant, None)
        if array is not None and array.dtype == np.float32 and value is not None:
            return value, array
    return None


def _producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value, past copies."""
    return None if value is None else _original(value).producer()


def _original(value: ir.Value) -> ir.Value:
    """Return what a value is a copy of."""
    while (node := value.producer()) is not None and operator_of(node) == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
