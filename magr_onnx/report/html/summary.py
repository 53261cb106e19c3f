"""Content of a page, computed from a report; its layout is in the templates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from magr_onnx.report.data import Report, by_reason, megabytes
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.report.reasons import Reason, TableReason
from magr_onnx.report.validation import OutputMetrics, severity

TAIL = 3.0  # times the median error from which a layer is an outlier
LARGE = 0.1  # fraction of the result's bytes from which a float weight is mentioned


@dataclass(frozen=True, slots=True)
class Card:
    """A figure of the summary: title, value and detail."""

    title: str
    value: str
    detail: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table of layers.

    Attributes:
        row: The layer.
        running: Its error, if that was measured in the running model.
        estimate: What its error was expected to be when it was solved.
        peak: By what fraction MagR lowered its largest weight.
        sweeps: Sweeps of the quantizer.
        headroom: Headroom of its tightest register in bits, if proved.
        share: Its error relative to the largest one, 0 to 1.
    """

    row: LayerRow
    running: float | None
    estimate: float | None
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
    """A message to read first; ``layer`` is the index of the layer it refers to."""

    text: str
    layer: int | None = None
    tone: str = ""


def has_feedback(report: Report) -> bool:
    """Return whether error feedback was used, so that a layer's error includes those of the layers before."""
    return any(row.feedback for row in report.layers)


def file_name(path: str) -> str:
    """Return the last part of the path of a model, on any system."""
    return PurePath(path.replace("\\", "/")).name or path


def lines_of(report: Report) -> list[Line]:
    """Return the layers from inputs to outputs."""
    headrooms = {} if report.proof is None else report.proof.by_node
    worst = max((r.error for r in report.layers if r.error is not None and math.isfinite(r.error)), default=0)
    lines = []
    for r in report.layers:
        share = min(severity(r.error or 0) / worst, 1.0) if worst else 0.0
        headroom = headrooms.get(r.emitted or "")
        peak = 1 - float(r.magr["max_after"]) / float(r.magr["max_before"]) if r.magr and r.magr.get("max_before") else None
        estimate = r.error if r.estimate is None else r.estimate
        lines.append(Line(r, r.error if r.measured else None, estimate, peak, sweeps_of(r), headroom, share))
    return sorted(lines, key=lambda line: math.inf if line.row.depth is None else line.row.depth)


def sweeps_of(row: LayerRow) -> int | None:
    """Return the number of sweeps of a layer's quantizer; None if it has none."""
    return (row.sweeps[-1] if row.sweeps else len(row.errors) - 1) if row.errors else None


def cards(report: Report) -> list[Card]:
    """Return the figures of the summary."""
    before, after = report.bytes_before, report.bytes_after
    shown = [Card("Size", megabytes(after), f"from {megabytes(before)}, {share_of(after, before)} of it")]
    shown += _accuracy(report)
    v = report.validation or report.check
    if v is not None and v.latency is not None:
        t = v.latency
        (low, high), (low_too, high_too) = t.spread
        ranges = f"({milliseconds(low_too)} to {milliseconds(high_too)})", f"({milliseconds(low)} to {milliseconds(high)})"
        detail = f"a batch on {v.provider} {ranges[0]}; float {milliseconds(t.float_ms)} ms {ranges[1]}; median (quartiles)"
        shown.append(Card("Latency", f"{milliseconds(t.quantized_ms)} ms", detail))
    skipped = f"{len(report.skipped)} left as they are" if report.skipped else "none left out"
    shown.append(Card("Layers converted", f"{len(report.layers)}", f"{skipped}; codes of {report.verified} read back and verified"))
    if report.proof is not None:
        p = report.proof
        headroom = "" if p.headroom is None else f"; least headroom {p.headroom:.3f} bits"
        tone = "good" if p.total and p.proved == p.total else "warn"
        shown.append(Card("No overflow", f"{p.proved} of {p.total}", f"proved: {p.against}{headroom}", tone))
    errors = [r.error for r in report.layers if r.error is not None]
    if errors:
        data = "estimated on the calibration data" if any(r.rows for r in report.layers) else "for uncorrelated inputs, without data"
        data = "in the running model" if any(r.measured for r in report.layers) else data
        detail = f"median; largest {max(errors, key=severity):.2%}, {data}"
        shown.append(Card("Layer error", f"{statistics.median(errors):.2%}", detail))
    if report.seconds:
        longest = max(report.seconds, key=lambda k: report.seconds[k])
        shown.append(Card("Time", duration(sum(report.seconds.values())), f"most of it: {longest}"))
    return shown


def _accuracy(report: Report) -> list[Card]:
    metrics = main_metrics(report)
    if report.validation is not None and (own := report.validation.metric) is not None:
        return [Card(own.name, number(own.quantized_value, ".6g"), f"float {own.float_value:.6g}, on {report.validation.data}")]
    if metrics is None:
        option = _as_written(report, "--validation heldout.npz", "validation_data=...")
        reason = "no output is of floats" if report.validation is not None else f"give held-out inputs: {option}"
        return [Card("Accuracy", "not measured", reason, "warn")]
    tone = "bad" if metrics.nonfinite[1] else ""
    if metrics.perplexity is not None:
        before, after = metrics.perplexity
        detail = f"float {before:.3f}; KL {metrics.kl or 0:.5f} nats, top-1 {metrics.top1 or 0:.2%}"
        return [Card("Perplexity", number(after, ".3f"), detail, tone)]
    if metrics.kl is not None:
        detail = f"of {metrics.output}; KL {metrics.kl:.5f} nats, SQNR {decibels(metrics.sqnr_db)}"
        return [Card("Same top-1", f"{metrics.top1 or 0:.2%}", detail, tone)]
    return [Card("Cosine", number(metrics.cosine, ".5f"), f"of {metrics.output}; SQNR {decibels(metrics.sqnr_db)}", tone)]


def main_metrics(report: Report) -> OutputMetrics | None:
    """Return the metrics of the main output in the default arithmetic."""
    if report.validation is None or not report.validation.arithmetics:
        return None
    outputs = next(iter(report.validation.arithmetics.values()))
    return next((m for m in outputs if m.kl is not None), next(iter(outputs), None))


def findings(report: Report, lines: Sequence[Line]) -> list[Finding]:
    """Return the messages of a report, most important first."""
    messages = [] if report.validation is None else [Finding(f"{text}.", tone="bad") for text in report.validation.broken()]
    if report.assignment is not None and not report.assignment.met:
        messages.append(Finding(f"The goal is missed: {report.assignment.goal}.", tone="bad"))
    if report.proof is not None and report.proof.proved < report.proof.total:
        messages.append(Finding(f"{report.proof.total - report.proof.proved} integer dot products are not proved.", tone="bad"))
    if not any(r.rows for r in report.layers) and report.layers:
        text = "No calibration data: inputs were taken as uncorrelated, and accuracy is lower than it could be."
        messages.append(Finding(text, tone="warn"))
    messages += _left_float(report)
    messages += [_added_bytes(report, line.row, i) for i, line in enumerate(lines) if line.row.added]
    messages += _outliers(lines)
    if report.validation is not None:
        messages += _arithmetics(report)
    if (v := report.validation or report.check) is not None and v.latency is not None and v.latency.slower:
        text = f"The result is slower than the float model here: {v.latency.ratio:.2f} times its time a batch."
        messages.append(Finding(text, tone="warn"))
    if report.growth > 1:
        messages.append(Finding(f"The file is {report.growth:.2f} times as large as its source.", tone="warn"))
    return messages


def _added_bytes(report: Report, row: LayerRow, index: int) -> Finding:
    """Report a layer whose float weight stays in the file, with a remedy."""
    name = row.scope or row.weight
    leave = _as_written(report, f"--exclude '{name}'", f"exclude={[name]}")
    table = _as_written(report, "--embeddings gather-block-quantized", 'embeddings="gather-block-quantized"')
    text = f"Converting {row.label} saved nothing and added {row.added} bytes: its float weight stays in the file for others that read it."
    return Finding(f"{text} Leave it out ({leave}), or convert those too (a table of embeddings: {table}).", index, "warn")


def _as_written(report: Report, command: str, python: str) -> str:
    """Return an option in the syntax of the run: command line or Python."""
    return command if report.command.startswith("onnx-magr") else python


def _left_float(report: Report) -> list[Finding]:
    """Report the largest float weight if it is a large part of the result, and the option that converts it."""
    floats = [s for s in report.skipped if s.reason != Reason.QUANTIZED]
    most = max(floats, key=lambda s: s.bytes, default=None)
    if most is None or most.bytes < LARGE * report.bytes_after:
        return []
    text = f"{most.name} ({most.op}) stays float: {megabytes(most.bytes)}, {share_of(most.bytes, report.bytes_after)} of the result."
    if most.reason == TableReason.UNASKED:
        option = _as_written(report, "--embeddings gather-block-quantized", 'embeddings="gather-block-quantized"')
        text += f" It is a table of embeddings: {option} converts it."
        return [Finding(text, tone="warn")]
    if most.reason == Reason.RECURRENT:
        option = _as_written(report, "--recurrent dynamic-quantize-lstm", 'recurrent="dynamic-quantize-lstm"')
        return [Finding(f"{text} {option} converts it.", tone="warn")]
    return [Finding(f"{text} Why: {most.reason}.")]


def _outliers(lines: Sequence[Line]) -> list[Finding]:
    """Report the layers of largest error, as estimated and in the running model."""
    messages = []
    for scope, values in (
        ("estimated of a layer", [line.estimate for line in lines]),
        ("in the running model", [line.running for line in lines]),
    ):
        errors = [(v, i) for i, v in enumerate(values) if v is not None]
        if len(errors) < 2:
            continue
        worst, i = max(errors, key=lambda one: severity(one[0]))
        median = statistics.median(v for v, _ in errors)
        if not math.isfinite(worst):
            messages.append(Finding(f"The error {scope} is {number(worst, '.2%')}.", i, "bad"))
        elif worst > 0:
            times = f", {worst / median:.1f} times the median" if median else ""
            messages.append(Finding(f"Largest error {scope}: {worst:.2%}{times}.", i, "warn" if worst > TAIL * median else ""))
    return messages


def _arithmetics(report: Report) -> Iterable[Finding]:
    """Report results that depend on onnxruntime's arithmetic."""
    assert report.validation is not None
    ratios = [(outputs[0].sqnr_db, name) for name, outputs in report.validation.arithmetics.items() if outputs]
    finite = [one for one in ratios if math.isfinite(one[0])]
    if finite and (difference := max(finite)[0] - min(finite)[0]) > 1:
        yield Finding(f"Arithmetics of onnxruntime differ by {difference:.1f} dB; the worst is {min(finite)[1]}.", tone="warn")


def skips(report: Report) -> list[dict[str, Any]]:
    """Group skipped nodes by reason, most frequent first."""
    groups = [{"reason": reason, "rows": rows} for reason, rows in by_reason(report.skipped).items()]
    return sorted(groups, key=lambda group: -len(group["rows"]))


def duration(seconds: float) -> str:
    """Format seconds."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if (rounded := round(seconds)) < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def milliseconds(value: float) -> str:
    """Format a latency with three significant digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def decibels(value: float) -> str:
    """Format a signal-to-noise ratio; infinite where nothing differs."""
    return "no difference" if value == math.inf else number(value, ".1f", " dB")


def number(value: float, form: str, unit: str = "") -> str:
    """Format a number, or say that it is none."""
    return "not a number" if math.isnan(value) else f"{value:{form}}{unit}"


def share_of(size: float, total: float) -> str:
    """Format a share in percent."""
    return f"{size / total:.1%}" if total else "0%"
