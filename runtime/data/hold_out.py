"""Hold-out of calibration batches: kept out of the moments that layers are solved with, for choosing between solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

S = TypeVar("S")

HELD_OUT = 4  # one batch in this many
FEW_SAMPLES = 64  # up to which every batch is held out in turn (cross-validation)
WIDE = 1024  # inputs of a layer above which that would take too much memory and time: it grows with their square, times four


@dataclass(frozen=True, slots=True)
class HoldOut:
    """The parts that batches are cut into, by index: every fourth batch is in the same part.

    Attributes:
        folds: Parts that are held out in turn: 0 for none; 1 for the last of every `HELD_OUT` batches; `HELD_OUT` for all.
    """

    folds: int = 1

    @staticmethod
    def of(samples: int | None) -> HoldOut:
        """Return the hold-out for a number of samples (None: many): of few, none can be spared for choosing alone."""
        return HoldOut(HELD_OUT if samples is not None and samples <= FEW_SAMPLES else 1)

    def at_width(self, k: int) -> HoldOut:
        """Return the hold-out for a layer of ``k`` inputs."""
        return HoldOut(min(self.folds, 1)) if k > WIDE else self

    @property
    def parts(self) -> int:
        """Number of parts: the folds, and the batches that are never held out."""
        return min(self.folds + 1, HELD_OUT)

    def part(self, batch: int) -> int:
        """Return the part of a batch: its fold, or the last part."""
        return min(HELD_OUT - 1 - batch % HELD_OUT, self.parts - 1)

    def __contains__(self, batch: int) -> bool:
        return self.part(batch) < self.folds

    def __bool__(self) -> bool:
        return self.folds > 0


NONE = HoldOut(0)


class Parts(Generic[S]):
    """The sums of one value, apart for the parts of a hold-out.

    Attributes:
        sums: One for each part.
        folds: Number of those that are held out, the first ones.
    """

    def __init__(self, hold_out: HoldOut, width: int, start: Callable[[], S]) -> None:
        """Start the sums of a value of ``width`` inputs."""
        self._hold_out = hold_out.at_width(width)
        self.folds = self._hold_out.folds
        self.sums = [start() for _ in range(self._hold_out.parts)]

    def part(self, batch: int) -> int:
        """Return the index of the sums that a batch is added to."""
        return self._hold_out.part(batch)

    def of(self, batch: int) -> S:
        """Return the sums that a batch is added to."""
        return self.sums[self.part(batch)]
