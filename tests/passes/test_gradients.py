"""Differentiating graphs: every rule, and a whole model, against finite differences in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.models import bundled
from magr_onnx.passes.instrument.backward import RULES, Backward
from magr_onnx.passes.instrument.gradients import adaptive_taps, fisher_gradients, fisher_taps
from magr_onnx.passes.instrument.taps import Extension, shape_taps
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Array, Builder

INT, BOOL = ir.DataType.INT64, ir.DataType.BOOL
Feeds = Mapping[str, Array]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def away_from_zero(*shape: int, seed: int = 0) -> Array:
    """Where kinks are, a finite difference is none."""
    x = normal(*shape, seed=seed)
    return np.where(x < 0, x - 0.3, x + 0.3)


def positive(*shape: int, seed: int = 0) -> Array:
    return np.asarray(np.abs(normal(*shape, seed=seed)) + 0.5, np.float32)


def shapes_of(model: ir.Model, feeds: Feeds) -> dict[str, tuple[int, ...]]:
    names = [str(v.name) for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))]
    with Session(shape_taps(model, names)) as session:
        return {n: tuple(int(d) for d in s) for n, s in zip(names, session.run(feeds), strict=True)}


def gradients(model: ir.Model, feeds: Feeds, wanted: Sequence[str], probes: Mapping[str, Array]) -> tuple[dict[str, Array], set[str]]:
    """Gradients of ``sum over outputs <probe, output>``, run by onnxruntime, and operators that were in the way."""
    copy = Extension(model)
    backward = Backward(copy, shapes_of(model, feeds))
    seeds = {name: copy.constant(f"probe_{name}", probe) for name, probe in probes.items()}
    found = backward.run(seeds, wanted)
    if not found:
        return {}, backward.blocked
    for name, value in found.items():
        copy.output(copy.add("Identity", [value], f"out_{name}"))
    with Session(copy.finish()) as session:
        return dict(zip(found, session.run(feeds), strict=True)), backward.blocked


def numeric(model: ir.Model, feeds: Feeds, name: str, probes: Mapping[str, Array], step: float = 3e-3) -> Array:
    """The same by central differences of the fourth order, one element of an input at a time."""
    result = np.zeros(feeds[name].shape)
    with Session(model) as session:

        def value(index: tuple[int, ...], move: float) -> float:
            moved = feeds[name].copy()
            moved[index] += move
            outputs = session.run({**feeds, name: moved})
            return sum(float(np.vdot(p.astype(np.float64), o.astype(np.float64))) for p, o in zip(probes.values(), outputs, strict=True))

        for index in np.ndindex(*result.shape):
            x = float(feeds[name][index])
            far, near = (
                (value(index, h) - value(index, -h)) / (float(np.float32(x + h)) - float(np.float32(x - h))) for h in (2 * step, step)
            )
            result[index] = (4 * near - far) / 3
    return result


def check(model: ir.Model, feeds: Feeds, wanted: Sequence[str]) -> None:
    with Session(model) as session:
        probes = {
            str(v.name): normal(*o.shape, seed=77 + i) for i, (v, o) in enumerate(zip(model.graph.outputs, session.run(feeds), strict=True))
        }
    found, blocked = gradients(model, feeds, wanted, probes)
    assert not blocked
    assert found.keys() == set(wanted)
    for name in wanted:
        expected = numeric(model, feeds, name, probes)
        assert found[name].shape == feeds[name].shape
        np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-3 * max(float(np.abs(expected).max()), 1e-2))


# Builds the graph of a case: its outputs, its feeds, and the inputs to differentiate by.
Case = Callable[[Builder], tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]]
CASES: dict[str, Case] = {}


def case(operator: str, label: str, inputs: Mapping[str, Array], *, fixed: Mapping[str, Array] | None = None, **attributes: Any) -> None:
    """One operator on inputs that are differentiated by, then constants."""

    def build(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
        values = {name: b.input(name, list(array.shape)) for name, array in inputs.items()}
        given = [*values.values(), *(b.constant(name, array) for name, array in (fixed or {}).items())]
        return [b.node(operator, given, "tested", **attributes)], dict(inputs), list(inputs)

    CASES[f"{operator}-{label}"] = build


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


for op in ("Identity", "Neg", "Tanh", "Sigmoid", "Exp", "Erf", "Dropout"):
    case(op, "plain", {"x": normal(2, 3)})
for op in ("Sqrt", "Log", "Reciprocal"):
    case(op, "plain", {"x": positive(2, 3)})
case("Relu", "plain", {"x": away_from_zero(3, 4)})
case("Clip", "both", {"x": away_from_zero(3, 4)}, fixed={"low": np.float32(-0.6), "high": np.float32(0.7)})
case("Cast", "same", {"x": normal(2, 3)}, to=ir.DataType.FLOAT)
case("Gelu", "erf", {"x": normal(3, 4)})
case("Gelu", "tanh", {"x": normal(3, 4)}, approximate="tanh")
for op in ("Add", "Sub", "Mul", "Div"):
    second = positive if op == "Div" else normal
    case(op, "same", {"x": normal(2, 3), "y": second(2, 3, seed=1)})
    case(op, "row", {"x": normal(2, 3), "y": second(3, seed=1)})
    case(op, "column", {"x": normal(2, 1), "y": second(2, 3, seed=1)})
    case(op, "outer", {"x": normal(4, 1, 3), "y": second(2, 1, seed=1)})
    case(op, "scalar", {"x": normal(2, 3), "y": second(seed=1)})
case("Sum", "one", {"x": normal(2, 3)})
case("Sum", "three", {"x": normal(2, 3), "y": normal(3, seed=1), "z": normal(2, 1, seed=2)})
case("Pow", "square", {"x": normal(2, 3)}, fixed={"p": np.float32(2)})
case("Pow", "cube-int", {"x": normal(2, 3)}, fixed={"p": np.int64(3)})
case("Pow", "rows", {"x": positive(2, 1)}, fixed={"p": np.array([0.5, -1.0, 2.5], np.float32)})
case("MatMul", "plain", {"x": normal(2, 3), "y": normal(3, 4, seed=1)})
case("MatMul", "batched", {"x": normal(2, 3, 4), "y": normal(2, 4, 2, seed=1)})
case("MatMul", "broadcast-right", {"x": normal(2, 2, 3), "y": normal(3, 2, seed=1)})
case("MatMul", "broadcast-left", {"x": normal(2, 3), "y": normal(2, 3, 2, seed=1)})
case("MatMul", "constant", {"x": normal(2, 2, 3)}, fixed={"w": normal(3, 4, seed=1)})
case("MatMul", "constant-batched", {"x": normal(2, 2, 3)}, fixed={"w": normal(2, 3, 4, seed=1)})
case("MatMul", "broadcast-both", {"x": normal(2, 1, 2, 3), "y": normal(3, 3, 2, seed=1)})
case("Gemm", "plain", {"x": normal(2, 3)}, fixed={"w": normal(3, 4, seed=1)})
case("Gemm", "turned", {"x": normal(2, 3)}, fixed={"w": normal(4, 3, seed=1), "b": normal(4, seed=2)}, transB=1, alpha=0.5, beta=2.0)
case("Reshape", "plain", {"x": normal(2, 6)}, fixed={"to": ints(3, -1)})
case("Flatten", "plain", {"x": normal(2, 2, 3)}, axis=1)
case("Squeeze", "plain", {"x": normal(2, 1, 3)}, fixed={"axes": ints(1)})
case("Unsqueeze", "plain", {"x": normal(2, 3)}, fixed={"axes": ints(0, -1)})
case("Transpose", "reversed", {"x": normal(2, 3, 4)})
case("Transpose", "cyclic", {"x": normal(2, 3, 4)}, perm=[1, 2, 0])
case("Expand", "axes", {"x": normal(2, 1, 3)}, fixed={"to": ints(2, 4, 3)})
case("Expand", "ranks", {"x": normal(2, 1)}, fixed={"to": ints(3, 2, 2)})
case("Concat", "middle", {"x": normal(2, 1, 3), "y": normal(2, 2, 3, seed=1), "z": normal(2, 3, 3, seed=2)}, axis=1)
case("Concat", "last", {"x": normal(2, 1), "y": normal(2, 2, seed=1)}, axis=-1)
case("Slice", "front", {"x": normal(4, 5)}, fixed={"s": ints(1), "e": ints(3), "a": ints(0)})
case("Slice", "back", {"x": normal(4, 5)}, fixed={"s": ints(-3), "e": ints(100), "a": ints(-1)})
case("Slice", "two", {"x": normal(4, 5)}, fixed={"s": ints(-100, 1), "e": ints(-1, -1), "a": ints(1, 0), "t": ints(1, 1)})
case("Slice", "no-axes", {"x": normal(4, 5)}, fixed={"s": ints(1, 2), "e": ints(3, 4)})
case("Gather", "scalar", {"x": normal(3, 4, 2)}, fixed={"i": np.int64(2)}, axis=1)
case("Gather", "negative", {"x": normal(3, 4)}, fixed={"i": np.int64(-1)})
case("Gather", "repeated", {"x": normal(3, 4)}, fixed={"i": ints(1, 1, 3, -1)}, axis=-1)
case("Softmax", "last", {"x": normal(2, 4)})
case("Softmax", "middle", {"x": normal(2, 3, 2)}, axis=1)
case("LayerNormalization", "plain", {"x": normal(3, 5)}, fixed={"s": positive(5), "b": normal(5, seed=1)}, epsilon=1e-3)
case("SimplifiedLayerNormalization", "plain", {"x": normal(3, 5)}, fixed={"s": positive(5)}, epsilon=1e-3)
case("RMSNormalization", "plain", {"x": normal(3, 5)}, fixed={"s": positive(5)}, epsilon=1e-3)
case("Trilu", "lower", {"x": normal(2, 3, 3)}, upper=0)
case("Trilu", "upper", {"x": normal(3, 4)}, fixed={"k": np.int64(1)})
for op in ("ReduceSum", "ReduceMean", "ReduceL2"):
    for keep in (0, 1):
        case(op, f"input-keep{keep}", {"x": away_from_zero(2, 3, 4)}, fixed={"axes": ints(-1, 0)}, keepdims=keep)
        case(op, f"all-keep{keep}", {"x": away_from_zero(2, 3)}, keepdims=keep)


def where(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
    x, y, condition = b.input("x", [2, 3]), b.input("y", [3]), b.input("c", [2, 2, 3], BOOL)
    out = b.node("Where", [condition, x, y], "tested")
    out.dtype = graphs.FLOAT
    return [out], {"x": normal(2, 3), "y": normal(3, seed=1), "c": normal(2, 2, 3, seed=2) > 0}, ["x", "y"]


def split(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
    """Three parts, of which the middle one is not used."""
    x = b.input("x", [2, 6])
    node = ir.node("Split", [x, b.constant("sizes", ints(1, 3, 2))], {"axis": -1}, num_outputs=3, name="tested")
    for i, value in enumerate(node.outputs):
        value.name, value.dtype = f"part{i}", graphs.FLOAT
    b.nodes.append(node)
    return [b.node("Exp", [node.outputs[0]]), b.node("Tanh", [node.outputs[2]])], {"x": normal(2, 6)}, ["x"]


def precise(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
    """A part of a graph in double precision, with rules that add constants."""
    double = b.node("Cast", [b.input("x", [2, 3])], to=ir.DataType.DOUBLE)
    double.dtype = ir.DataType.DOUBLE
    squared = b.node("Pow", [b.node("Sigmoid", [double]), b.constant("p", np.array(2.0))])
    return [b.node("Cast", [b.node("ReduceMean", [squared], keepdims=0)], to=ir.DataType.FLOAT)], {"x": normal(2, 3)}, ["x"]


def transposed(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
    """Products with a constant that is transposed first, as heads tied to a table are, and with the transpose of an input."""
    x, y = b.input("x", [2, 4, 3]), b.input("y", [2, 5, 3])
    first = b.node("MatMul", [x, b.node("Transpose", [b.constant("table", normal(6, 3, seed=2))], perm=[1, 0])])
    second = b.node("MatMul", [x, b.node("Transpose", [y], perm=[0, 2, 1])])
    return [first, second], {"x": normal(2, 4, 3), "y": normal(2, 5, 3, seed=1)}, ["x", "y"]


def fan(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
    """A value read three times, once twice by one node, and put out as well."""
    x = b.input("x", [2, 3])
    middle = b.node("Tanh", [x], "tested")
    return [middle, b.node("Mul", [middle, middle]), b.node("Exp", [b.node("Add", [middle, x])])], {"x": normal(2, 3)}, ["x"]


CASES |= {"Where-broadcast": where, "Split-unused": split, "fan-out": fan, "Transpose-products": transposed, "Cast-around": precise}


def model_of(build: Case, opset: int) -> tuple[ir.Model, dict[str, Array], Sequence[str]]:
    b = Builder(opset)
    outputs, feeds, wanted = build(b)
    for i, out in enumerate(outputs):
        out.name, out.dtype, out.shape = f"y{i}", graphs.FLOAT, None
    return b.model_of(list(outputs)), feeds, wanted


@pytest.mark.parametrize("label", CASES)
def test_rule_against_finite_differences(label: str) -> None:
    model, feeds, wanted = model_of(CASES[label], 23 if label.startswith("RMS") else 20)
    check(model, feeds, wanted)


def test_every_rule_has_a_case() -> None:
    assert {label.split("-")[0] for label in CASES} - {"fan"} == RULES.keys()


OLD: dict[str, Case] = {}


def old(operator: str, label: str, **attributes: Any) -> None:
    def build(b: Builder) -> tuple[Sequence[ir.Value], dict[str, Array], Sequence[str]]:
        return [b.node(operator, [b.input("x", [2, 1, 4])], "tested", **attributes)], {"x": away_from_zero(2, 1, 4)}, ["x"]

    OLD[f"{operator}-{label}"] = build


for keep in (0, 1):
    for op in ("ReduceSum", "ReduceMean", "ReduceL2"):
        old(op, f"attribute-keep{keep}", axes=[-1], keepdims=keep)
old("Squeeze", "attribute", axes=[1])
old("Unsqueeze", "attribute", axes=[0])
old("Softmax", "last", axis=-1)
old("Cast", "cast", to=ir.DataType.FLOAT)


@pytest.mark.parametrize("label", OLD)
def test_rule_of_an_old_opset(label: str) -> None:
    """Axes are attributes up to opset 12, and there is no CastLike."""
    check(*model_of(OLD[label], 12))


# --- What cannot be differentiated ----------------------------------------------------------------------------------------


def through(middle: Callable[[Builder, ir.Value], ir.Value], opset: int = 20) -> tuple[ir.Model, dict[str, Array]]:
    b = Builder(opset)
    before = b.node("Tanh", [b.input("x", [3, 4])], "before")
    after = middle(b, before)
    after.name, after.dtype = "after", graphs.FLOAT
    return b.model(b.node("Exp", [after], "last"), [None, None]), {"x": normal(3, 4)}


def _by_matrix(b: Builder, v: ir.Value) -> ir.Value:
    return b.node("Reshape", [b.node("Gather", [v, b.constant("i", ints(0, 2)[None])]), b.constant("to", ints(2, 4))])


BLOCKED: dict[str, tuple[str, Callable[[Builder, ir.Value], ir.Value], int]] = {
    "no rule": ("CumSum", lambda b, v: b.node("CumSum", [v, b.constant("axis", np.int64(1))]), 20),
    "strided": (
        "Slice",
        lambda b, v: b.node("Slice", [v, *(b.constant(n, ints(i)) for n, i in zip("seat", (0, 3, 0, 2), strict=True))]),
        20,
    ),
    "transposed": ("Gemm", lambda b, v: b.node("Gemm", [v, b.constant("w", normal(3, 2))], transA=1), 20),
    "second operand": ("Gemm", lambda b, v: b.node("Gemm", [b.constant("w", normal(2, 3)), v]), 20),
    "third operand": ("Gemm", lambda b, v: b.node("Gemm", [b.constant("w", normal(3, 2)), b.constant("u", normal(2, 4)), v]), 20),
    "exponent": ("Pow", lambda b, v: b.node("Pow", [b.constant("base", np.float32(2)), v]), 20),
    "old softmax": ("Softmax", lambda b, v: b.node("Softmax", [v], axis=0), 12),
    "index matrix": ("Gather", _by_matrix, 20),
}


@pytest.mark.parametrize("label", BLOCKED)
def test_what_is_in_the_way_is_named(label: str) -> None:
    """Values before it have no gradient, rather than a wrong one; values behind it have theirs."""
    operator, middle, opset = BLOCKED[label]
    model, feeds = through(middle, opset)
    with Session(model) as session:
        (y,) = session.run(feeds)
    found, blocked = gradients(model, feeds, ["before_out", "after"], {"y": np.ones_like(y)})
    assert blocked == {operator}
    assert found.keys() == {"after"}
    np.testing.assert_allclose(found["after"], y, rtol=1e-5)


def test_constants_are_not_transposed() -> None:
    """onnxruntime would keep the transpose beside the constant, which for a table of embeddings are hundreds of megabytes."""
    for label in ("MatMul-constant", "Transpose-products"):
        model, feeds, wanted = model_of(CASES[label], 20)
        copy = Extension(model)
        backward = Backward(copy, shapes_of(model, feeds))
        backward.run({str(v.name): v for v in model.graph.outputs}, wanted)
        made = [node for node in copy.model.graph if str(node.name).startswith("__grad") and node.op_type == "Transpose"]
        assert not any(node.inputs[0] is not None and node.inputs[0].const_value is not None for node in made)


def test_one_way_in_the_way_is_enough() -> None:
    """A part of a gradient is no gradient."""
    model, feeds = through(lambda b, v: b.node("Add", [v, b.node("CumSum", [v, b.constant("axis", np.int64(1))])]))
    found, blocked = gradients(model, feeds, ["before_out"], {"y": np.ones((3, 4), np.float32)})
    assert (found, blocked) == ({}, {"CumSum"})


def test_what_subgraphs_read_is_not_forgotten() -> None:
    def middle(b: Builder, v: ir.Value) -> ir.Value:
        branches = []
        for name, op in (("then", "Exp"), ("else", "Neg")):
            node = ir.node(op, [v], name=name)
            node.outputs[0].name, node.outputs[0].dtype = f"{name}_out", graphs.FLOAT
            branches.append(ir.Graph([], node.outputs, nodes=[node], name=name))
        condition = b.input("condition", [], BOOL)
        chosen = b.node("If", [condition], "choice", then_branch=branches[0], else_branch=branches[1])
        chosen.dtype = graphs.FLOAT
        return b.node("Add", [chosen, v])

    model, feeds = through(middle)
    feeds["condition"] = np.array(True)
    found, blocked = gradients(model, feeds, ["before_out", "after"], {"y": np.ones((3, 4), np.float32)})
    assert blocked == {"If"}
    assert found.keys() == {"after"}


def test_integers_made_of_shapes_are_not_in_the_way() -> None:
    """A causal mask made of the sequence length, in a file that says no types between: nothing in it depends on values."""

    def middle(b: Builder, v: ir.Value) -> ir.Value:
        length = b.node("Gather", [b.node("Shape", [v]), b.constant("one", np.int64(1))])
        zero, step = b.constant("zero", np.int64(0)), b.constant("step", np.int64(1))
        positions = b.node("Range", [zero, length, step])
        real = b.node("Cast", [positions], to=ir.DataType.FLOAT)
        bent = b.node("Mul", [v, b.node("Sin", [real])])
        return b.node("Where", [b.node("Greater", [v, b.constant("low", np.float32(-0.5))]), bent, v])

    model, feeds = through(middle)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = None
    probe = normal(3, 4, seed=9)
    found, blocked = gradients(model, feeds, ["x"], {"y": probe})
    assert not blocked
    np.testing.assert_allclose(found["x"], numeric(model, feeds, "x", {"y": probe}), rtol=5e-3, atol=5e-3)


# --- Whole models ---------------------------------------------------------------------------------------------------------


def test_bundled_model_against_finite_differences() -> None:
    """The directional derivative of a scalar of the logits, at layers' outputs of every block."""
    model = ir.load(bundled.MODEL)
    feeds = {"input_ids": np.load(bundled.CALIBRATION)["input_ids"][:1, :24]}
    layers, _ = find(model)
    chosen = [layers[0], layers[3], layers[len(layers) // 2], layers[-2]]
    (output,) = (str(v.name) for v in model.graph.outputs)
    with Session(model) as session:
        probe = normal(*session.run(feeds)[0].shape) / 100
    found, blocked = gradients(model, feeds, [str(layer.output.name) for layer in chosen], {output: probe})
    assert not blocked
    for i, layer in enumerate(chosen):
        name = str(layer.output.name)
        direction = normal(*found[name].shape, seed=i)
        moved = model.clone()
        values = {str(v.name): v for node in moved.graph for v in node.outputs}
        step = ir.val("step", graphs.FLOAT, [])
        along = ir.Value(name="direction", type=ir.TensorType(graphs.FLOAT), const_value=ir.tensor(direction, name="direction"))
        moved.graph.inputs.append(step)
        moved.graph.register_initializer(along)
        move = ir.node("Mul", [along, step])
        total = ir.node("Add", [values[name], move.outputs[0]])
        ir.convenience.replace_all_uses_with(values[name], total.outputs[0])
        total.replace_input_with(0, values[name])
        moved.graph.insert_after(values[name].producer(), [move, total])
        with Session(moved) as session:
            up, down = (
                float(np.vdot(probe.astype(np.float64), session.run({**feeds, "step": np.array(h, np.float32)})[0].astype(np.float64)))
                for h in (1e-2, -1e-2)
            )
        expected = (up - down) / 2e-2
        assert float(np.vdot(found[name], direction)) == pytest.approx(expected, rel=0.01, abs=0.01 * float(np.linalg.norm(found[name])))


def tail(kind: str, dtype: Any = np.float32, opset: int = 20) -> tuple[ir.Model, Array, Array]:
    """A value ``h = x W1`` and logits ``h W2``, or three times a regression's outputs; the model, W1 and W2."""
    b = Builder(opset)
    w1, w2 = normal(5, 4), normal(4, 6, seed=1)
    x = b.input("x", ["batch", 5], graphs.FLOAT if dtype == np.float32 else ir.DataType.FLOAT16)
    hidden = b.node("MatMul", [x, b.constant("w1", w1.astype(dtype))], "first")
    name = "logits" if kind == "logits" else "y"
    return b.model(b.node("MatMul", [hidden, b.constant("w2", w2.astype(dtype))], "second"), ["batch", 6], name), w1, w2


def moments(model: ir.Model, x: Array, logits: bool, repeats: int = 1) -> Array:
    feeds = {"x": x}
    tapped, reached, blocked = fisher_taps(model, {"first_out": 4}, shapes_of(model, feeds), lambda name, rank: logits)
    assert (reached, blocked) == (["first_out"], set())
    with Session(tapped) as session:
        found: Array = sum(session.run(feeds)[0].astype(np.float64) for _ in range(repeats)) / repeats
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [20, 13])
def test_fisher_of_logits_is_exact_on_average(dtype: Any, opset: int) -> None:
    """``E g g^T = W2 (diag(p) - p p^T) W2^T``, summed over rows: the Hessian of the Kullback-Leibler divergence."""
    model, w1, w2 = tail("logits", dtype, opset)
    x = normal(20000, 5, seed=2).astype(dtype)
    logits = x.astype(np.float64) @ w1 @ w2
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    expected = w2 @ (np.diag(p.sum(axis=0)) - p.T @ p) @ w2.T
    found = moments(model, x, True)
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.abs(expected).max()))
    np.testing.assert_allclose(found, found.T, rtol=1e-3, atol=1e-3 * float(np.abs(found).max()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gauss_newton_of_other_outputs(dtype: Any) -> None:
    """``n W2 W2^T / ||y||^2``: the squared error of an output relative to its own power."""
    model, w1, w2 = tail("values", dtype)
    x = normal(4000, 5, seed=2).astype(dtype)
    expected = len(x) * w2 @ w2.T / np.square(x.astype(np.float64) @ w1 @ w2).sum()
    np.testing.assert_allclose(moments(model, x, False, 5), expected, atol=0.05 * float(np.abs(expected).max()))


def test_half_precision_without_types_between() -> None:
    """Constants take the type of what they meet."""
    b = Builder()
    x = b.input("x", ["batch", 5], ir.DataType.FLOAT16)
    hidden = b.node("Gelu", [b.node("MatMul", [x, b.constant("w1", normal(5, 4).astype(np.float16))], "first")], "gelu")
    model = b.model(b.node("MatMul", [hidden, b.constant("w2", normal(4, 6, seed=1).astype(np.float16))], "second"), ["batch", 6])
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].type = None
    found = moments(model, normal(100, 5, seed=2).astype(np.float16), False)
    assert np.isfinite(found).all()
    assert found.trace() > 0


def mixer(samples_first: bool, dtype: Any = np.float32) -> tuple[ir.Model, list[str]]:
    """Two layers with a softmax over the positions of a sample between them; its axis of samples is the first, or not."""
    b = Builder()
    x = b.input("x", ["batch", "length", 5], graphs.FLOAT if dtype == np.float32 else ir.DataType.FLOAT16)
    if not samples_first:
        x = b.node("Transpose", [x], "turned", perm=[1, 0, 2])
    hidden = b.node("MatMul", [x, b.constant("w1", normal(5, 4).astype(dtype))], "first")
    mixed = b.node("Mul", [hidden, b.node("Softmax", [hidden], axis=1 if samples_first else 0)])
    total = b.node("ReduceSum", [mixed, b.constant("axis", np.array([1 if samples_first else 0]))], "total", keepdims=1)
    logits = b.node("MatMul", [b.node("Add", [mixed, total], "sum"), b.constant("w2", normal(4, 6, seed=1).astype(dtype))], "second")
    return b.model(logits, ["batch", "length", 6], "logits"), ["first_out", "logits"]


@pytest.mark.parametrize(
    ("samples_first", "length", "dtype"), [(True, 7, np.float32), (True, 1, np.float32), (True, 7, np.float16), (False, 7, np.float32)]
)
def test_adaptive_taps_are_sums_over_samples(samples_first: bool, length: int, dtype: Any) -> None:
    """Against the weight's gradient of every sample, made in NumPy of gradients with the same noise; of turned axes there is one sample."""
    model, names = mixer(samples_first, dtype)
    feeds = {"x": normal(3, length, 5, seed=2).astype(dtype)}
    shapes = shapes_of(model, feeds)
    copy = Extension(model)
    _, found = fisher_gradients(copy, names, shapes, lambda name, rank: True)
    read = {"first_out": ("x" if samples_first else "turned_out", 5, 4), "logits": ("sum_out", 4, 6)}
    for i, (name, gradient) in enumerate(found.items()):
        for j, value in enumerate((gradient, copy.values[read[name][0]])):
            copy.output(copy.add("Cast", [value], f"out_{i}_{j}", to=graphs.FLOAT))
    with Session(copy.finish()) as session:
        arrays = [array.astype(np.float64) for array in session.run(feeds)]
    taps = adaptive_taps(model, read, shapes, lambda name, rank: True, ("x", 3))
    assert (taps.values, taps.blocked) == (names, set())
    with Session(taps.model) as session:
        moments = session.run(feeds)
    for h, delta, x in zip(moments, arrays[::2], arrays[1::2], strict=True):
        if not samples_first:
            delta, x = (array.reshape(1, -1, array.shape[-1]) for array in (delta, x))
        ones = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2)
        gradients = np.einsum("stk,stn->skn", ones, delta)
        expected = np.einsum("skn,sln->kl", gradients, gradients)
        np.testing.assert_allclose(h, expected, atol=(1e-5 if dtype == np.float32 else 1e-2) * float(np.abs(expected).max()))
