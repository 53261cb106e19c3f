"""Hold-out of calibration batches: kept out of the moments that layers are solved with, for choosing between solutions."""

from __future__ import annotations

from dataclasses import dataclass

HELD_OUT = 4  # one batch in this many


@dataclass(frozen=True, slots=True)
class HoldOut:
    """The held-out batches, by index: the last of every ``every`` batches, or none. ``index in HoldOut()`` tells whether one is."""

    every: int | None = HELD_OUT

    def __contains__(self, batch: int) -> bool:
        return self.every is not None and batch % self.every == self.every - 1

    def __bool__(self) -> bool:
        return self.every is not None


NONE = HoldOut(None)
