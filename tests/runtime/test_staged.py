"""Error feedback: cutting the graph, statistics of both models, and the weights that are aimed at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core import error_feedback
from magr_onnx.core.activation_ranges import rounded
from magr_onnx.core.types import ActivationGrid, DynamicRange, LayerStats, TargetMoments
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.instrument.segments import cut, reads, segments_of
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import staged as stages
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.moments import collect
from magr_onnx.runtime.calibration.staged import Schedule, staged
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Builder, random
from tests.helpers import target_error


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
    steps = segments_of(model, layers)
    assert [[layer.name for layer in stage] for stage in steps.stages] == [["branch_1", "branch_2"], ["down"], ["head"]]
    assert steps.live == (("x",), ("x", "inner_out"), ("around_out",))


def test_segments_compute_what_the_model_does() -> None:
    """Running the segments one after the other gives every value of the whole model."""
    model = residual()
    layers, _ = find(model)
    feeds = batches(model, 1)[0]
    live: dict[str, Any] = dict(feeds)
    for wanted in segments_of(model, layers).live:
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


@pytest.mark.parametrize("folds", [1, 4])
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["disk", "memory"])
def test_unquantized_prefix_gives_the_statistics_of_the_float_model(limit: int, folds: int) -> None:
    """Nothing quantized: both inputs are the same, the target is what the layer computes, and moments are those taps gather in one pass."""
    model = residual()
    layers, _ = find(model)
    with Session(model) as session:
        data = open_data(batches(model), session.inputs)
    expected = collect(model, layers, CalibrationContext(data, hold_out=HoldOut(folds))).stats
    seen, goals = {}, {}
    work = model.clone()
    context = CalibrationContext(data, hold_out=HoldOut(folds))
    for _, found in staged(model, work, find(work)[0], context, Schedule(cache=limit)):
        seen |= found.stats
        goals |= found.targets
    assert seen.keys() == expected.keys()
    for name, stats in seen.items():
        np.testing.assert_allclose(stats.gram, expected[name].gram, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats.target_mean, expected[name].mean, rtol=1e-4, atol=1e-4)
        assert stats.rows == expected[name].rows == 512
        assert [fold.rows for fold in stats.folds] == [128] * folds
        for fold, same in zip(stats.folds, expected[name].folds, strict=True):
            assert same.rows == 128
            np.testing.assert_allclose(fold.gram, same.gram, rtol=1e-4, atol=1e-4)
    assert goals.keys() == {"down", "head"}  # the first layers read the same in both models
    for layer in layers[2:]:
        stats, weights = seen[str(layer.x.name)], layer.read()
        np.testing.assert_allclose(goals[layer.name].cross, stats.gram @ weights, rtol=1e-3, atol=1e-3)
        assert target_error(weights, stats, goals[layer.name], False) < 1e-5


def test_later_stages_see_the_quantized_model() -> None:
    model = residual()
    work = model.clone()
    layers, _ = find(work)
    with Session(model) as session:
        data = open_data(batches(model), session.inputs)
    for stage, found in staged(model, work, layers, CalibrationContext(data)):
        for layer in stage:
            stats = found.stats[str(layer.x.name)]
            if layer.name.startswith("branch"):
                assert layer.name not in found.targets
                layer.write(np.zeros_like(layer.read()), None)
            elif layer.name == "down":  # tanh(0)
                assert not stats.gram.any()
                assert not found.targets["down"].cross.any()
                assert found.targets["down"].power.all()


def block(residuals: bool = True) -> ir.Model:
    """Two layers of a transformer's kind: each reads a function of a running sum, and its output is added to that sum."""
    b = Builder()
    total = b.input("x", ["batch", "time", 32])
    mask = b.input("attention_mask", ["batch", "time"], ir.DataType.INT64)
    for i in range(3):
        hidden = b.node("Tanh", [total], f"read_{i}")
        product = b.node("MatMul", [hidden, b.constant(f"w{i}", random(32, 32, seed=i))], f"layer_{i}")
        out = b.node("Add", [product, b.constant(f"b{i}", random(32, seed=i + 10))], f"bias_{i}")
        total = b.node("Add", [total, out] if i % 2 else [out, total], f"sum_{i}") if residuals else out
    total.name, total.shape = "y", ir.Shape(["batch", "time", 32])
    flags = b.node("Identity", [mask], "keep")
    flags.name, flags.shape, flags.dtype = "mask_out", ir.Shape(["batch", "time"]), ir.DataType.INT64
    return b.model_of([total, flags])


def values(model: ir.Model, data: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Real values inside a model, a dictionary a batch."""
    given = {str(v.name): data[0][str(v.name)] for v in model.graph.inputs}
    with Session(cut(model, given, names)) as session:
        inputs = [i.name for i in session.inputs]
        return [dict(zip(names, session.run({n: feeds[n] for n in inputs}, names), strict=True)) for feeds in data]


@pytest.mark.parametrize("mask", [None, "attention_mask"])
@pytest.mark.parametrize("residuals", [True, False])
@pytest.mark.parametrize("folds", [1, 4])
def test_targets_are_the_moments_of_the_two_models_values(residuals: bool, mask: str | None, folds: int) -> None:
    """``X_q^T Y``, ``mean Y`` and ``mean Y^2`` in NumPy, ``Y = X W0 + R - R_q`` of values onnxruntime computes in either model."""
    model = block(residuals)
    work = model.clone()
    layers, _ = find(work)
    data = [graphs.feeds(model, 20, 7, seed=s) for s in range(6)]
    with Session(model) as session:
        source = open_data(data, session.inputs)
    seen = 0
    for (layer,), found in staged(model, work, layers, CalibrationContext(source, mask, hold_out=HoldOut(folds))):
        weights, i = layer.read(), layer.name[-1]
        if layer.name != "layer_0":
            before = f"sum_{int(i) - 1}_out"
            names = [f"read_{i}_out", *([before] if residuals else [])]
            real, wrong = values(model, data, names), values(work, data, names)
            x, q, y = [], [], []
            for floats, quants, feeds in zip(real, wrong, data, strict=True):
                keep = feeds["attention_mask"].astype(bool) if mask else np.ones((20, 7), bool)
                a, b = (v[names[0]][keep].astype(np.float64) for v in (floats, quants))
                x.append(a)
                q.append(b)
                missing = (floats[before].astype(np.float64) - quants[before])[keep] if residuals else 0.0
                y.append(a @ weights + missing)
            whole, targets = found.stats[layer.x.name], found.targets[layer.name]
            held_out = [[3], [2], [1, 5], [0, 4]][:folds]
            assert len(whole.folds) == len(targets.folds) == folds
            for part, stats, goal in zip((range(6), *held_out), (whole, *whole.folds), (targets, *targets.folds), strict=True):
                inputs, should = (np.concatenate([s[b] for b in part]) for s in (q, y))
                n = len(inputs)
                assert stats.rows == goal.rows == n
                np.testing.assert_allclose(stats.gram, inputs.T @ inputs / n, rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(goal.cross, inputs.T @ should / n, rtol=1e-3, atol=1e-3)
                np.testing.assert_allclose(goal.mean, should.mean(axis=0), rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(goal.power, np.square(should).mean(axis=0), rtol=1e-3, atol=1e-4)
            seen += 1
        layer.write(np.round(weights * 4) / 4, layer.read_bias())  # spoil it for those behind
    assert seen == 2


@pytest.mark.parametrize("op", ["RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"])
def test_what_is_random_is_drawn_once(op: str) -> None:
    """Two equal layers of different stages read the same drawn values: what is made of their statistics is the same, to the last bit."""
    b = Builder()
    x, zero = b.input("x", ["batch", 48]), b.constant("zero", np.float32(0))
    early = b.node("Mul", [x, zero])  # onnxruntime seeds a generator by the place of its node
    shape = [64, 48]
    if op in ("RandomNormal", "RandomUniform"):
        drawn = b.node(op, [], "draw", shape=shape)
    elif op == "Multinomial":
        whole = b.node(op, [b.constant("odds", np.log(np.abs(random(64, 5)) + 0.1))], "draw", sample_size=48)
        whole.dtype = ir.DataType.INT32
        drawn = b.node("Cast", [whole], "float", to=ir.DataType.FLOAT)
        drawn.dtype = ir.DataType.FLOAT
    else:
        drawn = b.node(op, [b.constant("odds", np.full(shape, 0.5, np.float32))], "draw")
    first = b.node("MatMul", [b.node("Add", [drawn, early]), b.constant("w1", random(48, 48))], "first")
    late = b.node("Mul", [first, zero])
    second = b.node("MatMul", [b.node("Add", [drawn, late]), b.constant("w2", random(48, 48))], "second")
    model = b.model(b.node("Add", [second, x]), ["batch", 48])
    data = [graphs.feeds(model, 64, seed=s) for s in range(2)]
    made, report = magr_onnx.optimize(model, data, effort="fast", bias="any", max_memory="1kB")
    assert [layer.bias_compensated for layer in report.layers] == [True, True]
    constants = {name: v.const_value.numpy() for name, v in made.graph.initializers.items() if v.const_value is not None}
    for name in (n for n in constants if n.startswith("w1")):
        np.testing.assert_array_equal(constants[name], constants[name.replace("w1", "w2")])
    assert np.ptp(constants["w1_bias"]) > 0


def test_masked_rows_are_left_out() -> None:
    model = graphs.masked()
    layers, _ = find(model)
    with Session(model) as session:
        data = open_data([graphs.feeds(model, seed=s) for s in range(4)], session.inputs)
    expected = collect(model, layers, CalibrationContext(data, "attention_mask"))
    unmasked: tuple[str, ...] = ()
    work = model.clone()
    for _, found in staged(model, work, find(work)[0], CalibrationContext(data, "attention_mask")):
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


def test_cache_keeps_values_apart_after_some_were_dropped() -> None:
    with Cache(0) as cache:
        arrays = {name: np.full(3, i, np.float32) for i, name in enumerate("abcd")}
        for name in "ab":
            cache.put(name, 0, arrays[name])
        cache.keep(["b"])
        for name in "cd":
            cache.put(name, 0, arrays[name])
        cache.keep(["b", "c"])
        cache.put("a", 0, arrays["a"])
        for name in "abc":
            np.testing.assert_array_equal(cache.get(name, 0), arrays[name])


def drifted(rows: int, folds: int = 1) -> tuple[Any, Any, LayerStats, LayerStats, Any]:
    """Inputs, what a quantized prefix makes of them (a rotation, and noise), their statistics with quarters held out, fresh ones,
    and what turns weights and a part of the rows into target moments."""
    rng = np.random.default_rng(0)
    x = graphs.correlated(2 * rows, 32).astype(np.float64)
    y = x @ (np.eye(32) + 0.05 * rng.standard_normal((32, 32))) + 0.05 * rng.standard_normal(x.shape)

    def stats(begin: int, end: int) -> LayerStats:
        a, b, n = x[begin:end], y[begin:end], end - begin
        return LayerStats(b.T @ b / n, b.mean(0), n, a.mean(0))

    def target(weights: Any, begin: int, end: int) -> TargetMoments:
        a, b, n = x[begin:end], y[begin:end], end - begin
        return error_feedback.target_moments(weights, b.T @ a / n, a.T @ a / n, a.mean(0), n)

    in_folds = tuple(stats(*ends) for ends in quarters(rows, folds))
    return x[:rows], y[:rows], replace(stats(0, rows), folds=in_folds), stats(rows, 2 * rows), target


def quarters(rows: int, folds: int) -> list[tuple[int, int]]:
    """The last ``folds`` quarters of the rows."""
    return [(at * rows // 4, (at + 1) * rows // 4) for at in range(4 - folds, 4)]


def test_target_moments_are_the_moments_of_the_float_output() -> None:
    x, y, _, _, goal = drifted(200)
    weights = random(32, 5)
    found, out = goal(weights, 0, 200), x @ weights
    np.testing.assert_allclose(found.cross, y.T @ out / 200, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.mean, out.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.power, np.square(out).mean(axis=0), rtol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("folds", [1, 4])
def test_targets_undo_what_the_prefix_did_on_fresh_rows(centred: bool, folds: int) -> None:
    *_, stats, fresh, target = drifted(2000, folds)
    weights = random(32, 24).astype(np.float32)
    moments = replace(target(weights, 0, 2000), folds=tuple(target(weights, *ends) for ends in quarters(2000, folds)))
    found = error_feedback.solve_target(weights, stats, moments, centred)
    assert found.damping is not None
    assert found.after < 0.2 * found.before
    after = target(weights, 2000, 4000)
    before = target_error(weights, fresh, after, centred)
    assert target_error(found.weights, fresh, after, centred) < 0.2 * before
    assert len(found.fits) == folds
    for fit in found.fits:  # each from three quarters of the rows
        assert target_error(fit, fresh, after, centred) < 0.2 * before
        assert not np.array_equal(fit, found.weights)


@pytest.mark.parametrize("folds", [1, 4])
def test_the_errors_of_targets_are_those_of_the_rows_held_out(folds: int) -> None:
    """Least squares on the rows outside a fold, damped, and the squared errors of the rows inside, summed over all folds."""
    x, y, stats, _, target = drifted(80, folds)
    weights = random(32, 6).astype(np.float32)
    moments = replace(target(weights, 0, 80), folds=tuple(target(weights, *ends) for ends in quarters(80, folds)))
    found = error_feedback.solve_target(weights, stats, moments, False)
    assert found.damping is not None
    wanted, power, errors = x @ weights.astype(np.float64), 0.0, dict.fromkeys((None, *error_feedback.DAMPINGS), 0.0)
    solved: dict[float | None, list[Any]] = {damping: [] for damping in errors}
    for begin, end in quarters(80, folds):
        rest = np.r_[0:begin, end:80]
        power += np.square(wanted[begin:end]).sum()
        gram = y[rest].T @ y[rest] / len(rest) + 4 / len(rest) * np.median(np.square(y[rest]).mean(axis=0)) * np.eye(32)
        for damping in errors:
            step = np.zeros_like(weights, np.float64)
            if damping is not None:
                residual = y[rest].T @ (wanted[rest] - y[rest] @ weights) / len(rest)
                step = np.linalg.inv(gram + damping * np.diag(gram.diagonal())) @ residual
            solved[damping].append(weights + step)
            errors[damping] += np.square((y @ (weights + step) - wanted)[begin:end]).sum()
    best = min(errors, key=lambda damping: errors[damping])
    assert found.damping == pytest.approx(best * 60 / 80)  # of all rows, a quarter less
    assert (found.before, found.after) == pytest.approx((errors[None] / power, errors[best] / power), rel=1e-6)
    for fit, expected in zip(found.fits, solved[best], strict=True):
        np.testing.assert_allclose(fit, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("folds", [1, 2])
def test_the_target_is_the_weight_itself_where_nothing_changed(folds: int) -> None:
    x = graphs.correlated(400, 16).astype(np.float64)
    gram, mean = x.T @ x / 400, x.mean(0)
    same = LayerStats(gram, mean, 400, mean)
    weights = random(16, 8).astype(np.float32)
    part = error_feedback.target_moments(weights, gram, gram, mean, 400)
    whole = replace(error_feedback.target_moments(weights, gram, gram, mean, 800), folds=(part,) * folds)
    found = error_feedback.solve_target(weights, LayerStats(gram, mean, 800, mean, folds=(same,) * folds), whole, True)
    for solution in (found.weights, *found.fits):
        np.testing.assert_allclose(solution, weights, rtol=1e-6)


@pytest.mark.parametrize("folds", [1, 3])
def test_the_target_is_the_weight_where_nothing_helps_on_held_out_rows(folds: int) -> None:
    """Few rows, and noise that is new in every third of them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 32))
    q = np.concatenate([x[:40] + rng.standard_normal((40, 32)), x[40:]])
    if folds == 3:  # what every part calls for is the opposite of what the others do
        q = x + x @ np.kron(np.diag([1.0, -1.0]), np.eye(16)) * 0.3 * np.repeat([1.0, -1.0, 0.0], 20)[:, None]
    weights = random(32, 8)

    def part(rows: slice) -> tuple[LayerStats, TargetMoments]:
        a, b = x[rows], q[rows]
        n = len(a)
        return LayerStats(b.T @ b / n, b.mean(0), n, a.mean(0)), error_feedback.target_moments(
            weights, b.T @ a / n, a.T @ a / n, a.mean(0), n
        )

    stats, target = part(slice(60))
    parts = [part(slice(20 * at, 20 * at + 20)) for at in range(3)][3 - folds :]
    stats, target = replace(stats, folds=tuple(s for s, _ in parts)), replace(target, folds=tuple(t for _, t in parts))
    found = error_feedback.solve_target(weights, stats, target, False)
    assert found.damping is None
    assert found.after == found.before
    assert len(found.fits) == folds
    for solution in (found.weights, *found.fits):
        np.testing.assert_array_equal(solution, weights)


def test_error_is_that_of_the_rows() -> None:
    x, y, stats, _, goal = drifted(200)
    weights, quantized = random(32, 5), random(32, 5, seed=1)
    left = y @ quantized - x @ weights
    expected = np.square(left).sum() / np.square(x @ weights).sum()
    assert target_error(quantized, stats, goal(weights, 0, 200), False) == pytest.approx(expected, rel=1e-6)
    left -= left.mean(axis=0)
    expected = np.square(left).sum() / np.square(x @ weights).sum()
    assert target_error(quantized, stats, goal(weights, 0, 200), True) == pytest.approx(expected, rel=1e-6)


def test_statistics_and_goals_combine_and_part() -> None:
    """Of rows a and b, the whole; of the whole without b, a."""
    x, y, _, _, goal = drifted(300)
    weights = random(32, 5)

    def stats(begin: int, end: int) -> LayerStats:
        part = y[begin:end]
        return LayerStats(part.T @ part / len(part), part.mean(0), len(part), x[begin:end].mean(0))

    for whole, a, b, names in (
        (stats(0, 300), stats(0, 200), stats(200, 300), ("gram", "mean", "float_mean", "rows")),
        (goal(weights, 0, 300), goal(weights, 0, 200), goal(weights, 200, 300), ("cross", "mean", "power", "rows")),
    ):
        for name in names:
            np.testing.assert_allclose(getattr(a.combine(b), name), getattr(whole, name), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(getattr(whole.combine(b, -1), name), getattr(a, name), rtol=1e-9, atol=1e-9)


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
    """Output error of the file on fresh rows, with feedback against without, of layers that add to what carries an error already."""
    model = block()
    data, fresh = [graphs.feeds(model, 8, 8, seed=s) for s in range(16)], graphs.feeds(model, 50, 8, seed=99)
    errors = []
    with Session(model) as session:
        expected = session.run(fresh)[0]
    for on in (False, True):
        out, options = tmp_path / f"{on}.onnx", {"format": form, "bits": 3, "quantizer": "comq", "feedback": on, "mask": None}
        report = magr_onnx.optimize(graphs.proto(model), data, output=out, **options).report
        assert ("error-feedback" in report.pipeline) == on
        assert report.verified == 3
        with Session(out) as session:
            errors.append(float(np.linalg.norm(session.run(fresh)[0] - expected)))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(("bits", "effort", "mean"), [(3, "balanced", 0), (8, "balanced", 0), (3, "balanced", 2), (3, "fast", 2)])
def test_the_reported_error_is_that_of_the_emitted_layers(bits: int, effort: Any, mean: float) -> None:
    """Of a chain, where the last layer's output is the model's; at 8 bits little must be left of a difference of large numbers.

    Relative to what varies in the output: a mean, however large, makes no error look small. ``error`` is of rows held out, so about
    that of fresh ones, and ``fitted_error`` of the calibration data.
    """
    b = Builder()
    x = b.input("x", ["batch", 64])
    inner = b.node("Tanh", [b.node("MatMul", [x, b.constant("w1", random(64, 64, scale=0.05))], "first")], "inner")
    inner = b.node("Add", [inner, b.constant("mean", np.full(64, mean, np.float32))], "lifted")
    model = b.model(b.node("MatMul", [inner, b.constant("w2", random(64, 32, seed=1))], "second"), ["batch", 32])
    data = batches(model, 8, 256)
    made, report = magr_onnx.optimize(
        model, data, bits=bits, effort=effort, exclude=["first"] if effort == "fast" else [], validation_data=data
    )
    fresh = [graphs.feeds(model, 256, seed=100 + s) for s in range(8)]
    relative = []
    with Session(model) as before, Session(made) as after:
        for source in (data, fresh):
            expected, found = (np.concatenate([session.run(feeds)[0] for feeds in source]) for session in (before, after))
            relative.append(np.sqrt(np.square(found - expected, dtype=np.float64).mean(axis=0).sum() / expected.var(axis=0).sum()))
    row = report.layers[-1]
    assert (row.feedback is not None) == (effort == "balanced")
    assert row.fitted_error == pytest.approx(relative[0], rel=0.05)
    assert row.estimate == pytest.approx(relative[1], rel=0.15)  # of the layer solved from three quarters of the rows


def test_mending_the_residual_makes_the_sum_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the running sum on fresh rows, with targets that mend what is wrong beside the layer, and with those that do not."""
    model = block()
    data, fresh = [graphs.feeds(model, 64, 7, seed=s) for s in range(12)], graphs.feeds(model, 200, 7, seed=99)
    errors = []
    with Session(model) as session:
        expected = session.run(fresh)[0]
    for mended in (False, True):
        with monkeypatch.context() as patch:
            if not mended:
                patch.setattr(stages, "residual_operand", lambda layer: None)
            made, report = magr_onnx.optimize(model, data, bits=2, mask=None)
        assert report.verified == 3
        with Session(made) as session:
            errors.append(float(np.linalg.norm(session.run(fresh)[0] - expected)))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, "no error feedback and no comparison with solutions without data"),
        ({"quantizer": "comq", "feedback": True}, "no error feedback and no comparison with solutions without data;"),
        ({"quantizer": "comq", "feedback": True, "format": "qdq-int8", "target": "x86-avx2"}, "no error feedback and no comparison"),
        ({"quantizer": "auto"}, "no comparison with solutions without data;"),
        ({"effort": "fast"}, "no comparison with solutions without data;"),
        ({"effort": "fast", "format": "qdq-int8", "target": "x86-avx2"}, "no comparison with solutions without data;"),
    ],
)
def test_too_few_batches_are_said(options: Any, missing: str) -> None:
    model = residual()
    for count in (3, 4):
        report = magr_onnx.optimize(model, batches(model, count), **options).report
        notes = [note for note in report.notes if "calibration batches are too few" in note]
        assert len(notes) == (count == 3)
        assert all(note.startswith("3 calibration batches") and missing in note for note in notes)


def test_feedback_needs_data() -> None:
    with pytest.raises(magr_onnx.OptionError, match="needs calibration data"):
        magr_onnx.optimize(graphs.proto(residual()), feedback=True)
    with pytest.raises(magr_onnx.OptionError, match="take effort fast"):
        magr_onnx.optimize(graphs.proto(residual()), effort="balanced")


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_memory_for_values_between_stages_changes_nothing(effort: Any, tmp_path: Path) -> None:
    """The file is the same, byte for byte, whether values stay in memory or all of them go to files."""
    model = block()
    data = [graphs.feeds(model, 8, 7, seed=s) for s in range(5)]
    made = []
    for cache in (1 << 30, 5000, 0):
        out = tmp_path / f"{cache}" / "out.onnx"
        out.parent.mkdir()
        magr_onnx.optimize(model, data, output=out, bits=3, effort=effort, cache=cache)
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("form", ["matmulnbits", "qdq", "qdq-int8", "dynamic-int8"])
def test_every_effort_with_every_format(form: Any, effort: Any, tmp_path: Path) -> None:
    """The emitted model is close to the float one on fresh rows."""
    model, out = block(), tmp_path / "out.onnx"
    data, fresh = [graphs.feeds(model, 32, 7, seed=s) for s in range(8)], graphs.feeds(model, 50, 7, seed=99)
    accumulator = {"target": "x86-avx2"} if form == "qdq-int8" else {}
    report = magr_onnx.optimize(graphs.proto(model), data, output=out, format=form, effort=effort, **accumulator).report
    assert report.verified == 3
    assert ("error-feedback" in report.pipeline) == (effort != "fast")
    notes = [note for note in report.notes if "gradients" in note]
    assert bool(notes) == (effort == "best" and bool(accumulator))
    assert all("under an accumulator" in note for note in notes)
    with Session(model) as before, Session(out) as after:
        expected, found = before.run(fresh)[0], after.run(fresh)[0]
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("effort", ["balanced", "best"])
@pytest.mark.parametrize("opset", [13, 20])
def test_efforts_in_half_precision(effort: Any, opset: int) -> None:
    b = Builder(opset)
    x = b.input("x", ["batch", 32], ir.DataType.FLOAT16)
    total = x
    for i in range(2):
        product = b.node("MatMul", [b.node("Tanh", [total]), b.constant(f"w{i}", random(32, 32, seed=i, dtype=np.float16))], f"layer_{i}")
        total = b.node("Add", [product, total], f"sum_{i}")
    head = b.node("MatMul", [total, b.constant("w", random(32, 8, seed=9, dtype=np.float16))], "head")
    model = b.model(head, ["batch", 8])
    data, fresh = batches(model, 8, 60), graphs.feeds(model, 100, seed=99)
    made, report = magr_onnx.optimize(graphs.proto(model), data, effort=effort, bits=8)
    assert report.verified == 3
    with Session(model) as before, Session(made) as after:
        expected, found = (s.run(fresh)[0].astype(np.float64) for s in (before, after))
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_sequences_between_layers_do_without_stages(effort: Any, tmp_path: Path) -> None:
    """What is no tensor cannot be kept between stages: the model is quantized in one, and the report says so."""
    b = Builder()
    x = b.input("x", ["batch", 48])
    inner = b.node("MatMul", [x, b.constant("w1", random(48, 48, seed=1))], "first")
    node = ir.node("SplitToSequence", [inner, b.constant("parts", np.array([24, 24]))], {"axis": 1}, name="split")
    node.outputs[0].name, node.outputs[0].type = "pieces", ir.SequenceType(ir.TensorType(graphs.FLOAT))
    b.nodes.append(node)
    half = b.node("SequenceAt", [node.outputs[0], b.constant("one", np.array(1))], "half")
    second = b.node("MatMul", [half, b.constant("w2", random(24, 24, seed=2))], "second")
    nothing = b.node("Mul", [b.node("ReduceMax", [second], "most", keepdims=0), b.constant("zero", np.float32(0))], "nothing")
    index = b.node("Cast", [nothing], "index", to=ir.DataType.INT64)  # so that the sequence is read a stage later
    index.dtype = ir.DataType.INT64
    other = b.node("SequenceAt", [node.outputs[0], index], "other")
    out = b.node("MatMul", [b.node("Add", [second, other], "sum"), b.constant("w3", random(24, 16, seed=3))], "third")
    model = b.model(out, ["batch", 16])
    report = magr_onnx.optimize(graphs.proto(model), batches(model), output=tmp_path / "out.onnx", effort=effort).report
    assert len(report.layers) == report.verified == 3
    assert any("no error feedback: pieces" in note for note in report.notes)
    assert ("no gradients" in " ".join(report.notes)) == (effort == "best")
    small = magr_onnx.optimize(graphs.proto(model), batches(model), effort="fast", max_memory=1000).report
    assert any("run as a whole" in note and "pieces" in note for note in small.notes)
    with Session(model) as a, Session(tmp_path / "out.onnx") as c:
        fresh = graphs.feeds(model, 50, seed=9)
        expected = a.run(fresh)[0]
        assert np.linalg.norm(c.run(fresh)[0] - expected) < 0.2 * np.linalg.norm(expected)


def test_many_sequences_between_layers_are_counted() -> None:
    """The first three are named, and how many more there are."""
    b = Builder()
    inner = b.node("MatMul", [b.input("x", ["batch", 48]), b.constant("w1", random(48, 48, seed=1))], "first")
    sizes = b.constant("sizes", np.array([24, 24]))
    pieces = []
    for i in range(5):
        node = ir.node("SplitToSequence", [inner, sizes], {"axis": 1}, name=f"split_{i}")
        node.outputs[0].name, node.outputs[0].type = f"pieces_{i}", ir.SequenceType(ir.TensorType(graphs.FLOAT))
        b.nodes.append(node)
        pieces.append(node.outputs[0])
    half = b.node(
        "Slice", [inner, b.constant("starts", np.array([0])), b.constant("ends", np.array([24])), b.constant("axes", np.array([1]))], "half"
    )
    total = b.node("MatMul", [half, b.constant("w2", random(24, 24, seed=2))], "second")
    nothing = b.node("Mul", [b.node("ReduceMax", [total], "most", keepdims=0), b.constant("none", np.float32(0))], "nothing")
    index = b.node("Cast", [nothing], "index", to=ir.DataType.INT64)  # so that sequences are read a stage later
    index.dtype = ir.DataType.INT64
    for i, piece in enumerate(pieces):
        total = b.node("Add", [total, b.node("SequenceAt", [piece, index], f"at_{i}")], f"sum_{i}")
    model = b.model(b.node("MatMul", [total, b.constant("w3", random(24, 16, seed=3))], "third"), ["batch", 16])
    names = "pieces_0, pieces_1, pieces_2 and 2 more between layers is no tensor"
    for options in ({"effort": "balanced"}, {"effort": "fast", "max_memory": 1000}):
        report = magr_onnx.optimize(graphs.proto(model), batches(model), **options).report
        assert any(names in note for note in report.notes), options


def test_cache_keeps_strings_on_disk() -> None:
    """Any text, and of any shape: NumPy could only pickle it."""
    arrays = [
        np.array([["word", ""], ["nul\0 inside", "nul behind\0"], ["ünï \ud800", "line\nbreak"]], object),
        np.array("scalar", object),
        np.empty((0, 3), object),
        np.array(["fixed", "width"]),
    ]
    with Cache(0) as cache:
        for i, array in enumerate(arrays):
            cache.put("words", i, array)
        for i, array in enumerate(arrays):
            found = cache.get("words", i)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)


def of_words() -> ir.Model:
    """Two layers behind an encoder of words."""
    b = Builder()
    words = b.input("words", ["batch", "length"], ir.DataType.STRING)
    domain = "ai.onnx.ml"
    label = ir.node(
        "LabelEncoder", [words], {"keys_strings": ["a", "b", "c"], "values_floats": [1.0, -2.0, 0.5], "default_float": 0.0}, domain=domain
    )
    label.name, label.outputs[0].name, label.outputs[0].dtype = "label", "label_out", ir.DataType.FLOAT
    b.nodes.append(label)
    hidden = b.node("Tanh", [b.node("MatMul", [label.outputs[0], b.constant("w0", random(16, 32, seed=1, scale=1))], "first")])
    model = b.model(b.node("MatMul", [hidden, b.constant("w1", random(32, 8, seed=2))], "second"), ["batch", 8])
    model.graph.opset_imports[domain] = 3
    return model


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_strings_as_inputs(cache: int) -> None:
    data = [{"words": np.random.default_rng(s).choice(np.array(list("abcd"), object), (20, 16))} for s in range(5)]
    _, report = magr_onnx.optimize(of_words(), data, cache=cache, progress=None)
    assert [row.rows for row in report.layers] == [100, 100]


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_model_whose_input_does_not_fit_its_weight(effort: Any, tmp_path: Path) -> None:
    text = 'g (float[40, n] x) => (float[8, n] y) { y = Einsum<equation = "kj,kn->jn">(w, x) }'
    proto = model(text, w=constant("w", 16, 8))
    with pytest.raises(magr_onnx.MagrError, match=r"has 40 columns, and its weight 16 rows|onnxruntime"):
        magr_onnx.optimize(proto, [{"x": constant("x", 40, 5)}] * 4, effort=effort, output=tmp_path / "out.onnx", bits=8)
