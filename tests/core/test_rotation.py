"""Rotations: orthogonal in every width, even, and better for the weights they are chosen by."""

from __future__ import annotations

import numpy as np
import pytest

from magr_onnx.core.quantizers import rtn
from magr_onnx.core.rotation import Rotation, random_rotation
from magr_onnx.core.rotation_descent import Turned, descend, gradient
from magr_onnx.core.types import Array, WeightSpec
from tests.graphs import random

WIDTHS = (1, 2, 3, 7, 12, 20, 24, 28, 36, 40, 52, 64, 96, 100, 160, 256, 576, 1024)


def dense(rotation: Rotation) -> Array:
    return rotation.of_rows(np.eye(len(rotation.signs)))


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_is_orthogonal_and_even(width: int, keeps_ones: bool) -> None:
    q = dense(random_rotation(width, 0, keeps_ones))
    np.testing.assert_allclose(q.T @ q, np.eye(width), atol=1e-12)
    if keeps_ones:
        np.testing.assert_allclose(q.sum(axis=0), 1, atol=1e-12)
        np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-12)
    assert np.abs(q).max() <= 6 / np.sqrt(width)


@pytest.mark.parametrize("width", [4, 12, 20, 28, 36, 40, 44, 64, 96, 160, 384, 768, 896, 1152, 2048])
def test_where_there_is_a_hadamard_matrix_all_entries_are_equally_large(width: int) -> None:
    q = dense(random_rotation(width, 1))
    np.testing.assert_allclose(np.abs(q), 1 / np.sqrt(width), atol=1e-12)


def test_seeds_give_other_rotations_and_the_same_seed_the_same() -> None:
    a, b, c = (dense(random_rotation(24, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


@pytest.mark.parametrize("width", [7, 24, 40])
def test_rows_and_columns_are_products_with_the_matrix(width: int) -> None:
    rotation, rng = random_rotation(width, 3, keeps_ones=True), np.random.default_rng(0)
    q, x, w = dense(rotation), rng.standard_normal((2, 5, width)), rng.standard_normal((width, 9))
    np.testing.assert_allclose(rotation.of_rows(x), x @ q, atol=1e-12)
    np.testing.assert_allclose(rotation.of_rows(x[0, 0]), x[0, 0] @ q, atol=1e-12)
    np.testing.assert_allclose(rotation.of_columns(w), q.T @ w, atol=1e-12)


def naive_objective(q: Array, weights: list[Turned], block: int | None) -> float:
    """By the definition: the mean over columns and blocks of the squared 8-norm, in units of the mean square of the weight."""
    total = 0.0
    for turned in weights:
        v = q.T @ turned.weight if turned.reads else turned.weight @ q
        rows = block or len(v)
        norms = [np.linalg.norm(column[i : i + rows], 8) ** 2 for column in v.T for i in range(0, len(v), rows)]
        total += float(np.mean(norms) / np.square(turned.weight).mean())
    return total


@pytest.mark.parametrize("block", [None, 16])
def test_the_gradient_is_that_of_the_objective(block: int | None) -> None:
    rng, spec, k = np.random.default_rng(0), WeightSpec(3, block), 24
    weights = [Turned(rng.standard_normal((k, 10)), True), Turned(rng.standard_normal((40, k)), False)]
    weights[0].weight[:, 4], weights[1].weight[8:32] = 0, 0  # an output that is not used; whole blocks
    q = dense(random_rotation(k, 0))
    value, slope = gradient(q, [*weights, Turned(np.zeros((k, 2)), True)], spec)
    assert np.isfinite(slope).all()
    assert value == pytest.approx(naive_objective(q, weights, block))
    for i, j in ((0, 0), (3, 5), (23, 1)):
        shift = np.zeros_like(q)
        shift[i, j] = 1e-5
        numeric = (naive_objective(q + shift, weights, block) - naive_objective(q - shift, weights, block)) / 2e-5
        assert slope[i, j] == pytest.approx(numeric, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("keeps_ones", [False, True])
def test_descent_lowers_the_rounding_error_and_stays_a_rotation(keeps_ones: bool) -> None:
    spec, k = WeightSpec(3, None), 32
    weights = [Turned(random(k, 40), True), Turned(random(50, k, seed=1), False)]
    start = random_rotation(k, 0, keeps_ones)
    found = descend(start, weights, spec, 80)
    q = dense(found)
    np.testing.assert_allclose(q.T @ q, np.eye(k), atol=1e-12)
    if keeps_ones:
        np.testing.assert_allclose(q.sum(axis=0), 1, atol=1e-9)
        np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-9)

    def error(rotation: Rotation) -> float:
        turned = [rotation.of_columns(weights[0].weight), rotation.of_rows(weights[1].weight)]
        return sum(float(np.square(rtn.quantize(v.astype(np.float32), np.ones(len(v)), spec).dequantize() - v).mean()) for v in turned)

    assert error(found) < 0.85 * error(start)
    np.testing.assert_array_equal(dense(descend(start, weights, spec, 80)), q)


def test_descent_on_a_sample_of_many_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are drawn anew in every step, where there are more weights than a step looks at."""
    rng, spec, k = np.random.default_rng(2), WeightSpec(4, None), 16
    weights = [Turned(rng.standard_normal((k, 400)).astype(np.float32) ** 3, True), Turned(rng.standard_normal((90, k)), False)]
    monkeypatch.setattr("magr_onnx.core.rotation_descent.SAMPLE", 1000)
    start = random_rotation(k, 0)
    found = descend(start, weights, spec, 60)
    assert gradient(dense(found), weights, spec)[0] < 0.97 * gradient(dense(start), weights, spec)[0]


def test_nothing_to_choose_by_leaves_the_start() -> None:
    start = random_rotation(8, 0)
    assert descend(start, [], WeightSpec(), 10) is start
    assert descend(start, [Turned(np.ones((8, 3), np.float32), True)], WeightSpec(), 0) is start
