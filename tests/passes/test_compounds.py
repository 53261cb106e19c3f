"""Norms and activations in several operators, which become one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.passes.canonical import compounds
from magr_onnx.passes.canonical.compound import OPSETS
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Builder, random

Part = Callable[[Builder, ir.Value], ir.Value]
K = 6


def number(b: Builder, value: float) -> ir.Value:
    return b.constant(f"number_{len(b.initializers)}", np.float32(value))


def vector(b: Builder, seed: int, k: int = K) -> ir.Value:
    return b.constant(f"vector_{len(b.initializers)}", 1 + 0.2 * random(k, seed=seed))


def mean(b: Builder, x: ir.Value) -> ir.Value:
    if b.opset >= 18:
        return b.node("ReduceMean", [x, b.constant(f"axes_{len(b.initializers)}", np.array([-1]))])
    return b.node("ReduceMean", [x], axes=[-1])


def root(b: Builder, d: ir.Value, *, square: str = "Pow") -> ir.Value:
    squared = b.node("Pow", [d, number(b, 2)]) if square == "Pow" else b.node("Mul", [d, d])
    return b.node("Sqrt", [b.node("Add", [mean(b, squared), number(b, 1e-5)])])


def layer_norm(b: Builder, x: ir.Value, k: int = K) -> ir.Value:
    d = b.node("Sub", [x, mean(b, x)])
    scaled = b.node("Mul", [b.node("Div", [d, root(b, d)]), vector(b, 1, k)])
    return b.node("Add", [scaled, vector(b, 2, k)])


def layer_norm_with_two_differences(b: Builder, x: ir.Value) -> ir.Value:
    center = mean(b, x)
    inverse = b.node("Reciprocal", [root(b, b.node("Sub", [x, center]), square="Mul")])
    scaled = b.node("Mul", [vector(b, 1), b.node("Mul", [inverse, b.node("Sub", [x, center])])])
    return b.node("Add", [vector(b, 2), scaled])


def layer_norm_without_gain(b: Builder, x: ir.Value) -> ir.Value:
    d = b.node("Sub", [x, mean(b, x)])
    return b.node("Div", [d, root(b, d)])


def layer_norm_of_tensorflow(b: Builder, x: ir.Value) -> ir.Value:
    center = mean(b, x)
    inverse = b.node("Reciprocal", [root(b, b.node("Sub", [x, center]), square="Mul")])
    factor = b.node("Mul", [inverse, vector(b, 1)])
    shift = b.node("Sub", [vector(b, 2), b.node("Mul", [center, factor])])
    return b.node("Add", [b.node("Mul", [x, factor]), shift])


def rms_norm(b: Builder, x: ir.Value, k: int = K) -> ir.Value:
    real = b.node("Cast", [x], to=ir.DataType.FLOAT.value)
    inverse = b.node("Div", [number(b, 1), root(b, real)])
    normed = b.node("Cast", [b.node("Mul", [real, inverse])], to=ir.DataType.FLOAT.value)
    return b.node("Mul", [vector(b, 1, k), normed])


def rms_norm_by_power(b: Builder, x: ir.Value) -> ir.Value:
    power = b.node("Add", [number(b, 1e-6), mean(b, b.node("Mul", [x, x]))])
    return b.node("Mul", [b.node("Mul", [x, b.node("Pow", [power, number(b, -0.5)])]), vector(b, 1)])


def gate(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Add", [b.node("Erf", [b.node("Div", [x, number(b, 2**0.5)])]), number(b, 1)])


def gelu(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [b.node("Mul", [x, gate(b, x)]), number(b, 0.5)])


def gelu_of_halves(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [b.node("Mul", [number(b, 0.5), x]), gate(b, x)])


def gelu_by_a_multiple(b: Builder, x: ir.Value) -> ir.Value:
    erf = b.node("Erf", [b.node("Mul", [number(b, 0.70710678), x])])
    return b.node("Mul", [x, b.node("Mul", [b.node("Add", [number(b, 1), erf]), number(b, 0.5)])])


def gelu_of_a_sum(b: Builder, x: ir.Value) -> ir.Value:
    return gelu(b, b.node("Add", [x, vector(b, 3)]))


def tanh_gelu(b: Builder, x: ir.Value) -> ir.Value:
    cubed = b.node("Mul", [number(b, 0.044715), b.node("Pow", [x, number(b, 3)])])
    inner = b.node("Mul", [number(b, 0.7978846), b.node("Add", [x, cubed])])
    outer = b.node("Add", [b.node("Tanh", [inner]), number(b, 1)])
    return b.node("Mul", [b.node("Mul", [number(b, 0.5), x]), outer])


def tanh_gelu_factored(b: Builder, x: ir.Value) -> ir.Value:
    square = b.node("Mul", [x, x])
    inner = b.node("Add", [b.node("Mul", [square, number(b, 0.044715 * 0.79788456)]), number(b, 0.79788456)])
    half = b.node("Mul", [number(b, 0.5), b.node("Tanh", [b.node("Mul", [x, inner])])])
    return b.node("Mul", [x, b.node("Add", [half, number(b, 0.5)])])


def clipped(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Clip", [b.node("Add", [x, number(b, 3)]), number(b, 0), number(b, 6)])


def hard_swish(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Div", [b.node("Mul", [x, clipped(b, x)]), number(b, 6)])


def hard_swish_by_its_gate(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [x, b.node("Div", [clipped(b, x), number(b, 6)])])


def hard_swish_of_an_operator(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [x, b.node("HardSigmoid", [x], alpha=1 / 6, beta=0.5)])


def hard_sigmoid(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [clipped(b, x), number(b, 1 / 6)])


FORMS: dict[Part, str] = {
    layer_norm: "LayerNormalization",
    layer_norm_with_two_differences: "LayerNormalization",
    layer_norm_without_gain: "LayerNormalization",
    layer_norm_of_tensorflow: "LayerNormalization",
    rms_norm: "RMSNormalization",
    rms_norm_by_power: "RMSNormalization",
    gelu: "Gelu",
    gelu_of_halves: "Gelu",
    gelu_by_a_multiple: "Gelu",
    gelu_of_a_sum: "Gelu",
    tanh_gelu: "Gelu",
    tanh_gelu_factored: "Gelu",
    hard_swish: "HardSwish",
    hard_swish_by_its_gate: "HardSwish",
    hard_swish_of_an_operator: "HardSwish",
    hard_sigmoid: "HardSigmoid",
}


def model_of(part: Part, opset: int) -> ir.Model:
    b = Builder(opset)
    x = b.node("Relu", [b.input("x", ["n", 3, K])])
    return b.model_of([part(b, x)])


def outputs(model: ir.Model) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    with Session(model) as session:
        return [np.asarray(y) for y in session.run({"x": 2 * random(5, 3, K, seed=7)})]


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("part", FORMS, ids=lambda part: part.__name__)
def test_several_operators_become_one(part: Part, opset: int) -> None:
    model = model_of(part, opset)
    expected, names = outputs(model), [value.name for value in model.graph.outputs]
    notes = compounds.rewrite(model, OPSETS)
    kind = FORMS[part]
    assert [node.op_type for node in model.graph] == ["Relu", *(["Add"] if part is gelu_of_a_sum else []), kind]
    assert len(notes) == 1
    assert notes[0].startswith(f"several operators written as one {kind}: ")
    assert model.opset_imports[""] >= OPSETS[kind]
    assert [value.name for value in model.graph.outputs] == names
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("part", FORMS, ids=lambda part: part.__name__)
def test_only_what_may_be_written_is(part: Part) -> None:
    model = model_of(part, 18)
    before = [node.op_type for node in model.graph if node.op_type != "Cast"]
    assert compounds.rewrite(model, OPSETS.keys() - {FORMS[part], "HardSigmoid"}) == []
    assert [node.op_type for node in model.graph] == before
    assert model.opset_imports[""] == 18


def another_factor(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [b.node("Mul", [x, gate(b, x)]), number(b, 0.51)])


def of_another_value(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [b.node("Mul", [b.node("Neg", [b.node("Sin", [x])]), gate(b, x)]), number(b, 0.5)])


def quick_gelu(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [x, b.node("Sigmoid", [b.node("Mul", [number(b, 1.702), x])])])


def of_another_axis(b: Builder, x: ir.Value) -> ir.Value:
    squares = b.node("ReduceMean", [b.node("Mul", [x, x]), b.constant(f"axes_{len(b.initializers)}", np.array([1]))])
    return b.node("Div", [x, b.node("Sqrt", [b.node("Add", [squares, number(b, 1e-5)])])])


def of_another_mean(b: Builder, x: ir.Value) -> ir.Value:
    d = b.node("Sub", [x, mean(b, b.node("Sin", [x]))])
    return b.node("Add", [b.node("Div", [d, root(b, d)]), vector(b, 1)])


def by_another_root(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Div", [x, root(b, b.node("Sin", [x]))])


def of_a_longer_gain(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Mul", [b.node("Div", [x, root(b, x)]), b.constant("gain", 1 + random(1, 1, 1, K, seed=1))])


def clipped_elsewhere(b: Builder, x: ir.Value) -> ir.Value:
    cut = b.node("Clip", [b.node("Add", [x, number(b, 3)]), number(b, 0), number(b, 5)])
    return b.node("Div", [b.node("Mul", [x, cut]), number(b, 6)])


@pytest.mark.parametrize(
    "part",
    [another_factor, of_another_value, quick_gelu, of_another_axis, of_another_mean, by_another_root, of_a_longer_gain, clipped_elsewhere],
)
def test_what_computes_something_else_stays(part: Part) -> None:
    model = model_of(part, 18)
    before, expected = [node.op_type for node in model.graph], outputs(model)
    compounds.rewrite(model, OPSETS)
    assert part in (of_another_mean, of_a_longer_gain) or [node.op_type for node in model.graph] == before
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_one_behind_another_and_parts_that_are_read_elsewhere() -> None:
    """What else reads a part keeps it; an operator whose input is the result of another reads that of the new one."""
    b = Builder(18)
    x = b.input("x", [5, 3, K])
    first = layer_norm(b, x)
    second = gelu(b, first)
    center = mean(b, x)
    d = b.node("Sub", [second, mean(b, second)])
    deviation = root(b, d)
    model = b.model_of([b.node("Div", [d, deviation]), b.node("Add", [deviation, center]), first])
    expected = outputs(model)
    compounds.rewrite(model, OPSETS)
    kinds = [node.op_type for node in model.graph]
    assert [kinds.count(kind) for kind in ("LayerNormalization", "Gelu", "Sqrt", "Erf")] == [2, 1, 1, 0]
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)


def test_overridable_gains_stay() -> None:
    b = Builder(18)
    x = b.input("x", [5, 3, K])
    gain = b.constant("gain", 1 + random(K, seed=1))
    model = b.model_of([b.node("Mul", [b.node("Div", [x, root(b, x)]), gain])])
    model.graph.inputs.append(gain)
    compounds.rewrite(model, OPSETS)
    assert [node.op_type for node in model.graph] == ["RMSNormalization", "Mul"]


@pytest.mark.parametrize("to", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_casts_of_a_type_to_itself_go(to: ir.DataType) -> None:
    b = Builder(18)
    real = b.node("Cast", [b.node("Relu", [b.input("x", ["n", 3, K])])], to=to.value)
    real.dtype = to
    model = b.model_of([b.node("Neg", [real])])
    compounds.rewrite(model, OPSETS)
    assert [node.op_type for node in model.graph] == ["Relu", *(["Cast"] if to == ir.DataType.FLOAT16 else []), "Neg"]
