"""Connected components: members of which pairs belong together, as the values that share a grid or a scale."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

H = TypeVar("H", bound=Hashable)


def connected(members: Iterable[H], pairs: Iterable[tuple[H, H]]) -> list[list[H]]:
    """Group members that pairs of them connect, directly or through others.

    Returns:
        The groups by their first member, each in the order of the members.
    """
    parent = {member: member for member in members}

    def root(member: H) -> H:
        while parent[member] != member:
            parent[member] = member = parent[parent[member]]
        return member

    for first, second in pairs:
        parent[root(second)] = root(first)
    groups: dict[H, list[H]] = {}
    for member in parent:
        groups.setdefault(root(member), []).append(member)
    return list(groups.values())
