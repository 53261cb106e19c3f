"""Layers of many output channels, such as heads of language models: the same figures as of their channels apart, in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from magr_onnx.core import error_feedback, types
from magr_onnx.core.layer import LayerProblem, relative_error
from magr_onnx.core.moments import with_folds
from magr_onnx.core.types import LayerStats, TargetMoments, column_parts
from magr_onnx.passes.plan import Plan
from tests.helpers import Array, activations, gram_of

K, ROWS, PART = 64, 400, 100
BYTES = 1 << 18  # of channels processed at a time, here
N = 16 * BYTES // (4 * K)
EDGE = N // 16  # between two parts


def measured(weight: Array, folds: int) -> tuple[LayerStats, TargetMoments]:
    """Statistics of inputs that the layers before have changed, and moments of what the float model made of the others."""
    x = activations(ROWS, K, seed=1)
    y = x @ (np.eye(K) + 0.05 * np.random.default_rng(0).standard_normal((K, K)))
    parts = []
    for at in range(0, ROWS, PART):
        a, b = x[at : at + PART], y[at : at + PART]
        target = error_feedback.target_moments(weight, b.T @ a / PART, gram_of(a), a.mean(axis=0), PART)
        parts.append((LayerStats(gram_of(b), b.mean(axis=0), PART, a.mean(axis=0)), target))
    return with_folds([s for s, _ in parts], folds), with_folds([t for _, t in parts], folds)


def problem_of(weight: Array, folds: int, feedback: bool) -> LayerProblem:
    stats, moments = measured(weight, folds)
    return LayerProblem(weight, np.zeros(weight.shape[1]), stats, target_moments=moments if feedback else None)


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> Array:
    monkeypatch.setattr(types, "COLUMN_BYTES", BYTES)
    return np.random.default_rng(3).standard_normal((K, N), np.float32)


def test_targets_of_a_wide_layer_are_those_of_its_channels(weight: Array) -> None:
    assert len(column_parts(K, N)) == 16
    stats, moments = measured(weight, 4)
    found = error_feedback.solve_target(weight, stats, moments, True)
    assert found.damping is not None
    inputs = stats.regularized(True)
    damped = inputs + found.damping * np.diag(inputs.diagonal())
    for channels in (slice(0, 3), slice(EDGE - 2, EDGE + 2), slice(N - 3, N)):
        alone, target = measured(weight[:, channels], 4)
        assert isinstance(target.cross, np.ndarray)
        residual = target.cross - np.outer(alone.mean, target.mean) - alone.objective_gram(True) @ weight[:, channels]
        np.testing.assert_allclose(
            found.weights[:, channels], weight[:, channels] + np.linalg.solve(damped, residual), rtol=1e-4, atol=1e-5
        )
        few = moments.columns(channels)
        np.testing.assert_allclose(few.cross, target.cross, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose((few.mean, few.power), (target.mean, target.power), rtol=1e-9, atol=1e-12)
    channels = error_feedback.sample(N, error_feedback.SAMPLE)
    assert [fit.shape for fit in found.fits] == [(K, len(channels))] * 4


@pytest.mark.parametrize("feedback", [False, True])
def test_errors_of_a_wide_layer_are_those_of_its_channels(weight: Array, feedback: bool) -> None:
    other = weight + 0.1 * np.random.default_rng(4).standard_normal(weight.shape, np.float32)
    squared = variance = 0.0
    for channels in np.array_split(np.arange(N), 7):
        part = problem_of(weight[:, channels], 4, feedback)
        assert part.output_variance > 0
        squared += relative_error(other[:, channels], part, True) ** 2 * part.output_variance
        variance += part.output_variance
    assert relative_error(other, problem_of(weight, 4, feedback), True) == pytest.approx(np.sqrt(squared / variance), rel=1e-5)


@pytest.mark.parametrize("feedback", [False, True])
def test_a_wide_layer_takes_little_memory(weight: Array, feedback: bool) -> None:
    """Beside the weight: its target, what is dequantized, codes, and a few channels at a time."""
    plan = Plan.parse("error-feedback,quantize{method=rtn,bits=8,block_size=none},compensate-bias")
    problem = problem_of(weight, 4, feedback)
    plan.solve(problem)  # compiles what is compiled
    tracemalloc.start()
    try:
        solution = plan.solve(problem)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert solution.quantized is not None
    assert peak < (4 + feedback) * weight.nbytes + 8 * BYTES
