"""Rotations of the values of attentions: exact however a graph makes heads, refused with a reason wherever that cannot be followed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core.rotation import random_rotation
from magr_onnx.passes import Rotate, find
from magr_onnx.passes.rewrites.base import Context
from magr_onnx.passes.rewrites.heads import find_heads
from magr_onnx.passes.rewrites.rotate import rotate_heads
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Array, Builder, random

T, HEADS, D = 5, 4, 8
K = HEADS * D


def layer(b: Builder, x: ir.Value, name: str, n: int, seed: int, bias: bool) -> ir.Value:
    y = b.node("MatMul", [x, b.constant(f"w_{name}", random(K, n, seed=seed))], name)
    return b.node("Add", [y, b.constant(f"b_{name}", random(n, seed=seed + 50))], f"{name}_bias") if bias else y


def split_heads(b: Builder, x: ir.Value, count: int = HEADS) -> ir.Value:
    """To ``(batch, heads, time, d)``."""
    return b.node("Transpose", [b.node("Reshape", [x, ints(b, 0, T, count, D)])], perm=[0, 2, 1, 3])


def ints(b: Builder, *values: int) -> ir.Value:
    return b.constant(f"ints_{len(b.initializers)}", np.array(values))


def parts(b: Builder, x: ir.Value, axis: int) -> list[ir.Value]:
    """Three equal parts along an axis."""
    node = ir.node("Split", [x], {"axis": axis, "num_outputs": 3}, num_outputs=3, name=f"split_{len(b.nodes)}")
    for i, output in enumerate(node.outputs):
        output.name, output.dtype = f"{node.name}_{i}", ir.DataType.FLOAT
    b.nodes.append(node)
    return list(node.outputs)


def separate(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
    return [split_heads(b, layer(b, x, name, K, seed, bias)) for seed, name in enumerate("qkv")]


def grouped(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
    """Two heads of keys and values for four of queries."""
    q, *kv = (
        split_heads(b, layer(b, x, name, count * D, seed, bias), count) for seed, (name, count) in enumerate((("q", 4), ("k", 2), ("v", 2)))
    )
    wide = [b.node("Expand", [b.node("Unsqueeze", [y, ints(b, 2)]), ints(b, 1, 2, 2, T, D)]) for y in kv]
    return [q, *(b.node("Reshape", [y, ints(b, 0, HEADS, T, D)]) for y in wide)]


def fused_last(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
    return [split_heads(b, y) for y in parts(b, layer(b, x, "v", 3 * K, 1, bias), -1)]


def fused_first(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
    """One layer, taken apart on an axis of its own by slices."""
    five = b.node("Reshape", [layer(b, x, "v", 3 * K, 1, bias), ints(b, 0, T, 3, HEADS, D)])
    turned = b.node("Transpose", [five], perm=[2, 0, 3, 1, 4])
    slices = [b.node("Slice", [turned, ints(b, i), ints(b, i + 1), ints(b, 0)]) for i in range(3)]
    return [b.node("Squeeze", [y, ints(b, 0)]) for y in slices]


def fused_heads(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
    """One layer whose columns are queries, keys and values of each head in turn (GPT-NeoX), taken apart by Gathers."""
    wide = b.node("Reshape", [layer(b, x, "v", 3 * K, 1, bias), ints(b, 0, T, HEADS, 3, D)])
    each = [b.node("Gather", [wide, b.constant(f"which{i}", np.array(i))], axis=3) for i in range(3)]
    return [b.node("Transpose", [y], perm=[0, 2, 1, 3]) for y in each]


FORMS = {f.__name__: f for f in (separate, grouped, fused_last, fused_first, fused_heads)}
Form = Callable[[Builder, ir.Value, bool], list[ir.Value]]
VALUES = {
    "separate": range(K),
    "grouped": range(2 * D),
    "fused_last": range(2 * K, 3 * K),
    "fused_first": range(2 * K, 3 * K),
    "fused_heads": [head * 3 * D + 2 * D + i for head in range(HEADS) for i in range(D)],
}


def attention(form: Form, bias: bool, change: Callable[[Builder, ir.Value, ir.Value], ir.Value | None] = lambda b, v, y: None) -> ir.Model:
    """An attention with a layer behind it; ``change`` makes another output of its values and its result."""
    b = Builder()
    q, k, v = form(b, b.input("x", ["batch", T, K]), bias)
    scores = b.node("MatMul", [q, b.node("Transpose", [k], perm=[0, 1, 3, 2])], "scores")
    mixed = b.node("MatMul", [b.node("Softmax", [scores], axis=-1), v], "mixed")
    joined = b.node("Reshape", [b.node("Transpose", [mixed], perm=[0, 2, 1, 3]), ints(b, 0, T, K)], "joined")
    other = change(b, v, mixed)
    end = layer(b, joined, "out", 24, 9, bias)
    end.name, end.shape = "y", ir.Shape(["batch", T, 24])
    if other is not None:
        other.shape = ir.Shape(["batch", None, None, None])
    return b.model_of([end, *([] if other is None else [other])])


def outputs(model: ir.Model) -> Array:
    with Session(model) as session:
        found: Array = session.run({"x": random(3, T, K, seed=3, scale=1)})[0]
    return found.astype(np.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_values_are_turned_head_by_head_and_nothing_else(name: str, bias: bool) -> None:
    model = attention(FORMS[name], bias)
    before, y = {found.name: (found.read().astype(np.float64), found.read_bias()) for found in find(model)[0]}, outputs(model)
    (heads,) = find_heads(model)
    assert not heads.problems
    rotation = random_rotation(D, 4)
    r = rotation.of_rows(np.eye(D))
    rotate_heads(heads, rotation)
    after = {found.name: (found.read(), found.read_bias()) for found in find(model)[0]}
    columns = np.array(VALUES[name])
    turned = before["v"][0].copy()
    for start in columns[::D]:
        turned[:, start : start + D] = turned[:, start : start + D] @ r
    np.testing.assert_allclose(after["v"][0], turned, atol=1e-6)
    np.testing.assert_allclose(after["out"][0], np.kron(np.eye(HEADS), r).T @ before["out"][0], atol=1e-6)
    np.testing.assert_array_equal(after["out"][1] if bias else 0, before["out"][1] if bias else 0)
    for other in {"q", "k"} & after.keys():
        np.testing.assert_array_equal(after[other][0], before[other][0])
    np.testing.assert_allclose(outputs(model), y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("name", FORMS)
def test_the_pass_rotates_them_and_says_so(name: str) -> None:
    model = attention(FORMS[name], True)
    y = outputs(model)
    assert "rotate: rotated the values of 1 attentions, heads of 8 channels" in Rotate(steps=3).rewrite(model, Context())[-1]
    np.testing.assert_allclose(outputs(model), y, atol=1e-5 * np.abs(y).max())
    data = [{"x": random(8, T, K, seed=s, scale=1)} for s in range(2)]
    _, report = magr_onnx.optimize(attention(FORMS[name], True), data, rotate="on", effort="fast")
    assert any("rotated the values of 1 attentions" in note and "float outputs differ by" in note for note in report.notes)


def test_values_alone_are_rotated_only_if_asked_for() -> None:
    data = [{"x": random(8, T, K, seed=s, scale=1)} for s in range(2)]
    for options, turned in (({}, False), ({"rotate": "on"}, True)):
        _, report = magr_onnx.optimize(attention(separate, True), data, bits=4, block_size=None, **options)  # type: ignore[arg-type]
        assert report.pipeline.startswith("rotate")
        assert any("rotated the values of 1 attention" in note for note in report.notes) == turned


def test_attentions_that_share_their_values_are_turned_once() -> None:
    b = Builder()
    x = b.input("x", ["batch", T, K])
    q, k, v = separate(b, x, True)
    ends = []
    for i, query in enumerate((q, k)):
        scores = b.node("Softmax", [b.node("MatMul", [query, b.node("Transpose", [k], perm=[0, 1, 3, 2])])], axis=-1)
        mixed = b.node("Transpose", [b.node("MatMul", [scores, v], f"mixed{i}")], perm=[0, 2, 1, 3])
        ends.append(layer(b, b.node("Reshape", [mixed, ints(b, 0, T, K)]), f"out{i}", 24, 9 + i, True))
    model = b.model(b.node("Add", ends, "both"), ["batch", T, 24])
    y = outputs(model)
    (heads,) = find_heads(model)
    assert sorted(found.name for found in heads.readers.values()) == ["out0", "out1"]
    Rotate(steps=0).rewrite(model, Context())
    np.testing.assert_allclose(outputs(model), y, atol=1e-5 * np.abs(y).max())


def test_every_reason_is_given() -> None:
    def refused(change: Callable[[Builder, ir.Value, ir.Value], ir.Value | None], form: Form = separate) -> str:
        model = attention(form, False, change)
        y = outputs(model)
        note = Rotate(steps=0).rewrite(model, Context())[-1]
        np.testing.assert_array_equal(outputs(model), y)
        assert "the values of 1 of 1 attentions are not rotated: " in note
        return note

    assert "is an output of the model" in refused(lambda b, v, y: v)  # as the cache of a decoder
    assert "other (Tanh) reads them" in refused(lambda b, v, y: b.node("Tanh", [y], "other"))
    assert "other (Concat) reads them" in refused(lambda b, v, y: b.node("Concat", [v, v], "other", axis=2))

    def also(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
        """Queries that are keys and values, too."""
        wide = layer(b, x, "v", 3 * K, 1, bias)
        q, k, v = parts(b, wide, -1)
        b.node("Relu", [wide], "both")
        return [split_heads(b, y) for y in (q, k, v)]

    assert "both (Relu) reads them together with others" in refused(lambda b, v, y: None, also)

    def windowed(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
        """Values of which a part of time is read elsewhere."""
        q, k, v = fused_last(b, x, bias)
        last = b.node("Slice", [v.producer().inputs[0].producer().inputs[0], ints(b, 1), ints(b, T), ints(b, 1)])  # type: ignore[list-item, union-attr]
        b.node("Relu", [last], "both")
        return [q, k, v]

    assert "both (Relu) reads them" in refused(lambda b, v, y: None, windowed)

    def gated(b: Builder, x: ir.Value, bias: bool) -> list[ir.Value]:
        q, k, v = separate(b, x, bias)
        return [q, k, b.node("Tanh", [v], "gate")]

    assert "gate (Tanh) makes them" in refused(lambda b, v, y: None, gated)


def test_attention_as_one_operator_is_said_to_be_left_alone() -> None:
    b = Builder()
    x = b.input("x", ["batch", T, K])
    q, k, v = (layer(b, x, name, K, seed, True) for seed, name in enumerate("qkv"))
    node = ir.node("MultiHeadAttention", [q, k, v], {"num_heads": HEADS}, domain="com.microsoft", name="attention")
    node.outputs[0].name, node.outputs[0].dtype = "mixed", ir.DataType.FLOAT
    b.nodes.append(node)
    model = b.model(layer(b, node.outputs[0], "out", 24, 9, True), ["batch", T, 24])
    model.graph.opset_imports["com.microsoft"] = 1
    y = outputs(model)
    note = Rotate().rewrite(model, Context())[-1]
    assert "attention (MultiHeadAttention) is one operator, whose values are not followed" in note
    np.testing.assert_array_equal(outputs(model), y)
