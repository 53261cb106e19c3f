"""Gram matrices of few rows: the solvers give what they give under the ``(K, K)`` matrix of the same rows."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import error_feedback, low_rank, magr
from magr_onnx.core.gram import LEAST_WIDTH, SHARE, RowGram, dense, few
from magr_onnx.core.grid import choose
from magr_onnx.core.linalg import column_errors, damped, lambda_max, left_product, solver
from magr_onnx.core.moments import MomentAccumulator, OutputAccumulator, pooled, split_stats, with_folds
from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.core.product import RowProduct
from magr_onnx.core.quantizers import QUANTIZERS, comq, cross_validation, gptq, two_sided
from magr_onnx.core.quantizers.grid_refinement import regrid
from magr_onnx.core.quantizers.interface import Options, Problem
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.errors import NonFiniteError
from tests.helpers import Array, activations, gram_of

K, N, ROWS = 160, 12, 24
WIDE, FEW = 1024, 60


def few_of(rows: int = ROWS, k: int = K, seed: int = 0) -> RowGram:
    """``X^T X / n`` with a diagonal added."""
    x = activations(rows, k, seed, tail=0.5).astype(np.float32)
    return RowGram.of(x, np.full(rows, 1 / rows)).plus_diagonal(np.random.default_rng(seed).uniform(0.1, 0.5, k))


def weights_of(k: int = K, n: int = N, seed: int = 0) -> Array:
    return (np.random.default_rng(seed + 1000).standard_t(4, (k, n)) * 0.05).astype(np.float32)


def expanded(gram: RowGram) -> Array:
    """The matrix, entry by entry from its definition."""
    result = np.diag(gram.added)
    for rows, weights in gram.pieces:
        for x, w in zip(rows.astype(np.float64), weights, strict=True):
            result = result + w * np.outer(x, x)
    return result


def close(found: Any, expected: Array, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(dense(found), expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def stats_of(x: Array, by_rows: bool, folds: tuple[Array, ...] = ()) -> LayerStats:
    rows = x.astype(np.float32)
    gram = RowGram.of(rows, np.full(len(x), 1 / len(x))) if by_rows else gram_of(rows.astype(np.float64))
    return LayerStats(gram, x.mean(axis=0), len(x), folds=tuple(stats_of(fold, by_rows) for fold in folds))


def both(rows: int = FEW, k: int = WIDE, held_out: int = 15) -> tuple[LayerStats, LayerStats]:
    """Statistics of the same rows, the last ones held out: by rows, and as matrices."""
    x = activations(rows, k, tail=0.5).astype(np.float32)
    parts = [x[-held_out:], x[:-held_out]]
    sums = [MomentAccumulator(k, few=True) for _ in parts]
    for part, accumulator in zip(parts, sums, strict=True):
        accumulator.add_rows(part, part)
    by_rows = split_stats(sums, 1, None)
    assert by_rows is not None
    return by_rows, stats_of(x.astype(np.float64), False, (x[-held_out:].astype(np.float64),))


def test_rows_are_kept_where_they_are_far_fewer_than_inputs() -> None:
    assert few(LEAST_WIDTH // SHARE, LEAST_WIDTH)
    assert few(60, 18_048)
    assert not few(LEAST_WIDTH // SHARE + 1, LEAST_WIDTH)
    assert not few(1, LEAST_WIDTH - 1)


def test_operations_are_those_of_the_matrix() -> None:
    gram = few_of()
    h, x, out = expanded(gram), weights_of().astype(np.float64), np.empty((N, K))
    close(gram, h)
    np.testing.assert_allclose(gram.diagonal(), h.diagonal())
    np.testing.assert_allclose(gram @ x, h @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gram @ x[:, 0], h @ x[:, 0], rtol=1e-5, atol=1e-6)
    left_product(x.T, gram, out)
    np.testing.assert_allclose(out, x.T @ h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(solver(gram)(x), np.linalg.solve(h, x), rtol=1e-4, atol=1e-5)
    rows = np.array([5, 3, 40])
    np.testing.assert_allclose(gram.block(rows), h[np.ix_(rows, rows)], rtol=1e-5)
    one, two = slice(0, 50), slice(50, K)
    np.testing.assert_allclose(gram[one, one] @ x[one], h[one, one] @ x[one], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gram[two, one] @ x[one], h[two, one] @ x[one], rtol=1e-5, atol=1e-6)
    close(gram.padded(K + 9), np.pad(h, (0, 9)))
    close(damped(gram, 0.3), damped(h, 0.3))
    close(2.5 * gram / 2, 1.25 * h)
    assert lambda_max(gram) == pytest.approx(np.linalg.eigvalsh(h)[-1], rel=1e-3)
    np.testing.assert_allclose(column_errors(x, gram), np.einsum("kn,kn->n", x, h @ x), rtol=1e-5)


def test_sums_are_those_of_the_matrices() -> None:
    a, b = few_of(20, WIDE), few_of(30, WIDE, 1)
    both = a + 0.5 * b
    assert isinstance(both, RowGram)
    close(both, expanded(a) + 0.5 * expanded(b))
    rest = both + -0.5 * b
    assert isinstance(rest, RowGram)
    assert rest.rank == a.rank  # the rows are taken out, not cancelled
    close(rest, expanded(a), 1e-12)
    other = np.eye(WIDE)
    for found in (a + other, other + a):
        assert isinstance(found, np.ndarray)
        close(found, expanded(a) + other)
    many = a + few_of(WIDE // SHARE, WIDE, 2)
    assert isinstance(many, np.ndarray)


def test_centred_matrix_has_no_mean_and_no_constant_inputs() -> None:
    x = activations(ROWS, K).astype(np.float32)
    x[:, 7] = 3.3
    w = np.random.default_rng(0).uniform(0.5, 1, ROWS)
    w /= w.sum()
    mean = w @ x.astype(np.float64)
    expected = (x.T.astype(np.float64) * w) @ x - np.outer(mean, mean)
    found = RowGram.of(x, w).centred(mean)
    close(found, expected, 1e-4)
    assert found.diagonal()[7] == 0


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("k", [5, 128, 300])
def test_factor_is_that_of_the_matrix(k: int, act_order: bool) -> None:
    gram = few_of(ROWS, k)
    expected = gptq.prepare(expanded(gram), 0.1, act_order)
    found = gptq.prepare(gram, 0.1, act_order)
    np.testing.assert_array_equal(found.order, expected.order)
    np.testing.assert_allclose(np.tril(found.weights @ found.rows.T, -1), expected.matrix, rtol=1e-3, atol=1e-4)
    assert found.notes(0.1) == ()


def test_infinite_rows_are_an_error() -> None:
    x = np.ones((2, K), np.float32)
    x[1, 3] = np.inf
    with pytest.raises(NonFiniteError, match="holds NaN or infinite"):
        gptq.prepare(RowGram.of(x).plus_diagonal(1.0))


@pytest.mark.parametrize("spec", [WeightSpec(4, 32), WeightSpec(3, None), WeightSpec(4, 20, symmetric=True), WeightSpec(8, None)], ids=str)
def test_solvers_reach_the_errors_that_they_reach_under_the_matrix(spec: WeightSpec) -> None:
    weights, gram = weights_of(300), damped(few_of(ROWS, 300), 0.2)
    h = expanded(gram)
    single = h.astype(np.float32)

    def error(weight: Any) -> float:
        return float(column_errors(weight.dequantize().astype(np.float64) - weights, h).sum())

    grid = choose(weights, spec, h.diagonal(), None)
    starts = [gptq.solve(weights, gptq.prepare(g, 0.0), grid) for g in (gram, h)]
    assert np.mean(starts[0].codes != starts[1].codes) < 0.01
    assert error(starts[0]) == pytest.approx(error(starts[1]), rel=0.02)
    refined = [comq.refine(weights, starts[1], g) for g in (gram, single)]
    assert error(refined[0].weight) == pytest.approx(refined[0].errors[-1], rel=1e-3)
    assert error(refined[0].weight) == pytest.approx(error(refined[1].weight), rel=0.02)
    if spec.group_size is not None:
        again = [regrid(weights, refined[1].weight, g).weight for g in (gram, single)]
        assert error(again[0]) == pytest.approx(error(again[1]), rel=0.02)
    reduced = [magr.reduce(weights, g, alpha=1e-3, group_size=spec.group_size) for g in (gram, h)]
    np.testing.assert_allclose(reduced[0].weights, reduced[1].weights, atol=1e-3 * np.abs(weights).max())
    assert reduced[0].objective == pytest.approx(reduced[1].objective, rel=1e-3)


def test_two_sided_descent_is_that_under_the_matrix() -> None:
    weights, gram = weights_of(), damped(few_of(), 0.2)
    outputs = two_sided.damped_outputs(gram_of(activations(50, N)))
    blocks, spec = two_sided.blocks_of(outputs), WeightSpec(4, 32)
    h = expanded(gram)
    grid = choose(weights, spec, h.diagonal(), None)
    starts = [two_sided.solve(weights, gptq.prepare(g, 0.0), grid, outputs, blocks) for g in (gram, h)]
    found, expected = (two_sided.refine(weights, starts[1], g, outputs, blocks) for g in (gram, h))
    assert np.mean(starts[0].codes != starts[1].codes) < 0.01
    assert found.errors[-1] == pytest.approx(expected.errors[-1], rel=0.02)


@pytest.mark.parametrize("kind", ["exact", "diagonal"])
def test_low_rank_branch_is_that_under_the_matrix(kind: Any) -> None:
    difference, gram = weights_of(), few_of()
    found, expected = (low_rank.reconstruct(difference, low_rank.root(g, 0.1, kind), 3).product() for g in (gram, expanded(gram)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(difference).max())


def test_sums_of_few_rows_are_kept_as_rows_until_they_are_many() -> None:
    x = activations(WIDE, WIDE).astype(np.float32)
    batches, weights = np.split(x, 8), [1.0, 0.5, 1.0, 0.25, 1.0, 1.0, 1.0, 1.0]
    by_rows, usual = MomentAccumulator(WIDE, float_mean=True, few=True), MomentAccumulator(WIDE, float_mean=True)
    for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        for sums in (by_rows, usual):
            sums.add_rows(batch, 2 * batch, weight)
        assert isinstance(by_rows.gram, RowGram) == (index < 2)
    found, expected = by_rows.stats(), usual.stats()
    close(found.gram, dense(expected.gram))
    np.testing.assert_allclose(found.mean, expected.mean)
    np.testing.assert_allclose(found.target_mean, expected.target_mean)
    assert found.rows == expected.rows


@pytest.mark.parametrize("centred", [False, True])
def test_statistics_of_few_rows_are_those_of_the_matrix(centred: bool) -> None:
    found, expected = both()
    for a, b in ((found, expected), (found.folds[0], expected.folds[0]), (found.without(0), expected.without(0))):
        assert isinstance(a.gram, RowGram)
        assert not a.is_large
        close(a.objective_gram(centred), dense(b.objective_gram(centred)), 1e-4)
        close(a.regularized(centred), dense(b.regularized(centred)), 1e-4)
    assert found.without(0).gram.rank == FEW - 15  # type: ignore[union-attr]
    readers = [(stats, centred) for stats in (found, expected)]
    close(pooled(readers, [2.0, 3.0]).gram, dense(pooled([readers[1]] * 2, [2.0, 3.0]).gram), 1e-4)
    of_few, usual = (pooled([reader] * 2, [2.0, 3.0]) for reader in readers)
    for a, b in ((of_few, usual), (of_few.without(0), usual.without(0))):
        assert isinstance(a.gram, RowGram)
        close(a.gram, dense(b.gram), 1e-4)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("spec", [WeightSpec(4, 32), WeightSpec(8, None)], ids=str)
@pytest.mark.parametrize("name", ["auto", "comq", "gptq"])
def test_whole_layers_are_solved_as_under_the_matrix(name: str, spec: WeightSpec, centred: bool) -> None:
    weights = weights_of(WIDE)
    stats = both()
    fresh = LayerStats(gram_of(activations(2000, WIDE, tail=0.5)[FEW:]), np.zeros(WIDE), 2000)
    found, expected = (cross_validation.run(QUANTIZERS[name], Problem(weights, weights, s, centred, spec), Options()) for s in stats)
    assert found.without_data == expected.without_data
    assert found.held_out == pytest.approx(expected.held_out, rel=0.03)
    errors = [column_errors(s.weight.dequantize() - weights, fresh.gram).sum() for s in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.parametrize("rows", [FEW, 0])
def test_codes_fit_an_accumulator(rows: int) -> None:
    weights = weights_of(WIDE)
    budget = Budget(Accumulator(16), 0, 255)
    stats = both()[0] if rows else LayerStats.data_free(WIDE)
    assert isinstance(stats.gram, RowGram)
    solution = gptq.run(Problem(weights, weights, stats, False, WeightSpec(8, None, symmetric=True), budget), Options())
    low, high = budget.column_extremes(solution.weight.raw())
    assert (low >= budget.low).all()
    assert (high <= budget.high).all()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_error_feedback_is_that_under_the_matrix(centred: bool, kept: bool) -> None:
    weights = weights_of(WIDE)
    x = activations(FEW, WIDE, tail=0.5).astype(np.float32)
    quantized = x + 0.1 * activations(FEW, WIDE, 5, tail=0.5).astype(np.float32)
    results = []
    for by_rows in (True, False):
        sums, targets = [MomentAccumulator(WIDE, float_mean=True, paired=not by_rows, few=by_rows) for _ in range(2)], []
        for part, rows in enumerate((slice(0, 15), slice(15, FEW))):
            sums[part].add_rows(quantized[rows], x[rows])
            outputs = OutputAccumulator(weights, few=kept)
            outputs.add_rows(quantized[rows], x[rows], 0.0)
            targets.append(outputs.target_moments() if by_rows else sums[part].target_moments(weights))
        stats = split_stats(sums, 1, None)
        assert stats is not None
        combined = targets[0].combine(targets[1])
        target = type(combined)(combined.cross, combined.mean, combined.power, combined.rows, (targets[0],))
        results.append(error_feedback.solve_target(weights, stats, target, centred))
    found, expected = results
    assert found.damping == expected.damping
    np.testing.assert_allclose(found.weights, expected.weights, atol=2e-4 * np.abs(weights).max())
    assert found.after == pytest.approx(expected.after, rel=1e-3)


def test_products_of_few_rows_add_up_without_matrices() -> None:
    """They are those of the matrices, and what is taken away leaves what there would have been without it."""
    x, y = activations(30, WIDE).astype(np.float32), activations(30, 12, 3).astype(np.float32)
    exact = x.astype(np.float64).T @ y
    first, second = RowProduct.of(x[:20], y[:20]), RowProduct.of(x[20:], y[20:], 0.5)
    both = RowProduct.zeros(WIDE, 12) + 2.0 * (first + 2 * second)
    columns = np.array([1, 5, 7])
    np.testing.assert_allclose(both[:, :], 2 * exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(both[:100, columns], 2 * exact[:100, columns], rtol=1e-4, atol=1e-4)
    left = both + -4.0 * second
    assert [len(rows) for (rows, _), _ in left.pieces] == [20]
    np.testing.assert_array_equal(left[:, :], (2.0 * first)[:, :])
    assert (both + -1.0 * both)[:, :].shape == (WIDE, 12)
    assert not (both + -1.0 * both)[:, :].any()


def test_memory_of_targets_grows_with_rows() -> None:
    k, n = 8192, 1024
    weights, x = weights_of(k, n), activations(40, k, tail=0.5).astype(np.float32)
    tracemalloc.start()
    try:
        parts = [OutputAccumulator(weights, few=True) for _ in range(2)]
        for part, rows in zip(parts, (x[:10], x[10:]), strict=True):
            part.add_rows(rows, rows, 0.0)
        moments = with_folds([part.target_moments() for part in parts], 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(moments.cross[:, :8], x.T @ (x @ weights[:, :8]) / 40, rtol=1e-3, atol=1e-3)
    assert peak < 8 * 40 * (k + n) * 4  # the matrix alone would be six times as much


def test_memory_grows_with_rows() -> None:
    k, n = 8192, 8
    weights = weights_of(k, n)
    x = activations(40, k, tail=0.5).astype(np.float32)
    sums = [MomentAccumulator(k, few=True) for _ in range(2)]
    for part, rows in zip(sums, (x[:10], x[10:]), strict=True):
        part.add_rows(rows, rows)
    tracemalloc.start()
    try:
        stats = split_stats(sums, 1, None)
        assert stats is not None
        cross_validation.run(QUANTIZERS["auto"], Problem(weights, weights, stats, True, WeightSpec(4, 32)), Options())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 4 * k * 40  # some copies of the rows; the matrix alone would be six times as much
