"""Two reports side by side: no run is called worse for what is another quantity, too small to be shown, or noise."""

from __future__ import annotations

from dataclasses import replace

import pytest

import magr_onnx
from magr_onnx import Report
from magr_onnx.report.html import side_by_side
from magr_onnx.report.html.side_by_side import NOISE, SAME, Measure, verdict
from magr_onnx.report.validation import Latency
from tests import graphs


@pytest.fixture(scope="module")
def runs() -> dict[str, Report]:
    """Two layers with and without error feedback."""
    model = graphs.chain()
    data = [graphs.feeds(model, seed=seed) for seed in range(9)]
    efforts = ("fast", "balanced")
    return {e: magr_onnx.optimize(model, data[:8], validation_data=data[8:], bits=3, effort=e).report for e in efforts}


def test_layer_errors_with_and_without_feedback_get_no_verdict(runs: dict[str, Report]) -> None:
    fast, balanced = runs["fast"], runs["balanced"]
    assert not any(row.feedback for row in fast.layers)
    assert any(row.feedback for row in balanced.layers)
    rows = {row.name: row for row in side_by_side.compared(fast, balanced)}
    for name in ("median estimated error", "largest estimated error"):
        assert (rows[name].change, rows[name].tone) == ("not comparable", "")
        assert rows[name].first != rows[name].second
    assert {row.name: row for row in side_by_side.compared(fast, replace(fast, bytes_after=1))}["median estimated error"].change == ""
    order = list(rows)
    names = ("SQNR", "size", "median error in the running model", "median estimated error")
    assert sorted(names, key=order.index) == list(names)


def test_layers_are_judged_by_the_running_model_where_both_have_it(runs: dict[str, Report]) -> None:
    fast, balanced = runs["fast"], runs["balanced"]
    how = side_by_side.basis_of(fast, balanced)
    assert (how.running, how.verdict) == (True, True)
    for row in (found := side_by_side.differences(fast, balanced)):
        assert row["change"] == row["second"].running - row["first"].running
    assert [abs(row["change"]) for row in found] == sorted((abs(row["change"]) for row in found), reverse=True)
    bare, unmeasured = (
        replace(r, layers=tuple(replace(row, error=row.estimate, measured=False) for row in r.layers)) for r in (balanced, fast)
    )
    how = side_by_side.basis_of(fast, bare)
    assert (how.running, how.verdict) == (False, False)
    assert all(row["change"] == row["second"].estimate - row["first"].estimate for row in side_by_side.differences(fast, bare))
    assert side_by_side.basis_of(unmeasured, unmeasured).verdict


def test_a_busier_machine_is_no_slower_model(runs: dict[str, Report]) -> None:
    v = runs["fast"].validation
    assert v is not None
    quiet = replace(runs["fast"], validation=replace(v, latency=Latency(20, 10, 9, (19, 21), (9.5, 10.5))))
    busy = replace(runs["fast"], validation=replace(v, latency=Latency(40, 20.1, 9, (38, 42), (19, 21))))
    worse = replace(runs["fast"], validation=replace(v, latency=Latency(20, 30, 9, (19, 21), (29, 31))))

    def judged(other: Report) -> tuple[str, str]:
        row = next(row for row in side_by_side.compared(quiet, other) if row.name == "latency over the float model's")
        return row.change, row.tone

    assert judged(busy) == (SAME, "")
    assert judged(worse) == ("+200.0%", "bad")


def ms(value: float, *spread: float) -> Measure:
    return Measure(f"{value} ms", value, within=NOISE, spread=(spread[0], spread[1]) if spread else None)


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (Measure("", 10.0), Measure("", 9.0), ("-10.0%", "good")),
        (Measure("", 0.0), Measure("", 9.0), ("from none", "bad")),
        (Measure("", 10.0), Measure("", 10.0), ("", "")),
        (Measure("", 10.0), Measure("", 9.9999), (SAME, "")),
        (Measure("", 10.0), Measure("", 10.0001), (SAME, "")),
        (Measure("", None), Measure("", 9.0), ("", "")),
        (Measure("", 0.90, False, side_by_side.points), Measure("", 0.915, False, side_by_side.points), ("+1.50 points", "good")),
        (Measure("", 22.0, False, side_by_side.in_decibels), Measure("", 20.0, False, side_by_side.in_decibels), ("-2.0 dB", "bad")),
        (ms(10), ms(10.9), (SAME, "")),
        (ms(10, 9, 13), ms(12, 11, 14), (SAME, "")),
        (ms(10, 9, 11), ms(12, 11.5, 14), ("+20.0%", "bad")),
    ],
)
def test_a_change_is_a_verdict_where_it_can_be_seen(one: Measure, two: Measure, expected: tuple[str, str]) -> None:
    assert verdict(one, two) == expected
