"""The tables of cases have what they promise, and few rows."""

from __future__ import annotations

import itertools

import pytest

from tests.pairwise import each_pair, each_value, pair_rows, value_rows


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (7, 7), (16, 18), (18, 16), (4, 4, 2), (3, 5, 2, 9)], ids=str)
@pytest.mark.parametrize("times", [1, 2])
def test_every_value_occurs(sizes: tuple[int, ...], times: int) -> None:
    rows = value_rows(sizes, times)
    assert len(rows) <= times * max(sizes)
    for factor, size in enumerate(sizes):
        counts = [sum(row[factor] == value for row in rows) for value in range(size)]
        most = max(other for place, other in enumerate(sizes) if place != factor)
        assert min(counts) >= min(times, most)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (2, 2, 2, 2), (4, 2, 2, 2), (3, 5, 2, 9), (6, 6, 6)], ids=str)
def test_every_pair_occurs(sizes: tuple[int, ...]) -> None:
    rows = pair_rows(sizes)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    largest, second = sorted(sizes)[-1:-3:-1]
    assert len(rows) <= 1.6 * largest * second
    assert pair_rows(sizes) == rows


def test_the_rest_of_the_product_is_slow() -> None:
    for cases in (each_value("abc", "xy"), each_pair("abc", "xy", [1, 2])):
        assert len({case.values for case in cases}) == len(cases) in (6, 12)
        assert 0 < sum(not case.marks for case in cases) < len(cases)
    assert [case.id for case in each_value(["one"], ["other"])] == ["one-other"]
