"""Names for what is added to a model: `Names` itself, and runs on models that already have the names a run makes."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magr_onnx
from magr_onnx.passes.graph.names import Names, add_initializer
from tests.graphs import Array, Builder, correlated, proto, random
from tests.helpers import EXAMPLES

FORMATS = ("matmulnbits", "qdq", "qdq-int8", "dynamic-int8")
SHORT = st.sampled_from(["a", "a_1", "a_2", "a_1_1", "b", "b_1"])
K = 64


@EXAMPLES
@given(st.lists(SHORT), st.lists(SHORT), st.lists(st.tuples(st.booleans(), SHORT), max_size=12))
def test_new_names_are_the_first_free_ones(values: list[str], nodes: list[str], bases: list[tuple[bool, str]]) -> None:
    names = Names(values, nodes)
    taken: tuple[list[str], list[str]] = ([*values], [*nodes])
    for is_node, base in bases:
        name = names.node(base) if is_node else names.value(base)
        free = (v for i in range(100) if (v := f"{base}_{i}" if i else base) not in taken[is_node])
        assert name == next(free)
        taken[is_node].append(name)


@EXAMPLES
@given(st.lists(st.tuples(SHORT, SHORT, st.integers(0, 5)), max_size=12))
def test_names_of_a_graph_stay_unique_while_nodes_are_added_and_replaced(steps: list[tuple[str, str, int]]) -> None:
    x = ir.val("x", ir.DataType.FLOAT, [1])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="main")
    for name, output, index in steps:
        node = ir.node("Identity", [x], name=name)
        node.outputs[0].name = output
        old = list(graph)[index : index + 1]
        Names.of(graph).adopt([node], old)
        others = [n for n in graph if n not in old]
        assert (node.name == name) == (name not in {n.name for n in others})
        assert (node.outputs[0].name == output) == (output not in {n.outputs[0].name for n in others})
        graph.remove(old, safe=True)
        graph.append(node)
        assert len({n.name for n in graph}) == len({n.outputs[0].name for n in graph}) == len(graph)


def nested() -> ir.Model:
    """An If whose branch has a value, an initializer and a node of its own."""
    x, c = ir.val("x", ir.DataType.FLOAT, ["n", K]), ir.val("c", ir.DataType.BOOL, [])
    weight = ir.Value(name="inner_weight", const_value=ir.tensor(random(K, K), name="inner_weight"))
    product = ir.node("MatMul", [x, weight], name="inner")
    product.outputs[0].name = "inner_out"
    same = ir.node("Identity", [x], name="same")
    same.outputs[0].name = "same_out"
    bodies = [
        ir.Graph([], product.outputs, nodes=[product], initializers=[weight], name="then"),
        ir.Graph([], same.outputs, nodes=[same], name="else"),
    ]
    choice = ir.node("If", [c], {"then_branch": bodies[0], "else_branch": bodies[1]}, name="choice")
    choice.outputs[0].name, choice.outputs[0].dtype, choice.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(["n", K])
    return ir.Model(ir.Graph([x, c], choice.outputs, nodes=[choice], opset_imports={"": 20}, name="main"), ir_version=9)


def test_names_of_bodies_are_taken() -> None:
    names = Names.of(nested().graph)
    for value in ("x", "c", "y", "inner_weight", "inner_out", "same_out"):
        assert names.value(value) == f"{value}_1"
    for node in ("choice", "inner", "same"):
        assert names.node(node) == f"{node}_1"
    assert (names.value("inner"), names.node("x")) == ("inner", "x")  # nodes and values do not meet


def test_a_graph_is_scanned_once_and_again_on_demand() -> None:
    model = nested()
    names = Names.of(model.graph)
    assert Names.of(model.graph) is names
    assert Names.of(model.clone().graph) is not names
    next(iter(model.graph)).outputs[0].name = "other"
    assert names.value("other") == "other"
    assert Names.rescan(model.graph).value("other") == "other_1"


def test_constants_are_registered_under_free_names() -> None:
    model = nested()
    body = next(iter(model.graph.subgraphs()))
    values = [add_initializer(model.graph, "w", random(2, 2)), add_initializer(model.graph, "w", np.float32(1), body)]
    assert [v.name for v in values] == ["w", "w_1"]
    assert [v.const_value.name for v in values if v.const_value is not None] == ["w", "w_1"]
    assert "w" in model.graph.initializers
    assert "w_1" in body.initializers


WEIGHTS = {name: random(K, K, seed=i, scale=0.1) for i, name in enumerate(("wq", "wk"))}
BIAS = random(K, seed=9)
DATA = [{"x": correlated(16, K, seed=i)} for i in range(4)]


def attention(read: str = "r") -> ir.Model:
    """Two layers that read one value, called ``read``."""
    b = Builder(21)
    hidden = b.node("Relu", [b.input("x", ["batch", K])], "relu")
    hidden.name = read
    q = b.node("MatMul", [hidden, b.constant("wq", WEIGHTS["wq"])], "q_proj")
    k = b.node("MatMul", [hidden, b.constant("wk", WEIGHTS["wk"])], "k_proj")
    k = b.node("Add", [k, b.constant("bk", BIAS)], "k_bias")
    for value, name in ((q, "q"), (k, "k")):
        value.name, value.shape = name, ir.Shape(["batch", K])
    return b.model_of([q, k])


def outputs(model: ir.Model | Path) -> tuple[Array, Array]:
    loaded = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(loaded, providers=["CPUExecutionProvider"])
    q, k = session.run(["q", "k"], DATA[0])
    return q, k


def assert_near_the_float_model(model: ir.Model | Path) -> None:
    x = np.maximum(DATA[0]["x"], 0)
    for out, exact in zip(outputs(model), (x @ WEIGHTS["wq"], x @ WEIGHTS["wk"] + BIAS), strict=True):
        assert np.linalg.norm(out - exact) < 0.15 * np.linalg.norm(exact)


@pytest.mark.parametrize(("first", "second"), list(product(FORMATS, FORMATS)))
def test_a_run_on_the_own_output_of_a_run(first: str, second: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": DATA, "effort": "fast"}
    one = magr_onnx.optimize(proto(attention()), format=first, include=["q_proj"], **options)
    alone = magr_onnx.optimize(proto(attention()), format=second, include=["k_proj"], **options)
    in_memory = magr_onnx.optimize(one.model, format=second, include=["k_proj"], **options)
    paths = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    magr_onnx.optimize(proto(attention()), output=paths[0], format=first, include=["q_proj"], **options)
    magr_onnx.optimize(paths[0], output=paths[1], format=second, include=["k_proj"], **options)
    for model in (in_memory.model, paths[1]):
        assert_near_the_float_model(model)
        q, k = outputs(model)
        np.testing.assert_allclose(q, outputs(paths[0])[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(k, outputs(alone.model)[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["q4", "q8", "q4_scales", "q8_scales", "q8_zero_points", "q8_dequantized", "q4_dequantized"])
def test_a_value_called_like_a_constant_to_be_made(format: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    magr_onnx.optimize(proto(attention(f"wq_{name}")), calibration=DATA, output=path, format=format, effort="fast")
    assert_near_the_float_model(path)


def test_names_that_another_pass_gave_are_seen() -> None:
    model = attention()
    quantize, emit = magr_onnx.passes.Plan.parse("quantize,emit-qdq").passes
    quantize(model)
    for node in model.graph:
        if node.name == "relu":
            node.name, node.outputs[0].name = "q_proj_q4", "wq_q4"
    emit(model)
    assert_near_the_float_model(model)


def test_names_of_replaced_nodes_are_used_again() -> None:
    b = Builder()
    x = b.input("x", ["batch", K])
    model = b.model(b.node("Add", [b.node("MatMul", [x, b.constant("w", random(K, K))], "fc"), b.constant("b", BIAS)], "fc_bias"), [3, K])
    for each in magr_onnx.passes.Plan.parse("quantize,emit-qdq").passes:
        each(model)
    assert [node.name for node in model.graph] == ["fc_dequantize", "fc_q4", "fc_bias"]


def tied() -> ir.Model:
    """Two Gathers of one table, two convolutions of one weight and two layers of one matrix, in a row."""
    b = Builder(21)
    table, kernel, matrix = (
        b.constant("table", random(256, 32)),
        b.constant("kernel", random(32, 32, 3)),
        b.constant("w", random(32, 32)),
    )
    ids = b.input("ids", ["batch", "time"], ir.DataType.INT64)
    rows = b.node("Add", [b.node("Gather", [table, ids], f"gather_{i}") for i in range(2)], "sum")
    turned = b.node("Transpose", [rows], "turn", perm=[0, 2, 1])
    for i in range(2):
        turned = b.node("Conv", [turned, kernel], f"conv_{i}", pads=[1, 1])
    out = b.node("Transpose", [turned], "back", perm=[0, 2, 1])
    for i in range(2):
        out = b.node("Relu", [b.node("MatMul", [out, matrix], f"fc_{i}")], f"relu_{i}")
    return b.model(out, ["batch", "time", 32])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("conv_form", "embeddings"), [("fold", "gather-block-quantized"), ("dequantize", "dequantize")])
def test_what_shares_a_weight_in_two_runs(format: str, conv_form: str, embeddings: str, tmp_path: Path) -> None:
    data = [{"ids": np.random.default_rng(i).integers(0, 256, (4, 8))} for i in range(4)]
    options: dict[str, Any] = {"format": format, "conv_form": conv_form, "conv_bits": 8, "embeddings": embeddings, "effort": "fast"}
    paths = [tmp_path / f"{i}.onnx" for i in range(2)]
    magr_onnx.optimize(proto(tied()), data, output=paths[0], include=["*_0"], bits=8, **options)
    report = magr_onnx.optimize(paths[0], data, output=paths[1], include=["*_1"], bits=8, **options).report
    assert {row.name for row in report.layers} == {"gather_1", "conv_1", "fc_1"}
    exact = ort.InferenceSession(proto(tied()).SerializeToString()).run(None, data[0])[0]
    out = ort.InferenceSession(str(paths[1])).run(None, data[0])[0]
    assert np.linalg.norm(out - exact) < 0.05 * np.linalg.norm(exact)
