"""Spectral bound, layer error and the factorization that retries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from magr_onnx.core.linalg import automatic_damping, cholesky, column_errors, damped, lambda_max, layer_error
from magr_onnx.errors import NonFiniteError
from tests.helpers import Array, activations, gram_of

pytestmark = pytest.mark.usefixtures("each_backend")


def with_spectrum(eigenvalues: Array, seed: int = 0) -> Array:
    k = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((k, k)))
    matrix: Array = (q * eigenvalues) @ q.T
    return matrix


SPECTRA = {
    "power law": 1 / np.arange(1.0, 101),
    "heavy tail": np.exp(3 * np.random.default_rng(0).standard_normal(100)),
    "uniform": np.linspace(0, 1, 100),
    "clustered": np.r_[np.full(10, 1.0), np.linspace(0.98, 0.999, 20), np.full(70, 1e-3)],
    "flat": np.ones(100),
    "rank one": np.r_[7.0, np.zeros(99)],
    "small": np.linspace(0.1, 3, 24),
    "just iterated": np.linspace(0.1, 3, 25),
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_lambda_max(name: str, dtype: Any) -> None:
    matrix = with_spectrum(SPECTRA[name]).astype(dtype)
    expected = float(np.linalg.eigvalsh(matrix.astype(np.float64))[-1])
    assert expected * (1 - 5e-3) <= lambda_max(matrix) <= expected * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rows", [10, 200, 5000])
def test_lambda_max_of_independent_inputs(rows: int, dtype: Any) -> None:
    gram = gram_of(np.random.default_rng(1).standard_normal((rows, 100)))
    assert lambda_max(gram.astype(dtype)) == pytest.approx(np.linalg.eigvalsh(gram)[-1], rel=1e-4)


def test_lambda_max_of_correlated_inputs_is_tight() -> None:
    gram = gram_of(activations(600, 150, tail=1.5))
    assert lambda_max(gram) == pytest.approx(np.linalg.eigvalsh(gram)[-1], rel=1e-6)


@pytest.mark.parametrize("k", [1, 24, 25, 60])
def test_lambda_max_of_zero_and_of_size_one(k: int) -> None:
    assert lambda_max(np.zeros((k, k))) == 0
    assert lambda_max(np.array([[3.5]])) == 3.5


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_errors_are_those_of_the_outputs(dtype: Any) -> None:
    x = activations(90, 20)
    difference = np.random.default_rng(1).standard_normal((20, 7)).astype(dtype)
    squares = ((x @ difference) ** 2).mean(axis=0)
    errors = column_errors(difference, gram_of(x))
    assert errors.dtype == np.float64
    np.testing.assert_allclose(errors, squares, rtol=1e-5)
    assert layer_error(difference, gram_of(x)) == pytest.approx(squares.sum(), rel=1e-5)


def test_damping_is_in_units_of_each_input_s_power() -> None:
    gram = np.array([[1.0, 0.5, 0], [0.5, 6.0, 0], [0, 0, 0]])
    wanted = np.array([[1.1, 0.5, 0], [0.5, 6.6, 0], [0, 0, 0.1e-6 * 7 / 3]])  # the dead input gets a trace of the mean
    np.testing.assert_allclose(damped(gram, 0.1), wanted)
    assert gram[0, 0] == 1
    np.testing.assert_allclose(damped(np.zeros((2, 2)), 0.1), 1e-7 * np.eye(2))


def test_damping_follows_the_number_of_rows() -> None:
    assert automatic_damping(100, 2000) == pytest.approx(0.1)
    assert automatic_damping(100, 10) == 1
    assert automatic_damping(100, 10**7) == automatic_damping(100, 0) == 0.01


def test_cholesky_of_a_definite_matrix_keeps_its_damping() -> None:
    gram = gram_of(activations(90, 20))
    factor = cholesky(gram.astype(np.float32), 0.01)
    assert factor.damping == 0.01
    assert factor.lower.dtype == np.float64
    np.testing.assert_allclose(factor.lower @ factor.lower.T, damped(gram, 0.01), rtol=1e-5, atol=1e-6)


def test_cholesky_raises_the_damping_of_an_indefinite_matrix() -> None:
    gram = np.eye(10)
    gram[0, 1] = gram[1, 0] = 1.5  # smallest eigenvalue -0.5
    factor = cholesky(gram, 0.01)
    assert factor.damping == pytest.approx(1.0)
    np.testing.assert_allclose(factor.lower @ factor.lower.T, damped(gram, factor.damping), atol=1e-12)


def test_cholesky_of_a_singular_matrix_without_damping() -> None:
    gram = np.diag([1.0, 0.0, 2.0])
    assert cholesky(gram, 0.0).damping == pytest.approx(1e-6)
    assert cholesky(np.zeros((3, 3)), 0.0).damping == pytest.approx(1e-6)


def test_cholesky_gives_up_and_names_the_last_damping_it_tried() -> None:
    with pytest.raises(NonFiniteError, match=r"\(4 x 4\).*damping 10$"):
        cholesky(-1e9 * np.diag([0.0, 0.0, 0.0, 1.0]) + 1e9 * np.diag([1.0, 0.0, 0.0, 0.0]), 0.01, retries=3)
    with pytest.raises(NonFiniteError):
        cholesky(np.full((4, 4), np.nan), 0.01)


def test_what_rounding_leaves_of_constant_inputs_is_damped() -> None:
    """Once the mean of inputs that never change is taken off, nothing but noise of either sign is left."""
    noise = np.random.default_rng(0).standard_normal((24, 24)) * 1e-7
    for gram in (noise + noise.T, np.full((1, 1), -1e-8), np.zeros((3, 3))):
        factor = cholesky(gram, 0.1)
        assert np.isfinite(factor.lower).all()
        assert (np.diag(factor.lower) > 0).all()
