"""Rotations of residual streams: exact for every form of norm, refused with a reason wherever anything else depends on the basis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core.rotation import random_rotation
from magr_onnx.models import bundled
from magr_onnx.passes import Plan, Rotate, find
from magr_onnx.passes.layers.weighted import FLOATS
from magr_onnx.passes.rewrites.base import Context
from magr_onnx.passes.rewrites.rotate import rotate, turned_weights
from magr_onnx.passes.rewrites.stream import find_streams
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Array, Builder, chain, random
from tests.helpers import few_samples

V, T, K, F = 50, 12, 24, 40  # tokens, positions, channels, inner channels
GAIN = (1 + 0.5 * np.random.default_rng(7).standard_normal(K)).astype(np.float32)
SHIFT = random(K, seed=8)

Norm = Callable[[Builder, ir.Value, int], ir.Value]


def constants(b: Builder, i: int) -> tuple[ir.Value, ir.Value]:
    return b.constant(f"g{i}", np.roll(GAIN, i)), b.constant(f"s{i}", np.roll(SHIFT, i))


def layer_norm(b: Builder, x: ir.Value, i: int) -> ir.Value:
    return b.node("LayerNormalization", [x, *constants(b, i)], f"norm{i}", axis=-1)


def layer_norm_without_shift(b: Builder, x: ir.Value, i: int) -> ir.Value:
    return b.node("LayerNormalization", [x, constants(b, i)[0]], f"norm{i}", axis=2)


def plain_layer_norm(b: Builder, x: ir.Value, i: int) -> ir.Value:
    ones, zeros = b.constant(f"g{i}", np.ones(K, np.float32)), b.constant(f"s{i}", np.zeros(K, np.float32))
    return b.node("LayerNormalization", [x, ones, zeros], f"norm{i}")


def decomposed_layer_norm(b: Builder, x: ir.Value, i: int) -> ir.Value:
    last = b.constant(f"last{i}", np.array([-1]))
    centred = b.node("Sub", [x, b.node("ReduceMean", [x, last])])
    power = b.node("ReduceMean", [b.node("Pow", [centred, b.constant(f"two{i}", np.float32(2).reshape(()))]), last])
    root = b.node("Sqrt", [b.node("Add", [power, b.constant(f"eps{i}", np.float32(1e-5).reshape(()))])])
    gain, shift = constants(b, i)
    return b.node("Add", [b.node("Mul", [b.node("Div", [centred, root]), gain]), shift], f"norm{i}")


def rms_norm(b: Builder, x: ir.Value, i: int) -> ir.Value:
    power = b.node("ReduceMean", [b.node("Mul", [x, x]), b.constant(f"last{i}", np.array([-1]))], keepdims=1)
    root = b.node("Sqrt", [b.node("Add", [power, b.constant(f"eps{i}", np.float32(1e-5).reshape(()))])])
    return b.node("Mul", [constants(b, i)[0], b.node("Mul", [x, b.node("Reciprocal", [root])])], f"norm{i}")


def l2_norm(b: Builder, x: ir.Value, i: int) -> ir.Value:
    length = b.node("ReduceL2", [x, b.constant(f"last{i}", np.array([-1]))], keepdims=1)
    return b.node("Mul", [b.node("Div", [x, length]), constants(b, i)[0]], f"norm{i}")


def simplified(b: Builder, x: ir.Value, i: int) -> ir.Value:
    return b.node("SimplifiedLayerNormalization", [x, constants(b, i)[0]], f"norm{i}", axis=-1)


def rms_operator(b: Builder, x: ir.Value, i: int) -> ir.Value:
    b.opset = 23
    return b.node("RMSNormalization", [x, constants(b, i)[0]], f"norm{i}", axis=-1)


NORMS: dict[str, Norm] = {
    f.__name__: f
    for f in (
        layer_norm,
        layer_norm_without_shift,
        plain_layer_norm,
        decomposed_layer_norm,
        rms_norm,
        simplified,
        rms_operator,
    )
}


def weight(b: Builder, name: str, k: int, n: int, seed: int) -> ir.Value:
    return b.constant(name, random(k, n, seed=seed, scale=0.3))


def layer(b: Builder, x: ir.Value, name: str, k: int, n: int, seed: int, bias: bool) -> ir.Value:
    y = b.node("MatMul", [x, weight(b, f"w_{name}", k, n, seed)], name)
    return b.node("Add", [b.constant(f"b_{name}", random(n, seed=seed + 100)), y], f"{name}_bias") if bias else y


def embedded(b: Builder, positions: bool) -> ir.Value:
    ids = b.input("ids", ["batch", T], ir.DataType.INT64)
    x = b.node("Gather", [b.constant("table", random(V, K, seed=1, scale=1)), ids], "embed")
    x.dtype = ir.DataType.FLOAT
    if not positions:
        return x
    table = b.constant("positions", random(2 * T, K, seed=2))
    ends = [b.constant(name, np.array([value])) for name, value in (("from", 0), ("to", T), ("axis", 0))]
    return b.node("Add", [x, b.node("Slice", [table, *ends], "used")], "placed")


def block(b: Builder, x: ir.Value, norm: Norm, i: int, bias: bool) -> ir.Value:
    """A layer, an activation, another layer, and the sum."""
    inner = layer(b, norm(b, x, i), f"in{i}", K, F, 10 + i, bias)
    return b.node("Add", [x, layer(b, b.node("Tanh", [inner]), f"out{i}", F, K, 20 + i, bias)], f"sum{i}")


def decoder(norm: Norm, bias: bool = False, positions: bool = False, opset: int = 20) -> ir.Model:
    b = Builder(opset)
    x = embedded(b, positions)
    for i in range(2):
        x = block(b, x, norm, i, bias)
    last = b.node("Gather", [norm(b, x, 2), b.constant("end", np.array([-1]))], "last", axis=1)
    return b.model(layer(b, last, "head", K, V, 30, False), ["batch", 1, V])


def outputs(model: ir.Model, seed: int = 0) -> Array:
    with Session(model) as session:
        found: Array = session.run({"ids": np.random.default_rng(seed).integers(0, V, (6, T))})[0]
    return found.astype(np.float64)


def differ(before: Array, after: Array) -> float:
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


def initializers(model: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value is not None}


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_rotated_model_computes_the_same(norm: str, bias: bool, positions: bool) -> None:
    model = decoder(NORMS[norm], bias, positions)
    before, nodes = outputs(model), [node.op_type for node in model.graph]
    size = sum(array.nbytes for array in initializers(model).values())
    weights = {found.name: found.read() for found in find(model)[0]}
    (note,) = Rotate(steps=5).rewrite(model, Context())
    assert "rotated the residual stream of 24 channels" in note
    assert "3 norms, 2 layers and" in note
    assert differ(before, outputs(model)) < 1e-5
    after = {found.name: found.read() for found in find(model)[0]}
    assert all(np.abs(after[name] - w).max() > 0.05 for name, w in weights.items())  # every one was turned
    assert [node.op_type for node in model.graph] == nodes  # at no cost
    assert sum(array.nbytes for array in initializers(model).values()) == size


@pytest.mark.parametrize("centred", [False, True])
def test_weights_are_turned_as_the_formulas_say(centred: bool) -> None:
    """With the rotation as a matrix: tables and writers times Q, Q^T times the gain times readers, shifts over gains times Q."""
    model = decoder(layer_norm if centred else rms_norm, bias=False, positions=True)
    before = {found.name: found.read().astype(np.float64) for found in find(model)[0]}
    tables = initializers(model)
    (stream,) = find_streams(model)
    assert stream.keeps_ones == centred
    rotation = random_rotation(K, 5, centred)
    q = rotation.of_rows(np.eye(K))
    rotate(stream, rotation)
    after, found = {f.name: f.read() for f in find(model)[0]}, initializers(model)
    for i in range(2):
        np.testing.assert_allclose(after[f"in{i}"], q.T @ np.diag(np.roll(GAIN, i)) @ before[f"in{i}"], atol=1e-5)
        np.testing.assert_allclose(after[f"out{i}"], before[f"out{i}"] @ q, atol=1e-5)
    np.testing.assert_allclose(after["head"], q.T @ (np.roll(GAIN, 2)[:, None] * before["head"]), atol=1e-5)
    np.testing.assert_allclose(found["table_rotated"], tables["table"] @ q, atol=1e-5)
    np.testing.assert_allclose(found["positions_rotated"], tables["positions"] @ q, atol=1e-5)
    if centred:
        np.testing.assert_allclose(found["s1_rotated"], (np.roll(SHIFT, 1) / np.roll(GAIN, 1)) @ q, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["g1_rotated"], 1)


def test_shifts_go_into_biases_where_all_layers_behind_have_one() -> None:
    model = decoder(layer_norm, bias=True)
    before = {found.name: (found.read().astype(np.float64), found.read_bias()) for found in find(model)[0]}
    Rotate(steps=0).rewrite(model, Context())
    after = {found.name: found.read_bias() for found in find(model)[0]}
    for i in range(2):
        weight, bias = before[f"in{i}"]
        assert bias is not None
        np.testing.assert_allclose(after[f"in{i}"], bias + np.roll(SHIFT, i) @ weight, atol=1e-5)
        np.testing.assert_array_equal(initializers(model)[f"s{i}_rotated"], 0)
    assert after["head"] is None


def test_a_shift_behind_a_gain_of_zero_goes_into_a_bias_all_the_same() -> None:
    gain = GAIN.copy()
    gain[3] = 0

    def norm(b: Builder, x: ir.Value, i: int) -> ir.Value:
        return b.node("LayerNormalization", [x, b.constant(f"g{i}", gain), b.constant(f"s{i}", SHIFT)], f"norm{i}")

    model = decoder(norm)
    before = outputs(model)
    assert Rotate(steps=0).rewrite(model, Context())
    assert differ(before, outputs(model)) < 1e-5
    assert all(found.has_bias for found in find(model)[0] if found.name.startswith("in"))


def test_norms_with_sums_of_onnxruntime() -> None:
    """SkipSimplifiedLayerNormalization adds, and puts out the sum too."""
    for kind, extra in (("SkipSimplifiedLayerNormalization", ()), ("SkipLayerNormalization", ("s",))):
        b = Builder()
        x = embedded(b, False)
        inner = layer(b, rms_norm(b, x, 0) if not extra else layer_norm(b, x, 0), "in0", K, K, 1, False)
        operands = [x, inner, b.constant("g", GAIN), *(b.constant(name, SHIFT) for name in extra), b.constant("added", random(K, seed=4))]
        node = ir.node(kind, operands, {"epsilon": 1e-5}, domain="com.microsoft", num_outputs=4, name="skip")
        for index, output in enumerate(node.outputs):
            output.name, output.dtype = ("skipped", "", "", "total")[index], ir.DataType.FLOAT
        b.nodes.append(node)
        total = b.node("Add", [node.outputs[3], layer(b, node.outputs[0], "in1", K, K, 2, False)], "sum1")
        end = layer(b, simplified(b, total, 2) if not extra else layer_norm(b, total, 2), "head", K, V, 3, True)
        model = b.model(end, ["batch", T, V])
        model.graph.opset_imports["com.microsoft"] = 1
        before = outputs(model)
        (note,) = Rotate(steps=0).rewrite(model, Context())
        assert "3 norms, 2 layers and 2 constants" in note
        assert differ(before, outputs(model)) < 1e-5


def test_a_deep_model_of_unknown_shapes() -> None:
    """Shape inference fails for onnxruntime's norms: ranks are found one after the other, not by recursion."""
    b = Builder()
    x = embedded(b, False)
    for i in range(400):
        x = b.node("Add", [layer(b, simplified(b, x, i), f"l{i}", K, K, i, False), x])
    model = b.model(layer(b, simplified(b, x, 400), "head", K, V, 999, False), ["batch", T, V])
    (stream,) = find_streams(model)
    assert not stream.problems
    assert len(stream.writers) == 400
    assert len(stream.readers) == 401


def test_half_precision_stays_half_precision() -> None:
    b = Builder()
    ids = b.input("ids", ["batch", T], ir.DataType.INT64)
    x = b.node("Gather", [b.constant("table", random(V, K, seed=1, scale=1, dtype=np.float16)), ids], "embed")
    x.dtype = ir.DataType.FLOAT16
    y = b.node("LayerNormalization", [x, b.constant("g", GAIN.astype(np.float16)), b.constant("s", SHIFT.astype(np.float16))], "norm")
    y = b.node("MatMul", [y, b.constant("w", random(K, K, seed=3, dtype=np.float16))], "one")
    z = b.node("Add", [x, y], "sum")
    z = b.node("LayerNormalization", [z, b.constant("g2", GAIN.astype(np.float16)), b.constant("s2", SHIFT.astype(np.float16))], "norm2")
    model = b.model(b.node("MatMul", [z, b.constant("h", random(K, V, seed=4, dtype=np.float16))], "head"), ["batch", T, V])
    data = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(2)]
    made, report = magr_onnx.optimize(model, data, pipeline_text="rotate,quantize{bits=8}")
    assert any("rotated the residual stream" in note for note in report.notes)
    assert {v.dtype for v in made.graph.initializers.values()} <= {*FLOATS, ir.DataType.INT64}
    assert differ(outputs(model), outputs(made)) < 2e-2


# What cannot be rotated


def refused(change: Callable[[Builder, ir.Value], ir.Value | None], norm: Norm = rms_norm) -> str:
    """The reason why a decoder is not rotated that has something more in the middle; it stays the same."""
    b = Builder()
    x = block(b, embedded(b, False), norm, 0, False)
    other = change(b, x)
    x = block(b, x if other is None or other.shape is not None else other, norm, 1, False)
    end = layer(b, norm(b, x, 2), "head", K, V, 30, False)
    end.name, end.shape = "y", ir.Shape(["batch", T, V])
    model = b.model_of([end, *([other] if other is not None and other.shape is not None else [])])
    before = outputs(model)
    (note,) = Rotate(steps=0).rewrite(model, Context())
    np.testing.assert_array_equal(outputs(model), before)
    assert "is not rotated" in note
    return note


def shaped(value: ir.Value) -> ir.Value:
    """A value that becomes an output."""
    value.shape = ir.Shape(["batch", T, None])
    return value


def test_every_reason_is_given() -> None:
    assert "sum0_out is an output of the model" in refused(lambda b, x: shaped(x))
    assert "other (Softmax) reads it" in refused(lambda b, x: shaped(b.node("Softmax", [x], "other", axis=-1)))
    assert "other (Relu) reads it" in refused(lambda b, x: b.node("Relu", [x], "other"))
    assert "reads it behind the gain of other, and" in refused(lambda b, x: b.node("Mul", [x, b.constant("scale", GAIN)], "other"))
    assert "other (Concat) reads it" in refused(lambda b, x: shaped(b.node("Concat", [x, x], "other", axis=-1)))
    assert "normed (LayerNormalization) is a norm whose gain" in refused(
        lambda b, x: b.node("Add", [x, b.node("LayerNormalization", [layer(b, x, "more", K, K, 9, False), *constants(b, 9)], "normed")])
    )  # as in Gemma
    assert "reads it, and not along its last axis alone" in refused(
        lambda b, x: shaped(b.node("LayerNormalization", [x, b.constant("wide", random(T, K))], "other", axis=1))
    )
    assert "other (Tanh) reads it behind the gain of norm8" in refused(lambda b, x: shaped(b.node("Tanh", [rms_norm(b, x, 8)], "other")))
    assert "squares of it" in refused(lambda b, x: shaped(b.node("Exp", [b.node("Mul", [x, x], "square")], "other")))

    def shares(b: Builder, x: ir.Value) -> ir.Value:
        w = weight(b, "both", K, K, 5)
        return b.node("Add", [b.node("Tanh", [b.node("MatMul", [x, w], "one")]), b.node("Tanh", [b.node("MatMul", [x, w], "two")])])

    assert "shares its weight both with other layers" in refused(lambda b, x: shaped(shares(b, x)))

    def overridable(b: Builder, x: ir.Value) -> ir.Value:
        free = b.constant("free", random(K))
        b.inputs.append(free)
        return b.node("Add", [x, free], "more")

    assert "more (Add) adds free, which a caller may override" in refused(overridable)


def test_a_stream_that_is_an_input_of_the_model() -> None:
    b = Builder()
    end = rms_norm(b, block(b, b.input("embeddings", ["batch", T, K]), rms_norm, 0, False), 1)
    model = b.model(layer(b, end, "head", K, V, 9, False), ["batch", T, V])
    (note,) = Rotate().rewrite(model, Context())
    assert "embeddings is an input of the model" in note


def tied(norm: Norm, gemm: bool = False, other: bool = False) -> ir.Model:
    """A decoder whose head multiplies by the rows of its table; an ``other`` value is the table's too."""
    b = Builder()
    x = block(b, embedded(b, True), norm, 0, False)
    table, y = next(v for v in b.initializers if v.name == "table"), norm(b, x, 1)
    if gemm:
        y = b.node("Gather", [y, b.constant("end", np.array(T - 1))], "last", axis=1)
        return b.model(b.node("Gemm", [y, table], "head", transB=1), ["batch", V])
    if other:
        y = b.node("Add", [y, b.node("ReduceMean", [table, b.constant("rows", np.array([0]))])], "more")
    return b.model(b.node("MatMul", [y, b.node("Transpose", [table], "turn", perm=[1, 0])], "head"), ["batch", T, V])


@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_a_head_that_is_the_table_stays_one_tensor_with_it(norm: str, gemm: bool) -> None:
    model = tied(NORMS[norm], gemm)
    before, size = outputs(model), sum(array.nbytes for array in initializers(model).values())
    table = initializers(model)["table"]
    note = Rotate(steps=5).rewrite(model, Context())[0]
    assert "rotated the residual stream" in note
    assert differ(before, outputs(model)) < 1e-5
    found = initializers(model)
    assert "table" not in found
    assert np.abs(found["table_rotated"] - table).max() > 0.1
    plain = norm == "plain_layer_norm"  # without a gain, the head takes the rotation up
    assert ("a product of its own" in note) != plain
    assert sum(array.nbytes for array in found.values()) == size + (0 if plain else 4 * K * K)


def test_the_product_before_a_tied_head_stays_float() -> None:
    data = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(2)]
    made, report = magr_onnx.optimize(tied(rms_norm), data, rotate="on", bits=8)
    assert [row.name for row in report.layers] == ["in0", "out0"]
    assert {skip.name: skip.reason for skip in report.skipped}["head_gain"].startswith("holds the gain of a norm between rotations")
    assert differ(outputs(tied(rms_norm)), outputs(made)) < 2e-2


def test_tables_that_something_else_reads_are_not_stored_twice() -> None:
    model = tied(rms_norm, other=True)
    before = outputs(model)
    (note,) = Rotate().rewrite(model, Context())
    assert "table table is read by " in note
    assert "turned for one, it would be stored twice" in note
    np.testing.assert_array_equal(outputs(model), before)


def post_norm() -> ir.Model:
    """Norms behind the sums."""
    b = Builder()
    x = embedded(b, True)
    for i in range(3):
        x = layer_norm(b, b.node("Add", [x, layer(b, x, f"l{i}", K, K, i, True)]), i)
    return b.model(layer(b, x, "head", K, V, 9, True), ["batch", T, V])


def test_models_with_norms_behind_sums_and_models_without_streams() -> None:
    (note,) = Rotate().rewrite(post_norm(), Context())
    assert note.startswith("rotate: the residual stream at norm0 is not rotated, nor are 2 others: ")
    b = Builder()
    plain = b.model(layer(b, b.input("x", ["batch", K]), "one", K, F, 1, True), ["batch", F])
    assert Rotate().rewrite(plain, Context()) == ["rotate: there is no residual stream: no sum of values is normalized"]


class Judging:
    """A comparison with given results."""

    def __init__(self, difference: float, losses: list[float]) -> None:
        self._difference, self._losses = difference, losses

    def difference(self, candidate: ir.Model) -> float:
        return self._difference

    def loss(self, candidate: ir.Model) -> float:
        return self._losses.pop(0)


def test_what_is_not_exact_or_does_not_pay_is_refused() -> None:
    for auto, difference, losses, text in (
        (False, 1e-3, [], "is not rotated: float outputs would differ by 1.0e-03, more than 1e-04"),
        (False, float("nan"), [], "is not rotated: float outputs would differ by nan"),
        (
            True,
            0,
            [0.2, 0.3],
            "is not rotated: float outputs differ by 0.0e+00; rounded to nearest, the loss is 0.3 with it and 0.2",
        ),
        (True, 0, [0.3, 0.2], "rotated the residual stream of 24 channels"),
    ):
        model, judge = decoder(rms_norm), Judging(difference, losses)
        before = initializers(model)
        (note,) = Rotate(auto=auto, steps=0).rewrite(model, Context(trial=lambda _, judge=judge: judge))
        assert text in note
        assert ("table" in initializers(model)) == ("is not rotated" in note)
        if "is not rotated" in note:
            for name, array in initializers(model).items():
                np.testing.assert_array_equal(array, before[name])
    (note,) = Rotate(auto=True).rewrite(decoder(rms_norm), Context())
    assert "nothing is rotated: the model was not run, which auto needs" in note


def test_layers_that_stay_float_are_turned_too_but_not_chosen_by() -> None:
    model = decoder(rms_norm)
    before = outputs(model)
    data = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(2)]
    made, report = magr_onnx.optimize(model, data, rotate="on", bits=8, include=["in0"])
    assert [row.name for row in report.layers] == ["in0"]
    assert differ(before, outputs(made)) < 1e-2


def test_rounding_loses_less_where_a_few_channels_are_strong() -> None:
    """A stream with outliers: a few channels of tables and writers are twenty times as strong as the others."""
    strong = np.where(np.arange(K) % 11 == 5, 20, 1).astype(np.float32)
    errors = {}
    for rotation in ("none", "on", "auto"):
        model = decoder(rms_norm, positions=True)
        for name in ("table", "positions", "w_out0", "w_out1"):
            value = model.graph.initializers[name]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * strong, name=name)
        data = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(3)]
        made, report = magr_onnx.optimize(
            model, data, rotate=rotation, quantizer="rtn", alpha=0, bits=4, format="dynamic-int8", bias="none"
        )
        errors[rotation] = differ(outputs(model, 9), outputs(made, 9))
        if rotation == "auto":
            assert any("rounded to nearest, the loss is" in note for note in report.notes)
    assert errors["on"] < 0.8 * errors["none"]
    assert errors["auto"] == errors["on"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 3}, "rounded to nearest, the loss is"),
        ({"bits": 2, "block_size": 16}, "rounded to nearest, the loss is"),
        ({"block_size": None}, "rotated the residual stream"),
        ({"format": "dynamic-int8", "bits": 4}, "rotated the residual stream"),
        ({}, None),
        ({"block_size": None, "rotate": "none"}, None),
        ({"bits": 3, "effort": "fast"}, None),
        ({"format": "dynamic-int8"}, None),
    ],
)
def test_weights_of_few_bits_are_rotated_by_default(options: dict[str, Any], said: str | None) -> None:
    data = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(4)]
    _, report = magr_onnx.optimize(decoder(layer_norm), data, **options)
    notes = [note for note in report.notes if note.startswith("rotate: ")]
    assert any(said in note for note in notes) if said else not notes


@pytest.mark.parametrize("options", [{"block_size": None}, {"bits": 2, "block_size": 16}])
def test_outputs_that_are_always_zero_are_no_hindrance(options: dict[str, Any]) -> None:
    """Pruned columns, unused tokens and padding have no range to lower; every rotation was NaN, and the check let it pass."""
    model = decoder(layer_norm)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.numpy().ndim == 2 and name != "table":
            weight = value.const_value.numpy().copy()
            weight[:, :3], weight[5] = 0, 0
            value.const_value = ir.tensor(weight, name=name)
    data = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(4)]
    made, report = magr_onnx.optimize(model, data, rotate="on", **options)
    assert any("rotated the residual stream" in note for note in report.notes)
    assert differ(outputs(model, 9), outputs(made, 9)) < 0.7


@pytest.mark.parametrize("more", [{}, {"max_memory": "1kB"}])
def test_nobody_is_told_of_rotations_they_did_not_ask_for(more: dict[str, Any]) -> None:
    """Neither where there is no stream, nor where norms stand behind sums, nor where the model cannot be run as a whole."""
    for model, data in (
        (chain(), {"x": random(16, 48)}),
        (post_norm(), {"ids": np.random.default_rng(0).integers(0, V, (6, T))}),
    ):
        _, report = magr_onnx.optimize(model, data, block_size=None, **more)
        assert not any("rotat" in note for note in report.notes), report.notes


@pytest.mark.parametrize("data", [True, False])
def test_the_command_says_what_it_did(data: bool) -> None:
    batches = [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(2)]
    _, report = magr_onnx.optimize(decoder(layer_norm), batches if data else None, rotate="on", effort="fast")
    assert report.pipeline.startswith("rotate,")
    assert any("rotated the residual stream of 24 channels at norm0" in n and "float outputs differ by" in n for n in report.notes)
    assert report.verified == len(report.layers) == 5


def test_models_larger_than_memory_are_rotated_layer_by_layer(tmp_path: Path) -> None:
    """They cannot be run as a whole, and the report says that nothing was checked; a sample of their weights is looked at."""
    model, batches = decoder(layer_norm, bias=True), [{"ids": np.random.default_rng(s).integers(0, V, (6, T))} for s in range(2)]
    options: dict[str, Any] = {"rotate": "on", "bits": 8, "effort": "fast", "block_size": None, "output": tmp_path / "model.onnx"}
    _, report = magr_onnx.optimize(model, batches, max_memory="1kB", **options)
    assert any("rotated the residual stream of 24 channels" in n and "not checked: the model was not run" in n for n in report.notes)
    with Session(tmp_path / "model.onnx") as session:
        found = session.run({"ids": np.random.default_rng(0).integers(0, V, (6, T))})[0].astype(np.float64)
    assert differ(outputs(model), found) < 2e-2


def test_a_share_of_many_weights_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magr_onnx.passes.rewrites.rotate.MOST_WEIGHTS", 0)
    b = Builder()
    x = embedded(b, False)
    for i in range(9):
        x = block(b, x, rms_norm, i, False)
    model = b.model(layer(b, rms_norm(b, x, 9), "head", K, V, 99, False), ["batch", T, V])
    (stream,) = find_streams(model)
    names = [found.name for found in find(model)[0]]
    turned = turned_weights(stream, names, 0)
    total = sum(found.k * found.n for found in find(model)[0])
    assert 0.1 < sum(t.weight.size for t in turned) / total < 0.6
    (first, _), *_ = stream.readers.values()
    whole = first.read() * np.roll(GAIN, 9 if first.name == "head" else int(first.name[2:])).astype(np.float64)[:, None]
    columns = {column.tobytes() for column in whole.astype(np.float32).T}
    assert all(column.tobytes() in columns for column in turned[0].weight.T)
    before = outputs(model)
    Rotate(steps=3).rewrite(model, Context())
    assert differ(before, outputs(model)) < 1e-5


def test_pipeline_text_and_bad_options() -> None:
    assert str(Plan.parse("rotate{auto=true,steps=5,seed=2},quantize")).startswith("rotate{auto=true,steps=5,seed=2}")
    with pytest.raises(magr_onnx.OptionError, match="rotate: steps=-1 must be 0 or more"):
        Plan.parse("rotate{steps=-1},quantize").check()
    with pytest.raises(magr_onnx.OptionError, match="rotate needs a quantize pass after it"):
        Plan.parse("rotate").check()
    with pytest.raises(magr_onnx.OptionError, match="rotate='sometimes' is not known"):
        magr_onnx.optimize(decoder(rms_norm), rotate="sometimes")  # type: ignore[typeddict-item]


def test_as_a_pass_by_itself() -> None:
    model = decoder(layer_norm)
    before = outputs(model)
    assert ir.passes.Sequential(Rotate())(model).modified
    assert differ(before, outputs(model)) < 1e-5


@pytest.mark.slow
def test_bundled_model(tmp_path: Path) -> None:
    divergence = {}
    for rotation in ("none", "on"):
        options: dict[str, Any] = {"format": "dynamic-int8", "bits": 4, "effort": "fast", "rotate": rotation}
        _, report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=tmp_path / "model.onnx", **options)
        ids = {"input_ids": np.load(bundled.HELD_OUT)["input_ids"][:16]}
        with Session(bundled.MODEL) as a, Session(tmp_path / "model.onnx") as b:
            x, y = (s.run(ids)[0].astype(np.float64) for s in (a, b))
        p, q = (z - z.max(-1, keepdims=True) for z in (x, y))
        p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
        divergence[rotation] = float((np.exp(p) * (p - q)).sum(-1).mean())
        assert report.verified == len(report.layers) == 21
    assert divergence["on"] < 0.9 * divergence["none"]
