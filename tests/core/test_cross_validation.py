"""Errors on held-out rows, from raw rows by hand; and that no quantizer does worse on fresh rows than without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import error_feedback
from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.moments import with_folds
from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, cross_validation, rtn
from magr_onnx.core.types import LayerStats, TargetMoments, WeightSpec
from magr_onnx.passes import Plan
from tests.helpers import Array, activations, gram_of

N = 16  # output channels


def stats_of(x: Array) -> LayerStats:
    return LayerStats(gram_of(x), x.mean(axis=0), len(x))


def weights_of(k: int, n: int = N, seed: int = 0) -> Array:
    weights: Array = (np.random.default_rng(seed + 1000).standard_t(4, (k, n)) * 0.05).astype(np.float32)
    return weights


def parts_of(rows: int, folds: int) -> list[Array]:
    """Numbers of the rows of every part, the folds first: all four quarters, or the last and the rest."""
    quarters = np.array_split(np.arange(rows), 4)
    return quarters[::-1] if folds == 4 else [quarters[3], np.concatenate(quarters[:3])]


def problem_of(x: Array, spec: WeightSpec, folds: int = 4, centred: bool = False, n: int = N) -> Problem:
    weights = weights_of(x.shape[1], n)
    return Problem(weights, weights, with_folds([stats_of(x[part]) for part in parts_of(len(x), folds)], folds), centred, spec)


def held_out_error(difference: Array, target: Array, parts: list[Array], centred: bool) -> float:
    """The mean squared error of outputs ``target (n, N)`` on the rows of all folds, over the variance of all outputs.

    ``centred``: less the mean error of the rows outside the fold.
    """
    squares = []
    for part in parts:
        rest = np.setdiff1d(np.arange(len(difference)), part)
        squares.append(np.square(difference[part] - (difference[rest].mean(axis=0) if centred else 0)).sum(axis=1))
    return float(np.concatenate(squares).mean() / target.var(axis=0).sum())


@pytest.mark.parametrize("folds", [1, 4])
@pytest.mark.parametrize("centred", [False, True])
def test_error_is_that_of_the_rows_held_out(folds: int, centred: bool) -> None:
    x = activations(90, 24, seed=1)
    problem = problem_of(x, WeightSpec(4, None), folds, centred)
    other = weights_of(24, seed=5)
    parts = cross_validation.folds(problem)
    assert len(parts) == folds
    difference, wanted = x @ (other.astype(np.float64) - problem.weights), x @ problem.weights.astype(np.float64)
    found = cross_validation.error(parts, lambda _: other)
    assert found == pytest.approx(held_out_error(difference, wanted, parts_of(90, folds)[:folds], centred), rel=1e-6)
    assert sum(fold.error(other) for fold in parts) == pytest.approx(found)
    assert cross_validation.error(parts, lambda _: problem.weights) == pytest.approx(0, abs=1e-9 * found)


@pytest.mark.parametrize("folds", [1, 4])
@pytest.mark.parametrize("centred", [False, True])
def test_error_behind_quantized_layers_is_against_the_float_output(folds: int, centred: bool) -> None:
    """``X_q W_hat - X W0``, by hand."""
    rng = np.random.default_rng(0)
    x = activations(90, 24, seed=1)
    y = x @ (np.eye(24) + 0.05 * rng.standard_normal((24, 24)))
    weights, other = weights_of(24), weights_of(24, seed=5)

    def part(rows: Array) -> tuple[LayerStats, TargetMoments]:
        a, b = x[rows], y[rows]
        n = len(a)
        return stats_of(b), error_feedback.target_moments(weights, b.T @ a / n, gram_of(a), a.mean(axis=0), n)

    measured = [part(rows) for rows in parts_of(90, folds)]
    stats, moments = with_folds([s for s, _ in measured], folds), with_folds([t for _, t in measured], folds)
    target = error_feedback.solve_target(weights, stats, moments, centred)
    problem = Problem(target.weights, target.weights, stats, centred, WeightSpec(4, None), None, weights, target.fits, moments)
    parts = cross_validation.folds(problem)
    for fold, fit in zip(parts, target.fits, strict=True):  # solved towards what the other rows call for
        np.testing.assert_array_equal(fold.problem.target, fit)
        np.testing.assert_array_equal(fold.problem.reference, weights)
    wanted = x @ weights.astype(np.float64)
    expected = held_out_error(y @ other.astype(np.float64) - wanted, wanted, parts_of(90, folds)[:folds], centred)
    assert cross_validation.error(parts, lambda _: other) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("folds", [1, 4])
def test_a_fold_is_solved_from_the_other_rows(folds: int) -> None:
    """Its problem has no trace of the rows in the fold: those may be anything."""
    x = activations(80, 24)
    problem = problem_of(x, WeightSpec(4, 8), folds, centred=True)
    for fold, rows in zip(cross_validation.folds(problem), parts_of(80, folds), strict=False):
        rest = np.setdiff1d(np.arange(80), rows)
        alone = replace(problem, stats=stats_of(x[rest]))
        assert fold.problem.stats.rows == len(rest)
        assert fold.held_out.rows == len(rows)
        for name in ("rtn", "gptq", "comq", "auto"):
            found, expected = (QUANTIZERS[name].run(p, Options()).weight for p in (fold.problem, alone))
            assert (found.codes != expected.codes).mean() < 0.01  # rounding breaks a tie differently


def test_many_channels_are_sampled() -> None:
    problem = problem_of(activations(80, 24), WeightSpec(4, None), n=200)
    columns = {fold.problem.weights.shape[1] for fold in cross_validation.folds(problem)}
    assert columns == {cross_validation.SAMPLE}
    sampled = cross_validation.folds(problem)[0].problem
    assert all((column == problem.weights.T).all(axis=1).any() for column in sampled.weights.T)
    assert cross_validation.run(QUANTIZERS["gptq"], problem, Options()).weight.codes.shape == (24, 200)


@pytest.mark.parametrize("name", ["rtn", "gptq", "comq", "hqq", "auto"])
@pytest.mark.parametrize("why", ["no data", "no folds"])
def test_without_rows_to_judge_by_the_quantizer_decides(name: str, why: str) -> None:
    problem = problem_of(activations(80, 24), WeightSpec(4, None, symmetric=True))
    if why == "no data":
        problem = replace(problem, stats=LayerStats.data_free(24))
    else:
        problem = replace(problem, stats=replace(problem.stats, folds=()))
    expected, found = QUANTIZERS[name].run(problem, Options()), cross_validation.run(QUANTIZERS[name], problem, Options())
    np.testing.assert_array_equal(found.weight.codes, expected.weight.codes)
    assert found.notes == expected.notes
    assert found.held_out is None


def misleading(rows: int = 80) -> Array:
    """Rows of which each quarter has inputs of its own: what is learnt of three is wrong for the fourth."""
    rng = np.random.default_rng(0)
    x = np.zeros((rows, 64))
    for i, part in enumerate(np.array_split(np.arange(rows), 4)):
        shared = rng.standard_normal((2, 64))
        x[part] = rng.standard_normal((len(part), 2)) @ shared + 0.01 * rng.standard_normal((len(part), 64))
        x[part] *= 1 + 9 * (np.arange(64) % 4 == i)
    return x


@pytest.mark.parametrize("name", ["gptq", "comq", "auto"])
@pytest.mark.parametrize("centred", [False, True])
def test_misleading_rows_are_not_used(name: str, centred: bool) -> None:
    """The solution is that without data, or that of rounding to nearest, and a note says so."""
    x = misleading()
    problem = problem_of(x, WeightSpec(4, 32), centred=centred)
    solution = cross_validation.run(QUANTIZERS[name], problem, Options())
    common = 0.0 if centred else x.mean() ** 2 / (np.square(x).mean() - x.mean() ** 2)
    free = replace(problem, stats=LayerStats.data_free(64, common), centred=False)
    candidates = {method: QUANTIZERS[method].run(free, Options()).weight for method in ("rtn", name)}
    parts = cross_validation.folds(problem)
    errors = {method: cross_validation.error(parts, lambda _, w=weight: w.dequantize()) for method, weight in candidates.items()}
    best = min(errors, key=lambda method: errors[method])
    np.testing.assert_array_equal(solution.weight.codes, candidates[best].codes)
    np.testing.assert_array_equal(solution.weight.scales, candidates[best].scales)
    assert solution.held_out == pytest.approx(errors[best])
    with_data = cross_validation.error(parts, lambda p: QUANTIZERS[name].run(p, Options()).weight.dequantize())
    (note,) = [note for note in solution.notes if note.startswith("solved without data")]
    assert note.endswith(f"better than quantizer {name} from 80 rows")
    if name != "auto":  # which solves trials by its own options
        assert f"that is {10 * np.log10(with_data / errors[best]):.1f} dB better" in note


@pytest.mark.parametrize("misled", [True, False])
def test_what_a_solution_without_data_does_not_use_is_not_reported(misled: bool) -> None:
    """MagR and error feedback ran, and are in the weights only where these were taken."""
    x, weights, rng = misleading() if misled else activations(800, 64), weights_of(64), np.random.default_rng(0)
    y = x @ (np.eye(64) + 0.05 * rng.standard_normal((64, 64)))
    measured = [
        (
            stats_of(y[rows]),
            error_feedback.target_moments(weights, y[rows].T @ x[rows] / len(rows), gram_of(x[rows]), x[rows].mean(axis=0), len(rows)),
        )
        for rows in parts_of(len(x), 4)
    ]
    stats, moments = with_folds([s for s, _ in measured], 4), with_folds([t for _, t in measured], 4)
    problem = LayerProblem(weights, None, stats, target_moments=moments)
    solution = Plan.parse("error-feedback,magr,quantize{method=gptq,bits=3}").solve(problem)
    taken = [note for note in solution.record.notes if note.startswith("solved without data")]
    assert bool(taken) == misled
    assert (solution.record.magr is None) == misled
    figures = solution.record.feedback
    assert figures is not None
    if misled:
        assert figures["damping"] is None
        assert figures["held_out_after"] == figures["held_out_before"]
        free = cross_validation.without_data(Problem(weights, weights, stats, False, WeightSpec(3, 32)))
        candidates = [QUANTIZERS[method].run(free, Options()).weight.dequantize() for method in ("rtn", "gptq")]
        best = min(candidates, key=lambda weight: np.abs(weight - solution.weight).max())
        np.testing.assert_array_equal(solution.weight, best)
    else:
        assert figures["held_out_after"] < figures["held_out_before"]


@pytest.mark.parametrize("name", ["gptq", "comq", "auto"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [13, 16])
def test_under_an_accumulator_no_solution_is_worse_than_those_without_data(name: str, symmetric: bool, bits: int) -> None:
    """On the rows held out; and it still fits."""
    budget = Budget(Accumulator(bits), 0, 255)
    for seed, x in enumerate((misleading(), activations(24, 64), activations(400, 64))):
        problem = replace(problem_of(x, WeightSpec(8, None, symmetric=symmetric), centred=seed == 1), budget=budget)
        solution = cross_validation.run(QUANTIZERS[name], problem, Options())
        low, high = budget.column_extremes(solution.weight.raw())
        assert (low >= budget.low).all()
        assert (high <= budget.high).all()
        free = cross_validation.without_data(problem)
        parts, found = cross_validation.folds(problem), solution.weight.dequantize()
        for other in (name, "a2q+"):
            weight = QUANTIZERS[other].run(free, Options()).weight.dequantize()
            limit = cross_validation.error(parts, lambda _, w=weight: w)
            assert solution.held_out is not None
            assert solution.held_out <= limit * (1 + 1e-9)
        if any(note.startswith("solved without data") for note in solution.notes):
            assert cross_validation.error(parts, lambda _, w=found: w) == pytest.approx(solution.held_out)


@pytest.mark.parametrize("name", ["gptq", "comq", "auto"])
def test_telling_rows_are_used(name: str) -> None:
    problem = problem_of(activations(800, 64), WeightSpec(4, 32), folds=1)
    solution, expected = (run(problem) for run in (lambda p: cross_validation.run(QUANTIZERS[name], p, Options()), runner(name)))
    np.testing.assert_array_equal(solution.weight.codes, expected.weight.codes)
    assert solution.notes == expected.notes
    parts = cross_validation.folds(problem)
    assert solution.held_out is not None
    nearest = rtn.run(cross_validation.without_data(problem), Options()).weight.dequantize()
    columns = error_feedback.sample(N, cross_validation.SAMPLE)
    assert solution.held_out < 0.8 * cross_validation.error(parts, lambda _: nearest[:, columns])


def runner(name: str) -> Callable[[Problem], Any]:
    return lambda problem: QUANTIZERS[name].run(problem, Options())


KINDS = ("independent", "correlated", "low rank", "sparse", "dead")  # inputs
Sampler = Callable[[int], Array]


def sampler(kind: str, k: int, rng: np.random.Generator) -> Sampler:
    """Inputs of one layer: calls draw fresh rows ``(n, k)`` of the same distribution."""
    mixing = rng.standard_normal((k, k)) / np.sqrt(k)
    if kind == "independent":
        return lambda n: rng.standard_normal((n, k))
    if kind == "correlated":  # powers of many orders of magnitude, and a mean
        factors, mean, power = mixing[: k // 4] * 2, 0.5 * rng.standard_normal(k), np.exp(rng.standard_normal(k))
        return lambda n: (rng.standard_normal((n, k // 4)) @ factors + 0.3 * rng.standard_normal((n, k)) + mean) * power
    if kind == "low rank":
        return lambda n: rng.standard_normal((n, k // 8)) @ mixing[: k // 8]
    thresholds = rng.uniform(-1, 3, k)  # behind ReLU: sparse
    if kind == "sparse":
        return lambda n: np.maximum(rng.standard_normal((n, k)) @ mixing - thresholds, 0)
    thresholds[rng.random(k) < 0.3] = 9
    return lambda n: np.maximum(rng.standard_normal((n, k)) - thresholds, 0)  # dead


def fresh_error(kind: str, n: int, k: int, bits: int, bias: str, name: str, seed: int) -> float:
    """The squared output error of a solved layer on 4,000 fresh rows, over that of rounding to nearest without data or bias."""
    rng = np.random.default_rng([seed, n, k])
    draw = sampler(kind, k, rng)
    x, fresh, weight = draw(n), draw(4000), weights_of(k, seed=seed)
    stats = with_folds([stats_of(part) for part in np.array_split(x, 4)], 4)
    spec = f"bits={bits},block_size={'none' if bits == 8 else 32}"

    def error(plan: str, measured: LayerStats) -> float:
        solution = Plan.parse(plan).solve(LayerProblem(weight, None, measured))
        difference = fresh @ (solution.weight.astype(np.float64) - weight) + (0 if solution.bias is None else solution.bias)
        return float(np.square(difference).sum())

    found = error(f"quantize{{method={name},{spec}}}" + (",compensate-bias{bias=any}" if bias == "any" else ""), stats)
    return found / error(f"quantize{{method=rtn,{spec}}}", LayerStats.data_free(k))


@pytest.mark.long
@pytest.mark.parametrize("name", ["auto", "gptq", "comq"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", ["none", "any"])
def test_few_rows_do_no_harm(name: str, bits: int, bias: str) -> None:
    """On fresh rows, layers solved from 4 to 64 rows are no worse than rounded to nearest without data, and as a rule far better.

    Of independent inputs nothing can be learnt, and the few rows that tell what harm is done may happen to say that there is none.
    """
    sizes = [(n, k) for n in (4, 16) for k in (32, 128)] if name == "auto" else [(n, k) for n in (4, 8, 16, 64) for k in (32, 64, 128)]
    ratios = {(kind, n, k): fresh_error(kind, n, k, bits, bias, name, seed=0) for kind in KINDS for n, k in sizes}
    for layer, ratio in ratios.items():
        assert ratio < (1.3 if layer[0] == "independent" else 1.15), layer
    assert np.exp(np.mean(np.log(list(ratios.values())))) < 0.75


@pytest.mark.parametrize("name", ["rtn", "hqq"])
def test_a_quantizer_that_data_does_not_change_is_kept(name: str) -> None:
    """Nothing is noted where there is nothing to choose from."""
    problem = problem_of(misleading(), WeightSpec(4, 32))
    options = Options(beta=1.0)
    solution = cross_validation.run(QUANTIZERS[name], problem, options)
    free = QUANTIZERS[name].run(cross_validation.without_data(problem), options)
    np.testing.assert_array_equal(solution.weight.codes, free.weight.codes)
    assert not any("without data" in note for note in solution.notes)
