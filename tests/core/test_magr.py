"""MagR against a convex solver, against the published iteration, and against its own claims."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from magr_onnx.core.magr import Reduction, penalty, reduce
from magr_onnx.errors import OptionError
from tests.helpers import Array, activations, gram_of, layer, project_by_sorting

pytestmark = pytest.mark.usefixtures("each_backend")


def slices(k: int, group: int | None) -> list[slice]:
    size = group or k
    return [slice(i, i + size) for i in range(0, k, size)]


def objective(w: Array, w0: Array, gram: Array, a: float, group: int | None = None) -> float:
    difference = w.astype(np.float64) - w0
    norms = sum(float(np.abs(w[s].astype(np.float64)).max(axis=0).sum()) for s in slices(len(w), group))
    return 0.5 * float((difference * (gram @ difference)).sum()) + a * norms


def published(w0: Array, gram: Array, alpha: float, steps: int, group: int | None = None) -> Array:
    """The authors' iteration, in float64 with a projection that sorts."""
    h = gram / np.linalg.eigvalsh(gram)[-1]
    w = w0.astype(np.float64)
    for _ in range(steps):
        v = w - h @ (w - w0)
        w = np.concatenate([v[s] - alpha * project_by_sorting(v[s] / alpha, 1.0) for s in slices(len(w), group)])
    return w


def solve_qp(w0: Array, gram: Array, a: float, group: int | None) -> float:
    """Minimum for one column, over ``(w, t)`` with ``-t <= w <= t`` for every group's ``t``."""
    k = len(w0)
    parts = slices(k, group)
    member = np.zeros((k, len(parts)))
    for g, s in enumerate(parts):
        member[s, g] = 1
    signs = np.block([[-np.eye(k), member], [np.eye(k), member]])

    def value(x: Array) -> tuple[float, Array]:
        pull = gram @ (x[:k] - w0)
        return 0.5 * float((x[:k] - w0) @ pull) + a * float(x[k:].sum()), np.concatenate([pull, np.full(len(parts), a)])

    begin = np.concatenate([w0, [np.abs(w0[s]).max() for s in parts]])
    constraint = {"type": "ineq", "fun": lambda x: signs @ x, "jac": lambda x: signs}
    solved: Any = minimize(value, begin, jac=True, method="SLSQP", constraints=[constraint], options={"maxiter": 500, "ftol": 1e-14})
    return float(solved.fun)


def exact(w0: Array, gram: Array, **options: Any) -> Reduction:
    return reduce(w0, gram, max_iterations=1500, tolerance=0.0, **options)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("alpha", [0.02, 0.3])
def test_minimum_is_that_of_a_qp_solver(group: int | None, alpha: float) -> None:
    w0, gram = layer(6, 3, seed=3)
    w0 = w0.astype(np.float64) * 20
    found = exact(w0, gram, alpha=alpha, group_size=group)
    expected = sum(solve_qp(w0[:, j], gram, found.penalty, group) for j in range(3))
    assert 0 < expected < found.start
    assert found.objective == pytest.approx(expected, rel=1e-3)
    assert objective(found.weights, w0, gram, found.penalty, group) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("seed", [0, 1])
def test_fewer_accelerated_steps_do_no_worse_than_200_published_ones(group: int | None, alpha: float, seed: int) -> None:
    w0, gram = layer(128, 24, seed, tail=1.5)
    default, thirty = reduce(w0, gram, alpha=alpha, group_size=group), reduce(w0, gram, alpha=alpha, group_size=group, max_iterations=30)
    assert default.iterations <= 50
    assert thirty.iterations <= 30
    a = default.penalty
    theirs = objective(published(w0, gram, a / np.linalg.eigvalsh(gram)[-1], 200, group), w0, gram, a, group)
    for found in (default, thirty):
        assert objective(found.weights, w0, gram, a, group) <= theirs * (1 + 1e-6)


@pytest.mark.parametrize("method", ["fista", "authors"])
@pytest.mark.parametrize("group", [None, 7, 32, 500])
@pytest.mark.parametrize("iterations", [1, 2, 5, 30])
def test_reported_objectives_are_those_of_the_result(method: Any, group: int | None, iterations: int) -> None:
    w0, gram = layer(50, 9, seed=4)
    found = reduce(w0, gram, alpha=0.01, group_size=group, method=method, max_iterations=iterations, tolerance=0.0)
    assert found.iterations == iterations
    assert found.start == pytest.approx(objective(w0, w0, gram, found.penalty, group), rel=1e-5)
    assert found.objective == pytest.approx(objective(found.weights, w0, gram, found.penalty, group), rel=1e-5)


@pytest.mark.parametrize("group", [None, 16, 50])
@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.1, 2.0])
@pytest.mark.parametrize("iterations", [1, 3, 10, None])
def test_objective_never_ends_above_its_start(group: int | None, alpha: float, iterations: int | None) -> None:
    w0, gram = layer(60, 8, seed=5, tail=2.0)
    found = reduce(w0, gram, alpha=alpha, group_size=group, max_iterations=iterations)
    assert found.objective <= found.start * (1 + 1e-6)
    assert objective(found.weights, w0, gram, found.penalty, group) <= objective(w0, w0, gram, found.penalty, group) * (1 + 1e-6)


@pytest.mark.parametrize("method", ["fista", "authors"])
@pytest.mark.parametrize("group", [None, 16])
def test_gap_bounds_the_distance_to_the_minimum(method: Any, group: int | None) -> None:
    w0, gram = layer(40, 6, seed=6)
    best = exact(w0, gram, alpha=0.02, group_size=group)
    assert best.gap < 1e-3  # not vacuous: it closes at the minimum
    minimum = objective(best.weights, w0, gram, best.penalty, group)
    for iterations in (1, 3, 10, 30):
        found = reduce(w0, gram, alpha=0.02, group_size=group, method=method, max_iterations=iterations, tolerance=0.0)
        value = objective(found.weights, w0, gram, found.penalty, group)
        assert (value - minimum) / value <= found.gap + 1e-5


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
def test_stops_at_the_first_fifth_step_that_adds_too_little(tolerance: float) -> None:
    w0, gram = layer(40, 6, seed=6)
    found = reduce(w0, gram, alpha=0.02, tolerance=tolerance, max_iterations=500)
    assert found.converged
    steps = range(5, found.iterations + 1, 5)
    runs = [reduce(w0, gram, alpha=0.02, tolerance=0.0, max_iterations=step) for step in steps]
    values = [found.start, *(run.objective for run in runs)]
    little = [before - now <= tolerance * (found.start - now) for before, now in pairwise(values)]
    stops = [done or run.gap <= tolerance for done, run in zip(little, runs, strict=True)]
    assert stops == [False] * (len(steps) - 1) + [True]
    np.testing.assert_array_equal(found.weights, runs[-1].weights)


def test_count_ends_an_iteration_that_has_not_converged() -> None:
    found = reduce(*layer(40, 6, seed=6), alpha=0.02, max_iterations=2)
    assert found.iterations == 2
    assert not found.converged


def test_uncorrelated_inputs_converge_at_once() -> None:
    w0, _ = layer(100, 6)
    assert reduce(w0, np.eye(100), alpha=0.01, tolerance=1e-3).iterations == 5  # the gap is looked at every 5 steps


@pytest.mark.parametrize("group", [None, 20])
@pytest.mark.parametrize("steps", [1, 200])
@pytest.mark.parametrize("inputs", ["correlated", "independent"])
def test_authors_method_is_the_published_iteration(group: int | None, steps: int, inputs: str) -> None:
    w0, gram = layer(48, 10, seed=7)
    if inputs == "independent":
        gram = gram_of(np.random.default_rng(7).standard_normal((2000, 48)))
    found = reduce(w0, gram, alpha=1e-3, relative=False, group_size=group, method="authors", max_iterations=steps)
    assert found.iterations == steps
    np.testing.assert_allclose(found.weights, published(w0, gram, 1e-3, steps, group), rtol=1e-4, atol=2e-6)


def test_authors_method_defaults_to_200_steps() -> None:
    assert reduce(*layer(8, 2), alpha=1e-3, relative=False, method="authors").iterations == 200


def test_groups_are_separate_norms_and_the_last_may_be_shorter() -> None:
    w0, gram = layer(50, 4, seed=8)
    found = exact(w0, np.eye(50), alpha=0.05, group_size=16)
    for s in slices(50, 16):  # with H = I every group is one prox
        expected = w0[s] - found.penalty * project_by_sorting(w0[s].astype(np.float64) / found.penalty, 1.0)
        np.testing.assert_allclose(found.weights[s], expected, atol=1e-6)
    assert exact(w0, gram, alpha=0.05, group_size=16).gap < 1e-3


def test_penalties() -> None:
    w0, gram = layer(30, 5)
    mass = float(np.abs(w0).mean() * np.diag(gram).mean())
    assert penalty(w0, gram, 0.1) == pytest.approx(0.1 * 30 * mass)
    assert penalty(w0, gram, 0.1, group_size=8) == pytest.approx(0.1 * 8 * mass)
    assert penalty(w0, gram, 0.1, relative=False) == pytest.approx(0.1 * np.linalg.eigvalsh(gram)[-1], rel=1e-6)


@pytest.mark.parametrize("relative", [True, False])
def test_alpha_zero_is_the_identity(relative: bool) -> None:
    w0, gram = layer(12, 3)
    found = reduce(w0, gram, alpha=0.0, relative=relative)
    np.testing.assert_array_equal(found.weights, w0)
    assert found.weights is not w0
    assert found.iterations == 0


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize(("factor", "tolerance"), [(8, 0.0), (10, 1e-4)])  # a power of two rounds alike
def test_relative_alpha_ignores_the_scale_of_weights_and_inputs(group: int | None, factor: int, tolerance: float) -> None:
    w0, gram = layer(48, 6, seed=9)
    plain = reduce(w0, gram, alpha=0.01, group_size=group)
    scaled = reduce(w0 * np.float32(factor), gram * factor**2, alpha=0.01, group_size=group)
    assert scaled.iterations == plain.iterations
    limit = tolerance * factor * np.abs(plain.weights).max()
    np.testing.assert_allclose(scaled.weights, factor * plain.weights, rtol=0, atol=limit)


@pytest.mark.parametrize("group", [None, 16])
def test_output_moves_no_further_than_the_bound(group: int | None) -> None:
    x = activations(200, 48, seed=11)
    w0, _ = layer(48, 6, seed=11)
    for iterations in (1, None):
        found = reduce(w0, gram_of(x), alpha=0.05, group_size=group, max_iterations=iterations)
        moved = np.linalg.norm(x @ (found.weights - w0.astype(np.float64)), axis=0) / np.sqrt(len(x))
        norms = sum(np.abs(w0[s]).max(axis=0) for s in slices(48, group))
        assert (moved <= np.sqrt(2 * found.penalty * norms) * (1 + 1e-5)).all()


@pytest.mark.parametrize("method", ["fista", "authors"])
@pytest.mark.parametrize("group", [None, 8])
def test_dead_inputs(method: Any, group: int | None) -> None:
    w0, gram = layer(32, 5, seed=12)
    dead = np.arange(8, 16)  # a whole group
    gram[dead] = 0
    gram[:, dead] = 0
    found = reduce(w0, gram, alpha=0.02, group_size=group, method=method)
    assert np.isfinite(found.weights).all()
    assert np.isfinite([found.objective, found.gap]).all()
    assert found.objective < found.start
    assert (np.abs(found.weights[dead]).max(axis=0) <= np.abs(w0).max(axis=0)).all()


@pytest.mark.parametrize("relative", [True, False])
def test_nothing_to_reduce(relative: bool) -> None:
    w0, gram = layer(30, 3)
    np.testing.assert_array_equal(reduce(w0, np.zeros((30, 30)), alpha=0.1, relative=relative).weights, w0)
    np.testing.assert_array_equal(reduce(np.zeros_like(w0), gram, alpha=0.1, relative=relative).weights, 0)


def test_dtype_and_input_are_kept() -> None:
    w0, gram = layer(30, 3)
    before = w0.copy(), gram.copy()
    assert reduce(w0, gram, alpha=0.1).weights.dtype == np.float32
    assert reduce(w0.astype(np.float64), gram, alpha=0.1).weights.dtype == np.float64
    np.testing.assert_array_equal(w0, before[0])
    np.testing.assert_array_equal(gram, before[1])


def test_refuses_what_cannot_be_solved() -> None:
    w0, gram = layer(8, 2)
    for alpha in (-1e-3, float("nan")):
        with pytest.raises(OptionError, match="alpha"):
            reduce(w0, gram, alpha=alpha)
    for shape in ((7, 7), (8, 7), (9, 9)):
        with pytest.raises(OptionError, match="Gram"):
            reduce(w0, np.ones(shape))


@pytest.mark.parametrize("group", [0, -4])
def test_refuses_impossible_groups(group: int) -> None:
    with pytest.raises(OptionError, match="group"):
        reduce(*layer(8, 2), group_size=group)
