"""What a page says in words and in figures: everything that is chosen or computed from a report is here, its looks are in the templates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from magr_onnx.report import LayerRow, Report, by_reason, megabytes
from magr_onnx.runtime.validate import OutputMetrics

TAIL = 3.0  # times the median error, from which a layer stands out


@dataclass(frozen=True, slots=True)
class Card:
    """A figure of the summary: what it is, its value, and a line of small print."""

    title: str
    value: str
    detail: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table of layers: the row, and what else is known of the layer.

    Attributes:
        row: The layer.
        running: Its relative error in the running model, if that was measured.
        peak: By what fraction MagR lowered its largest weight.
        sweeps: Of the quantizer.
        headroom: Bits to the overflow of its tightest register, if that was proved.
        share: Its error over the largest one, 0 to 1.
    """

    row: LayerRow
    running: float | None
    peak: float | None
    sweeps: int | None
    headroom: float | None
    share: float

    @property
    def shape(self) -> str:
        r = self.row
        return f"{r.k} × {r.n}" if r.groups == 1 else f"{r.groups} × {r.k} × {r.n}"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to look at first; ``layer`` is the index of the layer it is about."""

    text: str
    layer: int | None = None
    tone: str = ""


def name_of(report: Report) -> str:
    """The model's short name."""
    return _short(report.source)


def result_of(report: Report) -> str:
    """That of the result, if it was written to a file."""
    return _short(report.output or report.source)


def _short(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name or path


def lines_of(report: Report) -> list[Line]:
    """The layers from the inputs to the outputs."""
    running = {} if report.validation is None else {m.layer: m.relative_error for m in report.validation.layers}
    rooms = {} if report.proof is None else report.proof.by_node
    worst = max((r.error or 0 for r in report.layers), default=0)
    found = []
    for r in report.layers:
        share = (r.error or 0) / worst if worst else 0.0
        room = rooms.get(r.emitted or "")
        found.append(Line(r, running.get(r.output or r.name), peak_of(r), len(r.errors) - 1 if r.errors else None, room, share))
    return sorted(found, key=lambda line: math.inf if line.row.depth is None else line.row.depth)


def peak_of(row: LayerRow) -> float | None:
    """By what fraction MagR lowered the largest weight of a layer."""
    if not row.magr or not row.magr.get("max_before"):
        return None
    return 1 - float(row.magr["max_after"]) / float(row.magr["max_before"])


def cards(report: Report) -> list[Card]:
    """The figures of the summary."""
    before, after = report.bytes_before, report.bytes_after
    found = [Card("Size", megabytes(after), f"from {megabytes(before)}, {_percent(after, before)} of it")]
    found += _accuracy(report)
    v = report.validation
    if v is not None and v.latency is not None:
        t = v.latency
        found.append(Card("Latency", f"{t.quantized_ms:.2f} ms", f"a batch on {v.provider}; float {t.float_ms:.2f} ms"))
    left = f"{len(report.skipped)} left as they are" if report.skipped else "none left out"
    found.append(Card("Layers converted", f"{len(report.layers)}", f"{left}; codes of {report.verified} read back and verified"))
    if report.proof is not None:
        p = report.proof
        room = "" if p.headroom is None else f"; least headroom {p.headroom:.3f} bits"
        tone = "good" if p.total and p.proved == p.total else "warn"
        found.append(Card("No overflow", f"{p.proved} of {p.total}", f"proved: {p.against}{room}", tone))
    errors = [r.error for r in report.layers if r.error is not None]
    if errors:
        data = "on the calibration data" if any(r.rows for r in report.layers) else "for uncorrelated inputs, without data"
        found.append(Card("Layer error", f"{statistics.median(errors):.2%}", f"median; largest {max(errors):.2%}, {data}"))
    if report.seconds:
        longest = max(report.seconds, key=lambda k: report.seconds[k])
        found.append(Card("Time", duration(sum(report.seconds.values())), f"most of it: {longest}"))
    return found


def _accuracy(report: Report) -> list[Card]:
    metrics = main_metrics(report)
    if metrics is None:
        return [Card("Accuracy", "not measured", "give held-out inputs: --validation heldout.npz", "warn")]
    if metrics.cross_entropy is not None:
        a, b = metrics.cross_entropy
        return [
            Card(
                "Perplexity", f"{math.exp(b):.3f}", f"float {math.exp(a):.3f}; KL {metrics.kl or 0:.5f} nats, top-1 {metrics.top1 or 0:.2%}"
            )
        ]
    if metrics.kl is not None:
        return [
            Card(
                "Same top-1", f"{metrics.top1 or 0:.2%}", f"of {metrics.output}; KL {metrics.kl:.5f} nats, SQNR {decibels(metrics.sqnr_db)}"
            )
        ]
    return [Card("Cosine", f"{metrics.cosine:.5f}", f"of {metrics.output}; SQNR {decibels(metrics.sqnr_db)}")]


def main_metrics(report: Report) -> OutputMetrics | None:
    """Of the output that says most, in the arithmetic that runs by default."""
    if report.validation is None or not report.validation.arithmetics:
        return None
    outputs = next(iter(report.validation.arithmetics.values()))
    return next((m for m in outputs if m.kl is not None), next(iter(outputs), None))


def findings(report: Report, lines: Sequence[Line]) -> list[Finding]:
    """What to look at first, most important first."""
    found = []
    if report.assignment is not None and not report.assignment.met:
        found.append(Finding(f"The goal is missed: {report.assignment.goal}.", tone="bad"))
    if report.proof is not None and report.proof.proved < report.proof.total:
        found.append(Finding(f"{report.proof.total - report.proof.proved} integer dot products are not proved.", tone="bad"))
    if not any(r.rows for r in report.layers) and report.layers:
        found.append(
            Finding("No calibration data: inputs were taken as uncorrelated, and accuracy is lower than it could be.", tone="warn")
        )
    found += _outliers(lines)
    if (v := report.validation) is not None:
        found += _arithmetics(report)
        if v.latency is not None and v.latency.quantized_ms > 1.1 * v.latency.float_ms:
            times = v.latency.quantized_ms / v.latency.float_ms
            found.append(Finding(f"The result is slower than the float model here: {times:.1f} times its time a batch.", tone="warn"))
    return found


def _outliers(lines: Sequence[Line]) -> list[Finding]:
    """The layers that lose most, by themselves and in the running model."""
    found = []
    for what, values in (("of a layer", [line.row.error for line in lines]), ("in the running model", [line.running for line in lines])):
        known = [(v, i) for i, v in enumerate(values) if v is not None]
        if len(known) < 2:
            continue
        worst, i = max(known)
        median = statistics.median(v for v, _ in known)
        if worst > 0:
            times = f", {worst / median:.1f} times the median" if median else ""
            found.append(Finding(f"Largest error {what}: {worst:.2%}{times}.", i, "warn" if worst > TAIL * median else ""))
    return found


def _arithmetics(report: Report) -> Iterable[Finding]:
    """A word where the result depends on how onnxruntime computes it."""
    assert report.validation is not None
    names, kls = zip(*((name, outputs[0].sqnr_db) for name, outputs in report.validation.arithmetics.items() if outputs), strict=True)
    if len(kls) > 1 and max(kls) - min(kls) > 1:
        low = names[kls.index(min(kls))]
        yield Finding(f"Arithmetics of onnxruntime differ by {max(kls) - min(kls):.1f} dB; the worst is {low}.", tone="warn")


def skips(report: Report) -> list[dict[str, Any]]:
    """What was left as it is, by reason, the most frequent first."""
    groups = [{"reason": reason, "rows": rows} for reason, rows in by_reason(report.skipped).items()]
    return sorted(groups, key=lambda group: -len(group["rows"]))


def differences(first: Report, second: Report) -> list[dict[str, Any]]:
    """Layers by name, those that changed most first; those in one report only at the end."""
    a, b = ({line.row.name: line for line in lines_of(r)} for r in (first, second))
    labels = {line.row.name: line.row.label for side in (a, b) for line in side.values()}
    found = []
    for name in dict.fromkeys([*a, *b]):
        one, two = a.get(name), b.get(name)
        known = one is not None and two is not None and one.row.error is not None and two.row.error is not None
        change = (two.row.error or 0) - (one.row.error or 0) if known and one is not None and two is not None else None
        found.append({"name": name, "label": labels[name], "first": one, "second": two, "change": change})
    return sorted(found, key=lambda row: math.inf if row["change"] is None else -abs(row["change"]))


def measures(report: Report) -> dict[str, tuple[str, float | None, bool]]:
    """Figures that can be compared: by name the text, the number, and whether less of it is better."""
    errors = [r.error for r in report.layers if r.error is not None]
    bits = sorted({r.bits for r in report.layers if r.bits is not None})
    found: dict[str, tuple[str, float | None, bool]] = {
        "size": (megabytes(report.bytes_after), report.bytes_after, True),
        "of the source": (_percent(report.bytes_after, report.bytes_before), None, True),
        "layers converted": (str(len(report.layers)), None, False),
        "left as they are": (str(len(report.skipped)), None, True),
        "bits": (", ".join(map(str, bits)) or "none", None, True),
    }
    if errors:
        found["median layer error"] = (f"{statistics.median(errors):.3%}", statistics.median(errors), True)
        found["largest layer error"] = (f"{max(errors):.3%}", max(errors), True)
    if (m := main_metrics(report)) is not None:
        if m.cross_entropy is not None:
            found["perplexity"] = (f"{math.exp(m.cross_entropy[1]):.3f}", math.exp(m.cross_entropy[1]), True)
            found["perplexity of the float model"] = (f"{math.exp(m.cross_entropy[0]):.3f}", None, True)
        if m.kl is not None:
            found["KL divergence (nats)"] = (f"{m.kl:.5f}", m.kl, True)
        if m.top1 is not None:
            found["same top-1"] = (f"{m.top1:.2%}", m.top1, False)
        found["SQNR"] = (decibels(m.sqnr_db), m.sqnr_db if math.isfinite(m.sqnr_db) else None, False)
        found["cosine"] = (f"{m.cosine:.5f}", m.cosine, False)
    if report.validation is not None and report.validation.latency is not None:
        ms = report.validation.latency.quantized_ms
        found["latency a batch"] = (f"{ms:.2f} ms", ms, True)
    if report.proof is not None:
        found["proved"] = (f"{report.proof.proved} of {report.proof.total}", None, False)
        if report.proof.headroom is not None:
            found["least headroom (bits)"] = (f"{report.proof.headroom:.3f}", report.proof.headroom, False)
    found["time of the run"] = (duration(sum(report.seconds.values())), sum(report.seconds.values()), True)
    return found


def compared(first: Report, second: Report) -> list[dict[str, Any]]:
    """Rows of the summary side by side, with the change and whether it is for the better."""
    a, b = measures(first), measures(second)
    rows = []
    for name in dict.fromkeys([*a, *b]):
        one, two = a.get(name), b.get(name)
        change, tone = "", ""
        if one and two and one[1] is not None and two[1] is not None and one[1] != two[1]:
            less = two[1] < one[1]
            change = f"{two[1] / one[1] - 1:+.1%}" if one[1] else "from none"
            tone = "good" if less == one[2] else "bad"
        rows.append({"name": name, "first": one[0] if one else "", "second": two[0] if two else "", "change": change, "tone": tone})
    return rows


def options_compared(first: Report, second: Report) -> list[dict[str, Any]]:
    """Options, versions and the pipeline, where the two differ."""

    def flat(r: Report) -> dict[str, Any]:
        return {**r.options, "pipeline": r.pipeline, "calibration": r.calibration} | {f"version of {k}": v for k, v in r.versions.items()}

    a, b = flat(first), flat(second)
    return [{"name": k, "first": a.get(k, ""), "second": b.get(k, "")} for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds < 3600 else f"{int(seconds // 3600)} h {seconds % 3600 / 60:.0f} min"


def decibels(value: float) -> str:
    """A signal-to-noise ratio; none where nothing differs."""
    return f"{value:.1f} dB" if math.isfinite(value) else "no difference"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0%"
