"""Error feedback: cutting the graph, statistics of both models, and the weights that are aimed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx import feedback
from magr_onnx.passes.linear import find
from magr_onnx.passes.segments import cut, plan, reads
from magr_onnx.ranges import rounded
from magr_onnx.runtime.calibrate import collect
from magr_onnx.runtime.data import open_data
from magr_onnx.runtime.session import Session
from magr_onnx.runtime.stages import Cache, staged
from magr_onnx.types import ActivationGrid, DynamicRange, LayerStats
from tests import graphs
from tests.graphs import Builder, random


def residual() -> ir.Model:
    """Two layers on one input, a sum, a layer on it, and a residual from the input around all of them."""
    b = Builder()
    x = b.input("x", ["batch", 48])
    left, right = (b.node("MatMul", [x, b.constant(f"w{i}", random(48, 48, seed=i))], f"branch_{i}") for i in (1, 2))
    inner = b.node("Tanh", [b.node("Add", [left, right], "sum")], "inner")
    down = b.node("MatMul", [inner, b.constant("w3", random(48, 48, seed=3))], "down")
    out = b.node("MatMul", [b.node("Add", [down, x], "around"), b.constant("w4", random(48, 16, seed=4))], "head")
    return b.model(out, ["batch", 16])


def batches(model: ir.Model, count: int = 8, rows: int = 64) -> list[dict[str, Any]]:
    return [graphs.feeds(model, rows, seed=s) for s in range(count)]


def test_stages_follow_the_graph() -> None:
    model = residual()
    layers, _ = find(model)
    steps = plan(model, layers)
    assert [[layer.name for layer in stage] for stage in steps.stages] == [["branch_1", "branch_2"], ["down"], ["head"]]
    assert steps.live == (("x",), ("x", "inner_out"), ("around_out",))


def test_segments_compute_what_the_model_does() -> None:
    """Running the segments one after the other gives every value of the whole model."""
    model = residual()
    layers, _ = find(model)
    feeds = batches(model, 1)[0]
    live: dict[str, Any] = dict(feeds)
    for wanted in plan(model, layers).live:
        names = [n for n in wanted if n not in live]
        if names:
            with Session(cut(model, live, names)) as session:
                inputs = [i.name for i in session.inputs]
                live |= dict(zip(names, session.run({n: live[n] for n in inputs}, names), strict=True))
        live = {n: live[n] for n in wanted}
    with Session(cut(model, live, ["y"])) as session, Session(model) as whole:
        found = session.run({n: live[n] for n in [i.name for i in session.inputs]})[0]
        np.testing.assert_allclose(found, whole.run(feeds)[0], rtol=1e-5, atol=1e-5)


def test_values_captured_by_subgraphs_are_read() -> None:
    inner = ir.node("Identity", [ir.val("outside")])
    body = ir.Graph([], inner.outputs, nodes=[inner], name="body")
    node = ir.node("If", [ir.val("condition")], {"then_branch": body, "else_branch": body})
    assert {"condition", "outside"} <= set(reads(node))


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["disk", "memory"])
def test_unquantized_prefix_gives_the_statistics_of_the_float_model(limit: int) -> None:
    """Nothing quantized: both inputs are the same, and all statistics those that taps gather in one pass."""
    model = residual()
    layers, _ = find(model)
    with Session(model) as session:
        data = open_data(batches(model), session.inputs)
    expected = collect(model, layers, data).stats
    seen = {}
    work = model.clone()
    for _, found in staged(model, work, find(work)[0], data, cache=limit):
        seen |= found.stats
    assert seen.keys() == expected.keys()
    for name, stats in seen.items():
        for matrix in (stats.gram, stats.cross, stats.float_gram):
            np.testing.assert_allclose(matrix, expected[name].gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats.target_mean, expected[name].mean, rtol=1e-4, atol=1e-4)
        assert stats.rows == expected[name].rows == 512
        assert stats.held_out is not None
        assert stats.held_out.rows == 128


def test_later_stages_see_the_quantized_model() -> None:
    model = residual()
    work = model.clone()
    layers, _ = find(work)
    with Session(model) as session:
        data = open_data(batches(model), session.inputs)
    for stage, found in staged(model, work, layers, data):
        for layer in stage:
            stats = found.stats[str(layer.x.name)]
            assert stats.cross is not None
            if layer.name.startswith("branch"):
                np.testing.assert_array_equal(stats.gram, stats.cross)
                layer.write(np.zeros_like(layer.read()), None)
            elif layer.name == "down":  # tanh(0)
                assert not stats.gram.any()
                assert stats.float_gram is not None
                assert stats.float_gram.any()


def test_masked_rows_are_left_out() -> None:
    model = graphs.masked()
    layers, _ = find(model)
    with Session(model) as session:
        data = open_data([graphs.feeds(model, seed=s) for s in range(4)], session.inputs)
    expected = collect(model, layers, data, mask="attention_mask")
    unmasked: tuple[str, ...] = ()
    work = model.clone()
    for _, found in staged(model, work, find(work)[0], data, mask="attention_mask"):
        unmasked += found.unmasked
        for name, stats in found.stats.items():
            assert stats.rows == expected.stats[name].rows
    assert unmasked == expected.unmasked


def test_cache_spills_and_forgets() -> None:
    with Cache(1000) as cache:
        arrays = [np.random.default_rng(i).standard_normal(100).astype(np.float32) for i in range(4)]
        for i, array in enumerate(arrays):
            cache.put("x", i, array)
        assert cache.spilled == 800
        for i, array in enumerate(arrays):
            np.testing.assert_array_equal(cache.get("x", i), array)
        cache.keep([])
        assert not cache.names(3)


def drifted(rows: int) -> tuple[Any, Any, LayerStats, LayerStats]:
    """Inputs, what a quantized prefix makes of them (a rotation, and noise), their statistics with a quarter held out, and fresh ones."""
    rng = np.random.default_rng(0)
    x = graphs.correlated(2 * rows, 32).astype(np.float64)
    y = x @ (np.eye(32) + 0.05 * rng.standard_normal((32, 32))) + 0.05 * rng.standard_normal(x.shape)

    def stats(begin: int, end: int, held: LayerStats | None = None) -> LayerStats:
        a, b, n = x[begin:end], y[begin:end], end - begin
        return LayerStats(b.T @ b / n, b.mean(0), n, a.mean(0), None, b.T @ a / n, a.T @ a / n, held)

    return x[:rows], y[:rows], stats(0, rows, stats(3 * rows // 4, rows)), stats(rows, 2 * rows)


@pytest.mark.parametrize("centred", [False, True])
def test_aim_undoes_what_the_prefix_did_on_fresh_rows(centred: bool) -> None:
    *_, stats, fresh = drifted(2000)
    weights = random(32, 24).astype(np.float32)
    found = feedback.aim(weights, stats, centred)
    assert found.damping is not None
    assert found.after < 0.2 * found.before
    assert feedback.error(found.weights, weights, fresh, centred) < 0.2 * feedback.error(weights, weights, fresh, centred)


def test_aim_is_the_weight_itself_where_nothing_changed() -> None:
    x = graphs.correlated(400, 16).astype(np.float64)
    gram, mean = x.T @ x / 400, x.mean(0)
    same = LayerStats(gram, mean, 400, mean, None, gram, gram)
    weights = random(16, 8).astype(np.float32)
    found = feedback.aim(weights, LayerStats(gram, mean, 800, mean, None, gram, gram, same), True)
    assert found.damping is None
    np.testing.assert_array_equal(found.weights, weights)


def test_error_is_that_of_the_rows() -> None:
    x, y, stats, _ = drifted(200)
    weights, quantized = random(32, 5), random(32, 5, seed=1)
    left = y @ quantized - x @ weights
    expected = np.square(left).sum() / np.square(x @ weights).sum()
    assert feedback.error(quantized, weights, stats, False) == pytest.approx(expected, rel=1e-6)
    left -= left.mean(axis=0)
    output = x @ weights
    expected = np.square(left).sum() / np.square(output - output.mean(axis=0)).sum()
    assert feedback.error(quantized, weights, stats, True) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", [ActivationGrid(0.05, 77), ActivationGrid(0.04, -20, True), DynamicRange(), DynamicRange(-1.0, 2.0)])
def test_rounding_is_onnxruntimes(activation: Any) -> None:
    """The values behind QuantizeLinear, or DynamicQuantizeLinear, and DequantizeLinear."""
    b = Builder()
    x = b.input("x", ["batch", 32])
    real = x
    if isinstance(activation, ActivationGrid):
        kind = np.int8 if activation.signed else np.uint8
        grid = [b.constant("s", np.float32(activation.scale)), b.constant("z", kind(activation.zero_point))]
        codes = b.node("QuantizeLinear", [x, *grid])
        codes.dtype = ir.DataType.INT8 if activation.signed else ir.DataType.UINT8
    else:
        if activation.clips:
            real = b.node("Clip", [x, b.constant("low", np.float32(activation.low)), b.constant("high", np.float32(activation.high))])
        node = ir.node("DynamicQuantizeLinear", [real], num_outputs=3)
        for value, name, dtype in zip(node.outputs, "csz", (ir.DataType.UINT8, graphs.FLOAT, ir.DataType.UINT8), strict=True):
            value.name, value.dtype = f"d{name}", dtype
        b.nodes.append(node)
        codes, *grid = node.outputs
    out = b.node("DequantizeLinear", [codes, *grid])
    out.dtype = graphs.FLOAT
    array = graphs.correlated(40, 32)
    with Session(b.model(out, ["batch", 32])) as session:
        np.testing.assert_allclose(rounded(array, activation), session.run({"x": array})[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["matmulnbits", "qdq-int8"])
def test_feedback_lowers_the_error_of_the_emitted_model(form: Any, tmp_path: Path) -> None:
    """Output error of the file on fresh rows, with feedback against without, at few bits where it matters."""
    model = residual()
    data, fresh = batches(model, 16), graphs.feeds(model, 400, seed=99)
    errors = []
    with Session(model) as session:
        expected = session.run(fresh)[0]
    for on in (False, True):
        out = tmp_path / f"{on}.onnx"
        report = magr_onnx.optimize(graphs.proto(model), data, output=out, format=form, bits=3, feedback=on).report
        assert ("error-feedback" in report.pipeline) == on
        assert report.verified == 4
        with Session(out) as session:
            errors.append(float(np.linalg.norm(session.run(fresh)[0] - expected)))
    assert errors[1] < errors[0]


def test_feedback_needs_data() -> None:
    with pytest.raises(magr_onnx.OptionError, match="needs calibration data"):
        magr_onnx.optimize(graphs.proto(residual()), feedback=True)
