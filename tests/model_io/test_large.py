"""Layers and models that are large for the memory there is: the lean ways give what the usual ones do."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core import gram as grams
from magr_onnx.core import linalg, magr, types
from magr_onnx.core import moments as accumulators
from magr_onnx.core.quantizers import comq, diagonal, gptq, interface, rtn
from magr_onnx.core.quantizers.interface import Options, Problem
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.model_io.external_data import serialized
from magr_onnx.model_io.spill import Spool
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import moments, staged
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data import sources
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.ort.session import Session, Weights, inputs_of
from tests import graphs
from tests.graphs import feeds, proto
from tests.helpers import activations, layer

K, N = 96, 40


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every layer a large one, solved in parts of a few columns; called where the usual result is known."""

    def switch() -> None:
        for module in (types, grams):
            monkeypatch.setattr(module, "LARGE", 8)
        for module in (types, linalg, accumulators):
            monkeypatch.setattr(module, "LARGE_ROWS", 7)
        monkeypatch.setattr(types, "COLUMN_BYTES", 4 * K * 9)

    return switch


def statistics(rows: int = 500) -> LayerStats:
    x = activations(rows, K)
    return LayerStats(x.T @ x / rows, x.mean(axis=0), rows)


def test_column_parts_cover_every_column_once(lean: Any) -> None:
    lean()
    parts = types.column_parts(K, N)
    assert len(parts) > 3
    assert [i for p in parts for i in range(N)[p]] == list(range(N))


@pytest.mark.parametrize("act_order", [True, False])
def test_a_factor_made_in_place_is_the_same(act_order: bool, lean: Any) -> None:
    stats = statistics()
    usual = gptq.prepare(stats.regularized(True), 0.02, act_order)
    lean()
    found = gptq.prepare(stats.regularized(True), 0.02, act_order)
    np.testing.assert_array_equal(found.order, usual.order)
    np.testing.assert_allclose(found.matrix, usual.matrix, rtol=1e-5, atol=1e-6)
    lower = linalg.cholesky(stats.gram, 0.1).lower
    np.testing.assert_allclose(lower @ lower.T, linalg.damped(stats.gram, 0.1), rtol=1e-9, atol=1e-9 * stats.gram.max())
    assert not np.triu(lower, 1).any()


def test_a_large_matrix_that_is_not_definite_is_damped_more(lean: Any) -> None:
    gram = -np.eye(K)
    gram[0, 0] = 1
    lean()
    with pytest.raises(magr_onnx.NonFiniteError, match="not positive definite"):
        linalg.cholesky(gram, 0.01)
    ones = np.ones((K, K))
    assert linalg.cholesky(ones, 0.0).damping > 0
    assert (ones == 1).all()  # the statistics stay as they are


@pytest.mark.parametrize("centred", [True, False])
def test_damped_statistics_are_the_same_and_stay_as_they_are(centred: bool, lean: Any) -> None:
    stats = statistics()
    usual, before = interface.damped_gram(stats, centred, 0.1), stats.gram.copy()
    lean()
    fresh = LayerStats(stats.gram, stats.mean, stats.rows)
    np.testing.assert_allclose(interface.damped_gram(fresh, centred, 0.1), usual, rtol=1e-6)
    np.testing.assert_array_equal(fresh.gram, before)
    assert not [m for m in fresh._memo.values() if getattr(m, "shape", None) == (K, K)]


@pytest.mark.parametrize("group", [32, None])
def test_solvers_by_columns_give_what_they_give_at_once(group: int | None, lean: Any) -> None:
    weights, _ = layer(K, N)
    stats, spec = statistics(), WeightSpec(4, group)
    given = Problem(weights, weights, stats, True, spec)
    gram = given.damped_gram(0.1)
    usual = [gptq.run(given, Options()).weight, comq.run(given, Options()).weight, magr.reduce(weights, gram, group_size=group)]
    lean()
    found = [gptq.run(given, Options()).weight, comq.run(given, Options()).weight, magr.reduce(weights, gram, group_size=group)]
    np.testing.assert_array_equal(found[0].codes, usual[0].codes)
    errors = [linalg.layer_error(weights - w.dequantize(), gram) for w in (usual[1], found[1], found[0])]
    assert errors[1] < 1.02 * errors[0]
    assert errors[1] < errors[2]
    assert found[2].objective == pytest.approx(usual[2].objective, rel=0.01)
    assert found[2].objective < found[2].start
    assert found[2].penalty == pytest.approx(usual[2].penalty)


def test_dequantizing_by_rows_is_exact(lean: Any) -> None:
    weights, gram = layer(K, N)
    quantized = rtn.quantize(weights, gram.diagonal(), WeightSpec(3, 32))
    usual = quantized.dequantize()
    lean()
    np.testing.assert_array_equal(quantized.dequantize(), usual)
    rows = quantized.spec.group_of_row(K)
    wanted = (quantized.codes.astype(np.float32) - quantized.zero_points.astype(np.float32)[rows]) * quantized.scales[rows]
    np.testing.assert_array_equal(usual, wanted)


def test_the_largest_eigenvalue_of_a_scaled_matrix() -> None:
    gram = statistics().gram
    scale = 1 / np.sqrt(gram.diagonal())
    assert linalg.lambda_max(gram, scale=scale) == pytest.approx(np.linalg.eigvalsh(gram * scale * scale[:, None])[-1], rel=1e-3)


def test_data_free_statistics_need_no_matrix() -> None:
    tracemalloc.start()
    stats = LayerStats.data_free(11008)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < 1 << 20
    assert stats.gram.shape == (11008, 11008)
    np.testing.assert_array_equal(LayerStats.data_free(5).gram, np.eye(5))
    x = np.random.default_rng(0).standard_normal((11008, 2), dtype=np.float32)
    np.testing.assert_array_equal(stats.gram @ x, x)
    np.testing.assert_allclose(stats.regularized(False) @ x, x + stats.common_mean * x.sum(axis=0), rtol=1e-4, atol=1e-4)


def test_data_free_solvers_need_no_matrix() -> None:
    k, n = 6000, 16
    weights = np.random.default_rng(0).standard_normal((k, n), dtype=np.float32)
    given = Problem(weights, weights, LayerStats.data_free(k), False, WeightSpec(4, 32))
    tracemalloc.start()
    solution = comq.run(given, Options())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * k * k / 10
    assert solution.figures["error"] < solution.figures["error_start"]


@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (None, False), (32, True), (20, False)])
def test_separable_descent_does_what_descent_under_the_identity_does(group: int | None, symmetric: bool) -> None:
    weights, _ = layer(K, N)
    spec = WeightSpec(3, group, symmetric)
    start = rtn.quantize(weights, np.ones(K), spec)
    found, errors = diagonal.refine(weights, start, 8, True)
    wanted = comq.refine(weights, start, np.eye(K))
    assert list(errors) == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(wanted.errors[0], rel=1e-5)
    assert errors[-1] == pytest.approx(float(((found.dequantize() - weights).astype(np.float64) ** 2).sum()), rel=1e-6)
    assert errors[-1] < 1.02 * wanted.errors[-1]
    np.testing.assert_array_equal(found.zero_points, start.zero_points)


def test_errors_of_columns_add_up() -> None:
    assert types.sum_traces([], [3.0, 2.0]) == [3.0, 2.0]
    assert types.sum_traces([4.0, 1.0], [3.0, 2.0, 1.5]) == [7.0, 3.0, 2.5]


def batches(count: int = 6) -> list[dict[str, Any]]:
    return [feeds(graphs.chain(), seed=i) for i in range(count)]


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_statistics_gathered_in_stages_are_those_of_the_float_model(folds: int) -> None:
    model = graphs.chain()
    layers, _ = find(model)
    opened = sources.open_data(batches(), inputs_of(model))
    context = CalibrationContext(opened, hold_out=HoldOut(folds))
    wanted = moments.collect(model, layers, context).stats
    found: dict[str, LayerStats] = {}
    seen: list[str] = []
    for part, result in staged.staged(model, model, layers, context, staged.Schedule(feedback=False, gram_budget=1)):
        assert not result.targets
        seen += [layer.name for layer in part]
        found |= result.stats
    assert seen == [layer.name for layer in layers]
    for name, stats in wanted.items():
        assert len(stats.folds) == folds
        for a, b in zip((stats, *stats.folds), (found[name], *found[name].folds), strict=True):
            assert a.rows == b.rows
            np.testing.assert_allclose(b.gram, a.gram, rtol=1e-4, atol=1e-4 * np.abs(a.gram).max())
            np.testing.assert_allclose(b.mean, a.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"effort": "fast"}, {}, {"effort": "fast", "include": ["down"]}, {"format": "qdq-int8"}])
def test_a_model_run_in_stages_comes_out_as_one_run_as_a_whole(options: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    magr_onnx.optimize(graphs.chain(), batches(), output=whole, **options)
    model, report = magr_onnx.optimize(graphs.chain(), batches(), output=parts, max_memory="2kB", **options)
    assert report.verified == len(report.layers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.onnx", "parts.onnx.data", "whole.onnx"]
    x = feeds(graphs.chain(), seed=9)
    with Session(whole) as a, Session(parts) as b, Session(model) as c:
        first, second, third = (s.run(x)[0] for s in (a, b, c))
    np.testing.assert_allclose(second, first, rtol=0.02, atol=0.02 * np.abs(first).max())
    np.testing.assert_array_equal(third, second)  # what is returned lies in the output's file, and the spool is gone


def test_emitted_constants_leave_memory(tmp_path: Path) -> None:
    model = graphs.chain()
    before = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items() if v.const_value is not None}
    Spool(tmp_path).spill(model)
    for name, value in model.graph.initializers.items():
        assert isinstance(value.const_value, ir.ExternalTensor) == (before[name].nbytes > 4096)
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])


def test_a_session_reads_external_data_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(proto(graphs.chain()), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model, folder = ir.load(path), tmp_path / "temporary"
    folder.mkdir()
    before = [v.const_value for v in model.graph.initializers.values()]
    serialized(model, folder)
    assert (folder / "model.data").stat().st_size == 0  # nothing was copied
    assert [v.const_value for v in model.graph.initializers.values()] == before
    x = feeds(graphs.chain())
    with Session(model) as a, Session(path) as b, Session(graphs.chain(), weights=Weights.MAPPED) as c:
        for one, two, three in zip(a.run(x), b.run(x), c.run(x), strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_allclose(one, three, rtol=1e-5, atol=1e-4)


def test_inputs_are_known_without_a_session() -> None:
    for make in (graphs.chain, lambda: ir.from_proto(proto(graphs.chain()))):
        model = make()
        with Session(model) as session:
            assert inputs_of(model) == session.inputs
