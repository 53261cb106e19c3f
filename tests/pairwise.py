"""Tables of cases: rows in which every value, or every pair of values, occurs; the rest of the full product is marked slow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

Row = tuple[int, ...]


def each_value(*factors: Sequence[Any], times: int = 1) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: every value of every factor occurs in at least ``times`` quick rows, beside different others."""
    return _cases(factors, value_rows([len(factor) for factor in factors], times))


def each_pair(*factors: Sequence[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: any two values of any two factors occur together in a row that is not slow."""
    return _cases(factors, pair_rows([len(factor) for factor in factors]))


def value_rows(sizes: Sequence[int], times: int = 1) -> set[Row]:
    """Rows of places of values; those of the longest factor in turn, the others beside them and shifted by one in each further turn."""
    longest = max(sizes)
    return {
        tuple((row + turn * (factor != sizes.index(longest)) + factor * (row // size)) % size for factor, size in enumerate(sizes))
        for turn in range(times)
        for row in range(longest)
    }


def pair_rows(sizes: Sequence[int]) -> set[Row]:
    """A covering array of strength 2: each row begins with a pair that is missing and takes what completes most others."""
    factors = range(len(sizes))
    missing = {((i, a), (j, b)): None for i, j in itertools.combinations(factors, 2) for a in range(sizes[i]) for b in range(sizes[j])}
    rows = set()
    while missing:
        row = dict(next(iter(missing)))
        for factor in factors:
            if factor not in row:
                gains = [sum(tuple(sorted(((factor, value), other))) in missing for other in row.items()) for value in range(sizes[factor])]
                row[factor] = gains.index(max(gains))
        for pair in itertools.combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.add(tuple(row[factor] for factor in factors))
    return rows


def _cases(factors: Sequence[Sequence[Any]], quick: set[Row]) -> list[Any]:
    found = []
    for row in itertools.product(*(range(len(factor)) for factor in factors)):
        values = [factor[i] for factor, i in zip(factors, row, strict=True)]
        label = "-".join(str(getattr(value, "name", value)) for value in values)
        found.append(pytest.param(*values, id=label, marks=() if row in quick else pytest.mark.slow))
    return found
