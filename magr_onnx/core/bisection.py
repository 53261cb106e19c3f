"""Bisection: the first of several candidates, each better than those before it, that is good enough."""

from __future__ import annotations


class Bisection:
    """A search for the first good one of ``count`` candidates, where all after a good one are taken to be good.

    Attributes:
        next: The candidate to judge next; once `finished`, the first good one, or the last where none is known to be good.
        finished: Whether `next` has been judged, or all before it.
    """

    def __init__(self, count: int, first: int | None = None) -> None:
        """Begin with ``first``, or the one in the middle.

        Raises:
            ValueError: There is no candidate.
        """
        if count < 1:
            raise ValueError("a bisection needs a candidate")
        self._low, self._high, self._first = 0, count - 1, first

    @property
    def next(self) -> int:
        return (self._low + self._high) // 2 if self._first is None or self.finished else self._first

    @property
    def finished(self) -> bool:
        return self._low == self._high

    def take(self, is_good: bool) -> None:
        """Take note of whether `next` is good."""
        if not self.finished:
            self._low, self._high = (self._low, self.next) if is_good else (self.next + 1, self._high)
            self._first = None
