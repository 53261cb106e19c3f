"""Bias compensation on actual inputs."""

from __future__ import annotations

import numpy as np
import pytest

from magr_onnx.core.bias_compensation import correction, shrinkage
from magr_onnx.core.grid import minmax
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.types import LayerStats, WeightSpec
from tests.helpers import Array, activations, gram_of, layer

X = activations(150, 24, seed=2)
REFERENCE = layer(24, 6, seed=2)[0]
BIAS = np.random.default_rng(3).standard_normal(6)
_GRID = minmax(REFERENCE, WeightSpec(bits=2, group_size=None))
QUANTIZED = _GRID.weight(_GRID.codes(REFERENCE)).dequantize()


def squared_error(bias: Array) -> float:
    wanted = X @ REFERENCE.astype(np.float64) + BIAS
    return float(((X @ QUANTIZED.astype(np.float64) + bias - wanted) ** 2).sum(axis=1).mean())


TARGET = (X @ REFERENCE.astype(np.float64)).mean(axis=0)


def test_is_the_mean_output_error() -> None:
    found = correction(TARGET, QUANTIZED, X.mean(axis=0))
    assert found.dtype == np.float64
    expected = (X @ REFERENCE.astype(np.float64)).mean(axis=0) - (X @ QUANTIZED.astype(np.float64)).mean(axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_minimises_the_squared_output_error() -> None:
    found = BIAS + correction(TARGET, QUANTIZED, X.mean(axis=0))
    least = squared_error(found)
    assert least < squared_error(BIAS)
    for channel in range(len(found)):
        for step in (1e-3, -1e-3):
            assert squared_error(found + step * np.eye(len(found))[channel]) > least


def test_leaves_the_error_under_the_centred_gram() -> None:
    stats = LayerStats(gram_of(X), X.mean(axis=0), len(X))
    difference = QUANTIZED.astype(np.float64) - REFERENCE
    left = squared_error(BIAS + correction(TARGET, QUANTIZED, stats.mean))
    assert left == pytest.approx(layer_error(difference, stats.objective_gram(centred=True)), rel=1e-9)
    assert squared_error(BIAS) == pytest.approx(layer_error(difference, stats.objective_gram(centred=False)), rel=1e-9)


def test_shrinkage_of_two_parts() -> None:
    """Means 1 and 3 of 10 rows each, in two channels: the mean's variance is estimated as ((1 - 2)^2 + (3 - 2)^2) / (2 * 1) each."""
    parts = [(10, np.array([1.0, 1.0])), (10, np.array([3.0, 3.0]))]
    assert shrinkage(np.array([2.0, 2.0]), parts) == pytest.approx(1 - 2 / 8)
    assert shrinkage(np.array([2.0, 2.0]), parts[:1]) == 1  # one part says nothing of the variance
    assert shrinkage(np.array([2.0, 2.0]), []) == 1
    assert shrinkage(np.zeros(2), [(10, np.ones(2)), (10, -np.ones(2))]) == 1  # nothing to shrink
    assert shrinkage(np.full(2, 0.1), [(10, np.array([1.1, 1.1])), (10, np.array([-0.9, -0.9]))]) == 0  # noise only: none of it is added


def test_shrinkage_where_all_parts_agree() -> None:
    """Weights solved from few rows make one error on all of them; what they make on other rows says how certain that is."""
    parts = [(10, np.array([2.0, 2.0]))] * 2
    assert shrinkage(np.array([2.0, 2.0]), parts) == 1
    assert shrinkage(np.array([2.0, 2.0]), parts, error=40.0) == pytest.approx(1 - 40 / 20 / 8)
    assert shrinkage(np.array([2.0, 2.0]), parts, error=1000.0) == 0
    parts = [(10, np.array([1.0, 1.0])), (10, np.array([3.0, 3.0]))]
    assert shrinkage(np.array([2.0, 2.0]), parts, error=20.0) == pytest.approx(1 - 2 / 8)  # the parts differ by more than that


@pytest.mark.parametrize("counts", [(10, 10, 10, 10), (4, 6, 10, 20), (1, 39)])
def test_the_variance_of_the_mean_is_estimated_without_bias(counts: tuple[int, ...]) -> None:
    """``total^2`` (1 - factor) is on average the variance of the mean of all rows: sigma^2 / n, in every channel."""
    rng = np.random.default_rng(0)
    channels, sigma, mean, total_rows = 4000, 2.0, 30.0, sum(counts)
    means = [mean + sigma / np.sqrt(count) * rng.standard_normal(channels) for count in counts]
    total = sum(count * part for count, part in zip(counts, means, strict=True)) / total_rows
    factor = shrinkage(total, list(zip(counts, means, strict=True)))
    assert np.square(total).sum() * (1 - factor) == pytest.approx(channels * sigma**2 / total_rows, rel=0.1)


@pytest.mark.parametrize("signal", [0.0, 0.1, 1.0])
def test_a_shrunk_mean_is_nearer_to_the_truth(signal: float) -> None:
    """Of 16 rows in four parts: never farther than the mean, and much nearer where there is more noise than signal."""
    rng = np.random.default_rng(1)
    truth = signal * rng.standard_normal(64)
    shrunk, plain = 0.0, 0.0
    for _ in range(50):
        rows = truth + rng.standard_normal((16, 64))
        mean = rows.mean(axis=0)
        factor = shrinkage(mean, [(4, part.mean(axis=0)) for part in np.split(rows, 4)])
        assert 0 <= factor <= 1
        shrunk += np.square(factor * mean - truth).sum()
        plain += np.square(mean - truth).sum()
    assert shrunk < plain * {0.0: 0.1, 0.1: 0.4, 1.0: 1.0}[signal]
