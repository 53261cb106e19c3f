"""Bit layouts: inverse of each other, byte for byte what the operators document, and exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magr_onnx.core.packing import (
    container_bits,
    dequantize_matmulnbits,
    dequantize_qdq,
    kernel_block,
    pack_bits,
    pack_matmulnbits,
    pack_qdq,
    unpack_bits,
    unpack_matmulnbits,
)
from magr_onnx.core.types import BITS, QuantizedWeight, WeightSpec
from tests.helpers import EXAMPLES, Array, random_quantized

SOME_BITS = (2, 3, 4, 5, 8)  # 6 and 7 are stored like 5
LAYOUTS = [(16, 16), (32, 32), (40, 32), (33, 16), (300, None), (5, None), (100, 48), (200, 96), (1084, 512), (40, 512)]
layouts = pytest.mark.parametrize(("k", "group"), LAYOUTS)
every_bits = pytest.mark.parametrize("bits", SOME_BITS)
symmetry = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
scale_types = pytest.mark.parametrize("scale_dtype", ["float32", "float16"])


@EXAMPLES
@given(st.sampled_from([2, 4, 8]), hnp.array_shapes(min_dims=1, max_dims=3, max_side=19), st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, shape[-1]), codes)


def column(codes: list[int], zeros: list[int], spec: WeightSpec) -> QuantizedWeight:
    scales = np.full((len(zeros), 1), 0.5, np.float32)
    return QuantizedWeight(np.array(codes, np.uint8)[:, None], scales, np.array(zeros, np.uint8)[:, None], spec)


def test_bytes_of_4_bits() -> None:
    codes = [1, 2, 3, 15, *([0] * 12), 9, 0, 7]
    packed = pack_matmulnbits(column(codes, [3, 12], WeightSpec(4, 16)))
    expected = [[[0x21, 0xF3, 0, 0, 0, 0, 0, 0], [0x09, 0x07, 0, 0, 0, 0, 0, 0]]]
    np.testing.assert_array_equal(packed.weight, expected)
    np.testing.assert_array_equal(packed.zero_points, [[0xC3]])
    np.testing.assert_array_equal(packed.scales, [[0.5, 0.5]])
    assert (packed.bits, packed.block_size, packed.k, packed.n) == (4, 16, 19, 1)


def test_bytes_of_2_bits() -> None:
    codes = [1, 2, 3, 0, 3, *([0] * 11), 2]
    packed = pack_matmulnbits(column(codes, [1, 3], WeightSpec(2, 16)))
    np.testing.assert_array_equal(packed.weight, [[[0b00111001, 0b00000011, 0, 0], [0b00000010, 0, 0, 0]]])
    np.testing.assert_array_equal(packed.zero_points, [[0b00001101]])
    assert (packed.bits, packed.block_size, packed.k, packed.n) == (2, 16, 17, 1)


@every_bits
@symmetry
@layouts
@scale_types
def test_matmulnbits_is_exact(bits: int, symmetric: bool, k: int, group: int | None, scale_dtype: Any) -> None:
    weight = random_quantized(k, 3, WeightSpec(bits, group, symmetric, scale_dtype))
    packed = pack_matmulnbits(weight)
    stored = {3: 4, 5: 8}.get(bits, bits)
    blocks = -(-k // packed.block_size)
    assert packed.bits == stored == container_bits(bits)
    assert packed.weight.shape == (3, blocks, packed.block_size * stored // 8)
    assert packed.scales.shape == (3, blocks)
    assert packed.scales.dtype == scale_dtype
    codes, _, _ = unpack_matmulnbits(packed)
    np.testing.assert_array_equal(codes, weight.codes + ({3: 4, 5: 112}.get(bits, 0) if symmetric else 0))
    np.testing.assert_array_equal(dequantize_matmulnbits(packed), weight.dequantize(), strict=True)
    if symmetric:
        assert packed.zero_points is None
    else:
        assert packed.zero_points is not None
        assert packed.zero_points.shape == (3, -(-blocks * stored // 8))


def test_default_zero_points_are_left_out_of_asymmetric_weights_too() -> None:
    assert pack_matmulnbits(column([1, 2, 3], [8], WeightSpec(4, None))).zero_points is None
    assert pack_matmulnbits(column([1, 2, 3], [4], WeightSpec(3, None))).zero_points is not None  # the default of 4 bits is 8


def test_one_group_a_column_repeats_its_scale() -> None:
    weight = random_quantized(1000, 2, WeightSpec(4, None))
    packed = pack_matmulnbits(weight)
    assert packed.scales.shape[1] > 1
    np.testing.assert_array_equal(packed.scales, np.repeat(weight.scales.T, packed.scales.shape[1], axis=1))


@every_bits
@symmetry
@layouts
@scale_types
def test_qdq_is_exact(bits: int, symmetric: bool, k: int, group: int | None, scale_dtype: Any) -> None:
    weight = random_quantized(k, 3, WeightSpec(bits, group, symmetric, scale_dtype))
    packed = pack_qdq(weight)
    np.testing.assert_array_equal(dequantize_qdq(packed), weight.dequantize(), strict=True)
    width = container_bits(bits)
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if symmetric else (0, 2**width - 1)
    stored: list[Array] = [packed.codes] if packed.zero_points is None else [packed.codes, packed.zero_points]
    assert all(low <= a.min() and a.max() <= high for a in stored)
    assert (packed.zero_points is None) == symmetric
    assert packed.scales.dtype == scale_dtype
    if group is None or group >= k:
        assert (packed.axis, packed.block_size, packed.scales.shape) == (1, 0, (3,))
    else:
        assert (packed.axis, packed.block_size) == (0, kernel_block(group, k, bits))
        assert packed.scales.shape == (-(-k // packed.block_size), 3)


@pytest.mark.parametrize(
    ("group", "k", "block"),
    [(16, 999, 16), (32, 999, 32), (48, 999, 16), (96, 999, 32), (192, 999, 64), (256, 999, 256), (512, 999, 256), (768, 999, 256)],
)
def test_block_is_the_largest_power_of_two_in_the_group(group: int, k: int, block: int) -> None:
    assert {kernel_block(group, k, bits) for bits in BITS} == {block}


@pytest.mark.parametrize(("k", "block"), [(4, 16), (17, 32), (100, 128), (256, 256), (300, 64), (1024, 256)])
def test_block_of_a_whole_column_needs_the_fewest_bytes(k: int, block: int) -> None:
    assert kernel_block(None, k, 4) == block
    assert kernel_block(k, k, 4) == block
    assert kernel_block(k + 7, k, 4) == block


@pytest.mark.parametrize("group", [1, 7, 8, 24, 40])
def test_groups_no_kernel_has(group: int) -> None:
    assert kernel_block(group, 100, 4) is None
    weight = random_quantized(100, 2, WeightSpec(4, group))
    for pack in (pack_matmulnbits, pack_qdq):
        with pytest.raises(ValueError, match=f"group size {group} "):
            pack(weight)
