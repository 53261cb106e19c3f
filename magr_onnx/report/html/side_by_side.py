"""Two reports side by side: what is compared, in which unit a change is given, and which of two figures is the better one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from magr_onnx.report.data import Report, megabytes
from magr_onnx.report.html.summary import decibels, duration, fed_back, lines_of, main_metrics, milliseconds, share_of
from magr_onnx.report.validation import severity

SAME = "about the same"
NOISE = 0.1  # of times: less than this between two runs tells nothing
FEEDBACK = "not comparable: with error feedback, a layer's error has in it what the layers before did wrong"


def points(a: float, b: float) -> str:
    """A change in percentage points, of what is a share."""
    return f"{100 * (b - a):+.2f} points"


def ratio(a: float, b: float) -> str:
    """A change in percent of the first."""
    return f"{b / a - 1:+.1%}" if a else "from none"


def as_is(a: float, b: float) -> str:
    """A change as it is."""
    return f"{b - a:+.5f}"


def in_bits(a: float, b: float) -> str:
    """A change in bits."""
    return f"{b - a:+.3f} bits"


def in_decibels(a: float, b: float) -> str:
    """A change in decibels."""
    return f"{b - a:+.1f} dB"


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of a report that can be compared.

    Attributes:
        text: As a person reads it.
        value: The number; None where neither of two would be better.
        less: Whether less of it is better.
        change: The change from one number to another, in words.
        within: Two numbers are about the same where they differ by no more than this, relatively.
        spread: Two numbers are about the same where these ranges of them meet.
        feedback: Whether error feedback makes another quantity of it.
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
    """A figure of both reports: its name, both texts, the change, and ``good`` or ``bad`` where one is better."""

    name: str
    first: str
    second: str
    change: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """How layers of two reports are compared.

    Attributes:
        running: By their errors in the running model, which both reports have; else by those on the calibration data.
        verdict: Whether less of that is better; it says nothing where one run only had error feedback.
        note: Why there is no verdict on errors on the calibration data.
    """

    running: bool
    verdict: bool
    note: str


def judged(first: Report, second: Report) -> Judged:
    """See `Judged`."""
    running = all(r.validation is not None and r.validation.layers for r in (first, second))
    differ = fed_back(first) != fed_back(second)
    return Judged(running, running or not differ, FEEDBACK if differ else "")


def measures(report: Report) -> dict[str, Measure]:
    """Figures by name: first those of the whole model, then those of its layers, then what the run took."""
    found: dict[str, Measure] = {}
    if (m := main_metrics(report)) is not None:
        if m.perplexity is not None:
            before, after = m.perplexity
            found["perplexity"] = Measure(f"{after:.3f}", after)
            found["perplexity of the float model"] = Measure(f"{before:.3f}")
        if m.kl is not None:
            found["KL divergence (nats)"] = Measure(f"{m.kl:.5f}", m.kl)
        if m.top1 is not None:
            found["same top-1"] = Measure(f"{m.top1:.2%}", m.top1, less=False, change=points)
        found["SQNR"] = Measure(decibels(m.sqnr_db), m.sqnr_db, less=False, change=in_decibels)
        found["cosine"] = Measure(f"{m.cosine:.5f}", m.cosine, less=False, change=as_is)
    found["size"] = Measure(megabytes(report.bytes_after), report.bytes_after)
    found["of the source"] = Measure(share_of(report.bytes_after, report.bytes_before))
    if report.validation is not None and (t := report.validation.latency) is not None:
        found["latency a batch"] = Measure(f"{milliseconds(t.quantized_ms)} ms")
        low, high = t.spread[1]
        times = t.quantized_ms / t.float_ms  # of the float model a moment before: what else the machine did, it did to both
        found["latency over the float model's"] = Measure(f"{times:.2f}", times, within=NOISE, spread=(low / t.float_ms, high / t.float_ms))
    if report.proof is not None:
        found["proved"] = Measure(f"{report.proof.proved} of {report.proof.total}")
        if report.proof.headroom is not None:
            found["least headroom"] = Measure(f"{report.proof.headroom:.3f} bits", report.proof.headroom, less=False, change=in_bits)
    bits = sorted({r.bits for r in report.layers if r.bits is not None})
    found["bits"] = Measure(", ".join(map(str, bits)) or "none")
    found["layers converted"] = Measure(str(len(report.layers)))
    found["left as they are"] = Measure(str(len(report.skipped)))
    if running := [line.running for line in lines_of(report) if line.running is not None]:
        found |= _errors("error in the running model", running, False)
    if errors := [r.error for r in report.layers if r.error is not None]:
        found |= _errors("layer error", errors, True)
    seconds = sum(report.seconds.values())
    found["time of the run"] = Measure(duration(seconds), seconds, within=NOISE)
    return found


def _errors(what: str, values: list[float], feedback: bool) -> dict[str, Measure]:
    both = {"median": statistics.median(values), "largest": max(values, key=severity)}
    return {f"{name} {what}": Measure(f"{v:.2%}", v, change=points, feedback=feedback) for name, v in both.items()}


def compared(first: Report, second: Report) -> list[Row]:
    """Rows of the summary side by side, with the change and whether it is for the better."""
    a, b, how = measures(first), measures(second), judged(first, second)
    rows = []
    for name in dict.fromkeys([*a, *b]):
        one, two = a.get(name, Measure("")), b.get(name, Measure(""))
        change, tone = ("not comparable", "") if one.feedback and how.note else verdict(one, two)
        rows.append(Row(name, one.text, two.text, change, tone))
    return rows


def verdict(one: Measure, two: Measure) -> tuple[str, str]:
    """The change, and its tone; none where it is too small to be shown, or no more than noise."""
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
    """Layers by name, those that changed most first, by what `judged` says; those in one report only at the end."""
    a, b = ({line.row.name: line for line in lines_of(r)} for r in (first, second))
    running = judged(first, second).running
    found = []
    for name in dict.fromkeys([*a, *b]):
        sides = a.get(name), b.get(name)
        values = [None if s is None else s.running if running else s.row.error for s in sides]
        change = None if values[0] is None or values[1] is None else values[1] - values[0]
        label = next(s.row.label for s in sides if s is not None)
        found.append({"name": name, "label": label, "first": sides[0], "second": sides[1], "change": change})
    return sorted(found, key=lambda row: math.inf if row["change"] is None else -severity(abs(row["change"])))


def options_compared(first: Report, second: Report) -> list[dict[str, Any]]:
    """Options, versions and the pipeline, where the two differ."""

    def flat(r: Report) -> dict[str, Any]:
        return {**r.options, "pipeline": r.pipeline, "calibration": r.calibration} | {f"version of {k}": v for k, v in r.versions.items()}

    a, b = flat(first), flat(second)
    return [{"name": k, "first": a.get(k, ""), "second": b.get(k, "")} for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
