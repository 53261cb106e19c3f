"""Convolutions and tables in the bodies of If, Loop and Scan: what is gathered in them, and what is written into them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.core.types import LayerStats
from magr_onnx.models.zoo import ZOO, Trap
from magr_onnx.models.zoo.branches import BIAS, OTHER, TRAPS, K, looped
from magr_onnx.models.zoo.convolutions import convolve, kernel, one, spread
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes import Plan
from magr_onnx.passes.graph.subgraphs import walk
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.layers.conv import OPS, find, to_matrices
from magr_onnx.runtime.calibration import conv_patches
from magr_onnx.runtime.calibration.subgraphs import NEVER
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import non_linear
from magr_onnx.workflow.converted import Converted
from magr_onnx.workflow.integer_convolutions import Rounding
from tests.helpers import run_context

Array = np.ndarray[Any, Any]
CONVOLUTIONS = [t for t in TRAPS if t.name.startswith("conv")]


def opened(proto: onnx.ModelProto, feeds: list[dict[str, Array]]) -> tuple[ir.Model, Batches]:
    found = ir.from_proto(proto)
    inline_and_rename(found)
    with Session(found) as session:
        return found, open_data(feeds, session.inputs)


def collected(proto: onnx.ModelProto, feeds: list[dict[str, Array]]) -> dict[str, list[LayerStats]]:
    found, data = opened(proto, feeds)
    layers = find(found)[0]
    assert conv_patches.unmeasured(found, layers, data, "cpu", conv_patches.PATCH_LIMIT) == {}
    return conv_patches.collect(found, layers, data)


def rows_of(x: Array, pad: int = 0) -> Array:
    """Patches of three places of ``x (n, C, length)``, as rows."""
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad)])
    return np.concatenate([x[:, :, at : at + 3].reshape(len(x), -1) for at in range(x.shape[2] - 2)]).astype(np.float64)


def agree(found: Sequence[LayerStats], rows: list[Array]) -> None:
    x = np.concatenate(rows)
    (stats,) = found
    assert stats.rows == len(x)
    np.testing.assert_allclose(stats.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_a_branch_counts_where_it_is_taken() -> None:
    trap, rng = ZOO["conv-in-both-branches"], np.random.default_rng(0)
    feeds = [trap.feeds(rng) for _ in range(9)]
    found = collected(trap.build(), feeds)
    agree(found["c"], [rows_of(np.maximum(f["x"], 0), 1) for f in feeds if f["c"]])
    agree(found["c_1"], [rows_of(np.tanh(f["x"]), 1) for f in feeds if not f["c"]])


def test_every_turn_of_a_loop_counts_with_its_own_length() -> None:
    trap, rng = ZOO["conv-in-a-loop-and-behind-it"], np.random.default_rng(0)
    feeds = [trap.feeds(rng) for _ in range(5)]
    found = collected(trap.build(), feeds)
    runs = [looped(f["x"], one(K.reshape(8, 24).T)) for f in feeds]
    agree(found["step"], [rows_of(x) for read, _, _ in runs for x in read])
    agree(found["after"], [rows_of(seen) for _, _, seen in runs])


def test_a_branch_in_a_scan_counts_at_the_steps_that_take_it() -> None:
    """``Y = P W``: the second moments of the outputs follow from those of the patches."""
    trap, rng = ZOO["conv-in-an-if-in-a-scan"], np.random.default_rng(0)
    feeds = [trap.feeds(rng) for _ in range(5)]
    found = collected(trap.build(), feeds)
    weights = {"up": to_matrices(kernel(4, 4, 3, 3), "ConvTranspose", 2), "flat": to_matrices(kernel(8, 2, 2, 2), "Conv", 2)}
    steps = [x for f in feeds for x in f["x"]]
    outputs = {
        "up": [spread(x, weights["up"], None, 3, 2, (0, 0)) for x in steps if x.sum() > 0],
        "flat": [convolve(x, weights["flat"], None, 1, 1, (0, 0)) for x in steps if x.sum() <= 0],
    }
    for name, made in outputs.items():
        y = np.concatenate([np.moveaxis(part, 1, -1).reshape(-1, 2, 4) for part in made]).astype(np.float64)
        w = weights[name].astype(np.float64)
        gram, mean = (np.stack([getattr(stats, figure) for stats in found[name]]) for figure in ("gram", "mean"))
        assert {stats.rows for stats in found[name]} == {len(y)}
        assert len(y) > 0
        np.testing.assert_allclose(
            np.einsum("gkm,gkl,gln->gmn", w, gram, w), np.einsum("ngm,ngl->gml", y, y) / len(y), rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(np.einsum("gkm,gk->gm", w, mean), y.mean(axis=0), rtol=1e-3, atol=1e-4)


def test_a_value_from_outside_counts_in_every_graph_as_often_as_it_is_read_there() -> None:
    text = """g (float[n, 8, 16] x, bool c) => (float[n, 8, 14] y) {
        [main] p = Conv(x, k)
        q = If(c) <
            then_branch = yes () => (float[n, 8, 14] a) { [yes] a = Conv(x, v) },
            else_branch = no () => (float[n, 8, 14] d) { [no] d = Conv(x, u) }
        >
        y = Add(p, q)
    }"""
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, 8, 16)).astype(np.float32), "c": np.array(i % 3 == 0)} for i in range(9)]
    found = collected(model(text, k=K, v=OTHER, u=kernel(8, 8, 3)[::-1].copy()), feeds)
    agree(found["main"], [rows_of(f["x"]) for f in feeds])
    agree(found["yes"], [rows_of(f["x"]) for f in feeds if f["c"]])
    agree(found["no"], [rows_of(f["x"]) for f in feeds if not f["c"]])


def test_convolutions_that_no_data_reaches_say_so(tmp_path: Path) -> None:
    trap, rng = ZOO["conv-in-both-branches"], np.random.default_rng(0)
    data = [{**trap.feeds(rng), "c": np.array(True)} for _ in range(5)]
    rows = {row.name: row for row in magr_onnx.optimize(trap.build(), data, conv_bits=4, output=tmp_path / "q.onnx").report.layers}
    assert rows["c"].rows == 5 * 4 * 16
    assert not any("data-free" in note for note in rows["c"].notes)
    assert rows["c_1"].rows == 0
    assert f"data-free: {NEVER}" in rows["c_1"].notes


def test_patches_in_a_body_have_a_limit_too() -> None:
    """That of the longest turn: 14 positions behind three ones, and 24 x 3 values of one-hot kernels."""
    trap, rng = ZOO["conv-in-a-loop-and-behind-it"], np.random.default_rng(0)
    found, data = opened(trap.build(), [trap.feeds(rng) for _ in range(3)])
    layers = find(found)[0]
    size = 4 * (24 * 8 + 8 * 9)
    assert conv_patches.unmeasured(found, layers, data, "cpu", size) == {}
    assert set(conv_patches.unmeasured(found, layers, data, "cpu", size - 1)) == {"step"}
    plan = Plan.parse("quantize{method=comq},compensate-bias,emit-qdq,convolutions")
    result = Converted()
    non_linear.convert_convolutions(result, found, found.clone(), plan, data, Rounding(), run_context(), patch_limit=size - 1)
    assert {row.name: row.rows > 0 for row in result.rows} == {"step": False, "after": True}


def test_convolutions_that_cannot_be_brought_out_of_their_body_are_data_free() -> None:
    """Up to opset 8 a Scan had a batch axis of its own: the converter changes what the model takes."""
    proto = model(
        """g (float[2, t, 3, 8, 16] x, float[n, 8, 16] z) => (float[2, t, 3, 8, 14] y, float[n, 8, 14] w) {
            y = Scan(x) <num_scan_inputs = 1, body = turn (float[3, 8, 16] now) => (float[3, 8, 14] a) { [in] a = Conv(now, k) }>
            [out] w = Conv(z, k)
        }""",
        opset=8,
        ir_version=4,
        k=K,
    )
    proto.graph.node[0].input.insert(0, "")
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((2, 4, 3, 8, 16)).astype(np.float32), "z": rng.standard_normal((2, 8, 16)).astype(np.float32)}
    made, report = magr_onnx.optimize(proto, [feeds] * 4, quantizer="comq")
    assert all(any(note.startswith("data-free: its patches cannot be gathered") for note in row.notes) for row in report.layers)
    assert len(report.layers) == 2
    with Session(made) as session, Session(ir.from_proto(proto)) as floats:
        for ours, original in zip(session.run(feeds), floats.run(feeds), strict=True):
            np.testing.assert_allclose(ours, original, atol=0.05)


def test_opsets_before_that_of_scan_are_raised_in_a_copy() -> None:
    text = """g (float[n, 8, 16] x, bool c) => (float[n, 8, 14] y) {
        y = If(c) <
            then_branch = yes () => (float[n, 8, 14] a) { [c] a = Conv(x, k) },
            else_branch = no () => (float[n, 8, 14] d) { t = Tanh(x)  [d] d = Conv(t, v) }
        >
    }"""
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((2, 8, 16)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(6)]
    made, report = magr_onnx.optimize(model(text, opset=7, ir_version=4, k=K, v=OTHER), data)
    assert [row.rows for row in report.layers] == [3 * 2 * 14] * 2
    assert made.opset_imports[""] == 7


FORMATS: dict[str, dict[str, Any]] = {
    "static": {"format": "qdq-int8"},
    "dynamic": {"format": "dynamic-int8"},
    "qdq": {"format": "qdq"},
    "best": {"effort": "best"},
    "4 bits, asymmetric": {"conv_bits": 4, "symmetric": False},
}


@pytest.mark.parametrize("kind", [kind if kind in ("static", "best") else pytest.param(kind, marks=pytest.mark.slow) for kind in FORMATS])
@pytest.mark.parametrize("trap", CONVOLUTIONS, ids=lambda t: t.name)
def test_every_format_is_valid_and_close(trap: Trap, kind: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "q.onnx"
    report = magr_onnx.optimize(trap.build(), [trap.feeds(rng) for _ in range(12)], output=path, **FORMATS[kind]).report
    assert report.verified == len(report.layers) > 0
    rounded = any(note.startswith("rounded to nearest") for note in report.notes)
    assert all(row.rows > 0 for row in report.layers) != rounded
    onnx.checker.check_model(str(path), full_check=True)
    with Session(path) as session, Session(ir.from_proto(trap.build())) as floats:
        for _ in range(3):
            feeds = trap.feeds(rng)
            for ours, original in zip(session.run(feeds), floats.run(feeds), strict=True):
                assert np.linalg.norm(ours - original) <= (0.2 if "4" in kind else 0.05 if kind == "static" else 0.03) * np.linalg.norm(
                    original
                )


def test_calibration_in_bodies_beats_rounding() -> None:
    trap, rng = ZOO["conv-in-both-branches"], np.random.default_rng(0)

    def samples(count: int) -> list[dict[str, Array]]:
        """Channels that are alike."""
        mix = constant("mix", 3, 8)
        fed = [trap.feeds(rng) for _ in range(count)]
        return [{**f, "x": np.einsum("nct,cd->ndt", f["x"][:, :3], mix)} for f in fed]

    data, held = samples(24), samples(24)
    errors = []
    for given in (None, data):
        made, _ = magr_onnx.optimize(trap.build(), given, conv_bits=3)
        with Session(made) as session, Session(ir.from_proto(trap.build())) as floats:
            errors.append(np.mean([np.linalg.norm(session.run(f)[0] - floats.run(f)[0]) for f in held]))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("form", ["fold", "dequantize"])
def test_a_weight_that_several_graphs_read_is_stored_once(form: str) -> None:
    trap, rng = ZOO[f"conv-weight-shared-by-branches-{form}"], np.random.default_rng(0)
    made, report = magr_onnx.optimize(trap.build(), [trap.feeds(rng) for _ in range(6)], **trap.options)
    assert "k" not in made.graph.initializers
    codes = [v for v in made.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert [tuple(v.shape.numpy()) for v in codes] == [(8, 8, 3)]
    assert len({node.inputs[1] for node, _ in walk(made.graph) if node.op_type in OPS}) == 1
    assert all(any("one weight for 3 convolutions" in note for note in row.notes) for row in report.layers)


@pytest.mark.parametrize("name", ["conv-of-constants-in-branches", "conv-weight-shared-by-branches-fold"])
def test_folded_weights_are_constants_at_run_time(name: str, tmp_path: Path) -> None:
    magr_onnx.optimize(ZOO[name].build(), output=tmp_path / "q.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(tmp_path / "q.onnx", options, providers=["CPUExecutionProvider"])
    after = [node.op_type for node, _ in walk(ir.load(tmp_path / "optimized.onnx").graph)]
    assert sum(op in ("Conv", "FusedConv") for op in after) == (2 if "constants" in name else 3)
    assert not {"Cast", "Mul"} & set(after)


def test_floats_that_bodies_held_are_gone() -> None:
    made, _ = magr_onnx.optimize(ZOO["conv-of-constants-in-branches"].build())
    held = [v for graph in (made.graph, *made.graph.subgraphs()) for v in graph.initializers.values()]
    nodes = [node for node, _ in walk(made.graph) if node.op_type == "Constant"]
    assert [v.name for v in held if v.dtype == ir.DataType.FLOAT and v.const_value.size > 8] == []
    assert [list(node.outputs[0].shape or ()) for node in nodes if node.outputs[0].name == "held"] == []


def test_patterns_and_inspection_reach_into_bodies() -> None:
    proto = ZOO["conv-of-constants-in-branches"].build()
    report = magr_onnx.optimize(proto, include=["other"]).report
    assert [row.name for row in report.layers] == ["other"]
    assert [(row.name, row.reason) for row in report.skipped] == [("c", "not among the layers to include")]
    for trap in CONVOLUTIONS:
        found = magr_onnx.inspect(trap.build())
        assert {row["name"] for row in found.layers} | {row.name for row in found.skipped} == set(trap.layers)


def test_a_model_too_large_to_run_is_data_free_in_its_bodies(tmp_path: Path) -> None:
    trap, rng = ZOO["conv-in-both-branches"], np.random.default_rng(0)
    onnx.save(trap.build(), tmp_path / "in.onnx")
    data = [trap.feeds(rng) for _ in range(4)]
    report = magr_onnx.optimize(tmp_path / "in.onnx", data, output=tmp_path / "q.onnx", max_memory=1000).report
    assert [row.rows for row in report.layers] == [0, 0]
    assert any("convolutions are data-free" in note for note in report.notes)


def test_linear_layers_and_budgets_beside_convolutions_in_bodies(tmp_path: Path) -> None:
    text = """g (float[n, 8, 16] x, bool c) => (float[n, 24] y) {
        h = If(c) <
            then_branch = yes () => (float[n, 32] a) {
                [conv] f = Conv<pads = [1, 1]>(x, k, b)
                p = GlobalAveragePool(f)
                m = Flatten(p)
                [inner] a = MatMul(m, w)
            },
            else_branch = no () => (float[n, 32] d) { [flat] f = Conv(x, whole)  d = Flatten(f) }
        >
        [outer] y = MatMul(h, v)
    }"""
    proto = model(text, k=K, b=BIAS, whole=kernel(32, 8, 16), w=constant("w", 8, 32), v=constant("v", 32, 24))
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((6, 8, 16)).astype(np.float32), "c": np.array(i % 2 == 0)} for i in range(8)]
    for options in ({"bits": 4, "block_size": 16}, {"target_size": "46%"}, {"format": "qdq-int8"}):
        report = magr_onnx.optimize(proto, data, output=tmp_path / "q.onnx", **options).report
        assert {row.name for row in report.layers} >= {"conv", "flat", "outer"}  # a budget may find `inner` too small to gain
        assert all(row.rows for row in report.layers)
        with Session(tmp_path / "q.onnx") as session, Session(ir.from_proto(proto)) as floats:
            for feeds in data[:2]:
                ours, original = session.run(feeds)[0], floats.run(feeds)[0]
                assert np.linalg.norm(ours - original) <= 0.15 * np.linalg.norm(original)


def test_numbers_that_are_none_in_a_body_are_named() -> None:
    trap, rng = ZOO["conv-in-both-branches"], np.random.default_rng(0)
    data = [{**trap.feeds(rng), "c": np.array(True)} for _ in range(3)]
    data[1]["x"][0, 0, 0] = 1e30  # its square is more than a float32 holds
    with pytest.raises(magr_onnx.errors.NonFiniteError, match=r"input of c .*NaN or infinite"):
        magr_onnx.optimize(trap.build(), data)


@pytest.mark.parametrize("form", ["gather-block-quantized", "dequantize"])
def test_tables_in_branches_share_their_codes(form: str) -> None:
    trap = ZOO[f"table-in-both-branches-{form}"]
    made, _ = magr_onnx.optimize(trap.build(), **trap.options)
    assert "table" not in made.graph.initializers
    codes = [v for v in made.graph.initializers.values() if v.dtype in (ir.DataType.INT8, ir.DataType.UINT8) and v.shape[1] == 64]
    assert len(codes) == 1
    names = [node.name for node, _ in walk(made.graph) if node.name]
    assert len(names) == len(set(names))
