"""Output-adaptive Hessians: centring, the mix with the Gram matrix, and what quantizers make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from magr_onnx.core.adaptive_hessian import AdaptiveHessian
from magr_onnx.core.quantizers import QUANTIZERS, cross_validation
from magr_onnx.core.quantizers.interface import Options, Problem
from magr_onnx.core.types import LayerStats, WeightSpec
from tests.helpers import Array

K, N, SAMPLES, TOKENS = 48, 12, 20, 9


def samples(k: int = K, seed: int = 0) -> tuple[Array, Array]:
    """Inputs ``(S, T, K)`` with a mean and gradients ``(S, T, N)``; the first inputs are read where the gradients are large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SAMPLES, TOKENS, k)) @ rng.standard_normal((k, k)) + 3 * rng.standard_normal(k)
    weights = np.exp(2 * rng.standard_normal((SAMPLES, TOKENS, 1)))
    x[..., : k // 4] *= weights
    return x, rng.standard_normal((SAMPLES, TOKENS, N)) * weights


def moments_of(x: Array, delta: Array) -> Array:
    """``sum_s G_s G_s^T`` by its definition, one gradient of the weight after the other."""
    total: Array = np.zeros((x.shape[-1] + 1,) * 2)
    for rows, gradients in zip(x, delta, strict=True):
        g = np.column_stack([rows, np.ones(len(rows))]).T @ gradients
        total += g @ g.T
    return total


def problem_of(spec: WeightSpec, centred: bool, share: float | None) -> Problem:
    x, delta = samples()
    rows = x.reshape(-1, K)
    stats = LayerStats(rows.T @ rows / len(rows), rows.mean(axis=0), len(rows))
    weights = np.random.default_rng(5).standard_normal((K, N)).astype(np.float32)
    hessian = None if share is None else AdaptiveHessian(moments_of(x, delta), share)
    return Problem(weights, weights, stats, centred, spec, adaptive_hessian=hessian)


def test_a_bias_takes_the_mean_out_of_every_gradient() -> None:
    x, delta = samples()
    mean = x.reshape(-1, K).mean(axis=0)
    hessian = AdaptiveHessian(moments_of(x, delta), 1.0)
    for centred, inputs in ((False, x), (True, x - mean)):
        gradients = np.einsum("stk,stn->skn", inputs, delta)
        expected = np.einsum("skn,sln->kl", gradients, gradients)
        np.testing.assert_allclose(hessian.matrix(mean, centred), expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("centred", [False, True])
def test_the_mix_is_of_equal_traces(centred: bool) -> None:
    problem = problem_of(WeightSpec(3, 16), centred, 1.0)
    hessian, stats = problem.adaptive_hessian, problem.stats
    assert hessian is not None
    gram = stats.objective_gram(centred)
    whole = hessian.mixed(stats, centred)
    assert np.trace(whole.gram) == pytest.approx(np.trace(gram))
    ratio = np.asarray(whole.gram) / hessian.matrix(stats.mean, centred)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    none, half = (replace(hessian, share=share).mixed(stats, centred) for share in (0.0, 0.5))
    np.testing.assert_allclose(none.gram, gram, rtol=1e-12)
    np.testing.assert_allclose(half.gram, (np.asarray(gram) + whole.gram) / 2, rtol=1e-12)
    assert not whole.mean.any()
    assert (whole.rows, whole.folds) == (stats.rows, ())


def test_constant_inputs_are_nothing_under_a_bias() -> None:
    x, delta = samples()
    x[..., 3] = 7.1
    rows = x.reshape(-1, K)
    stats = LayerStats(rows.T @ rows / len(rows), rows.mean(axis=0), len(rows))
    mixed = AdaptiveHessian(moments_of(x, delta).astype(np.float32), 0.5).mixed(stats, True)
    assert not np.asarray(mixed.gram)[3].any()
    assert np.count_nonzero(np.asarray(mixed.gram).diagonal()) == K - 1


def test_gradients_of_nothing_leave_the_gram_matrix() -> None:
    stats = problem_of(WeightSpec(3, 16), True, None).stats
    mixed = AdaptiveHessian(np.zeros((K + 1, K + 1)), 1.0).mixed(stats, True)
    np.testing.assert_allclose(mixed.gram, stats.objective_gram(True))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("spec", [WeightSpec(3, 16), WeightSpec(2, None)], ids=str)
def test_the_loss_falls_that_the_gradients_stand_for(spec: WeightSpec, centred: bool) -> None:
    """Errors of the outputs on samples, summed with their gradients: less than under the Gram matrix, which has less layer error."""
    x, delta = samples()
    inputs = x - x.reshape(-1, K).mean(axis=0) if centred else x
    gradients = np.einsum("stk,stn->skn", inputs, delta)
    found = {}
    for share in (None, 1.0):
        problem = problem_of(spec, centred, share)
        solution = cross_validation.run(QUANTIZERS["auto"], problem, Options(damping=1e-3))
        error = solution.weight.dequantize().astype(np.float64) - problem.target
        felt = np.square(np.einsum("skn,km->snm", gradients, error)).sum()
        found[share] = felt, np.square(inputs @ error).sum()
    assert found[1.0][0] < 0.8 * found[None][0]
    assert found[1.0][1] > found[None][1]


def test_a_share_of_nothing_changes_nothing() -> None:
    for centred in (False, True):
        plain, none = (QUANTIZERS["auto"].run(problem_of(WeightSpec(3, 16), centred, share), Options()) for share in (None, 0.0))
        np.testing.assert_array_equal(plain.weight.codes, none.weight.codes)
        assert ("adaptive" in none.figures, "adaptive" in plain.figures) == (True, False)
