"""Grouping of layers whose matrices fit into memory together; each group costs one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def split_by_budget(units: Iterable[Sequence[T]], cost: Callable[[T], tuple[Hashable, int]], budget: int) -> list[list[T]]:
    """Split units, in order, into groups that fit ``budget`` bytes, or are one unit that does not.

    Args:
        units: Elements that must stay together.
        cost: Returns the key of the matrix an element needs, and its bytes; elements of a group share matrices of the same key.
        budget: Bytes per group.
    """
    groups: list[list[T]] = []
    used: dict[Hashable, int] = {}
    for unit in units:
        costs = dict(map(cost, unit))
        new = sum(size for key, size in costs.items() if key not in used)
        if not groups or (new and sum(used.values()) + new > budget):
            groups.append([])
            used = {}
        groups[-1] += unit
        used |= costs
    return groups
