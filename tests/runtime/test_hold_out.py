"""Which batches are held out."""

from __future__ import annotations

import pytest

from magr_onnx.runtime.data.hold_out import FEW_SAMPLES, HELD_OUT, NONE, WIDE, HoldOut


@pytest.mark.parametrize(
    ("folds", "parts"),
    [
        (0, [0, 0, 0, 0, 0, 0, 0, 0, 0]),  # one part, never held out
        (1, [1, 1, 1, 0, 1, 1, 1, 0, 1]),  # the last of every four, and the others
        (4, [3, 2, 1, 0, 3, 2, 1, 0, 3]),
    ],
)
def test_parts(folds: int, parts: list[int]) -> None:
    hold_out = HoldOut(folds)
    assert [hold_out.part(batch) for batch in range(9)] == parts
    assert hold_out.parts == max(parts) + 1
    assert [batch in hold_out for batch in range(9)] == [part < folds for part in parts]
    assert bool(hold_out) == (folds > 0)


def test_of_few_samples_all_are_held_out_in_turn() -> None:
    assert [HoldOut.of(samples).folds for samples in (1, FEW_SAMPLES, FEW_SAMPLES + 1, None)] == [HELD_OUT, HELD_OUT, 1, 1]
    assert not NONE
    assert NONE.parts == 1


def test_wide_layers_hold_out_one_part() -> None:
    few = HoldOut.of(16)
    assert few.at_width(WIDE) is few
    assert few.at_width(WIDE + 1) == HoldOut(1)
    assert NONE.at_width(WIDE + 1) == NONE
