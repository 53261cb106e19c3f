"""Bisection against a look at every candidate."""

from __future__ import annotations

import pytest

from magr_onnx.core.bisection import Bisection


@pytest.mark.parametrize("begin", [None, 0])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
def test_it_finds_the_first_good_candidate(count: int, begin: int | None) -> None:
    """Whichever it is, in as many steps as the number of candidates has binary digits; the last one where none before it is good."""
    for first in range(count + 1):
        bisection, judged = Bisection(count, begin), list[int]()
        while not bisection.finished:
            judged.append(bisection.next)
            bisection.take(bisection.next >= first)
        assert bisection.next == min(first, count - 1)
        assert len(judged) == len(set(judged)) <= (count - 1).bit_length() + (begin is not None)
        assert begin is None or judged[:1] in ([], [begin])


def test_it_needs_a_candidate() -> None:
    with pytest.raises(ValueError, match="candidate"):
        Bisection(0)
