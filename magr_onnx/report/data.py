"""Report of a run, as data, as JSON and as text."""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from magr_onnx.errors import ReportError, listed
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.report.mixed_precision import Assignment
from magr_onnx.report.reasons import Skip
from magr_onnx.report.serialization import AS_IS, decode, json_text, plain
from magr_onnx.report.validation import Latency, Validation, severity
from magr_onnx.report.verdicts import verdicts

MOST = 25
"""Layers in a short table."""

COLUMNS = 80
"""Width of text where the terminal's is unknown."""

LEGEND = (
    "K x N: inputs x outputs. error: root mean square of what differs at the layer's output in the quantized model, "
    "over the standard deviation of that output in the float model{}. *: the largest error."
)
ESTIMATED = "; estimated layer by layer, since there are no samples to measure it on"
"""Legend of a table of layers in `Report.to_text`, and its addition where no error was measured."""

SCHEMA = 3
"""Version of the JSON: 1 had no `Report.schema`, no histograms and no curves, 2 had None for all values that are not finite."""


@dataclass(frozen=True, slots=True)
class ProofSummary:
    """Result of `magr_onnx.verify` on the output, where an accumulator was set.

    Attributes:
        against: The target or the accumulator, in words.
        proved: Integer dot products that no input overflows.
        total: Integer dot products.
        headroom: Of the tightest register, in bits; None without integer dot products.
        unproved: Nodes that are no integer dot products, or cannot be read.
        by_node: Headroom of the tightest register of every node that is one, in bits, by node name in the result.
    """

    against: str
    proved: int
    total: int
    headroom: float | None
    unproved: int
    by_node: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.total == 0:
            return f"nothing to prove: no layer computes in integers ({self.against})"
        headroom = "" if self.headroom is None else f", least headroom {self.headroom:.2f} bits"
        return f"{self.proved} of {self.total} integer dot products proved{headroom} ({self.against})"


@dataclass(frozen=True, slots=True)
class Report:
    """Report of `magr_onnx.optimize`.

    Attributes:
        source: Path of the model, or a description.
        output: Path written, if any.
        pipeline: Text that reproduces the passes; an ``assignment`` has the bits and blocks of every layer instead.
        calibration: Description of the data, or that there was none.
        layers: Converted layers in graph order.
        skipped: Nodes with weights that were not converted.
        bytes_before: Size of the source.
        bytes_after: Size of the result.
        verified: Layers whose codes were read back from the result and compared.
        seconds: Wall time by stage.
        versions: Versions of the packages involved.
        notes: Anything out of the ordinary, as sentences.
        validation: Comparison of the float and the quantized model, if requested.
        check: The same on a few calibration batches, or on made-up inputs and without layers, where no validation was requested and the
            model fits into memory.
        proof: Proof that no accumulator overflows, if requested.
        assignment: Mixed precision under a budget, if requested.
        command: The command or Python call that reproduces the run; paths are as typed.
        options: Options without defaults; objects that are not plain data are text.
        recipe: The options as a recipe, where the command line was used.
        schema: Version of this structure, as `SCHEMA`.
    """

    source: str
    output: str | None
    pipeline: str
    calibration: str
    layers: tuple[LayerRow, ...]
    skipped: tuple[Skip, ...]
    bytes_before: int
    bytes_after: int
    verified: int
    seconds: dict[str, float]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    validation: Validation | None = field(default=None)
    proof: ProofSummary | None = None
    assignment: Assignment | None = None
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict, metadata=AS_IS)
    recipe: str = ""
    check: Validation | None = None
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON; NaN and infinities become the texts ``nan``, ``inf`` and ``-inf``."""
        return plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """Convert to JSON, with arrays of numbers on one line; `from_json` restores the report."""
        return json_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "report") -> Self:
        """Restore a report from `to_json` of this or an older version, whose missing fields are empty.

        Raises:
            ReportError: Not a report, or one of a newer version; the message begins with ``where``.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{where}: not JSON ({error}); give a file that 'optimize --report FILE.json' wrote") from error
        if isinstance(value, dict) and isinstance(schema := value.setdefault("schema", 1), int) and schema > SCHEMA:
            raise ReportError(f"{where}: written by a newer onnx-magr (schema {schema}, this one reads up to {SCHEMA}); update onnx-magr")
        return decode(cls, value, where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load a report from a JSON file.

        Raises:
            ReportError: It cannot be read, or is not a report.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ReportError(f"report {os.fspath(path)}: {error.strerror or error}") from error
        return cls.from_json(text, f"report {os.fspath(path)}")

    def to_html(self) -> str:
        """Render as a self-contained HTML page.

        Raises:
            OptionError: The extra ``report`` is not installed.
        """
        from magr_onnx.report import html  # an optional extra

        return html.page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a file: HTML for ``.html``, JSON for ``.json``.

        Raises:
            OptionError: The extra ``report`` is not installed, or the suffix is not supported.
            OutputError: The file cannot be written.
        """
        from magr_onnx.report import html

        html.save(self, Path(path))

    def to_text(self, most: int | None = None, width: int = COLUMNS) -> str:
        """Render as text: a summary, a table of at most ``most`` layers with the largest errors, and the skipped nodes by reason.

        Lines have ``width`` columns, at least 60, except for paths and the tables of a validation or a budget, which need 80.
        """
        labels = {row.output: row.label for row in self.layers}
        return "\n".join(
            [
                *self._summary(width),
                "",
                *layer_table(self.layers, most, width),
                *(wrapped(self._legend, 0, width) if any(row.error is not None for row in self.layers) else ()),
                *self._skips(width),
                *([] if self.assignment is None else ["", *self.assignment.lines()]),
                *([] if self.validation is None else ["", *validation_text(self.validation, labels, width)]),
                *self._notes(width),
                *self._verdicts(width),
            ]
        )

    @property
    def _legend(self) -> str:
        return LEGEND.format("" if any(row.measured for row in self.layers) else ESTIMATED)

    @property
    def growth(self) -> float:
        """The size of the result over that of its source; 0 where that is unknown."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 0.0

    def _summary(self, width: int) -> list[str]:
        return [
            f"model        {self.source}",
            f"output       {self.output or 'in memory'}",
            f"calibration  {self.calibration}",
            *wrapped(
                f"layers       {len(self.layers)} converted, {len(self.skipped)} left as they are; {self.verified} read back and verified",
                width=width,
            ),
            *([] if self.proof is None else wrapped(f"accumulator  {self.proof}", width=width)),
            *([] if self.check is None else wrapped(f"check        {_check_text(self.check)}", width=width)),
            f"size         {megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)} ({self.growth:.1%})",
            *wrapped(f"time         {', '.join(f'{k} {v:.1f} s' for k, v in self.seconds.items())}", width=width),
        ]

    def _skips(self, width: int) -> list[str]:
        if not self.skipped:
            return []
        lines = (line for reason, rows in by_reason(self.skipped).items() for line in skip_lines(reason, rows, width))
        return ["", "left as they are", *lines]

    def _notes(self, width: int) -> list[str]:
        notes = [*self.notes, *layer_notes(self.layers)]
        return ["", "notes", *(line for n in notes for line in wrapped(f"  {n}", 4, width))] if notes else []

    def _verdicts(self, width: int) -> list[str]:
        lines = verdicts(self.layers, [v for v in (self.validation or self.check,) if v is not None], self.growth)
        if self.validation is not None and self.validation.metric is not None:
            lines.append(f"{self.validation.metric} on {self.validation.amount} of {self.validation.data}")
        return ["", *(line for text in lines for line in wrapped(text, 2, width))] if lines else []


def _check_text(check: Validation) -> str:
    worst = min((m for outputs in check.arithmetics.values() for m in outputs), key=lambda m: m.sqnr_db, default=None)
    if worst is None:
        return "no output is of floats"
    data = f"{check.amount} of {check.data}{' that layers were solved from (others lose more)' * check.in_sample}"
    times = "" if check.latency is None else f"; {_latency_text(check.latency)}"
    return f"output {worst.output} on {data}: SQNR {worst.sqnr_db:.1f} dB, cosine {worst.cosine:.5f}{times}"


def _latency_text(times: Latency) -> str:
    return f"{times.float_ms:.2f} ms -> {times.quantized_ms:.2f} ms a batch, {times.ratio:.2f} times (median of {times.runs})"


def by_reason(rows: Iterable[Skip]) -> dict[str, list[Skip]]:
    """Group rows by reason, in order of appearance."""
    groups: dict[str, list[Skip]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row)
    return groups


def skip_lines(text: str, rows: Sequence[Skip], width: int = COLUMNS) -> list[str]:
    """Summarize skips of one reason: count, size of their weights (shared ones once), and the first names."""
    size = sum({r.detail: r.bytes for r in rows}.values())
    text += f", {megabytes(size)}" * bool(size)
    shown = listed([r.label for r in rows])
    return wrapped(f"  {len(rows):3d}  {text}: {shown}", 7, width)


def wrapped(text: str, indent: int = 13, width: int = COLUMNS) -> list[str]:
    """Wrap text to ``width`` columns, with later lines indented."""
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def layer_notes(rows: tuple[LayerRow, ...], most: int = 6) -> list[str]:
    """Collect the notes of layers, each once with the number of layers it applies to."""
    layers: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            layers.setdefault(note, []).append(row.label)
    lines = [f"{names[0] if len(names) == 1 else f'{len(names)} layers'}: {note}" for note, names in layers.items()]
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more (see the JSON report)"]


def layer_table(rows: Sequence[LayerRow], most: int | None = None, width: int = COLUMNS) -> list[str]:
    """Render a table of layers with the worst error marked; of more than ``most``, those with the largest errors first."""
    if most is not None and len(rows) > most:
        ordered = sorted(rows, key=lambda row: -severity(row.error or 0))
        errors = [row.error or 0 for row in ordered[most:]]
        ends = f"{min(errors, key=severity):.2%} to {max(errors, key=severity):.2%}"
        note = f"... and {len(errors)} more layers with errors from {ends} (--verbose shows all)"
        return [*layer_table(ordered[:most], width=width), *wrapped(note, 4, width)]
    name_width = width - 40  # for names
    reduced = any(r.magr for r in rows) and all(r.bits is None for r in rows)
    head = f"{'largest weight':>21}" if reduced else f"{'bits':>4} {'block':>7} {'error':>8}"
    lines = [f"{'layer':{name_width}} {'K x N':>13} {head}"]
    worst = max((severity(r.error or 0) for r in rows), default=0)
    for r in rows:
        name = name_end(r.label, name_width)
        error = "" if r.error is None else f"{r.error:8.2%}"
        mark = " *" if r.error and severity(r.error) == worst and len(rows) > 1 else ""
        shape = f"{r.k} x {r.n}" if r.groups == 1 else f"{r.groups} x {r.k} x {r.n}"
        figures = f"{_lowered(r):>21}" if reduced else f"{r.bits or '-':>4} {r.block or '-':>7} {error}{mark}"
        lines.append(f"{name:{name_width}} {shape:>13} {figures}")
    return lines


def name_end(name: str, most: int) -> str:
    """Return the end of a name, which tells layers apart, in at most ``most`` characters."""
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _lowered(row: LayerRow) -> str:
    """Describe how MagR reduced the largest weight of a layer."""
    return "-" if row.magr is None else f"{row.magr['max_before']:.4g} -> {row.magr['max_after']:.4g}"


def validation_text(v: Validation, labels: Mapping[str | None, str] = MappingProxyType({}), width: int = COLUMNS) -> list[str]:
    """Render a validation: metrics by output and arithmetic, then size and latency; ``labels`` maps outputs to layers."""
    lines = [
        f"validation   {v.data}: {v.amount}, provider {v.provider}",
        f"  {'output':18} {'arithmetic':11} {'SQNR dB':>7} {'cosine':>8} {'max err':>8} {'top-1':>7} {'KL':>8}",
    ]
    for arithmetic, m in v.shown():
        top1 = "" if m.top1 is None else f"{m.top1:7.2%}"
        kl = "" if m.kl is None else f"{m.kl:8.5f}"
        row = f"  {m.output:18.18} {arithmetic:11} {m.sqnr_db:7.2f} {m.cosine:8.5f} {m.max_error:8.3g} {top1:>7} {kl:>8}"
        lines.append(row.rstrip())
    lines += [] if v.metric is None else [f"  metric {v.metric}"]
    lines += [line for sentence in v.broken() for line in wrapped(f"  {sentence}", 4, width)]
    for m in next(iter(v.arithmetics.values()), ()):
        if m.cross_entropy is not None and m.perplexity is not None:
            (a, b), (before, after) = m.cross_entropy, m.perplexity
            lines.append(f"  perplexity {before:.3f} -> {after:.3f}")
            lines.append(f"  cross-entropy {a:.4f} -> {b:.4f} nats a token ({b - a:+.4f})")
    lines.append(f"  size {megabytes(v.float_bytes)} -> {megabytes(v.quantized_bytes)}")
    if v.latency is not None:
        lines.append(f"  latency {_latency_text(v.latency)}")
        if v.latency.float_quartiles and v.latency.quantized_quartiles:
            lines.append("    quartiles " + " -> ".join(f"{low:.2f} to {high:.2f} ms" for low, high in v.latency.spread))
        lines += wrapped(f"    {v.latency.where}", 6, width)
    if v.layers:
        worst = max(v.layers, key=lambda layer: severity(layer.relative_error))
        lines.append(f"  largest error at a layer in the running model: {worst.relative_error:.2%}")
        lines.append(f"    at {labels.get(worst.layer, worst.label)}")
    return [*lines, *(line for n in v.notes for line in wrapped(f"  {n}", 4, width))]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def versions() -> dict[str, str]:
    """Return the versions of this package and its main dependencies."""
    versions_by_name = {}
    for name in ("onnx-magr", "numpy", "numba", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"):
        try:
            versions_by_name[name] = version(name)
        except PackageNotFoundError:
            continue
    versions_by_name.setdefault("onnx-magr", "unknown")
    return versions_by_name
