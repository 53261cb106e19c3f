"""Integer grids: what they hold, and that the search never loses to min-max."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magr_onnx.core.grid import Grid, choose, minmax, search
from magr_onnx.core.types import BITS, WeightSpec
from tests.helpers import EXAMPLES, Array, layer

pytestmark = pytest.mark.usefixtures("each_backend")

SPECS = [WeightSpec(b, g, s) for b in (2, 3, 4, 5, 8) for s in (False, True) for g in (None, 7, 32)]
specs = pytest.mark.parametrize("spec", SPECS, ids=str)
K, N = 45, 6


def both(weights: Array, gram: Array, spec: WeightSpec) -> list[Grid]:
    return [minmax(weights, spec), minmax(weights, spec, 0.8), search(weights, spec, gram.diagonal())]


def check_grid(grid: Grid, weights: Array) -> None:
    """Codes fit, zero is on the grid, and rounding is to the nearest grid point."""
    spec = grid.spec
    assert grid.scales.dtype == grid.zeros.dtype == np.float32
    assert grid.scales.shape == grid.zeros.shape == (spec.groups(len(weights)), weights.shape[1])
    assert np.isfinite(grid.scales).all()
    assert (grid.scales > 0).all()
    assert (grid.zeros == np.rint(grid.zeros)).all()
    assert grid.zeros.min() >= 0
    assert grid.zeros.max() <= spec.top
    if spec.symmetric:
        assert (grid.zeros == spec.middle).all()
    codes = grid.codes(weights)
    assert (codes == np.rint(codes)).all()
    assert codes.min() >= 0
    assert codes.max() <= spec.top
    assert (grid.weight(grid.codes(np.zeros_like(weights))).dequantize() == 0).all()
    back = grid.weight(codes).dequantize()
    rows = spec.group_of_row(len(weights))
    step, zero = grid.scales[rows], grid.zeros[rows]
    nearest = np.clip(weights, -zero * step, (spec.top - zero) * step)
    assert (np.abs(back - nearest) <= step * (0.5 + 1e-4)).all()


@specs
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_grids_hold_their_weights(spec: WeightSpec, scale_dtype: Any) -> None:
    spec = WeightSpec(spec.bits, spec.group_size, spec.symmetric, scale_dtype)
    weights, gram = layer(K, N)
    for grid in both(weights, gram, spec):
        check_grid(grid, weights)
        np.testing.assert_array_equal(grid.scales, grid.scales.astype(scale_dtype).astype(np.float32))


@specs
def test_minmax_is_within_half_a_step_everywhere(spec: WeightSpec) -> None:
    weights, _ = layer(K, N)
    grid = minmax(weights, spec)
    off = np.abs(grid.weight(grid.codes(weights)).dequantize() - weights)
    assert (off <= grid.scales[spec.group_of_row(K)] * (0.5 + 1e-4)).all()


@specs
def test_search_never_loses_to_minmax(spec: WeightSpec) -> None:
    weights, gram = layer(K, N, seed=1)
    diagonal = gram.diagonal()

    def errors(grid: Grid) -> Array:
        weighted = diagonal[:, None] * (grid.weight(grid.codes(weights)).dequantize().astype(np.float64) - weights) ** 2
        return np.add.reduceat(weighted, np.arange(0, K, spec.rows(K)), axis=0)

    found, plain = errors(search(weights, spec, diagonal)), errors(minmax(weights, spec))
    assert (found <= plain * (1 + 1e-5)).all()
    if spec.bits < 5:
        assert found.sum() < 0.98 * plain.sum()


@EXAMPLES
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 3)), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from([None, 1, 4]),
    st.sampled_from(["float32", "float16"]),
)
def test_any_weight_gets_a_sound_grid(weights: Array, bits: int, symmetric: bool, group: int | None, scale_dtype: Any) -> None:
    spec = WeightSpec(bits, group, symmetric, scale_dtype)
    for grid in both(weights, np.eye(len(weights)), spec):
        check_grid(grid, weights)


@specs
def test_all_zero_groups_stay_zero(spec: WeightSpec) -> None:
    weights, gram = layer(K, N)
    weights[:32] = 0
    weights[:, 0] = 0
    for grid in both(weights, gram, spec):
        back = grid.weight(grid.codes(weights)).dequantize()
        assert np.isfinite(back).all()
        assert (back[weights == 0] == 0).all()


@specs
def test_last_group_is_gridded_on_its_own(spec: WeightSpec) -> None:
    weights, gram = layer(K, N)
    rows = spec.rows(K)
    tail = (K - 1) // rows * rows
    for whole, alone in zip(both(weights, gram, spec), both(weights[tail:], gram[tail:, tail:], spec), strict=True):
        np.testing.assert_array_equal(whole.scales[-1], alone.scales[0])
        np.testing.assert_array_equal(whole.zeros[-1], alone.zeros[0])


def test_minmax_by_hand() -> None:
    weights = np.array([[-1.0, 0.0], [0.5, 2.0], [2.0, 3.0]], np.float32)
    grid = minmax(weights, WeightSpec(2, None))
    np.testing.assert_array_equal(grid.scales, [[1.0, 1.0]])
    np.testing.assert_array_equal(grid.zeros, [[1, 0]])
    np.testing.assert_array_equal(grid.codes(weights), [[0, 0], [1, 2], [3, 3]])
    symmetric = minmax(weights, WeightSpec(2, None, symmetric=True))
    np.testing.assert_array_equal(symmetric.scales, [[2.0, 3.0]])
    np.testing.assert_array_equal(symmetric.zeros, [[2, 2]])
    np.testing.assert_array_equal(minmax(weights, WeightSpec(2, None), 0.5).scales, [[0.5, 0.5]])


def test_dead_inputs_keep_the_minmax_grid() -> None:
    weights, _ = layer(K, N)
    spec = WeightSpec(3, 7)
    np.testing.assert_array_equal(search(weights, spec, np.zeros(K)).scales, minmax(weights, spec).scales)


def test_choose() -> None:
    weights, gram = layer(K, N)
    spec = WeightSpec(3, 7)
    np.testing.assert_array_equal(choose(weights, spec, gram.diagonal(), 0.8).scales, minmax(weights, spec, 0.8).scales)
    np.testing.assert_array_equal(choose(weights, spec, gram.diagonal(), None).scales, search(weights, spec, gram.diagonal()).scales)


def test_grid_of_a_quantized_weight_is_the_grid_it_was_made_on() -> None:
    weights, _ = layer(K, N)
    grid = minmax(weights, WeightSpec(4, 7))
    again = Grid.of(grid.weight(grid.codes(weights)))
    np.testing.assert_array_equal(again.scales, grid.scales)
    np.testing.assert_array_equal(again.zeros, grid.zeros)
    assert again.k == K


def test_float16_scales_stay_in_range() -> None:
    spec = WeightSpec(2, None, scale_dtype="float16")
    for size in (1e-12, 1e6):  # scales below the smallest and above the largest float16
        weights = np.array([[-size], [size]], np.float32)
        grid = minmax(weights, spec)
        assert np.isfinite(grid.scales).all()
        assert np.isfinite(grid.weight(grid.codes(weights)).dequantize()).all()
