"""Finding linear layers: every form is viewed as Y = X W + b, everything else is skipped for the right reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.passes import LinearLayer, Reason, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import FORMS, Builder, K, N, feeds, random


def only(model: ir.Model) -> LinearLayer:
    layers, skips = find(model)
    assert len(layers) == 1
    assert not skips
    return layers[0]


@pytest.mark.parametrize("form", FORMS)
def test_view_is_the_layer(form: str) -> None:
    model = FORMS[form]()
    layer = only(model)
    assert (layer.k, layer.n, layer.read().shape) == (K, N, (K, N))
    x = feeds(model)
    with Session(model) as session:
        (expected,) = session.run(x)
    bias = layer.read_bias()
    got = x["x"] @ layer.read() + (0 if bias is None else bias)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_write_is_the_inverse_of_read(form: str) -> None:
    model = FORMS[form]()
    layer = only(model)
    weight, bias = random(K, N, seed=9), random(N, seed=10).astype(np.float64)
    layer.write(weight, bias if layer.has_bias else None)
    again = only(model)
    np.testing.assert_allclose(again.read(), weight, rtol=1e-6)
    if layer.has_bias:
        np.testing.assert_allclose(again.read_bias(), bias, rtol=1e-6)
    assert "w" not in model.graph.initializers  # the old constant is gone, with the nodes only it fed
    assert not any(n.op_type in ("Transpose", "Constant") for n in model.graph)
    x = feeds(model)
    with Session(model) as session:
        (got,) = session.run(x)
    np.testing.assert_allclose(got, x["x"] @ weight + (bias if layer.has_bias else 0), rtol=1e-4, atol=1e-4)


def dynamic() -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", K])
    return b.model(b.node("MatMul", [x, b.node("Transpose", [x], perm=[1, 0])], "layer"), ["batch", "batch"])


def constant_left() -> ir.Model:
    b = Builder()
    x = b.input("x", [K, N])
    return b.model(b.node("MatMul", [b.constant("w", random(8, K)), x], "layer"), [8, N])


def rank() -> ir.Model:
    b = Builder()
    x = b.input("x", [2, "time", K])
    return b.model(b.node("MatMul", [x, b.constant("w", random(2, K, N))], "layer"), [2, "time", N])


def vector() -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", K])
    return b.model(b.node("MatMul", [x, b.constant("w", random(K))], "layer"), ["batch"])


def double() -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", K], ir.DataType.DOUBLE)
    return b.model(b.node("MatMul", [x, b.constant("w", random(K, N, dtype=np.float64))], "layer"), ["batch", N])


def overridable() -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", K])
    weight = b.constant("w", random(K, N))
    b.inputs.append(weight)
    return b.model(b.node("MatMul", [x, weight], "layer"), ["batch", N])


def trans_a() -> ir.Model:
    b = Builder()
    x = b.input("x", [K, "batch"])
    return b.model(b.node("Gemm", [x, b.constant("w", random(K, N))], "layer", transA=1), ["batch", N])


def dynamic_bias() -> ir.Model:
    b = Builder()
    x, c = b.input("x", ["batch", K]), b.input("c", ["batch", N])
    return b.model(b.node("Gemm", [x, b.constant("w", random(K, N)), c], "layer"), ["batch", N])


def zero_alpha() -> ir.Model:
    return graphs.gemm(alpha=0.0)


def weight_is_output() -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", K])
    weight = b.constant("w", random(K, N))
    out = b.node("MatMul", [x, weight], "layer")
    out.shape = ir.Shape(["batch", N])
    return b.model_of([out, weight])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dynamic, Reason.DYNAMIC_WEIGHT),
        (constant_left, Reason.CONSTANT_LEFT),
        (rank, Reason.WEIGHT_RANK),
        (vector, Reason.WEIGHT_RANK),
        (double, Reason.WEIGHT_DTYPE),
        (overridable, Reason.OVERRIDABLE),
        (trans_a, Reason.TRANS_A),
        (dynamic_bias, Reason.BIAS),
        (zero_alpha, Reason.ALPHA),
        (weight_is_output, Reason.GRAPH_OUTPUT),
    ],
)
def test_skip_reason(make: Callable[[], ir.Model], reason: Reason) -> None:
    layers, skips = find(make())
    assert not layers
    assert [s.reason for s in skips] == [reason]
    assert "layer" in str(skips[0])


def test_layers_in_bodies_are_found() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["batch", K])
    condition = ir.val("condition", ir.DataType.BOOL, [])
    branches = []
    for i in range(2):
        b = Builder()
        out = b.node("MatMul", [x, b.constant(f"w{i}", random(K, N))], f"branch_{i}")
        branches.append(ir.Graph([], [out], nodes=b.nodes, initializers=b.initializers, name=f"branch_{i}"))
    node = ir.node("If", [condition], {"then_branch": branches[0], "else_branch": branches[1]}, name="choice")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    model = ir.Model(ir.Graph([x, condition], [node.outputs[0]], nodes=[node], opset_imports={"": 20}, name="g"), ir_version=9)
    layers, skips = find(model)
    assert [(layer.name, layer.nested, layer.root) for layer in layers] == [(f"branch_{i}", True, model.graph) for i in range(2)]
    assert skips == []


def test_include_and_exclude_match_node_and_weight_names() -> None:
    model = graphs.chain()
    assert [layer.name for layer in find(model)[0]] == ["up", "down"]
    layers, skips = find(model, Selection(["w1"]))
    assert [layer.name for layer in layers] == ["up"]
    assert {s.name: s.reason for s in skips} == {"down": Reason.NOT_INCLUDED, "scores": Reason.DYNAMIC_WEIGHT}
    assert [layer.name for layer in find(model, Selection(exclude=["d*"]))[0]] == ["up"]
    layers, skips = find(model, Selection(["up", "w*"], ["w2"]))  # both name "down": it stays
    assert [layer.name for layer in layers] == ["up"]
    assert {s.name: s.reason for s in skips} == {"down": Reason.EXCLUDED, "scores": Reason.DYNAMIC_WEIGHT}


def test_layers_of_one_name_are_told_apart() -> None:
    b = Builder()
    x = b.input("x", ["batch", K])
    hidden = b.node("MatMul", [x, b.constant("w1", random(K, K))], "same")
    hidden.name = "hidden"
    model = b.model(b.node("MatMul", [hidden, b.constant("w2", random(K, N))], "same"), ["batch", N])
    assert [layer.name for layer in find(model)[0]] == ["same", "same:y"]


def test_bias_is_not_taken_from_an_add_that_others_can_see_past() -> None:
    b = Builder()
    x = b.input("x", ["batch", K])
    product = b.node("MatMul", [x, b.constant("w", random(K, N))], "layer")
    added = b.node("Add", [product, b.constant("b", random(N))], "bias")
    for value in (product, added):
        value.shape = ir.Shape(["batch", N])
    layer = only(b.model_of([product, added]))
    assert layer.add is None
    assert not layer.has_bias


def test_bias_of_higher_rank_is_not_a_bias() -> None:
    b = Builder()
    x = b.input("x", ["batch", K])
    product = b.node("MatMul", [x, b.constant("w", random(K, N))], "layer")
    out = b.node("Add", [product, b.constant("b", random(1, 1, N))], "bias")  # raises the rank of the result to 3
    assert not only(b.model(out, [1, "batch", N])).has_bias


def test_infinities_that_mask_outputs_are_no_bias() -> None:
    b = Builder()
    product = b.node("MatMul", [b.input("x", ["batch", K]), b.constant("w", random(K, N))], "layer")
    mask = np.zeros(N, np.float32)
    mask[3] = -np.inf
    assert not only(b.model(b.node("Add", [product, b.constant("mask", mask)], "masked"), ["batch", N])).has_bias


def test_patterns_find_a_layer_by_the_module_of_its_weight() -> None:
    b = graphs.Builder()
    x = b.node("MatMul", [b.input("x", ["batch", 24]), b.constant("block.0.up.weight", graphs.random(24, 24))], "node_1")
    model = b.model(b.node("MatMul", [x, b.constant("w", graphs.random(24, 8))], "node_2"), ["batch", 8])
    for pattern, found in (("block.0.up", ["node_1"]), ("*.up", ["node_1"]), ("block.0", []), ("", [])):
        assert [layer.name for layer in find(model, Selection([pattern]))[0]] == found
    assert [layer.name for layer in find(model, Selection(exclude=["block.0.up"]))[0]] == ["node_2"]


def test_tied_weight_keeps_its_other_reader() -> None:
    b = Builder()
    ids = b.input("ids", ["batch"], ir.DataType.INT64)
    table = b.constant("table", random(N, K))
    x = b.node("Gather", [table, ids], "embed")
    x.dtype = ir.DataType.FLOAT
    model = b.model(b.node("MatMul", [x, b.node("Transpose", [table], perm=[1, 0])], "head"), ["batch", N])
    layer = only(model)
    layer.write(np.zeros((K, N), np.float32), None)
    assert "table" in model.graph.initializers
    with Session(model) as session:
        assert not session.run({"ids": np.array([1, 2])})[0].any()
