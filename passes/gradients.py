"""Reverse-mode differentiation of a graph: a copy of a model that also computes gradients of its outputs, run like any model.

To teach it an operator, write its rule: a function of `Backward`, the node and the gradients of its outputs that returns a
gradient for every input (None where there is none), under ``@rule("Operator")``.

Only what lies between the values asked about and the outputs is differentiated. Where an operator without a rule is in the way,
the values before it have no gradient, and `Backward.blocked` names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.segments import reads
from magr_onnx.passes.taps import Extension

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
    """The copy of the model while its backward half is written.

    Attributes:
        graph: Where nodes are added.
        blocked: Operators without a rule that were met.
    """

    def __init__(self, graph: Extension, shapes: Mapping[str, Sequence[int]]) -> None:
        self.graph = graph
        self.blocked: set[str] = set()
        self._shapes = shapes
        self._count = 0
        self._gradients: dict[str, list[ir.Value]] = {}
        self._lost: set[str] = set()
        self._active: set[str] = set()

    def run(self, seeds: Mapping[str, ir.Value], wanted: Iterable[str]) -> dict[str, ir.Value]:
        """Gradients of ``sum over outputs <seed, output>`` with respect to every wanted value that has one."""
        wanted = list(wanted)
        nodes = list(self.graph.model.graph)
        active = self._active = set(wanted)
        for node in nodes:
            if not _flat(node) and any(name in active for name in reads(node)):
                active.update(str(v.name) for v in node.outputs)
        for name, seed in seeds.items():
            self._gradients.setdefault(name, []).append(seed)
        for node in reversed(nodes):
            inputs = [] if _flat(node) else self._differentiated(node)
            reached = [self.gradient(str(v.name)) for v in node.outputs]
            lost = any(v.name in self._lost for v in node.outputs)
            if not inputs or not (lost or any(g is not None for g in reached)):
                continue
            found: Grads | None = None
            if not lost and node.op_type in RULES and node.domain in ("", "com.microsoft"):
                found = RULES[node.op_type](self, node, reached)
            if found is None:
                if not lost:
                    self.blocked.add(node.op_type)
                self._lost.update(inputs)
                continue
            for value, gradient in zip_longest(node.inputs, found):
                if value is None or value.name not in inputs:
                    continue
                if gradient is None:  # the rule does not know this operand
                    self.blocked.add(node.op_type)
                    self._lost.add(str(value.name))
                else:
                    self._gradients.setdefault(str(value.name), []).append(gradient)
        return {name: g for name in wanted if name not in self._lost and (g := self.gradient(name)) is not None}

    def _differentiated(self, node: ir.Node) -> set[str]:
        """What a node reads (its subgraphs included) and a gradient is asked of."""
        others = {str(v.name) for v in node.inputs if v is not None and v.dtype not in _FLOATS}
        return {name for name in reads(node) if name in self._active} - others

    def gradient(self, name: str) -> ir.Value | None:
        """The sum of what has been found for a value so far; complete once all its readers were visited."""
        parts = self._gradients.get(name)
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = self.op("Add", total, part)
        self._gradients[name] = [total]
        return total

    # --- What rules are written in ------------------------------------------------------------------------------------

    def op(self, name: str, *inputs: Maybe, **attributes: object) -> ir.Value:
        self._count += 1
        return self.graph.add(name, inputs, f"__grad_{self._count}", **attributes)

    def number(self, value: float, like: Maybe) -> ir.Value:
        self._count += 1
        kind = np.float16 if like is not None and like.dtype == ir.DataType.FLOAT16 else np.float32
        constant = self.graph.constant(f"__grad_{self._count}", kind(value))
        return constant if like is None or like.dtype is not None else self.cast(constant, like)

    def cast(self, value: Maybe, like: Maybe) -> ir.Value:
        """``value`` in the type of another value, which the file need not say from opset 15 on."""
        if self.graph.opset >= 15:
            return self.op("CastLike", value, like)
        return self.op("Cast", value, to=(None if like is None else like.dtype) or ir.DataType.FLOAT)

    def integers(self, values: Sequence[int]) -> ir.Value:
        self._count += 1
        return self.graph.constant(f"__grad_{self._count}", np.array(values, np.int64))

    def shape(self, value: Maybe) -> tuple[int, ...]:
        """As it was on one batch; the rank and the axes of size 1 are what rules may read from it."""
        assert value is not None
        if value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape.numpy())
        return tuple(self._shapes[str(value.name)])

    def sum(self, gradient: Maybe, axes: Sequence[int], keepdims: bool = True) -> ir.Value:
        if self.graph.opset >= 13:
            return self.op("ReduceSum", gradient, self.integers(axes), keepdims=int(keepdims))
        return self.op("ReduceSum", gradient, axes=list(axes), keepdims=int(keepdims))

    def mean(self, value: Maybe, axis: int = -1) -> ir.Value:
        if self.graph.opset >= 18:
            return self.op("ReduceMean", value, self.integers([axis]), keepdims=1)
        return self.op("ReduceMean", value, axes=[axis], keepdims=1)

    def unsqueeze(self, value: Maybe, axes: Sequence[int]) -> ir.Value:
        if self.graph.opset >= 13:
            return self.op("Unsqueeze", value, self.integers(axes))
        return self.op("Unsqueeze", value, axes=list(axes))

    def to_shape_of(self, gradient: Maybe, value: Maybe, result: Sequence[int]) -> Maybe:
        """The gradient of a broadcast operand: summed over the axes along which it was repeated to the shape ``result``."""
        if value is None or value.name not in self._active:  # never read
            return gradient
        own = self.shape(value)
        leading = len(result) - len(own)
        if leading:
            gradient = self.sum(gradient, list(range(leading)), keepdims=False)
        axes = [i for i, size in enumerate(own) if size == 1 and result[leading + i] != 1]
        return self.sum(gradient, axes) if axes else gradient


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, None)
# Constant almost everywhere, or no floats: types of values between are often missing in files, so integers are told by what makes them.
_FLAT = frozenset(
    (
        *("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "IsNaN", "IsInf", "Not", "And", "Or"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Sign", "Floor", "Ceil", "Round"),
    )
)


def _flat(node: ir.Node) -> bool:
    """Whether nothing that comes out of a node has a gradient."""
    if node.op_type == "Cast" and "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int()) not in _FLOATS
    return node.op_type in _FLAT and node.domain == ""


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(v) for v in tensor.numpy().reshape(-1)]


def _attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    """Axes of a reduction, from its attribute or its constant input; None where they are computed."""
    if "axes" in node.attributes:
        axes: list[int] | None = list(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = _constant(node.inputs[1])
    else:
        axes = list(range(rank))
    return None if axes is None else sorted(a % rank for a in axes)


# --- Rules --------------------------------------------------------------------------------------------------------------


@rule("Identity", "Dropout")
def _same(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [grads[0]]


@rule("Cast")
def _cast(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.cast(grads[0], node.inputs[0])]


@rule("Add", "Sub")
def _add(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (g,), (x, y) = grads, node.inputs
    result = b.shape(node.outputs[0])
    return [b.to_shape_of(g, x, result), b.to_shape_of(g if node.op_type == "Add" else b.op("Neg", g), y, result)]


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

    def turned(value: Maybe, rank: int) -> ir.Value:
        return b.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])

    result = b.shape(node.outputs[0])
    left = b.op("MatMul", g, turned(y, ranks[1]))
    right = b.op("MatMul", turned(x, ranks[0]), g)
    return [b.to_shape_of(left, x, (*result[:-2], *b.shape(x)[-2:])), b.to_shape_of(right, y, (*result[:-2], *b.shape(y)[-2:]))]


@rule("Gemm")
def _gemm(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    (g,), weight = grads, node.inputs[1]
    if _attribute(node, "transA", 0):
        return None
    alpha = node.attributes.get("alpha")
    back = b.op("Gemm", g, weight, transB=1 - _attribute(node, "transB", 0), alpha=1.0 if alpha is None else alpha.as_float())
    return [back]


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.op("Reshape", grads[0], b.op("Shape", node.inputs[0]))]


@rule("Transpose")
def _transpose(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    rank = len(b.shape(node.outputs[0]))
    perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(rank))[::-1]
    return [b.op("Transpose", grads[0], perm=[perm.index(i) for i in range(rank)])]


@rule("Expand")
def _expand(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.to_shape_of(grads[0], node.inputs[0], b.shape(node.outputs[0]))]


@rule("Concat")
def _concat(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    axis = _attribute(node, "axis", 0)
    axis %= len(b.shape(node.outputs[0]))
    grads_in: list[Maybe] = []
    begin = b.integers([0])
    for value in node.inputs:
        size = b.op("Slice", b.op("Shape", value), b.integers([axis]), b.integers([axis + 1]))
        end = b.op("Add", begin, size)
        grads_in.append(b.op("Slice", grads[0], begin, end, b.integers([axis])))
        begin = end
    return grads_in


@rule("Split")
def _split(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    parts = [b.op("Mul", out, b.number(0, out)) if g is None else g for out, g in zip(node.outputs, grads, strict=True)]
    return [b.op("Concat", *parts, axis=_attribute(node, "axis", 0))]


@rule("Slice")
def _slice(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    if len(node.inputs) < 3:
        return None
    x, starts = node.inputs[:2]
    rank = len(b.shape(x))
    axes = _constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(rank))
    steps = _constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    if axes is None or steps is None or set(steps) != {1}:
        return None
    total, left = b.op("Shape", x), b.op("Shape", node.outputs[0])
    front = {}
    for i, axis in enumerate(axes):
        size = b.op("Slice", total, b.integers([axis % rank]), b.integers([axis % rank + 1]))
        start = b.op("Slice", starts, b.integers([i]), b.integers([i + 1]))
        start = b.op("Cast", start, to=ir.DataType.INT64)
        wrapped = b.op("Where", b.op("Less", start, b.integers([0])), b.op("Add", start, size), start)
        front[axis % rank] = b.op("Max", b.op("Min", wrapped, size), b.integers([0]))
    begin = b.op("Concat", *(front.get(i) or b.integers([0]) for i in range(rank)), axis=0)
    after = b.op("Sub", b.op("Sub", total, left), begin)
    return [b.op("Pad", grads[0], b.op("Concat", begin, after, axis=0))]


@rule("Gather")
def _gather(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    x, index = node.inputs
    g = grads[0]
    rank, axis = len(b.shape(x)), _attribute(node, "axis", 0)
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
    axis = _attribute(node, "axis", -1 if b.graph.opset >= 13 else 1)
    if b.graph.opset < 13 and axis not in (-1, len(b.shape(y)) - 1):  # over all axes from this one on
        return None
    weighted = b.op("Mul", grads[0], y)
    return [b.op("Sub", weighted, b.op("Mul", y, b.sum(weighted, [axis])))]


def _normalized(b: Backward, node: ir.Node, grads: Grads, centre: bool) -> Grads | None:
    x, scale = node.inputs[:2]
    rank = len(b.shape(x))
    if _attribute(node, "axis", -1) not in (-1, rank - 1) or len([v for v in node.outputs if v.uses()]) > 1:
        return None
    epsilon = node.attributes.get("epsilon")
    if centre:
        x = b.op("Sub", x, b.mean(x))
    power = b.op("Add", b.mean(b.op("Mul", x, x)), b.number(1e-5 if epsilon is None else epsilon.as_float(), x))
    deviation = b.op("Sqrt", power)
    unit = b.op("Div", x, deviation)
    g = b.op("Mul", grads[0], scale)
    inner = b.op("Sub", g, b.op("Mul", unit, b.mean(b.op("Mul", g, unit))))
    if centre:
        inner = b.op("Sub", inner, b.mean(g))
    return [b.op("Div", inner, deviation)]


@rule("LayerNormalization")
def _layer_norm(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    return _normalized(b, node, grads, centre=True)


@rule("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    return _normalized(b, node, grads, centre=False)


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


@rule("Erf")
def _erf(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x = node.inputs[0]
    density = b.op("Exp", b.op("Neg", b.op("Mul", x, x)))
    return [b.op("Mul", grads[0], b.op("Mul", density, b.number(2 / math.sqrt(math.pi), x)))]


@rule("Sigmoid", "Tanh", "Exp", "Sqrt", "Reciprocal")
def _of_result(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    """Functions whose derivative is one of their value."""
    g, y = grads[0], node.outputs[0]
    if node.op_type == "Exp":
        return [b.op("Mul", g, y)]
    if node.op_type == "Sqrt":
        return [b.op("Div", b.op("Mul", g, b.number(0.5, y)), y)]
    if node.op_type == "Reciprocal":
        return [b.op("Neg", b.op("Mul", g, b.op("Mul", y, y)))]
    other = b.op("Sub", b.number(1, y), y if node.op_type == "Sigmoid" else b.op("Mul", y, y))
    return [b.op("Mul", g, b.op("Mul", y, other) if node.op_type == "Sigmoid" else other)]


@rule("Neg")
def _neg(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.op("Neg", grads[0])]


@rule("Log")
def _log(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.op("Div", grads[0], node.inputs[0])]


@rule("Pow")
def _pow(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x, p = node.inputs
    result = b.shape(node.outputs[0])
    exponent = b.cast(p, x)
    slope = b.op("Mul", b.op("Pow", x, b.op("Sub", exponent, b.number(1, x))), exponent)
    return [b.to_shape_of(b.op("Mul", grads[0], slope), x, result)]


@rule("Relu")
def _relu(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x = node.inputs[0]
    return [b.op("Where", b.op("Greater", x, b.number(0, x)), grads[0], b.number(0, x))]


@rule("Clip")
def _clip(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    x = node.inputs[0]
    return [b.op("Where", b.op("Equal", x, node.outputs[0]), grads[0], b.number(0, x))]


@rule("Where")
def _where(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    (condition, x, y), g = node.inputs, grads[0]
    result, zero = b.shape(node.outputs[0]), b.number(0, node.outputs[0])
    return [None, b.to_shape_of(b.op("Where", condition, g, zero), x, result), b.to_shape_of(b.op("Where", condition, zero, g), y, result)]


@rule("Trilu")
def _trilu(b: Backward, node: ir.Node, grads: Grads) -> Grads:
    return [b.op("Trilu", grads[0], *node.inputs[1:], upper=_attribute(node, "upper", 1))]


@rule("ReduceSum", "ReduceMean", "ReduceL2")
def _reduce(b: Backward, node: ir.Node, grads: Grads) -> Grads | None:
    x, y, g = node.inputs[0], node.outputs[0], grads[0]
    axes = _axes(node, len(b.shape(x)))
    if axes is None:
        return None
    if not _attribute(node, "keepdims", 1):
        g, y = b.unsqueeze(g, axes), b.unsqueeze(y, axes)
    if node.op_type == "ReduceL2":
        return [b.op("Mul", x, b.op("Div", g, y))]
    if node.op_type == "ReduceMean":
        count = b.cast(b.op("Div", b.op("Size", x), b.op("Size", y)), x)
        g = b.op("Div", g, count)
    return [b.op("Expand", g, b.op("Shape", x))]


def fisher_taps(
    model: ir.Model, values: Sequence[str], shapes: Mapping[str, Sequence[int]], logits: Callable[[str, int], bool]
) -> tuple[ir.Model, list[str], set[str]]:
    """A copy of the model that outputs ``G^T G (N, N)`` of every value ``y (..., N)`` that has one, ``G`` being random gradients.

    The gradients are of ``sum <seed, output>``, with seeds such that their second moments are the Fisher information of the
    outputs: of covariance ``diag(p) - p p^T``
    for logits (``E g g^T`` is then the Hessian of the Kullback-Leibler divergence from the float model), uncorrelated for all
    others (the Gauss-Newton matrix of the squared error, every output relative to its own power).

    Args:
        model: The model.
        values: Values to differentiate by.
        shapes: Of every value of the graph, on one batch.
        logits: Whether an output of a name and rank is one of logits.

    Returns:
        The copy, the values it has outputs for, in order, and operators in the way that cannot be differentiated.
    """
    copy = Extension(model)
    backward = Backward(copy, shapes)
    seeds = {}
    for i, value in enumerate(model.graph.outputs):
        name = str(value.name)
        if value.dtype not in _FLOATS or name not in shapes or not shapes[name]:
            continue
        out = copy.values[name]
        if value.dtype == ir.DataType.FLOAT16:
            out = backward.op("Cast", out, to=ir.DataType.FLOAT)
        noise = backward.op("RandomNormalLike", out, seed=float(i + 1), dtype=ir.DataType.FLOAT)
        if logits(name, len(shapes[name])):
            p = backward.op("Softmax", out, axis=-1)
            root = backward.op("Mul", backward.op("Sqrt", p), noise)
            seed = backward.op("Sub", root, backward.op("Mul", p, backward.sum(root, [-1])))
        else:
            power = (
                backward.op("ReduceSumSquare", out, keepdims=0)
                if copy.opset < 18
                else backward.op("ReduceSumSquare", out, None, keepdims=0)
            )
            seed = backward.op("Div", noise, backward.op("Sqrt", power))
        seeds[name] = backward.op("Cast", seed, to=value.dtype) if value.dtype == ir.DataType.FLOAT16 else seed
    found = backward.run(seeds, values)
    for i, (name, gradient) in enumerate(found.items()):
        rows = backward.op("Reshape", backward.op("Cast", gradient, to=ir.DataType.FLOAT), backward.integers([-1, shapes[name][-1]]))
        copy.output(copy.add("Gemm", [rows, rows], f"__fisher_{i}", transA=1), shape=[shapes[name][-1]] * 2)
    return copy.finish(), list(found), backward.blocked
