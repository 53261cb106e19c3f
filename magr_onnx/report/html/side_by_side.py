"""Comparison of two reports: figures, changes with their units, and which of two is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from magr_onnx.report.data import Report, megabytes
from magr_onnx.report.html.summary import decibels, duration, has_feedback, lines_of, main_metrics, milliseconds, share_of
from magr_onnx.report.validation import severity

SAME = "about the same"
NOISE = 0.1  # relative difference of times that is within noise
FEEDBACK = "not comparable: with error feedback, the estimate of a layer includes the errors of the layers before"


def ratio(a: float, b: float) -> str:
    """Format a change in percent."""
    return f"{b / a - 1:+.1%}" if a else "from none"


def difference(form: str, factor: float = 1.0) -> Callable[[float, float], str]:
    """Return a function that formats the change ``b - a`` of a number, times a factor."""
    return lambda a, b: form.format(factor * (b - a))


points = difference("{:+.2f} points", 100)
as_is, in_bits, in_decibels = difference("{:+.5f}"), difference("{:+.3f} bits"), difference("{:+.1f} dB")


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of a report that can be compared.

    Attributes:
        text: Formatted value.
        value: The number; None where neither of two is better.
        less: Whether less is better.
        change: Formats the change between two numbers.
        within: Relative difference up to which two numbers are about the same.
        spread: Ranges; two numbers are about the same where theirs overlap.
        feedback: Whether error feedback changes its meaning.
    """

    text: str
    value: float | None = None
    less: bool = True
    change: Callable[[float, float], str] = ratio
    within: float = 0.0
    spread: tuple[float, float] | None = None
    feedback: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of both reports: name, both values, the change, and ``good`` or ``bad`` where one is better."""

    name: str
    first: str
    second: str
    change: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Basis:
    """Basis on which layers of two reports are compared.

    Attributes:
        running: Errors in the running model, if both reports have them; else estimates on the calibration data.
        verdict: Whether these are comparable; not where only one run had error feedback.
        note: Reason why estimates are not comparable.
    """

    running: bool
    verdict: bool
    note: str


def basis_of(first: Report, second: Report) -> Basis:
    """Choose the `Basis` of a comparison."""
    running = all(any(row.measured for row in r.layers) for r in (first, second))
    differ = has_feedback(first) != has_feedback(second)
    return Basis(running, running or not differ, FEEDBACK if differ else "")


def measures(report: Report) -> dict[str, Measure]:
    """Return figures by name: of the model, of its layers, and of the run."""
    rows: dict[str, Measure] = {}
    if (m := main_metrics(report)) is not None:
        if m.perplexity is not None:
            before, after = m.perplexity
            rows["perplexity"] = Measure(f"{after:.3f}", after)
            rows["perplexity of the float model"] = Measure(f"{before:.3f}")
        if m.kl is not None:
            rows["KL divergence (nats)"] = Measure(f"{m.kl:.5f}", m.kl)
        if m.top1 is not None:
            rows["same top-1"] = Measure(f"{m.top1:.2%}", m.top1, less=False, change=points)
        rows["SQNR"] = Measure(decibels(m.sqnr_db), m.sqnr_db, less=False, change=in_decibels)
        rows["cosine"] = Measure(f"{m.cosine:.5f}", m.cosine, less=False, change=as_is)
    rows["size"] = Measure(megabytes(report.bytes_after), report.bytes_after)
    rows["of the source"] = Measure(share_of(report.bytes_after, report.bytes_before))
    if report.validation is not None and (t := report.validation.latency) is not None:
        rows["latency a batch"] = Measure(f"{milliseconds(t.quantized_ms)} ms")
        low, high = t.spread[1]
        times = t.quantized_ms / t.float_ms  # relative to the float model in the same run, which had the same machine load
        rows["latency over the float model's"] = Measure(f"{times:.2f}", times, within=NOISE, spread=(low / t.float_ms, high / t.float_ms))
    if report.proof is not None:
        rows["proved"] = Measure(f"{report.proof.proved} of {report.proof.total}")
        if report.proof.headroom is not None:
            rows["least headroom"] = Measure(f"{report.proof.headroom:.3f} bits", report.proof.headroom, less=False, change=in_bits)
    bits = sorted({r.bits for r in report.layers if r.bits is not None})
    rows["bits"] = Measure(", ".join(map(str, bits)) or "none")
    rows["layers converted"] = Measure(str(len(report.layers)))
    rows["left as they are"] = Measure(str(len(report.skipped)))
    if running := [line.running for line in lines_of(report) if line.running is not None]:
        rows |= _errors("error in the running model", running, False)
    if errors := [line.estimate for line in lines_of(report) if line.estimate is not None]:
        rows |= _errors("estimated error", errors, True)
    seconds = sum(report.seconds.values())
    rows["time of the run"] = Measure(duration(seconds), seconds, within=NOISE)
    return rows


def _errors(label: str, values: list[float], feedback: bool) -> dict[str, Measure]:
    values_by_name = {"median": statistics.median(values), "largest": max(values, key=severity)}
    return {f"{name} {label}": Measure(f"{v:.2%}", v, change=points, feedback=feedback) for name, v in values_by_name.items()}


def compared(first: Report, second: Report) -> list[Row]:
    """Compare the summaries of two reports, row by row."""
    a, b, basis = measures(first), measures(second), basis_of(first, second)
    rows = []
    for name in dict.fromkeys([*a, *b]):
        one, two = a.get(name, Measure("")), b.get(name, Measure(""))
        change, tone = ("not comparable", "") if one.feedback and basis.note else verdict(one, two)
        rows.append(Row(name, one.text, two.text, change, tone))
    return rows


def verdict(one: Measure, two: Measure) -> tuple[str, str]:
    """Return the change and its tone; none where it is too small to show or within noise."""
    a, b = one.value, two.value
    if a is None or b is None or a == b:
        return "", ""
    if math.isnan(a) or math.isnan(b):
        return "", "" if math.isnan(a) and math.isnan(b) else "bad" if math.isnan(b) else "good"
    change = one.change(a, b)
    meet = one.spread and two.spread and one.spread[0] <= two.spread[1] and two.spread[0] <= one.spread[1]
    if meet or abs(b - a) <= one.within * abs(a) or change in (one.change(1.0, 1.0), one.change(1.0, 1.0).replace("+", "-")):
        return SAME, ""
    return change, "good" if (b < a) == one.less else "bad"


def differences(first: Report, second: Report) -> list[dict[str, Any]]:
    """Compare layers by name on the chosen `Basis`, largest change first; layers of one report only come last."""
    a, b = ({line.row.name: line for line in lines_of(r)} for r in (first, second))
    running = basis_of(first, second).running
    rows = []
    for name in dict.fromkeys([*a, *b]):
        sides = a.get(name), b.get(name)
        values = [None if s is None else s.running if running else s.estimate for s in sides]
        change = None if values[0] is None or values[1] is None else values[1] - values[0]
        label = next(s.row.label for s in sides if s is not None)
        rows.append({"name": name, "label": label, "first": sides[0], "second": sides[1], "change": change})
    return sorted(rows, key=lambda row: math.inf if row["change"] is None else -severity(abs(row["change"])))


def options_compared(first: Report, second: Report) -> list[dict[str, Any]]:
    """Return options, versions and pipeline where the two differ."""

    def flat(r: Report) -> dict[str, Any]:
        return {**r.options, "pipeline": r.pipeline, "calibration": r.calibration} | {f"version of {k}": v for k, v in r.versions.items()}

    a, b = flat(first), flat(second)
    return [{"name": k, "first": a.get(k, ""), "second": b.get(k, "")} for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
