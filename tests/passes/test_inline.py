"""Inlining functions that hold layers: what is inlined, what stays a call, and that nothing computed changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import magr_onnx
from magr_onnx.errors import ModelError
from magr_onnx.models.zoo import ZOO
from magr_onnx.models.zoo.nested import U, W
from magr_onnx.models.zoo.trap import model
from magr_onnx.passes.instrument.inline import inline, inline_and_rename
from magr_onnx.passes.layers.linear import OPERATORS, find
from magr_onnx.report.reasons import Reason
from magr_onnx.runtime.ort.session import Session

FUNCTIONS = [name for name, trap in ZOO.items() if "function" in name]
LOCAL = ("local",)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inlining_changes_no_output(name: str) -> None:
    trap = ZOO[name]
    source = ir.from_proto(trap.build())
    assert source.functions
    inputs, outputs = ([v.name for v in values] for values in (source.graph.inputs, source.graph.outputs))
    feeds = trap.feeds(np.random.default_rng(0))
    with Session(source) as session:
        before = session.run(feeds)
    (note,) = inline_and_rename(source)
    assert "inlined" in note
    onnx.checker.check_model(ir.to_proto(source), full_check=True)
    assert [v.name for v in source.graph.inputs] == inputs
    assert [v.name for v in source.graph.outputs] == outputs
    with Session(source) as session:
        for a, b in zip(before, session.run(feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_functions_without_layers_stay_calls() -> None:
    made, report = magr_onnx.optimize(ZOO["function-with-weights-passed-in"].build(), bits=8, block_size=16)
    assert [f.name for f in made.functions.values()] == ["plain"]
    assert "plain" in [node.op_type for node in made.graph]
    assert any(note.startswith("1 model-local function with layers inlined (dense)") for note in report.notes)


def test_models_without_functions_are_left_alone() -> None:
    assert inline_and_rename(ir.from_proto(ZOO["matmul-and-bias"].build())) == []


def outer_and_inner(version: int) -> ir.Model:
    """A call of `old`, at another opset, which calls `dense`; and a call of `fresh`."""
    source = ir.from_proto(
        model(
            """g (float[n, 48] x) => (float[n, 24] y, float[n, 24] z) {
                y = local.old(x, w)
                z = local.fresh(x, w)
            }
            <domain: "local", opset_import: ["": 17, "local": 1]>
            old (a, m) => (o) { o = local.dense(a, m) }
            <domain: "local", opset_import: ["": 17]>
            dense (a, m) => (o) { [inner] o = MatMul(a, m) }
            <domain: "local", opset_import: ["": 17]>
            fresh (a, m) => (o) { [fc] o = MatMul(a, m) }""",
            domains=LOCAL,
            w=W,
        )
    )
    source.functions["local", "old", ""].opset_imports[""] = version
    return source


def test_functions_of_another_opset_stay_calls_with_what_they_call() -> None:
    source = outer_and_inner(16)
    assert inline(source, OPERATORS) == ["1 model-local function with layers inlined (fresh)"]
    assert sorted(f.name for f in source.functions.values()) == ["dense", "old"]
    layers, skips = find(source)
    assert [layer.name for layer in layers] == ["fc"]
    assert [(s.name, s.reason, s.detail) for s in skips] == [("inner", Reason.SUBGRAPH, "function dense")]
    source = outer_and_inner(17)
    assert inline(source, OPERATORS) == ["3 model-local functions with layers inlined (dense, fresh, old)"]
    assert [layer.name for layer in find(source)[0]] == ["inner", "fc"]


def test_outputs_that_are_inputs_keep_their_names() -> None:
    """onnxruntime refuses such a function; the ONNX reference runs it."""
    proto = model(
        """g (float[n, 48] x) => (float[n, 48] same, float[n, 24] y) {
            same, y = local.pair(x, w)
        }
        <domain: "local", opset_import: ["": 17]>
        pair (a, m) => (a, o) { [fc] o = MatMul(a, m) }""",
        domains=LOCAL,
        w=W,
    )
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    wanted = ReferenceEvaluator(proto).run(None, {"x": x})
    source = ir.from_proto(proto)
    inline_and_rename(source)
    with Session(source) as session:
        assert [i.name for i in session.inputs] == ["x"]
        for a, b in zip(session.run({"x": x}), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_optional_inputs_and_missing_attributes() -> None:
    """A call leaves an input and an attribute out: the Gemm has no bias, and its alpha is the operator's own default."""
    proto = model(
        """g (float[n, 24] x) => (float[n, 24] y) { y = local.dense(x, u) }
        <domain: "local", opset_import: ["": 17]>
        dense <scale> (a, m, v) => (o) { [fc] o = Gemm<alpha: float = @scale>(a, m, v) }""",
        domains=LOCAL,
        u=U,
    )
    made, report = magr_onnx.optimize(proto, bits=8, block_size=16)
    assert [row.name for row in report.layers] == ["fc"]
    x = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    with Session(made) as session:
        np.testing.assert_allclose(session.run({"x": x})[0], x @ U, atol=0.05)


def test_weights_inside_a_function_are_shared_by_its_calls() -> None:
    values = ", ".join(f"{v:.9g}" for v in U.reshape(-1))
    proto = model(
        f"""g (float[n, 24] x) => (float[n, 24] y) {{
            h = local.dense(x)
            y = local.dense(h)
        }}
        <domain: "local", opset_import: ["": 17]>
        dense (a) => (o) {{ m = Constant<value = float[24, 24] {{{values}}}>()  [fc] p = MatMul(a, m)  o = Tanh(p) }}""",
        domains=LOCAL,
    )
    made, report = magr_onnx.optimize(proto, bits=8, block_size=16)
    assert [row.name for row in report.layers] == ["fc", "fc_2"]
    assert sum(str(v.name).endswith("_q8") for v in made.graph.initializers.values()) == 1


def test_a_circle_of_functions_is_refused() -> None:
    source = outer_and_inner(17)
    dense = source.functions["local", "dense", ""]
    dense.append(ir.node("old", list(dense.inputs), domain="local"))
    with pytest.raises(ModelError, match="cannot be inlined: Cyclic dependency"):
        inline(source, OPERATORS)


@pytest.mark.parametrize("name", ["fc", "f?"])
def test_patterns_mean_every_call_of_a_function(name: str) -> None:
    proto = ZOO["function-called-twice-with-different-weights"].build()
    kept = magr_onnx.optimize(proto, include=[name], bits=8).report
    assert len(kept.layers) == 2
    with pytest.raises(ModelError, match="excluded by name"):
        magr_onnx.optimize(proto, exclude=[name], bits=8)
