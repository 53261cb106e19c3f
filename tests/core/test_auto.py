"""Options chosen for every layer by its error on held-out rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import error_feedback, magr
from magr_onnx.core.linalg import automatic_damping, damped, layer_error
from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.core.quantizers import QUANTIZERS, Options, Problem, auto, comq
from magr_onnx.core.quantizers.auto import Choice, usual_alpha
from magr_onnx.core.types import LayerStats, WeightSpec
from tests.helpers import Array, activations, gram_of

SPECS = [WeightSpec(2, 32), WeightSpec(3, None), WeightSpec(4, 32), WeightSpec(4, 20, symmetric=True), WeightSpec(8, 32)]
some_specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def stats_of(x: Array, held: LayerStats | None = None) -> LayerStats:
    return LayerStats(gram_of(x), x.mean(axis=0), len(x), held_out=held)


def problem_of(
    spec: WeightSpec, k: int = 64, n: int = 32, rows: int = 800, seed: int = 0, tail: float = 0.5, centred: bool = True
) -> tuple[Problem, Array]:
    """A problem whose last quarter of rows is held out, and rows nobody has seen."""
    rng = np.random.default_rng(seed + 1000)
    weights = (rng.standard_t(4, (k, n)) * 0.05).astype(np.float32)
    x = activations(2 * rows, k, seed, tail)
    stats = stats_of(x[:rows], stats_of(x[3 * rows // 4 : rows]))
    return Problem(weights, weights, stats, centred, spec), x[rows:]


def error(weights: Array, problem: Problem, stats: LayerStats) -> float:
    return layer_error(weights.astype(np.float64) - problem.reference, stats.objective_gram(problem.centred))


def chosen(problem: Problem, options: Options) -> Choice:
    facts = auto.run(problem, options).figures
    return Choice(facts["alpha"], facts["damping"], bool(facts["act_order"]))


def held_out_error(problem: Problem, choice: Choice, options: Options) -> float:
    """Of the layer solved by hand on the rows that are not held out: MagR, GPTQ, four sweeps."""
    held = problem.stats.held_out
    assert held is not None
    kept = problem.stats.combine(held, -1)
    weights = problem.weights
    if choice.alpha:
        gram = damped(kept.objective_gram(problem.centred), choice.damping)
        weights = magr.reduce(weights, gram, alpha=choice.alpha, group_size=problem.spec.group_size).weights
    given = Options(options.beta, choice.damping, choice.act_order, auto.TRIAL_SWEEPS)
    found = comq.run(replace(problem, weights=weights, stats=kept), given)
    return error(found.weight.dequantize(), problem, held)


@some_specs
@pytest.mark.parametrize("seed", [0, 1])
def test_chosen_options_are_the_best_of_those_tried(spec: WeightSpec, seed: int) -> None:
    """By the solver called with each: alpha first, then damping, then act-order, each from the best so far."""
    problem, _ = problem_of(spec, seed=seed)
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
        best = least(replace(best, alpha=0.0), [replace(best, alpha=alpha * a) for a in auto.ALPHAS])
    best = least(best, [replace(best, damping=kept * d) for d in auto.DAMPINGS])
    best = least(best, [replace(best, act_order=False)])
    found = auto.run(problem, options)
    assert found.figures["tried"] == len(tried)
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
    assert set(seen[:-1]) == {auto.SAMPLE}
    assert seen[-1] == 100


@pytest.mark.parametrize("alpha", [0.0, 2e-3])
def test_given_options_are_not_chosen(alpha: float) -> None:
    problem, _ = problem_of(WeightSpec(3, 32))
    given = auto.run(problem, Options(alpha=alpha, damping=0.07, act_order=False)).figures
    assert (given["alpha"], given["damping"], given["act_order"], given["tried"]) == (alpha, 0.07, False, 0)
    some = auto.run(problem, Options(alpha=alpha)).figures
    assert (some["alpha"], some["tried"]) == (alpha, len(auto.DAMPINGS) + 2)
    undamped = auto.run(problem, Options(damping=0.0, act_order=True)).figures
    assert (undamped["damping"], undamped["act_order"], undamped["tried"]) == (0, True, len(auto.ALPHAS) + 1)


def test_without_held_out_rows_options_are_the_usual_ones() -> None:
    problem, _ = problem_of(WeightSpec(3, 32))
    problem = replace(problem, stats=replace(problem.stats, held_out=None))
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
    found = auto.run(replace(problem, budget=budget), Options()).weight

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


def test_goals_are_what_choices_are_judged_by() -> None:
    """Behind a spoilt prefix: towards the aim, by the error against the float output on held-out rows."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_t(4, (48, 24)) * 0.05).astype(np.float32)
    x = activations(1200, 48, 0, 0.5)
    y = x @ (np.eye(48) + 0.03 * rng.standard_normal((48, 48)))

    def part(rows: slice) -> tuple[LayerStats, Any]:
        a, b = x[rows], y[rows]
        n = len(a)
        return stats_of(b), error_feedback.target_moments(weights, b.T @ a / n, a.T @ a / n, a.mean(axis=0), n)

    stats, goal = part(slice(0, 800))
    held, held_goal = part(slice(600, 800))
    stats, goal = replace(stats, held_out=held), replace(goal, held_out=held_goal)
    aimed = error_feedback.solve_target(weights, stats, goal, True)
    assert aimed.damping is not None
    problem = Problem(aimed.weights, aimed.weights, stats, True, WeightSpec(4, None), None, weights, aimed.fit, goal)
    found = auto.run(problem, Options())
    fresh, fresh_goal = part(slice(800, 1200))
    plain = auto.run(replace(problem, weights=weights, target=weights, fit_target=None), Options())
    ours, theirs = (error_feedback.error(s.weight.dequantize().astype(np.float64), fresh, fresh_goal, True) for s in (found, plain))
    assert ours < 0.8 * theirs
    kept = stats.combine(held, -1)
    errors = {}
    for a in auto.ALPHAS:
        alpha = a * usual_alpha(problem.spec.bits, problem.spec.group_size)
        choice = Choice(alpha, automatic_damping(48, kept.rows), True)
        tried, *_ = auto._solve(replace(problem, weights=aimed.fit, target=aimed.fit, stats=kept), choice, Options(), quick=True)
        errors[alpha] = error_feedback.error(tried.dequantize().astype(np.float64), held, held_goal, True)
    assert found.figures["alpha"] == min(errors, key=lambda alpha: errors[alpha])


def test_output_moments_lower_the_energy_they_stand_for() -> None:
    problem, _ = problem_of(WeightSpec(3, 32))
    g = np.random.default_rng(1).standard_normal((100, 4)) @ np.random.default_rng(2).standard_normal((4, 32))
    outputs = g.T @ g / 100
    alone, found = (auto.run(p, Options()) for p in (problem, replace(problem, output_hessian=outputs)))
    assert found.figures["coupled"] < found.figures["coupled_start"]
    assert "coupled" not in alone.figures
    root = g / 10  # what the layer's error does behind it

    def felt(weights: Array) -> float:
        return layer_error((weights.astype(np.float64) - problem.target) @ root.T, problem.gram)

    assert felt(found.weight.dequantize()) < 0.8 * felt(alone.weight.dequantize())
