"""The l1-ball projection and the prox of the l_inf norm against oracles that sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magr_onnx.core.prox import levels, project_l1_ball, prox_linf
from tests.helpers import EXAMPLES, Array, project_by_sorting

pytestmark = pytest.mark.usefixtures("each_backend")

entries = st.floats(-100, 100, width=32)
vectors = hnp.arrays(np.float64, st.integers(1, 40), elements=entries)
radii = st.floats(0.01, 500)
DTYPES: list[tuple[Any, float]] = [(np.float64, 1e-12), (np.float32, 2e-6)]


def level_by_sorting(values: Array, threshold: float, metric: Array) -> float:
    """The root is the largest Newton step over all prefixes of the sorted entries."""
    order = np.argsort(-np.abs(values))
    weight = metric[order].astype(np.float64)
    steps = (np.cumsum(weight * np.abs(values[order]).astype(np.float64)) - threshold) / np.cumsum(weight)
    return max(0.0, float(steps.max()))


@EXAMPLES
@given(vectors, radii)
def test_projection_equals_sorting(v: Array, radius: float) -> None:
    np.testing.assert_allclose(project_l1_ball(v, radius), project_by_sorting(v[:, None], radius)[:, 0], atol=1e-10)


@EXAMPLES
@given(vectors, radii)
def test_projection_is_idempotent_and_lands_in_the_ball(v: Array, radius: float) -> None:
    p = project_l1_ball(v, radius)
    assert np.abs(p).sum() <= radius * (1 + 1e-9) + 1e-9
    np.testing.assert_allclose(project_l1_ball(p, radius), p, atol=1e-9)


def test_projection_inside_on_and_outside_the_ball() -> None:
    v = np.array([0.5, -1.0, 0.25])
    np.testing.assert_array_equal(project_l1_ball(v, 2.0), v)
    np.testing.assert_allclose(project_l1_ball(v, 1.75), v, atol=1e-15)
    np.testing.assert_allclose(project_l1_ball(v, 1.0), [0.25, -0.75, 0.0], atol=1e-15)
    np.testing.assert_array_equal(project_l1_ball(v, 0.0), np.zeros(3))
    with pytest.raises(ValueError, match="negative"):
        project_l1_ball(v, -1.0)


@EXAMPLES
@given(vectors, radii)
def test_prox_is_what_the_projection_leaves(v: Array, t: float) -> None:
    p = prox_linf(v, t)
    np.testing.assert_allclose(p + t * project_by_sorting(v[:, None] / t, 1.0)[:, 0], v, atol=1e-9)
    if np.abs(v).sum() <= t:
        np.testing.assert_array_equal(p, 0)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_prox_of_columns_is_columnwise(dtype: Any, tolerance: float) -> None:
    v = np.random.default_rng(0).standard_t(3, (50, 7)).astype(dtype)
    p = prox_linf(v, 2.5)
    assert p.dtype == dtype
    assert p.shape == v.shape
    np.testing.assert_allclose(p, v - project_by_sorting(v.astype(np.float64), 2.5), atol=10 * tolerance)
    np.testing.assert_allclose(p[:, 3], prox_linf(v[:, 3].copy(), 2.5), atol=10 * tolerance)


def test_prox_of_threshold_zero_is_the_identity() -> None:
    v = np.arange(-3.0, 3.0)
    p = prox_linf(v, 0.0)
    np.testing.assert_array_equal(p, v)
    assert p is not v


def starts(values: Array) -> list[Array | None]:
    """No start, zero, left and right of any root, beyond every entry, and astronomically beyond."""
    top = np.abs(values).max(axis=-1)
    return [None, *(np.asarray(f * top, values.dtype) for f in (0.0, 0.1, 0.7, 0.999, 1.0, 2.0, 1e30))]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("threshold", [0.01, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_level_solves_its_equation_from_any_start(dtype: Any, tolerance: float, threshold: float, spread: float) -> None:
    rng = np.random.default_rng(1)
    v = rng.standard_t(2, (9, 64)).astype(dtype)
    metric = np.exp(spread * rng.standard_normal(64)).astype(dtype)
    expected = np.array([level_by_sorting(row, threshold, metric) for row in v])
    for start in starts(v):
        c = levels(v, threshold, metric, start)
        assert c.dtype == dtype
        np.testing.assert_allclose(c, expected, rtol=10 * tolerance, atol=tolerance)
        mass = (metric * np.maximum(np.abs(v) - c[:, None], 0)).sum(axis=-1)
        slack = 10 * tolerance * (metric * np.abs(v)).sum(axis=-1)
        positive = c > 0
        assert (np.abs(mass - threshold) <= slack)[positive].all()
        assert (mass <= threshold + slack)[~positive].all()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_levels_of_groups_with_their_own_metric(dtype: Any, tolerance: float) -> None:
    rng = np.random.default_rng(2)
    v = rng.standard_normal((5, 4, 16)).astype(dtype)
    metric = rng.uniform(0.1, 10, (4, 16)).astype(dtype)
    expected = [[level_by_sorting(v[i, g], 3.0, metric[g]) for g in range(4)] for i in range(5)]
    for start in starts(v):
        np.testing.assert_allclose(levels(v, 3.0, metric, start), expected, rtol=10 * tolerance, atol=tolerance)


@EXAMPLES
@given(st.data())
def test_level_of_a_weighted_row_equals_sorting(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 30))
    v = data.draw(hnp.arrays(np.float64, n, elements=entries))
    metric = data.draw(hnp.arrays(np.float64, n, elements=st.floats(1e-3, 1e3)))
    threshold = data.draw(st.floats(0.01, 1e4))
    start = data.draw(st.none() | st.floats(0, 200))
    c = levels(v[None], threshold, metric, None if start is None else np.array([start]))
    np.testing.assert_allclose(c[0], level_by_sorting(v, threshold, metric), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("row", "threshold", "expected"), [([2, -2, 2, -2], 4, 1), ([3, 3, 1, 1], 4, 1), ([5, 1, 1], 4, 1), ([0, 0], 1, 0)]
)
def test_ties(dtype: Any, tolerance: float, row: list[float], threshold: float, expected: float) -> None:
    v = np.array([row], dtype)
    for start in (None, np.array([expected], dtype), np.array([row[0]], dtype)):
        np.testing.assert_allclose(levels(v, threshold, start=start), [expected], atol=10 * tolerance)
