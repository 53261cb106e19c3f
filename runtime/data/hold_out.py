"""Which calibration batches are held out of the statistics that layers are solved with, to choose options by."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = 4


@dataclass(frozen=True, slots=True)
class HoldOut:
    """Every ``every``-th batch is held out, the first of them after as many as that; None holds out none.

    ``index in HoldOut()`` tells whether a batch is.
    """

    every: int | None = HELD_OUT

    def __contains__(self, batch: int) -> bool:
        return self.every is not None and batch % self.every == self.every - 1

    def __bool__(self) -> bool:
        return self.every is not None


NONE = HoldOut(None)
