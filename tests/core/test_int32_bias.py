"""Biases of integer products."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from magr_onnx.core.int32_bias import bias_codes, bias_scales, with_room
from magr_onnx.core.types import ActivationGrid, QuantizedWeight, WeightSpec
from tests.helpers import random_quantized

SPEC = WeightSpec(8, None, True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.floats(-9, 3), st.floats(-40, 3), st.floats(-6, 3))
def test_every_bias_fits_and_weights_change_by_less_than_can_be_seen(seed: int, bias: float, scale: float, step: float) -> None:
    rng = np.random.default_rng(seed)
    weight = random_quantized(12, 5, SPEC, seed)
    scales = weight.scales.copy()
    scales[0, 1:3] = np.float32(10**scale)  # channels that are nearly or quite dead
    weight = QuantizedWeight(weight.codes, scales, weight.zero_points, SPEC)
    biases, grid = rng.standard_normal(5) * 10**bias, ActivationGrid(float(np.float32(10**step)), 7)
    result = with_room(weight, biases, grid)
    units = bias_scales(result.scales[0], grid)
    codes = bias_codes(biases, units)
    assert np.abs(codes).max() <= 2**30 + 128
    assert (result.scales >= weight.scales).all()
    raised = result.scales[0] > weight.scales[0]
    np.testing.assert_array_equal(result.codes[:, ~raised], weight.codes[:, ~raised])
    change = np.abs(result.dequantize().astype(float) - weight.dequantize())[:, raised] * 255 * grid.scale
    assert (change <= 200 * np.abs(biases[raised]) / 2**30).all()  # of every product, beside the bias


def test_a_channel_of_zeros_gets_a_scale_that_its_bias_fits() -> None:
    codes = np.full((3, 1), SPEC.middle, np.uint8)
    weight = QuantizedWeight(codes, np.full((1, 1), 1e-38, np.float32), np.full((1, 1), SPEC.middle, np.uint8), SPEC)
    grid = ActivationGrid(0.02, 0)
    result = with_room(weight, np.array([-3.5]), grid)
    units = bias_scales(result.scales[0], grid)
    np.testing.assert_allclose(bias_codes(np.array([-3.5]), units) * units, [-3.5], rtol=1e-6)
    assert not result.dequantize().any()
