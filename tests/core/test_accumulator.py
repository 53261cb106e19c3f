"""Exact accumulator arithmetic against enumeration of every input and every order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magr_onnx.core.overflow.accumulator import (
    Accumulator,
    Budget,
    RunningSums,
    bits_for,
    data_type_bits,
    extremes,
    largest_block,
    log2_gap,
    signed_sums,
    smallest_feasible,
    tile_starts,
)
from magr_onnx.errors import OptionError

Codes = npt.NDArray[np.int64]
RANGES = [(0, 3), (-2, 1), (-1, 1), (0, 1)]


def all_inputs(k: int, x_min: int, x_max: int) -> Codes:
    return np.array(list(itertools.product(range(x_min, x_max + 1), repeat=k)), np.int64).reshape(-1, k)


def fits(codes: Codes, budget: Budget) -> bool:
    """Whether neither the tiles of ``codes (K, N)`` nor their outer sum can overflow, for any input."""
    low, high = extremes(codes, budget.accumulator.tile, budget.x_min, budget.x_max)
    limit = 2 ** (budget.accumulator.outer_bits - 1)
    inside = low.min() >= budget.low and high.max() <= budget.high
    return bool(inside and low.sum(axis=0).min() >= -limit and high.sum(axis=0).max() <= limit - 1)


def brute(codes: Codes, tile: int | None, x_min: int, x_max: int, block: int | None = None) -> tuple[list[Any], list[Any]]:
    """Least and greatest sum of every tile, by trying every input."""
    k = len(codes)
    low, high = [], []
    for begin in range(0, k, block or k):
        end = min(begin + (block or k), k)
        for start in range(begin, end, tile or k):
            part = codes[start : min(start + (tile or k), end)]
            sums = all_inputs(len(part), x_min, x_max) @ part
            low.append(sums.min(axis=0))
            high.append(sums.max(axis=0))
    return low, high


tiny = st.lists(st.integers(-4, 4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(tiny, st.sampled_from([None, 1, 2, 3, 7]), st.sampled_from(RANGES), st.sampled_from([None, 2, 3]))
def test_extremes_are_reached_and_not_passed(column: list[int], tile: int | None, span: tuple[int, int], block: int | None) -> None:
    codes = np.array([column, column[::-1]]).T
    low, high = extremes(codes, tile, *span, block)
    expected_low, expected_high = brute(codes, tile, *span, block)
    np.testing.assert_array_equal(low, expected_low)
    np.testing.assert_array_equal(high, expected_high)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=4), st.sampled_from(RANGES))
def test_no_order_of_summation_leaves_the_extremes(column: list[int], span: tuple[int, int]) -> None:
    codes = np.array(column)[:, None]
    low, high = (int(a[0, 0]) for a in extremes(codes, None, *span))
    seen = [0]
    for x in all_inputs(len(column), *span):
        for order in itertools.permutations(range(len(column))):
            seen += np.cumsum((x * column)[list(order)]).tolist()
    assert (min(seen), max(seen)) == (low, high)


def test_least_code_of_a_narrow_type_counts() -> None:
    codes = np.full((4, 1), -128, np.int8)
    low, high = extremes(codes, None, 0, 255)
    assert (low.tolist(), high.tolist()) == ([[-4 * 128 * 255]], [[0]])


def test_no_rows() -> None:
    assert extremes(np.zeros((0, 3), np.int8), 2, 0, 255)[1].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("k", "tile", "block", "expected"),
    [(7, None, None, [0]), (7, 2, None, [0, 2, 4, 6]), (7, 2, 3, [0, 2, 3, 5, 6]), (7, None, 4, [0, 4]), (6, 9, 3, [0, 3])],
)
def test_tiles_start_afresh_with_blocks(k: int, tile: int | None, block: int | None, expected: list[int]) -> None:
    assert tile_starts(k, tile, block).tolist() == expected


def test_signs_are_summed_apart() -> None:
    p, m = signed_sums(np.array([[3], [-1], [2], [-5], [1]], np.int8), 2)
    assert (p.tolist(), m.tolist()) == ([[3], [2], [1]], [[-1], [-5], [0]])


@pytest.mark.parametrize("kind", [np.int8, np.float32])
def test_large_weights_are_summed_in_pieces(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(-128, 128, (7, 5)).astype(kind)
    budget = Budget(Accumulator(16, 2, 32))
    whole = *signed_sums(codes, 2, 3), *budget.column_extremes(codes)
    monkeypatch.setattr("magr_onnx.core.overflow.accumulator.CHUNK", 14)  # two columns
    pieces = *signed_sums(codes, 2, 3), *budget.column_extremes(codes)
    for a, b in zip(whole, pieces, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40))
def test_bits_hold_the_range_and_no_fewer_do(a: int, b: int) -> None:
    low, high = min(a, b), max(a, b)
    bits = bits_for(low, high)
    assert -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)  # noqa: PT018
    assert bits == 1 or low < -(2 ** (bits - 2)) or high >= 2 ** (bits - 2)


@settings(max_examples=150, deadline=None)
@given(tiny, st.sampled_from([None, 1, 2, 3]), st.sampled_from(RANGES), st.integers(2, 6), st.integers(0, 2))
def test_fits_is_necessary_and_sufficient(column: list[int], tile: int | None, span: tuple[int, int], bits: int, more: int) -> None:
    codes = np.array(column)[:, None]
    budget = Budget(Accumulator(bits, tile, bits + more), *span)
    low, high = brute(codes, tile, *span)
    outer = 2 ** (bits + more - 1)
    inside = min(map(int, np.ravel(low))) >= budget.low and max(map(int, np.ravel(high))) <= budget.high
    inside = inside and sum(map(int, np.ravel(low))) >= -outer and sum(map(int, np.ravel(high))) <= outer - 1
    assert fits(codes, budget) is inside


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_room_offers_exactly_the_codes_that_fit(data: st.DataObject) -> None:
    """Whatever was taken before, in any order: a code is offered if and only if its tiles, of all orders of K, can still hold it."""
    tile = data.draw(st.sampled_from([None, 1, 2, 3]))
    span = data.draw(st.sampled_from([*RANGES, (0, 255), (-128, 127)]))
    bits = data.draw(st.integers(smallest_feasible(Budget(Accumulator(16, tile), *span)), 12))
    budget = Budget(Accumulator(bits, tile, 32), *span, data.draw(st.sampled_from([(1,), (2,), (3,), (1, 2), (3, 2, 1)])))
    k = 6
    room = RunningSums(budget, k, 1)

    def expected_to_fit() -> bool:
        orders = (codes.reshape(-1, taps).T.reshape(-1, 1) for taps in budget.taps)
        return all(fits(ordered, budget) for ordered in orders)

    codes = np.zeros((k, 1), np.int64)
    for row in data.draw(st.permutations(range(k))):
        low, high = (int(a[0]) for a in room.limits(row))
        for code, expected in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
            codes[row] = code
            assert expected_to_fit() is expected, (row, code)
        codes[row] = data.draw(st.integers(low, high))
        room.take(row, codes[row])
    for _ in range(2):
        rebuilt = RunningSums(budget, k, 1, codes)
        for row in range(k):
            np.testing.assert_array_equal(room.limits(row), rebuilt.limits(row))
        room.take(2, codes[2], sign=-1)
        codes[2] = 0


@pytest.mark.parametrize("bits", range(2, 18))
@pytest.mark.parametrize("span", [*RANGES, (0, 255), (-128, 127)])
def test_largest_lone_code(bits: int, span: tuple[int, int]) -> None:
    budget = Budget(Accumulator(bits, None, 32), *span)
    c = budget.largest_code
    assert all(fits(np.array([[s * c]]), budget) for s in (1, -1))
    assert not all(fits(np.array([[s * (c + 1)]]), budget) for s in (1, -1))
    assert (c > 0) is (bits >= smallest_feasible(budget))


@pytest.mark.parametrize(("tile", "x", "q"), [(64, (0, 255), (-128, 127)), (2, (-127, 127), (0, 15)), (3, (-2, 1), (-2, 1))])
def test_data_type_bound_holds_the_worst_codes(tile: int, x: tuple[int, int], q: tuple[int, int]) -> None:
    bits = data_type_bits(tile, *x, *q)
    worst = [extremes(np.full((tile, 1), c), None, *x) for c in q]
    low, high = min(int(w[0].min()) for w in worst), max(int(w[1].max()) for w in worst)
    assert bits_for(low, high) == bits


def test_largest_block_of_four_bit_codes_in_sixteen_bits() -> None:
    assert largest_block(4, 16, (16, 32, 64)) == 16  # 16 * 127 * 15 = 30480; 32 would need 60960
    assert largest_block(8, 16, (16, 32)) is None


def test_headroom() -> None:
    assert log2_gap(-10, 32767, 16) == 0
    assert log2_gap(0, 0, 16) == float("inf")
    assert log2_gap(0, 65534, 16) == -1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Accumulator(1),
        lambda: Accumulator(16, 0),
        lambda: Accumulator(16, 2, 8),
        lambda: Accumulator(65, None, 65),
        lambda: Budget(Accumulator(), 1, 255),
        lambda: Budget(Accumulator(), -5, 0),
    ],
)
def test_impossible_registers_are_refused(make: Any) -> None:
    with pytest.raises(OptionError):
        make()
