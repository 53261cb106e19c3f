"""Bias compensation on actual inputs."""

from __future__ import annotations

import numpy as np
import pytest

from magr_onnx.core.bias_compensation import compensate
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
    found = compensate(BIAS, TARGET, QUANTIZED, X.mean(axis=0))
    assert found.dtype == np.float64
    expected = BIAS + (X @ REFERENCE.astype(np.float64)).mean(axis=0) - (X @ QUANTIZED.astype(np.float64)).mean(axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(compensate(None, TARGET, QUANTIZED, X.mean(axis=0)), expected - BIAS, rtol=1e-10, atol=1e-10)


def test_minimises_the_squared_output_error() -> None:
    found = compensate(BIAS, TARGET, QUANTIZED, X.mean(axis=0))
    least = squared_error(found)
    assert least < squared_error(BIAS)
    for channel in range(len(found)):
        for step in (1e-3, -1e-3):
            assert squared_error(found + step * np.eye(len(found))[channel]) > least


def test_leaves_the_error_under_the_centred_gram() -> None:
    stats = LayerStats(gram_of(X), X.mean(axis=0), len(X))
    difference = QUANTIZED.astype(np.float64) - REFERENCE
    left = squared_error(compensate(BIAS, TARGET, QUANTIZED, stats.mean))
    assert left == pytest.approx(layer_error(difference, stats.objective_gram(centred=True)), rel=1e-9)
    assert squared_error(BIAS) == pytest.approx(layer_error(difference, stats.objective_gram(centred=False)), rel=1e-9)
