"""Reverse-mode differentiation of a graph: a copy of a model that also computes gradients of its outputs.

To support an operator, write its rule: a function of `Backward`, the node and the gradients of its outputs that returns a
gradient for every input (None where there is none), under ``@rule("Operator")``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import onnx_ir as ir

from magr_onnx.passes.graph.constants import ints
from magr_onnx.passes.graph.kv_cache import pairs_of
from magr_onnx.passes.graph.nodes import operand
from magr_onnx.passes.instrument.backward import FLOATS, RULES, Backward, Grads, Maybe, rule
from magr_onnx.passes.instrument.taps import Extension


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    """Return the axes of a reduction, from its attribute or constant input; None if they are computed."""
    axes = ints(node, "axes", 1)
    if axes is None and "axes" not in node.attributes and operand(node, 1) is None:
        axes = list(range(rank))
    return None if axes is None else sorted(a % rank for a in axes)


# --- Rules --------------------------------------------------------------------------------------------------------------


@rule("Add", "Sub")
def _add(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (g,), (x, y) = grads, node.inputs
    result = b.shape(node.outputs[0])
    return [b.to_shape_of(g, x, result), b.to_shape_of(g if node.op_type == "Add" else b.op("Neg", g), y, result)]


@rule("Sum")
def _sum(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (g,), result = grads, b.shape(node.outputs[0])
    return [b.to_shape_of(g, value, result) for value in node.inputs]


@rule("Mul")
def _mul(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (g,), (x, y) = grads, node.inputs
    result = b.shape(node.outputs[0])
    return [b.to_shape_of(b.op("Mul", g, y), x, result), b.to_shape_of(b.op("Mul", g, x), y, result)]


@rule("Div")
def _div(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (g,), (x, y), out = grads, node.inputs, node.outputs[0]
    result = b.shape(out)
    quotient = b.op("Div", g, y)
    return [b.to_shape_of(quotient, x, result), b.to_shape_of(b.op("Neg", b.op("Mul", quotient, out)), y, result)]


@rule("MatMul")
def _matmul(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    (g,), (x, y) = grads, node.inputs
    ranks = len(b.shape(x)), len(b.shape(y))
    if min(ranks) < 2:
        return None

    def transposed(value: Maybe, rank: int) -> ir.Value:
        return _source_of_transpose(value, rank) or b.op("Transpose", value, perm=_swapped(rank))

    result = b.shape(node.outputs[0])
    # onnxruntime would compute the transpose of a constant once and keep it: twice the memory
    fused = y is not None and y.const_value is not None and y.dtype == ir.DataType.FLOAT and ranks[1] == 2
    grad_x = b.microsoft("FusedMatMul", g, y, transB=1) if fused else b.op("MatMul", g, transposed(y, ranks[1]))
    grad_y = b.op("MatMul", transposed(x, ranks[0]), g)
    return [b.to_shape_of(grad_x, x, (*result[:-2], *b.shape(x)[-2:])), b.to_shape_of(grad_y, y, (*result[:-2], *b.shape(y)[-2:]))]


def _swapped(rank: int) -> list[int]:
    """Return the permutation that transposes the last two axes."""
    return [*range(rank - 2), rank - 1, rank - 2]


def _source_of_transpose(value: Maybe, rank: int) -> ir.Value | None:
    """Return what a value is the transpose of, if that is how it is made."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or _permutation(node, rank) != _swapped(rank):
        return None
    return node.inputs[0]


def _permutation(node: ir.Node, rank: int) -> list[int]:
    """Return the permutation of a Transpose, which reverses all axes by default."""
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(rank))[::-1]


@rule("Gemm")
def _gemm(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    (g,), weight = grads, node.inputs[1]
    if node.attributes.get_int("transA", 0):
        return None
    grad_x = b.op("Gemm", g, weight, transB=1 - node.attributes.get_int("transB", 0), alpha=node.attributes.get_float("alpha", 1.0))
    return [grad_x]


@rule("Transpose")
def _transpose(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    rank = len(b.shape(node.outputs[0]))
    perm = _permutation(node, rank)
    return [b.op("Transpose", grads[0], perm=[perm.index(i) for i in range(rank)])]


@rule("Expand")
def _expand(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.to_shape_of(grads[0], node.inputs[0], b.shape(node.outputs[0]))]


@rule("Concat")
def _concat(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    axis = node.attributes.get_int("axis", 0)
    axis %= len(b.shape(node.outputs[0]))
    grads_in: list[Maybe] = []
    start = b.integers([0])
    for value in node.inputs:
        size = b.op("Slice", b.op("Shape", value), b.integers([axis]), b.integers([axis + 1]))
        end = b.op("Add", start, size)
        grads_in.append(b.op("Slice", grads[0], start, end, b.integers([axis])))
        start = end
    return grads_in


@rule("Split")
def _split(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    slices = [b.op("Mul", out, b.number(0, out)) if g is None else g for out, g in zip(node.outputs, grads, strict=True)]
    return [b.op("Concat", *slices, axis=node.attributes.get_int("axis", 0))]


@rule("Slice")
def _slice(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    if len(node.inputs) < 3:
        return None
    x, starts = node.inputs[:2]
    rank = len(b.shape(x))
    axes = list(range(rank)) if operand(node, 3) is None else ints(node, "axes", 3)
    steps = [1] if operand(node, 4) is None else ints(node, "steps", 4)
    if axes is None or steps is None or set(steps) != {1}:
        return None
    total, length = b.op("Shape", x), b.op("Shape", node.outputs[0])
    front = {}
    for i, axis in enumerate(axes):
        size = b.op("Slice", total, b.integers([axis % rank]), b.integers([axis % rank + 1]))
        start = b.op("Slice", starts, b.integers([i]), b.integers([i + 1]))
        start = b.op("Cast", start, to=ir.DataType.INT64)
        wrapped = b.op("Where", b.op("Less", start, b.integers([0])), b.op("Add", start, size), start)
        front[axis % rank] = b.op("Max", b.op("Min", wrapped, size), b.integers([0]))
    before = b.op("Concat", *(front.get(i) or b.integers([0]) for i in range(rank)), axis=0)
    after = b.op("Sub", b.op("Sub", total, length), before)
    return [b.op("Pad", grads[0], b.op("Concat", before, after, axis=0))]


@rule("Gather")
def _gather(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    x, index = node.inputs
    g = grads[0]
    rank, axis = len(b.shape(x)), node.attributes.get_int("axis", 0)
    axis %= rank
    positions = len(b.shape(index))
    if positions > 1 or b.graph.opset < 16:
        return None
    if positions == 0:
        g, index = b.unsqueeze(g, [axis]), b.unsqueeze(index, [0])
    column = b.op("Reshape", index, b.integers([1] * axis + [-1] + [1] * (rank - axis - 1)))
    spread = b.op("Expand", column, b.op("Shape", g))
    return [b.op("ScatterElements", b.op("Mul", x, b.number(0, x)), spread, g, axis=axis, reduction="add")]


@rule("Softmax")
def _softmax(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    y = node.outputs[0]
    axis = node.attributes.get_int("axis", -1 if b.graph.opset >= 13 else 1)
    if b.graph.opset < 13 and axis not in (-1, len(b.shape(y)) - 1):  # softmax over all axes from this one on
        return None
    weighted = b.op("Mul", grads[0], y)
    return [b.op("Sub", weighted, b.op("Mul", y, b.sum(weighted, [axis])))]


def _normalized(b: Backward, node: ir.Node, grads: Grads, centre: bool) -> Grads | None:
    x, scale = node.inputs[:2]
    rank = len(b.shape(x))
    if node.attributes.get_int("axis", -1) not in (-1, rank - 1) or len([v for v in node.outputs if v.uses()]) > 1:
        return None
    if centre:
        x = b.op("Sub", x, b.mean(x))
    power = b.op("Add", b.mean(b.op("Mul", x, x)), b.number(node.attributes.get_float("epsilon", 1e-5), x))
    deviation = b.op("Sqrt", power)
    unit = b.op("Div", x, deviation)
    g = b.op("Mul", grads[0], scale)
    inner = b.op("Sub", g, b.op("Mul", unit, b.mean(b.op("Mul", g, unit))))
    if centre:
        inner = b.op("Sub", inner, b.mean(g))
    return [b.op("Div", inner, deviation)]


rule("LayerNormalization")(partial(_normalized, centre=True))
rule("RMSNormalization", "SimplifiedLayerNormalization")(partial(_normalized, centre=False))


@rule("Gelu")
def _gelu(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x = node.inputs[0]
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        square = b.op("Mul", x, x)
        root = math.sqrt(2 / math.pi)
        inner = b.op("Add", b.op("Mul", square, b.number(0.044715, x)), b.number(1, x))
        t = b.op("Tanh", b.op("Mul", b.op("Mul", x, inner), b.number(root, x)))
        rise = b.op("Add", b.op("Mul", square, b.number(3 * 0.044715 * root, x)), b.number(root, x))
        slope = b.op("Mul", b.op("Mul", x, rise), b.op("Sub", b.number(1, x), b.op("Mul", t, t)))
        slope = b.op("Mul", b.op("Add", b.op("Add", t, slope), b.number(1, x)), b.number(0.5, x))
    else:
        cumulative = b.op("Erf", b.op("Mul", x, b.number(math.sqrt(0.5), x)))
        cumulative = b.op("Mul", b.op("Add", cumulative, b.number(1, x)), b.number(0.5, x))
        density = b.op("Exp", b.op("Mul", b.op("Mul", x, x), b.number(-0.5, x)))
        slope = b.op("Add", cumulative, b.op("Mul", b.op("Mul", x, density), b.number(1 / math.sqrt(2 * math.pi), x)))
    return [b.op("Mul", grads[0], slope)]


Derivative = Callable[[Backward, ir.Value, ir.Value, Maybe], Maybe]
_UNARY: dict[str, Derivative] = {
    **{op: lambda b, x, y, g: g for op in ("Identity", "Dropout")},
    **{op: lambda b, x, y, g: b.op("Reshape", g, b.op("Shape", x)) for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    "Cast": lambda b, x, y, g: b.cast(g, x),
    "Neg": lambda b, x, y, g: b.op("Neg", g),
    "Log": lambda b, x, y, g: b.op("Div", g, x),
    "Exp": lambda b, x, y, g: b.op("Mul", g, y),
    "Sqrt": lambda b, x, y, g: b.op("Div", b.op("Mul", g, b.number(0.5, y)), y),
    "Reciprocal": lambda b, x, y, g: b.op("Neg", b.op("Mul", g, b.op("Mul", y, y))),
    "Sigmoid": lambda b, x, y, g: b.op("Mul", g, b.op("Mul", y, b.op("Sub", b.number(1, y), y))),
    "Tanh": lambda b, x, y, g: b.op("Mul", g, b.op("Sub", b.number(1, y), b.op("Mul", y, y))),
    "Relu": lambda b, x, y, g: b.op("Where", b.op("Greater", x, b.number(0, x)), g, b.number(0, x)),
    "Clip": lambda b, x, y, g: b.op("Where", b.op("Equal", x, y), g, b.number(0, x)),
    "Erf": lambda b, x, y, g: b.op("Mul", g, b.op("Mul", b.op("Exp", b.op("Neg", b.op("Mul", x, x))), b.number(2 / math.sqrt(math.pi), x))),
}
"""Gradients of ``x`` for operators ``y = f(x)``, from x, y and the gradient of y."""


@rule(*_UNARY)
def _unary(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x = node.inputs[0]
    assert x is not None
    return [_UNARY[node.op_type](b, x, node.outputs[0], grads[0])]


@rule("Pow")
def _pow(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x, p = node.inputs
    result = b.shape(node.outputs[0])
    exponent = b.cast(p, x)
    slope = b.op("Mul", b.op("Pow", x, b.op("Sub", exponent, b.number(1, x))), exponent)
    return [b.to_shape_of(b.op("Mul", grads[0], slope), x, result)]


@rule("Where")
def _where(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (condition, x, y), g = node.inputs, grads[0]
    result, zero = b.shape(node.outputs[0]), b.number(0, node.outputs[0])
    return [None, b.to_shape_of(b.op("Where", condition, g, zero), x, result), b.to_shape_of(b.op("Where", condition, zero, g), y, result)]


@rule("Trilu")
def _trilu(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.op("Trilu", grads[0], *node.inputs[1:], upper=node.attributes.get_int("upper", 1))]


@rule("ReduceSum", "ReduceMean", "ReduceL2")
def _reduce(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    x, y, g = node.inputs[0], node.outputs[0], grads[0]
    axes = _axes(node, len(b.shape(x)))
    if axes is None:
        return None
    if not node.attributes.get_int("keepdims", 1):
        g, y = b.unsqueeze(g, axes), b.unsqueeze(y, axes)
    if node.op_type == "ReduceL2":
        return [b.op("Mul", x, b.op("Div", g, y))]
    if node.op_type == "ReduceMean":
        count = b.cast(b.op("Div", b.op("Size", x), b.op("Size", y)), x)
        g = b.op("Div", g, count)
    return [b.op("Expand", g, b.op("Shape", x))]


class Gradients(NamedTuple):
    """A copy of a model whose outputs are sums of products of gradients.

    Attributes:
        model: The copy.
        values: The values of its outputs, in order.
        blocked: Operators that cannot be differentiated.
    """

    model: ir.Model
    values: list[str]
    blocked: set[str]


def shaped_values(model: ir.Model) -> list[str]:
    """Return the names of the values whose shapes rules may need, and of the outputs; other values may not be tensors."""
    operands = {str(v.name): None for node in model.graph if node.op_type in RULES for v in (*node.inputs, *node.outputs) if v is not None}
    defined = {str(v.name) for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)) if v.name}
    return [name for name in (operands | {str(v.name): None for v in model.graph.outputs}) if name in defined]


def judged_outputs(backward: Backward, shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, ir.Value, int]]:
    """Return the outputs of a model that are its results in floats: names, values as float32, ranks."""
    copy, results = backward.graph, []
    cache = set(pairs_of(copy.model).values())  # not a model result, and on the path of every layer
    for value in list(copy.model.graph.outputs):
        name, out = str(value.name), copy.values[str(value.name)]
        if name not in cache and value.dtype in FLOATS and shapes.get(name):
            if value.dtype not in (ir.DataType.FLOAT, None):
                out = backward.op("Cast", out, to=ir.DataType.FLOAT)
            results.append((name, out, len(shapes[name])))
    return results


def seed_of(backward: Backward, output: str, gradient: ir.Value) -> ir.Value:
    """Return a float32 gradient of an output in the type of the output."""
    kind = backward.graph.values[output].dtype
    return gradient if kind in (ir.DataType.FLOAT, None) else backward.op("Cast", gradient, to=kind)


def fisher_gradients(
    copy: Extension, values: Iterable[str], shapes: Mapping[str, Sequence[int]], logits: Callable[[str, int], bool]
) -> tuple[Backward, dict[str, ir.Value]]:
    """Add random gradients of the outputs at ``values`` to a copy of a model.

    The gradients are of ``sum <seed, output>``, with seeds such that their second moments are the Fisher information of the outputs: of
    covariance ``diag(p) - p p^T`` for logits (``E g g^T`` is then the Hessian of the Kullback-Leibler divergence from the float model),
    uncorrelated for all others (the Gauss-Newton matrix of the squared error, every output relative to its own power).

    Args:
        copy: The copy.
        values: Values to differentiate by.
        shapes: Shapes of `shaped_values` on one batch.
        logits: Whether an output of a given name and rank is logits.

    Returns:
        What knows the operators that cannot be differentiated, and the gradients that exist, by value.
    """
    backward = Backward(copy, shapes)
    seeds = {}
    for i, (name, out, rank) in enumerate(judged_outputs(backward, shapes)):
        noise = backward.op("RandomNormalLike", out, seed=float(i + 1), dtype=ir.DataType.FLOAT)
        if logits(name, rank):
            p = backward.op("Softmax", out, axis=-1)
            root = backward.op("Mul", backward.op("Sqrt", p), noise)
            seed = backward.op("Sub", root, backward.op("Mul", p, backward.sum(root, [-1])))
        else:
            seed = backward.op("Div", noise, backward.op("Sqrt", backward.op("ReduceSumSquare", out, keepdims=0)))
        seeds[name] = seed_of(backward, name, seed)
    return backward, backward.run(seeds, values)


def fisher_taps(
    model: ir.Model, values: Mapping[str, int], shapes: Mapping[str, Sequence[int]], logits: Callable[[str, int], bool]
) -> Gradients:
    """Copy the model to output ``G^T G (N, N)`` of every differentiable value ``y (..., N)``, with random gradients ``G``.

    Args:
        model: The model.
        values: Values to differentiate by, and their widths N.
        shapes: See `fisher_gradients`.
        logits: See `fisher_gradients`.
    """
    copy = Extension(model)
    backward, gradients = fisher_gradients(copy, values, shapes, logits)
    for i, (name, gradient) in enumerate(gradients.items()):
        rows = backward.op("Reshape", backward.op("Cast", gradient, to=ir.DataType.FLOAT), backward.integers([-1, values[name]]))
        copy.output(copy.add("Gemm", [rows, rows], f"__fisher_{i}", transA=1), shape=[values[name]] * 2)
    return Gradients(copy.finish(), list(gradients), backward.blocked)


def adaptive_taps(
    model: ir.Model,
    layers: Mapping[str, tuple[str, int, int]],
    shapes: Mapping[str, Sequence[int]],
    logits: Callable[[str, int], bool],
    batch: tuple[str, int],
) -> Gradients:
    """Copy the model to output ``sum_s G_s G_s^T (K+1, K+1)`` of every layer with a gradient, ``G_s = [X_s 1]^T Delta_s`` of one sample.

    ``G_s (K+1, N)`` itself is never made: the sum is ``X'^T A X'`` with ``A = Delta Delta^T (T, T)`` of every sample.

    Args:
        model: The model.
        layers: By name of the output, the value that a layer reads, K and N.
        shapes: See `fisher_gradients`.
        logits: See `fisher_gradients`.
        batch: An input whose first axis is that of samples, and its length on the batch of ``shapes``. A value whose first axis is no
            multiple of it is taken for that of one sample.
    """
    copy = Extension(model, opset=13)
    backward, gradients = fisher_gradients(copy, layers, shapes, logits)
    op, integers = backward.op, backward.integers
    of_batch = op("Slice", op("Shape", copy.values[batch[0]]), integers([0]), integers([1]))
    padding, one = integers([0, 0, 0, 0, 0, 1]), backward.number(1, None)

    for i, (name, gradient) in enumerate(gradients.items()):
        reads, k, n = layers[name]
        samples = integers([1]) if shapes[reads][0] % batch[1] else of_batch

        def by_sample(value: ir.Value, width: int, samples: ir.Value = samples) -> ir.Value:
            return op("Reshape", op("Cast", value, to=ir.DataType.FLOAT), op("Concat", samples, integers([-1, width]), axis=0))

        delta = by_sample(gradient, n)
        x = op("Pad", by_sample(copy.values[reads], k), padding, one)
        weighted = op("MatMul", op("MatMul", delta, op("Transpose", delta, perm=[0, 2, 1])), x)
        rows = [op("Reshape", value, integers([-1, k + 1])) for value in (x, weighted)]
        copy.output(copy.add("Gemm", rows, f"__adaptive_{i}", transA=1), shape=[k + 1] * 2)
    return Gradients(copy.finish(), list(gradients), backward.blocked)
