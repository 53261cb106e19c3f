"""Options chosen for every layer by its error on held-out rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import error_feedback, magr
from magr_onnx.core.linalg import automatic_damping, damped, layer_error
from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, auto, comq, cross_validation, gptq
from magr_onnx.core.quantizers.auto import Choice, usual_alpha
from magr_onnx.core.types import LayerStats, TargetMoments, WeightSpec
from tests.helpers import Array, activations, gram_of, target_error

pytestmark = pytest.mark.usefixtures("each_backend")

SPECS = [WeightSpec(2, 32), WeightSpec(3, None), WeightSpec(4, 32), WeightSpec(4, 20, symmetric=True), WeightSpec(8, 32)]
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def stats_of(x: Array, *folds: Array) -> LayerStats:
    return LayerStats(gram_of(x), x.mean(axis=0), len(x), folds=tuple(map(stats_of, folds)))


def problem_of(
    spec: WeightSpec, k: int = 64, n: int = 32, rows: int = 800, seed: int = 0, tail: float = 0.5, centred: bool = True, folds: int = 1
) -> tuple[Problem, Array]:
    """A problem whose last quarters of rows are held out in turn, ``folds`` of them, and rows nobody has seen."""
    rng = np.random.default_rng(seed + 1000)
    weights = (rng.standard_t(4, (k, n)) * 0.05).astype(np.float32)
    x = activations(2 * rows, k, seed, tail)
    stats = stats_of(x[:rows], *np.split(x[:rows], 4)[4 - folds :])
    return Problem(weights, weights, stats, centred, spec), x[rows:]


def error(weights: Array, problem: Problem, stats: LayerStats) -> float:
    return layer_error(weights.astype(np.float64) - problem.reference, stats.objective_gram(problem.centred))


def chosen(problem: Problem, options: Options) -> Choice:
    facts = auto.run(problem, options).figures
    return Choice(facts["alpha"], facts["damping"], bool(facts["act_order"]))


def held_out_error(problem: Problem, choice: Choice, options: Options) -> float:
    """Of the layer solved by hand on the rows outside every fold: MagR, GPTQ, sweeps; the mean of those rows is in the bias.

    Over the variance of the layer's output.
    """
    stats, total, rows = problem.stats, 0.0, 0
    variance = layer_error(problem.reference.astype(np.float64), stats.gram - np.outer(stats.mean, stats.mean))
    for fold in stats.folds:
        rest = stats.combine(fold, -1)
        weights = problem.weights
        if choice.alpha:
            gram = damped(rest.regularized(problem.centred).astype(np.float32), choice.damping)
            weights = magr.reduce(weights, gram, alpha=choice.alpha, group_size=problem.spec.group_size).weights
        trial = Options(options.beta, choice.damping, choice.act_order, auto.TRIAL_SWEEPS)
        solution = comq.run(replace(problem, weights=weights, stats=rest), trial)
        moments = fold.gram
        if problem.centred:  # second moments about the mean of the other rows
            cross = np.outer(fold.mean, rest.mean)
            moments = fold.gram - cross - cross.T + np.outer(rest.mean, rest.mean)
        total += fold.rows * layer_error(solution.weight.dequantize().astype(np.float64) - problem.reference, moments)
        rows += fold.rows
    return total / rows / variance


@some_specs
@pytest.mark.parametrize(("seed", "folds", "centred"), [(0, 1, True), (1, 1, False), (0, 4, True), (1, 4, False)])
def test_chosen_options_are_the_best_of_those_tried(spec: WeightSpec, seed: int, folds: int, centred: bool) -> None:
    """By the solver called with each: alpha first, then damping, then act-order, each from the best so far."""
    problem, _ = problem_of(spec, seed=seed, folds=folds, centred=centred)
    options = Options()
    kept = automatic_damping(64, 600)
    best, alpha = Choice(usual_alpha(spec.bits, spec.group_size), kept, True), usual_alpha(spec.bits, spec.group_size)
    tried = set()

    def left(choice: Choice) -> float:
        tried.add(choice)
        return held_out_error(problem, choice, options)

    def least(simple: Choice, others: list[Choice]) -> Choice:
        found = min(others, key=left)
        return found if left(found) < (1 - auto.MARGIN) * left(simple) else simple

    if alpha:
        none, *strengths = (replace(best, alpha=alpha * a) for a in (0.0, *auto.ALPHAS))
        best = least(none, strengths) if left(strengths[0]) < left(none) else none
    for factor in auto.DAMPINGS:
        if left(other := replace(best, damping=kept * factor)) < left(best):
            best = least(best, [other])
            break
    best = least(best, [replace(best, act_order=False)])
    found = auto.run(problem, options)
    assert found.figures["tried"] == len(tried)
    assert found.held_out == pytest.approx(left(best), rel=1e-6)
    assert chosen(problem, options) == replace(best, damping=pytest.approx(automatic_damping(64, 800) * best.damping / kept))


def test_columns_are_sampled_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    solve = auto._solve

    def spy(problem: Problem, *rest: Any, **options: Any) -> Any:
        seen.append(problem.weights.shape[1])
        return solve(problem, *rest, **options)

    monkeypatch.setattr(auto, "_solve", spy)
    problem, _ = problem_of(WeightSpec(3, 32), n=100)
    assert auto.run(problem, Options()).weight.codes.shape == (64, 100)
    assert set(seen[:-1]) == {cross_validation.SAMPLE, 2 * cross_validation.SAMPLE}
    assert seen[-1] == 100


@pytest.mark.parametrize("alpha", [0.0, 2e-3])
def test_given_options_are_not_chosen(alpha: float) -> None:
    problem, _ = problem_of(WeightSpec(3, 32))
    given = auto.run(problem, Options(alpha=alpha, damping=0.07, act_order=False)).figures
    assert (given["alpha"], given["damping"], given["act_order"], given["tried"]) == (alpha, 0.07, False, 0)
    some = auto.run(problem, Options(alpha=alpha)).figures
    assert some["alpha"] == alpha
    assert 3 <= some["tried"] <= len(auto.DAMPINGS) + 2
    undamped = auto.run(problem, Options(damping=0.0, act_order=True)).figures
    assert (undamped["damping"], undamped["act_order"], undamped["tried"]) == (0, True, len(auto.ALPHAS) + 1)


def test_without_held_out_rows_options_are_the_usual_ones() -> None:
    problem, _ = problem_of(WeightSpec(3, 32))
    problem = replace(problem, stats=replace(problem.stats, folds=()))
    assert auto.run(problem, Options()).held_out is None
    assert chosen(problem, Options()) == Choice(1e-4, automatic_damping(64, 800), True)


@some_specs
def test_without_data_it_is_comq(spec: WeightSpec) -> None:
    problem, _ = problem_of(spec)
    problem = replace(problem, stats=LayerStats.data_free(64))
    one, other = (QUANTIZERS[name].run(problem, Options()).weight for name in ("auto", "comq"))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scales, other.scales)


def test_a_budget_is_respected() -> None:
    problem, _ = problem_of(WeightSpec(4, None, symmetric=True))
    free = auto.run(problem, Options()).weight
    budget = Budget(Accumulator(14, 32), 0, 255)
    found = auto.run(replace(problem.on_host, budget=budget), Options()).weight

    def fits(codes: Array) -> bool:
        raw = codes.astype(int) - 8
        return all(
            abs(255 * np.where(s * part > 0, part, 0).sum(axis=0)).max() < 2**13
            for part in np.split(raw, 2)
            for s in (1, -1)
        )  # fmt: skip

    assert fits(found.codes)
    assert not fits(free.codes)


@some_specs
@pytest.mark.parametrize("centred", [True, False])
def test_codes_are_in_range_and_it_is_no_worse_than_comq(spec: WeightSpec, centred: bool) -> None:
    """On fresh rows, with usual options the other way: MagR, comq, its own damping."""
    ours = theirs = 0.0
    for seed in range(4):
        problem, fresh = problem_of(spec, seed=seed, centred=centred)
        found = auto.run(problem, Options()).weight
        assert found.codes.max() <= spec.top
        assert found.spec == spec
        gram = problem.damped_gram(problem.damping(Options()))
        reduced = magr.reduce(problem.weights, gram, alpha=usual_alpha(spec.bits, spec.group_size), group_size=spec.group_size).weights
        usual = comq.run(replace(problem, weights=reduced), Options()).weight
        own, other = (error(w.dequantize(), problem, stats_of(fresh)) for w in (found, usual))
        assert own < 1.1 * other
        ours, theirs = ours + own / other, theirs + 1
    assert ours < 1.02 * theirs


def test_it_is_better_on_few_correlated_rows_with_outliers() -> None:
    """Where the usual options are not the right ones."""
    ratios = []
    for seed in range(6):
        problem, fresh = problem_of(WeightSpec(3, None), k=96, rows=300, seed=seed, tail=1.5)
        found = auto.run(problem, Options()).weight
        gram = problem.damped_gram(problem.damping(Options()))
        usual = comq.run(replace(problem, weights=magr.reduce(problem.weights, gram, alpha=1e-3).weights), Options()).weight
        ratios.append(error(found.dequantize(), problem, stats_of(fresh)) / error(usual.dequantize(), problem, stats_of(fresh)))
    assert np.mean(ratios) < 0.97


@pytest.mark.parametrize("folds", [1, 4])
def test_targets_are_what_choices_are_judged_by(folds: int) -> None:
    """Behind a spoilt prefix: towards the target weights, by the error against the float output on held-out rows."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_t(4, (48, 24)) * 0.05).astype(np.float32)
    x = activations(1200, 48, 0, 0.5)
    y = x @ (np.eye(48) + 0.03 * rng.standard_normal((48, 48)))

    def part(rows: slice) -> tuple[LayerStats, TargetMoments]:
        a, b = x[rows], y[rows]
        n = len(a)
        return stats_of(b), error_feedback.target_moments(weights, b.T @ a / n, a.T @ a / n, a.mean(axis=0), n)

    held_out = [slice(at, at + 200) for at in (600, 400, 200, 0)[:folds]]
    stats, target = part(slice(0, 800))
    parts = list(map(part, held_out))
    stats, target = replace(stats, folds=tuple(a for a, _ in parts)), replace(target, folds=tuple(b for _, b in parts))
    solved = error_feedback.solve_target(weights, stats, target, True)
    assert solved.damping is not None
    problem = Problem(solved.weights, solved.weights, stats, True, WeightSpec(4, None), None, weights, solved.fits, target)
    found = auto.run(problem, Options())
    fresh, fresh_target = part(slice(800, 1200))
    plain = auto.run(replace(problem, weights=weights, target=weights, fit_targets=()), Options())
    ours, theirs = (target_error(s.weight.dequantize().astype(np.float64), fresh, fresh_target, True) for s in (found, plain))
    assert ours < 0.8 * theirs
    errors = {}
    for alpha in (0.0, *(a * usual_alpha(problem.spec.bits, problem.spec.group_size) for a in auto.ALPHAS)):
        choice, errors[alpha] = Choice(alpha, automatic_damping(48, 600), True), 0.0
        for rows, fit in zip(held_out, solved.fits, strict=True):
            rest = np.r_[0 : rows.start, rows.stop : 800]
            trial, *_ = auto._solve(replace(problem, weights=fit, target=fit, stats=stats_of(y[rest])), choice, Options(), quick=True)
            output = y[:800] @ trial.dequantize().astype(np.float64) - x[:800] @ weights
            errors[alpha] += np.square(output[rows] - output[rest].mean(axis=0)).sum()
    errors[0.0] *= 1 - auto.MARGIN
    assert found.figures["alpha"] == min(errors, key=lambda alpha: errors[alpha])


def test_output_moments_lower_the_energy_they_stand_for() -> None:
    problem = problem_of(WeightSpec(3, 32))[0].on_host
    g = np.random.default_rng(1).standard_normal((100, 4)) @ np.random.default_rng(2).standard_normal((4, 32))
    outputs = g.T @ g / 100
    alone, found = (auto.run(p, Options()) for p in (problem, replace(problem, output_hessian=outputs)))
    assert found.figures["coupled"] < found.figures["coupled_start"]
    assert "coupled" not in alone.figures
    root = g / 10  # what the layer's error does behind it

    def felt(weights: Array) -> float:
        return layer_error((weights.astype(np.float64) - problem.target) @ root.T, problem.gram)

    assert felt(found.weight.dequantize()) < 0.8 * felt(alone.weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3])
def test_min_max_grids_gain_more_from_a_stronger_magr(bits: int) -> None:
    """By the error of GPTQ's outputs on fresh rows; grids that are searched clip the largest weights by themselves."""
    errors = dict.fromkeys(("plain", "usual", "stronger"), 0.0)
    for seed in range(4):
        problem, fresh = problem_of(WeightSpec(bits, None), k=96, seed=seed)
        x = fresh - problem.stats.mean
        for name, alpha in (("plain", 0.0), ("usual", usual_alpha(bits, None)), ("stronger", usual_alpha(bits, None, 1.0))):
            reduced = magr.reduce(problem.weights, problem.damped_gram(0.3), alpha=alpha).weights
            found = gptq.run(replace(problem, weights=reduced), Options(beta=1.0)).weight
            errors[name] += np.square(x @ (found.dequantize() - problem.target)).sum()
    assert errors["stronger"] < 0.95 * errors["usual"] < 0.9 * errors["plain"]
