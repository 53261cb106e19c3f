"""What happened to every layer, as data, as JSON and as text."""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from magr_onnx.errors import ReportError, listed
from magr_onnx.report.mixed_precision import Assignment
from magr_onnx.report.serialization import AS_IS, decode, json_text, plain
from magr_onnx.report.validation import Validation, severity

MOST = 25
"""Layers in a table for a person in a hurry."""

COLUMNS = 80
"""Of text for people, where nothing says how many there are."""

LEGEND = (
    "K x N: inputs x outputs. error: of the layer's output, relative, on its rows of "
    "calibration data (a row is a token, or else a sample). *: the largest error."
)
"""What a table of layers means, for `Report.to_text`."""

SCHEMA = 3
"""Version of the JSON: 1 had no `Report.schema`, no histograms and no curves, 2 had None for all that is not finite."""


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One converted layer.

    Attributes:
        name: Node name.
        op: MatMul, Gemm, Conv or ConvTranspose.
        weight: Initializer name.
        k: Input width.
        n: Output width.
        bits: Code width; None where the weight stayed float (MagR alone).
        block_size: Rows that share a scale; of a table values of a row.
        rows: Calibration rows behind the statistics; 0 for data-free.
        error: Relative layer error ``sqrt(tr(D^T H D) / tr(W^T H W))`` on the calibration data, bias correction included. Behind
            quantized layers: of the output against what it should be there, what the layers before did wrong included.
        magr: Iterations and magnitudes of MagR, if it ran.
        solver: Figures of the quantizer, if it has any: sweeps, layer error before and after them.
        bias_compensated: Whether the bias took up the mean error.
        emitted: Name of the node that multiplies by the quantized weight.
        notes: Anything out of the ordinary.
        activation: How the input is quantized, if it is.
        feedback: Damping and held-out errors of error feedback, if it ran.
        low_rank: Rank of the low-rank branch, and the relative layer error without and with it, if there is one.
        groups: Matrices ``k x n`` of a convolution, one a group of channels.
        weights: Histograms of the weight before and after MagR, of its values and on its grid; see `magr_onnx.core.histograms.sketch`.
        errors: What the quantizer lowers, at the start and after every sweep (of at most 50).
        sweeps: How many sweeps each of ``errors`` is behind; empty in older reports, which have all of them.
        tiles: Headroom of a constrained accumulator along K; see `magr_onnx.core.histograms.tile_headroom`.
        depth: Converted layers before it on the longest way from the inputs.
        output: Name of its output, by which `Validation.layers` has it.
        scope: Path of the torch module it came from, where the file says so (`magr_onnx.passes.graph.torch_names`); of several layers of
            one path the second has ``@1`` behind it, and so on.
        stored_block: Rows of the blocks it is stored in, where those are smaller than ``block_size``, so that scales are repeated.
        added: Bytes that it adds to the file, where its float weight stays in it for others.
    """

    name: str
    op: str
    weight: str
    k: int
    n: int
    bits: int | None
    block_size: int | None
    rows: int
    error: float | None
    magr: dict[str, Any] | None
    solver: dict[str, float] | None
    bias_compensated: bool
    emitted: str | None
    notes: tuple[str, ...] = ()
    activation: dict[str, Any] | None = None
    feedback: dict[str, Any] | None = None
    low_rank: dict[str, Any] | None = None
    groups: int = 1
    weights: dict[str, Any] | None = None
    errors: tuple[float, ...] = ()
    sweeps: tuple[int, ...] = ()
    tiles: dict[str, Any] | None = None
    depth: int | None = None
    output: str | None = None
    scope: str = ""
    stored_block: int | None = None
    added: int | None = None

    @property
    def label(self) -> str:
        """What to call it to a person: its module, or the name of its node."""
        return self.scope or self.name

    @property
    def block(self) -> str:
        """What shares a scale: that many rows, or a whole channel; in a table that many values of a row, or the whole row."""
        whole, name = (self.n, "row") if self.op == "Gather" else (self.k, "channel")
        return "" if self.block_size is None else name if self.block_size >= whole else str(self.block_size)


@dataclass(frozen=True, slots=True)
class ProofSummary:
    """What `magr_onnx.verify` found in the result, where an accumulator was asked for.

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
        room = "" if self.headroom is None else f", least headroom {self.headroom:.2f} bits"
        return f"{self.proved} of {self.total} integer dot products proved{room} ({self.against})"


@dataclass(frozen=True, slots=True)
class SkipRow:
    """A node that was looked at and left alone (not converted, or neither proved nor refuted), and why; its weights where known.

    ``scope`` is the path of the torch module it came from, where the file says so.
    """

    name: str
    op: str
    reason: str
    detail: str = ""
    bytes: int = 0
    scope: str = ""

    @property
    def label(self) -> str:
        """What to call it to a person: nodes of one module differ by their names."""
        return f"{self.scope} ({self.name})" if self.scope else self.name


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `magr_onnx.optimize` did.

    Attributes:
        source: Path of the model, or a description.
        output: Path written, if any.
        pipeline: Text that reproduces the passes; with an ``assignment`` that has the bits and blocks of every layer instead.
        calibration: What the data was, or that there was none.
        layers: Converted layers in graph order.
        skipped: Nodes with weights that were left alone.
        bytes_before: Size of the source.
        bytes_after: Size of the result.
        verified: Layers whose codes were read back from the result and found equal to those chosen.
        seconds: Wall time by stage.
        versions: Of the packages involved.
        notes: Whatever else should be known.
        validation: Float against quantized, if it was asked for.
        proof: That no accumulator overflows, if that was asked for.
        assignment: Mixed precision under a budget, if that was asked for.
        command: The command or the Python call that does the same again; paths are as they were given.
        options: What was asked for, defaults left out; objects that are no plain data are text.
        recipe: The same as the text of a recipe, where the command line was used.
        schema: Version of this structure, as `SCHEMA`.
    """

    source: str
    output: str | None
    pipeline: str
    calibration: str
    layers: tuple[LayerRow, ...]
    skipped: tuple[SkipRow, ...]
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
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; NaN and infinities are the texts ``nan``, ``inf`` and ``-inf``."""
        return plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """JSON, an array of numbers a line; `from_json` gives the same report back."""
        return json_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "report") -> Self:
        """The report that `to_json` wrote, in this version or an older one, whose missing parts are empty.

        Raises:
            ReportError: No report, or one of a newer version; the message begins with ``where``.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{where}: not JSON ({error}); give a file that 'optimize --report FILE.json' wrote") from error
        if isinstance(value, dict) and isinstance(made := value.setdefault("schema", 1), int) and made > SCHEMA:
            raise ReportError(f"{where}: written by a newer onnx-magr (schema {made}, this one reads up to {SCHEMA}); update onnx-magr")
        return decode(cls, value, where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """`from_json` of a file.

        Raises:
            ReportError: It cannot be read, or is no report.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ReportError(f"report {os.fspath(path)}: {error.strerror or error}") from error
        return cls.from_json(text, f"report {os.fspath(path)}")

    def to_html(self) -> str:
        """A page that shows everything, in one file that needs no network.

        Raises:
            OptionError: The extra ``report`` is not installed.
        """
        from magr_onnx.report import html  # an extra: most users of reports need no page

        return html.page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file: a page to ``.html``, else JSON to ``.json``.

        Raises:
            OptionError: The extra ``report`` is not installed, or the suffix is another.
            OutputError: The file cannot be written.
        """
        from magr_onnx.report import html

        html.save(self, Path(path))

    def to_text(self, most: int | None = None, width: int = COLUMNS) -> str:
        """A summary, a table of layers (of more than ``most`` those with the largest errors) and the reasons of those skipped.

        Lines have ``width`` columns, from 60 on, but for paths and the numbers of a validation or a budget, which need 80.
        """
        return "\n".join(
            [
                *self._summary(width),
                "",
                *layer_table(self.layers, most, width),
                *(wrapped(LEGEND, 0, width) if any(row.error is not None for row in self.layers) else ()),
                *self._skips(width),
                *self._assignment(),
                *self._validation(width),
                *self._notes(width),
            ]
        )

    def _summary(self, width: int) -> list[str]:
        ratio = self.bytes_after / self.bytes_before if self.bytes_before else 0
        return [
            f"model        {self.source}",
            f"output       {self.output or 'in memory'}",
            f"calibration  {self.calibration}",
            *wrapped(
                f"layers       {len(self.layers)} converted, {len(self.skipped)} left as they are; {self.verified} read back and verified",
                width=width,
            ),
            *([] if self.proof is None else wrapped(f"accumulator  {self.proof}", width=width)),
            f"size         {megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)} ({ratio:.1%})",
            *wrapped(f"time         {', '.join(f'{k} {v:.1f} s' for k, v in self.seconds.items())}", width=width),
        ]

    def _skips(self, width: int) -> list[str]:
        if not self.skipped:
            return []
        lines = (line for reason, rows in by_reason(self.skipped).items() for line in skip_lines(reason, rows, width))
        return ["", "left as they are", *lines]

    def _assignment(self) -> list[str]:
        return [] if self.assignment is None else ["", *self.assignment.lines()]

    def _validation(self, width: int) -> list[str]:
        labels = {row.output: row.label for row in self.layers}
        return [] if self.validation is None else ["", *validation_text(self.validation, labels, width)]

    def _notes(self, width: int) -> list[str]:
        found = [*self.notes, *layer_notes(self.layers)]
        return ["", "notes", *(line for n in found for line in wrapped(f"  {n}", 4, width))] if found else []


def by_reason(rows: Iterable[SkipRow]) -> dict[str, list[SkipRow]]:
    """Rows by reason, in order of appearance."""
    found: dict[str, list[SkipRow]] = {}
    for row in rows:
        found.setdefault(row.reason, []).append(row)
    return found


def skip_lines(text: str, rows: Sequence[SkipRow], width: int = COLUMNS) -> list[str]:
    """How many, why, the size of their weights where it is known (one that several read counts once), and the first names."""
    size = sum({r.detail: r.bytes for r in rows}.values())
    text += f", {megabytes(size)}" * bool(size)
    shown = listed([r.label for r in rows])
    return wrapped(f"  {len(rows):3d}  {text}: {shown}", 7, width)


def wrapped(text: str, indent: int = 13, width: int = COLUMNS) -> list[str]:
    """The text in lines of ``width`` columns, later ones indented."""
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def layer_notes(rows: tuple[LayerRow, ...], most: int = 6) -> list[str]:
    """What there is to say about layers, each sentence once with the number of layers it is true of."""
    layers: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            layers.setdefault(note, []).append(row.label)
    lines = [f"{names[0] if len(names) == 1 else f'{len(names)} layers'}: {note}" for note, names in layers.items()]
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more (see the JSON report)"]


def told_apart(rows: Iterable[LayerRow]) -> list[LayerRow]:
    """Rows whose scopes differ: of several with the same one, those after the first are numbered."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        count = seen[row.scope] = seen.get(row.scope, -1) + 1
        found.append(replace(row, scope=f"{row.scope}@{count}") if row.scope and count else row)
    return found


def layer_table(rows: Sequence[LayerRow], most: int | None = None, width: int = COLUMNS) -> list[str]:
    """Layers as text of ``width`` columns, worst error marked; of more than ``most`` those with the largest errors, largest first."""
    if most is not None and len(rows) > most:
        ordered = sorted(rows, key=lambda row: -severity(row.error or 0))
        errors = [row.error or 0 for row in ordered[most:]]
        ends = f"{min(errors, key=severity):.2%} to {max(errors, key=severity):.2%}"
        rest = f"... and {len(errors)} more layers with errors from {ends} (--verbose shows all)"
        return [*layer_table(ordered[:most], width=width), *wrapped(rest, 4, width)]
    left = width - 40  # for names
    reduced = any(r.magr for r in rows) and all(r.bits is None for r in rows)
    head = f"{'largest weight':>21}" if reduced else f"{'bits':>4} {'block':>7} {'error':>8}"
    lines = [f"{'layer':{left}} {'K x N':>13} {head}"]
    worst = max((severity(r.error or 0) for r in rows), default=0)
    for r in rows:
        name = shortened(r.label, left)
        error = "" if r.error is None else f"{r.error:8.2%}"
        mark = " *" if r.error and severity(r.error) == worst and len(rows) > 1 else ""
        shape = f"{r.k} x {r.n}" if r.groups == 1 else f"{r.groups} x {r.k} x {r.n}"
        done = f"{_lowered(r):>21}" if reduced else f"{r.bits or '-':>4} {r.block or '-':>7} {error}{mark}"
        lines.append(f"{name:{left}} {shape:>13} {done}")
    return lines


def shortened(name: str, most: int) -> str:
    """The end of a name, which tells layers apart."""
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _lowered(row: LayerRow) -> str:
    """What MagR made of the largest weight of a layer."""
    return "-" if row.magr is None else f"{row.magr['max_before']:.4g} -> {row.magr['max_after']:.4g}"


def validation_text(v: Validation, labels: Mapping[str | None, str] = MappingProxyType({}), width: int = COLUMNS) -> list[str]:
    """Metrics of every output and arithmetic, then size and latency; layers by ``labels`` of their outputs, where there are any."""
    lines = [
        f"validation   {v.data}: {v.amount}, provider {v.provider}",
        f"  {'output':18} {'arithmetic':11} {'SQNR dB':>7} {'cosine':>8} {'max err':>8} {'top-1':>7} {'KL':>8}",
    ]
    for arithmetic, m in v.shown():
        top1 = "" if m.top1 is None else f"{m.top1:7.2%}"
        kl = "" if m.kl is None else f"{m.kl:8.5f}"
        row = f"  {m.output:18.18} {arithmetic:11} {m.sqnr_db:7.2f} {m.cosine:8.5f} {m.max_error:8.3g} {top1:>7} {kl:>8}"
        lines.append(row.rstrip())
    lines += [line for said in v.broken() for line in wrapped(f"  {said}", 4, width)]
    for m in next(iter(v.arithmetics.values()), ()):
        if m.cross_entropy is not None and m.perplexity is not None:
            (a, b), (before, after) = m.cross_entropy, m.perplexity
            lines.append(f"  perplexity {before:.3f} -> {after:.3f} ({b - a:+.4f} nats a token)")
    lines.append(f"  size {megabytes(v.float_bytes)} -> {megabytes(v.quantized_bytes)}")
    if v.latency is not None:
        t = v.latency
        lines.append(f"  latency {t.float_ms:.2f} ms -> {t.quantized_ms:.2f} ms a batch (median of {t.runs} each, in turns)")
        if t.float_quartiles and t.quantized_quartiles:
            lines.append("    quartiles " + " -> ".join(f"{low:.2f} to {high:.2f} ms" for low, high in t.spread))
    if v.layers:
        worst = max(v.layers, key=lambda layer: severity(layer.relative_error))
        lines.append(f"  largest error at a layer in the running model: {worst.relative_error:.2%}")
        lines.append(f"    at {labels.get(worst.layer, worst.label)}")
    return [*lines, *(line for n in v.notes for line in wrapped(f"  {n}", 4, width))]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def versions() -> dict[str, str]:
    """Versions of this package and those it stands on."""
    found = {}
    for name in ("onnx-magr", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found.setdefault("onnx-magr", "unknown")
    return found
