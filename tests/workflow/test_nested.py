"""Layers in the bodies of If, Loop and Scan: what is hoisted out of them, and what is written into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.errors import ModelError
from magr_onnx.models.zoo import ZOO, Trap
from magr_onnx.models.zoo.nested import SQUARE, TRAPS, U, W
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.passes.graph.subgraphs import unique_names, walk
from magr_onnx.passes.instrument.hoist import hoist, hoisted
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.layers.linear import OPERATORS, find
from magr_onnx.passes.plan import Plan
from magr_onnx.report.reasons import Reason
from magr_onnx.runtime.calibration import moments, subgraphs
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Arithmetic, Session

Array = Any
BODIES = [t for t in TRAPS if any(word in t.name for word in ("branch", "loop", "scan", "three"))]
TURNS = """g (float[n, 32] s, int64 trips) => (float[n, 32] y) {
    go = Constant<value = bool {1}>()
    y = Loop(trips, go, s) <body = turn (int64 i, bool c, float[n, 32] state) => (bool next, float[n, 32] out) {
        next = Identity(c)
        [step] h = MatMul(state, w)
        out = Tanh(h)
    }>
}"""
SHRINKS = """g (float[t, 1] x, float[5, 24] rows) => (float[1] y) {
    start = Constant<value = int64[1] {1}>()
    end, all = Scan(start, x) <num_scan_inputs = 1, body = turn (int64[1] count, float[1] now) => (int64[1] next, float[1] seen) {
        one = Constant<value = int64[1] {1}>()
        zero = Constant<value = int64[1] {0}>()
        next = Add(count, one)
        part = Slice(rows, zero, count, zero)
        [fc] h = MatMul(part, w)
        flat = Constant<value = int64[2] {0, 1}>()
        s = ReduceSum<keepdims = 0>(h, flat)
        seen = Reshape(s, one)
    }>
    y = ReduceSum<keepdims = 0>(all, start)
}"""


def gathered(source: ir.Model, feeds: list[dict[str, Array]]) -> tuple[dict[str, Any], subgraphs.TappedModel]:
    """Statistics of what every layer reads, by layer name."""
    inline_and_rename(source)
    layers, _ = find(source)
    with Session(source) as session:
        data = open_data(feeds, session.inputs)
    tapped = subgraphs.tap_subgraphs(source, layers, data, Plan(), "cpu")
    stats = moments.collect(tapped.model, tapped.reached(layers), CalibrationContext(data)).stats
    return {layer.name: stats.get(layer.reads) for layer in layers}, tapped


def loop_rows(feeds: dict[str, Array]) -> dict[str, list[Array]]:
    state, rows = feeds["s"], []
    for _ in range(3):
        rows.append(state)
        state = np.tanh(state @ SQUARE)
    return {"step": rows}


def if_in_loop_rows(feeds: dict[str, Array]) -> dict[str, list[Array]]:
    state, rows = feeds["s"], {"even": [], "odd": []}
    for i in range(4):
        rows["odd" if i % 2 else "even"].append(state)
        state = state @ SQUARE[::-1] / 2 if i % 2 else np.tanh(state @ SQUARE)
    return rows


def scan_rows(feeds: dict[str, Array]) -> dict[str, list[Array]]:
    state, rows = np.zeros((2, 24), np.float32), {"in": [], "back": []}
    for x in feeds["x"]:
        rows["in"].append(x)
        rows["back"].append(state)
        state = np.tanh(x @ W + state @ U)
    return rows


def growing_rows(feeds: dict[str, Array]) -> dict[str, list[Array]]:
    return {"fc": [feeds["x"][: i + 1] for i in range(3)]}


def branch_rows(feeds: dict[str, Array]) -> dict[str, list[Array]]:
    x = feeds["x"]
    return {"fc": [2 * x] if feeds["c"] else [], "fc_1": [] if feeds["c"] else [np.maximum(x, 0)]}


@pytest.mark.parametrize(
    ("name", "unroll"),
    [
        ("loop-with-carried-state", loop_rows),
        ("if-in-a-loop", if_in_loop_rows),
        ("scan", scan_rows),
        ("loop-whose-rows-change", growing_rows),
        ("names-in-both-branches", branch_rows),
    ],
)
def test_statistics_are_those_of_the_unrolled_model(name: str, unroll: Callable[[dict[str, Array]], dict[str, list[Array]]]) -> None:
    trap, rng = ZOO[name], np.random.default_rng(1)
    feeds = [trap.feeds(rng) for _ in range(6)]
    found, tapped = gathered(ir.from_proto(trap.build()), feeds)
    assert tapped.missing == {}
    assert len(hoisted(tapped.model)) == len(found)
    for layer, stats in found.items():
        x = np.concatenate([rows for one in feeds for rows in unroll(one)[layer]]).astype(np.float64)
        assert stats.rows == len(x)
        np.testing.assert_allclose(stats.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [t.name for t in BODIES])
def test_hoisting_changes_no_output(name: str) -> None:
    trap, rng = ZOO[name], np.random.default_rng(1)
    source = ir.from_proto(trap.build())
    _, tapped = gathered(source, [trap.feeds(rng) for _ in range(4)])
    feeds = trap.feeds(rng)
    with Session(source) as plain, Session(tapped.model) as other:
        for a, b in zip(plain.run(feeds), other.run(feeds), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_loop_carries_what_grows_before_its_scan_outputs() -> None:
    trap = ZOO["loop-with-carried-state"]
    source = ir.from_proto(trap.build())
    feeds = trap.feeds(np.random.default_rng(2))
    copy = hoist(source, {"state": 32}, growing={"state"})
    copy.graph.outputs.append(next(v for node in copy.graph for v in node.outputs if v.name == "state"))
    with Session(source) as plain, Session(copy) as other:
        *same, rows = other.run(feeds)
        for a, b in zip(plain.run(feeds), same, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(rows, np.concatenate(loop_rows(feeds)["step"]), rtol=1e-5, atol=1e-6)


def test_a_scan_whose_axes_are_given_has_one_more() -> None:
    text = """g (float[t, 2, 48] x) => (float[2, t, 24] y) {
        y = Scan(x) <num_scan_inputs = 1, scan_output_axes = [1], scan_output_directions = [1],
            body = turn (float[2, 48] now) => (float[2, 24] seen) { r = Relu(now)  [fc] seen = MatMul(r, w) }>
    }"""
    x = np.random.default_rng(0).standard_normal((5, 2, 48)).astype(np.float32)
    found, _ = gathered(ir.from_proto(model(text, w=W)), [{"x": x}])
    rows = np.maximum(x.reshape(-1, 48), 0)
    np.testing.assert_allclose(found["fc"].gram, rows.T @ rows / 10, rtol=1e-4, atol=1e-5)


UNREACHED = [
    ("loop-that-never-turns", model(TURNS, w=SQUARE), {"s": np.ones((5, 32), np.float32), "trips": np.int64(0)}, subgraphs.NEVER),
    ("rows-of-a-scan", model(SHRINKS, w=U), {"x": np.ones((3, 1), np.float32), "rows": np.ones((5, 24), np.float32)}, "onnxruntime cannot"),
]


@pytest.mark.parametrize(("name", "source", "feeds", "why"), UNREACHED, ids=[u[0] for u in UNREACHED])
def test_layers_without_statistics_say_so(name: str, source: onnx.ModelProto, feeds: dict[str, Array], why: str, tmp_path: Path) -> None:
    feeds = {k: np.asarray(v) for k, v in feeds.items()}
    data = [feeds] * 8
    for options in ({"bits": 4, "block_size": 16}, {"format": "dynamic-int8"}):
        (row,) = magr_onnx.optimize(source, data, output=tmp_path / "q.onnx", **options).report.layers
        assert row.rows == 0
        assert any(note.startswith("data-free: ") and why in note for note in row.notes)
    with pytest.raises(ModelError, match=f"{Reason.NO_STATISTICS}.*{why}"):
        magr_onnx.optimize(source, data, format="qdq-int8")
    with pytest.raises(ModelError, match=f"{Reason.NO_STATISTICS}.*{why}"):
        magr_onnx.optimize(source, data, target_size="50%")


def test_a_branch_never_taken_keeps_its_floats_where_ranges_are_static() -> None:
    trap = ZOO["if-branch-never-taken"]
    rng = np.random.default_rng(0)
    report = magr_onnx.optimize(trap.build(), [trap.feeds(rng) for _ in range(4)], format="qdq-int8", include=["*"]).report
    assert [row.name for row in report.layers] == ["fc"]
    assert [(row.name, row.reason, row.detail) for row in report.skipped] == [("never", str(Reason.NO_STATISTICS), subgraphs.NEVER)]


INTEGER = {"format": "qdq-int8", "bias": "none"}
FORMATS: dict[str, dict[str, Any]] = {
    "static": INTEGER,
    "static, outputs": {
        "pipeline_text": "quantize-activations,quantize{bits=8,block_size=channel,symmetric=true},emit-qdq-int8{outputs=true}"
    },
    "dynamic": {"format": "dynamic-int8"},
    "blocks": {"bits": 8, "block_size": 16, "format": "qdq"},
    "best": {"bits": 8, "block_size": 16, "effort": "best"},
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("trap", BODIES, ids=lambda t: t.name)
def test_every_format_is_valid_and_close(trap: Trap, kind: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "q.onnx"
    report = magr_onnx.optimize(trap.build(), [trap.feeds(rng) for _ in range(24)], output=path, include=["*"], **FORMATS[kind]).report
    assert report.verified == len(report.layers) > 0
    onnx.checker.check_model(str(path), full_check=True)
    with Session(path) as session, Session(ir.from_proto(trap.build())) as floats:
        for _ in range(3):
            feeds = trap.feeds(rng)
            for ours, original in zip(session.run(feeds), floats.run(feeds), strict=True):
                assert np.linalg.norm(ours - original) <= 0.08 * np.linalg.norm(original)


@pytest.mark.parametrize("trap", BODIES, ids=lambda t: t.name)
def test_accumulators_are_proved_in_bodies(trap: Trap, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = [trap.feeds(rng) for _ in range(6)]
    report = magr_onnx.optimize(trap.build(), data, output=tmp_path / "q.onnx", accumulator_bits=20, include=["*"], **INTEGER).report
    assert report.proof is not None
    assert report.proof.proved == report.proof.total == len(report.layers)
    verified = magr_onnx.verify(tmp_path / "q.onnx", target="x86-avx2", run=False)
    assert {row.name for row in verified.layers} == {row.emitted for row in report.layers}


@pytest.mark.parametrize("options", [{"target_size": "60%"}, {"max_loss": "5%"}], ids=["size", "loss"])
def test_mixed_precision_chooses_for_bodies(options: dict[str, Any]) -> None:
    trap, rng = ZOO["if-in-a-loop"], np.random.default_rng(0)
    result = magr_onnx.optimize(trap.build(), [trap.feeds(rng) for _ in range(8)], **options)
    assert result.report.assignment is not None
    assert {name for row in result.report.assignment.rows for name in row.layers} == {"even", "odd"}
    assert all(row.rows for row in result.report.layers)


def test_external_data_holds_what_bodies_read(tmp_path: Path) -> None:
    trap, rng = ZOO["weights-in-a-branch"], np.random.default_rng(0)
    options = {"bits": 8, "block_size": 16, "exclude": ["other"], "external_data": True}
    report = magr_onnx.optimize(trap.build(), output=tmp_path / "q.onnx", **options).report
    assert (tmp_path / "q.onnx.data").stat().st_size > 0
    assert len(report.layers) == 1
    with Session(tmp_path / "q.onnx") as session, Session(ir.from_proto(trap.build())) as floats:
        feeds = {**trap.feeds(rng), "c": np.array(True)}
        np.testing.assert_allclose(session.run(feeds)[0], floats.run(feeds)[0], atol=0.05)


def test_what_a_body_still_captures_stays() -> None:
    trap = ZOO["weight-shared-by-three-layers"]
    made, report = magr_onnx.optimize(trap.build(), bits=4, block_size=16, include=["*"], exclude=["second"])
    assert "u" in made.graph.initializers
    assert any("stays in the file" in note and "second (MatMul)" in note for row in report.layers for note in row.notes)
    made, report = magr_onnx.optimize(trap.build(), bits=4, block_size=16)
    assert "u" not in made.graph.initializers
    assert not any("stays in the file" in note for row in report.layers for note in row.notes)


def test_a_new_constant_is_not_hidden_by_a_name_in_a_body() -> None:
    """The codes of `w` would be called w_q8, as a value in the body is."""
    text = """g (float[n, 24] x, bool c) => (float[n, 24] y) {
        y = If(c) <
            then_branch = yes () => (float[n, 24] a) { w_q8 = Relu(x)  [fc] h = MatMul(w_q8, w)  a = Add(h, w_q8) },
            else_branch = no () => (float[n, 24] d) { d = Relu(x) }
        >
    }"""
    made, _ = magr_onnx.optimize(model(text, w=U), bits=8, block_size=16)
    x = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    with Session(made) as session:
        (found,) = session.run({"x": x, "c": np.array(True)})
    np.testing.assert_allclose(found, np.maximum(x, 0) @ U + np.maximum(x, 0), atol=0.05)


def test_names_become_unique_and_the_main_graph_keeps_its_own() -> None:
    source = ir.from_proto(ZOO["names-in-both-branches"].build())
    before = [str(v.name) for v in (*source.graph.inputs, *source.graph.outputs, *(v for n in source.graph for v in n.outputs))]
    unique_names(source, OPERATORS)
    after = [str(v.name) for v in (*source.graph.inputs, *source.graph.outputs, *(v for n in source.graph for v in n.outputs))]
    names = [str(v.name) for node, _ in walk(source.graph) for v in node.outputs]
    assert before == after
    assert len(names) == len(set(names))
    onnx.checker.check_model(ir.to_proto(source), full_check=True)


def test_a_mask_does_not_count_rows_of_a_body() -> None:
    """The rows in the branch look like the mask's on one batch, and are none on the next."""
    text = """g (float[n, 24] x, bool c, int64[n] attention_mask) => (float[n, 24] y, int64[n] m) {
        m = Identity(attention_mask)
        y = If(c) <
            then_branch = yes () => (float[n, 24] a) { r = Relu(x)  [fc] a = MatMul(r, w) },
            else_branch = no () => (float[n, 24] d) { d = Relu(x) }
        >
    }"""
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.standard_normal((4, 24)).astype(np.float32), "c": np.array(i % 2 == 0), "attention_mask": np.array([1, 1, 1, 0])}
        for i in range(4)
    ]
    report = magr_onnx.optimize(model(text, w=U), data, bits=4, block_size=16).report
    assert report.layers[0].rows == 8
    assert any(note.startswith("fc: all input rows count") and "attention_mask" in note for note in report.notes)


def test_opsets_are_raised_in_bodies(tmp_path: Path) -> None:
    """Squeeze and ReduceSum took their axes as attributes, and Softmax flattened, before opset 13."""
    text = """g (float[n, 1, 24] x, bool c) => (float[n, 24] y) {
        y = If(c) <
            then_branch = yes () => (float[n, 24] a) {
                [fc] h = MatMul(x, w)
                s = Softmax<axis = 0>(h)
                a = ReduceSum<axes = [1], keepdims = 0>(s)
            },
            else_branch = no () => (float[n, 24] d) { d = Squeeze<axes = [1]>(x) }
        >
    }"""
    source = model(text, opset=11, w=U)
    made, _ = magr_onnx.optimize(source, bits=4, block_size=16, format="qdq", output=tmp_path / "q.onnx")
    assert made.opset_imports[""] == 21
    x = np.random.default_rng(0).standard_normal((3, 1, 24)).astype(np.float32)
    (weight,) = read_weights(ir.load(tmp_path / "q.onnx")).values()
    h = np.exp(x @ weight)
    with Session(tmp_path / "q.onnx", arithmetic=Arithmetic.UNOPTIMIZED) as session:
        np.testing.assert_allclose(session.run({"x": x, "c": np.array(True)})[0], (h / h.sum()).sum(axis=1), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(session.run({"x": x, "c": np.array(False)})[0], x[:, 0])


def test_patterns_reach_into_bodies() -> None:
    trap = ZOO["if-both-branches"]
    report = magr_onnx.optimize(trap.build(), bits=4, block_size=16, include=["other"]).report
    assert [row.name for row in report.layers] == ["other"]
    assert [(row.name, row.reason) for row in report.skipped] == [("fc", str(Reason.NOT_INCLUDED))]


def test_inspection_finds_what_is_converted() -> None:
    for trap in TRAPS:
        found = magr_onnx.inspect(trap.build())
        assert {row["name"] for row in found.layers} | {row.name for row in found.skipped} == set(trap.layers)


def test_bodies_do_not_hide_what_is_captured_twice() -> None:
    """Two bodies and the main graph quantize one value each for itself: what one body makes, another cannot read."""
    text = """g (float[n, 24] x, bool c) => (float[n, 24] y) {
        [main] p = MatMul(x, w)
        h = If(c) <
            then_branch = yes () => (float[n, 24] a) { [fc] a = MatMul(x, u) },
            else_branch = no () => (float[n, 24] d) { [other] d = MatMul(x, v) }
        >
        y = Add(p, h)
    }"""
    u, v, w = (constant(name, 24, 24) for name in "uvw")
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((5, 24)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(4)]
    for options in (INTEGER, {"format": "dynamic-int8"}):
        made, _ = magr_onnx.optimize(model(text, u=u, v=v, w=w), data, **options)
        onnx.checker.check_model(ir.to_proto(made), full_check=True)
        with Session(made) as session:
            for feeds in data:
                wanted = feeds["x"] @ w + feeds["x"] @ (u if feeds["c"] else v)
                assert np.linalg.norm(session.run(feeds)[0] - wanted) <= 0.05 * np.linalg.norm(wanted)


def test_passes_run_on_the_whole_model_one_after_the_other() -> None:
    trap, rng = ZOO["if-in-a-loop"], np.random.default_rng(0)
    source = ir.from_proto(trap.build())
    with Session(source) as session:
        data = open_data([trap.feeds(rng) for _ in range(4)], session.inputs)
    moments.attach_stats(source, data)
    ir.passes.Sequential(*Plan.parse("magr,quantize{bits=8,block_size=16},emit-matmulnbits").passes)(source)
    weights = read_weights(source)
    assert len(weights) == 2
    feeds = trap.feeds(rng)
    with Session(source) as session:
        names = dict(zip(("even", "odd"), weights.values(), strict=True))
        np.testing.assert_allclose(session.run(feeds)[0], trap.evaluate(feeds, names)[0], rtol=1e-3, atol=1e-3)


def test_a_model_too_large_to_run_is_data_free_in_its_bodies(tmp_path: Path) -> None:
    trap, rng = ZOO["weight-shared-by-three-layers"], np.random.default_rng(0)
    onnx.save(trap.build(), tmp_path / "in.onnx")
    data = [trap.feeds(rng) for _ in range(8)]
    options = {"bits": 8, "block_size": 16, "output": tmp_path / "q.onnx", "max_memory": 1000}
    report = magr_onnx.optimize(tmp_path / "in.onnx", data, **options).report
    rows = {row.name: row for row in report.layers}
    assert [rows[name].rows > 0 for name in ("first", "second", "third")] == [True, False, True]
    assert f"data-free: {subgraphs.TOO_LARGE}" in rows["second"].notes
    assert "third reads the same weight in another stage, and has codes of its own" in rows["first"].notes


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """The first reader of a weight finished before, the others not."""
    trap, rng = ZOO["weight-shared-by-three-layers"], np.random.default_rng(0)
    onnx.save(trap.build(), tmp_path / "in.onnx")
    data = [trap.feeds(rng) for _ in range(8)]

    def run(name: str) -> bytes:
        magr_onnx.optimize(tmp_path / "in.onnx", data, bits=4, block_size=16, output=tmp_path / name, resume=tmp_path / "job")
        return (tmp_path / name).read_bytes()

    whole = run("a.onnx")
    layers = sorted((tmp_path / "job" / "layers").iterdir())
    assert len(layers) == 3
    for finished in range(3):
        for i, file in enumerate(layers):
            if i != finished:
                file.unlink()
        assert run(f"b{finished}.onnx") == whole


@pytest.mark.parametrize("external", [False, True], ids=["one file", "data beside it"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_fuses_weight_only_products_in_bodies(bits: int, external: bool, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    magr_onnx.optimize(model(TURNS, w=SQUARE), output=path, bits=bits, block_size=16, format="qdq", external_data=external)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = ir.load(tmp_path / "optimized.onnx").graph.all_nodes()
    assert [node.op_type for node in nodes if node.op_type not in ("Loop", "Identity", "Tanh")] == ["MatMulNBits"]


def test_patterns_mean_layers_of_one_name_in_both_branches() -> None:
    proto = ZOO["names-in-both-branches"].build()
    with pytest.raises(ModelError, match="excluded by name"):
        magr_onnx.optimize(proto, exclude=["fc"], bits=8)
    assert len(magr_onnx.optimize(proto, include=["fc"], bits=8).report.layers) == 2


CARRIED = {
    "taken by another state": "n, p",
    "returned twice": "q, q",
    "taken by another state, from an Identity": "p, n",
}
"""What a Loop's body returns for its two states: ``n`` is the first of them, ``p`` an Identity of it, and ``q`` an Identity of that."""


@pytest.mark.parametrize("case", CARRIED)
def test_a_constant_state_that_another_state_takes(case: str, tmp_path: Path) -> None:
    text = f"""g (float[b, 48] x, int64 trips) => (float[b, 24] z) {{
        yes = Constant<value = bool {{1}}>()
        first, last, y = Loop(trips, yes, w, v, x) <
            body = turn (int64 i, bool go, float[48, 48] n, float[48, 48] m, float[b, 48] before)
                => (bool still, float[48, 48] {CARRIED[case].replace(", ", ", float[48, 48] ")}, float[b, 48] after) {{
                still = Identity(go) p = Identity(n) q = Identity(p) a = MatMul(before, m) after = MatMul(a, n)
            }}
        >
        z = MatMul(y, u)
    }}"""
    w, v, u = (np.random.default_rng(seed).standard_normal((48, n)).astype(np.float32) / 7 for seed, n in enumerate((48, 48, 24)))
    x = np.random.default_rng(3).standard_normal((6, 48)).astype(np.float32)
    expected = x @ v @ w @ w @ w @ w @ w @ u  # three turns, of which the first has v in the second state
    magr_onnx.optimize(model(text, w=w, v=v, u=u), output=tmp_path / "out.onnx", bits=8)
    with Session(tmp_path / "out.onnx") as session:
        (result,) = session.run({"x": x, "trips": np.array(3)})
    assert np.abs(result - expected).max() < 0.05 * np.abs(expected).max()
