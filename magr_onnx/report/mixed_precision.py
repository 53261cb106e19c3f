"""Mixed-precision result under a budget of size or loss, as data and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 60, 11  # of the plot, characters


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """The choice for one layer, or for layers that share a weight.

    Attributes:
        layers: Node names.
        bits: Code width; None for float.
        block_size: Rows that share a scale; None for a whole column, or float.
        bytes: Change of the tensors in the file, in bytes; 0 for float.
        loss: Predicted loss of the model with this choice and all other layers float.
    """

    layers: tuple[str, ...]
    bits: int | None
    block_size: int | None
    bytes: int
    loss: float

    @property
    def label(self) -> str:
        return choice_label(self.bits, self.block_size)


@dataclass(frozen=True, slots=True)
class TradeOff:
    """A size and its predicted loss; with a label where all layers have the same choice."""

    bytes: int
    loss: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Predicted and measured loss of one quantization of the model, or the user's own measure of it."""

    bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """Mixed precision under a budget.

    Attributes:
        goal: The budget, in words.
        metric: Name of the loss.
        measured_on: Description of the batches.
        source_bytes: Size of the source, the base of percentages.
        attempts: Every quantization; the last one is the result.
        met: Whether the result meets the budget.
        rows: Choices, in graph order.
        curve: The best predicted trade-offs from the smallest to the least loss.
        uniform: The same choice for all layers.
        measure: Name of the user's own measure, where that is what was measured of attempts; higher is better.
    """

    goal: str
    metric: str
    measured_on: str
    source_bytes: int
    attempts: tuple[Attempt, ...]
    met: bool
    rows: tuple[ChoiceRow, ...]
    curve: tuple[TradeOff, ...]
    uniform: tuple[TradeOff, ...]
    measure: str = ""

    def lines(self) -> list[str]:
        """Render as text within 80 columns."""
        text = [f"mixed precision: {self.goal}"]
        for a in self.attempts:
            measured = f"{self.measure} {a.measured:.6g}" if self.measure else f"{a.measured:.4g} measured"
            text.append(f"  {a.bytes / self.source_bytes:6.2%}  {self.metric} {a.predicted:.4g} predicted, {measured}")
        text.append(f"  measured on {self.measured_on}")
        if not self.met:
            text.append("  THE GOAL IS MISSED: the best of these attempts still loses more than was asked for")
        groups: dict[str, int] = {}
        for row in sorted(self.rows, key=lambda r: (r.bits or 99, r.block_size or 9999)):
            groups[row.label] = groups.get(row.label, 0) + len(row.layers)
        text += [f"  {count:4d} {'layer ' if count == 1 else 'layers'} {label}" for label, count in groups.items()]
        return [*text, "", *self._table(), "", *self._plot()]

    def _table(self) -> list[str]:
        """Tabulate uniform choices against the best mixed one of no more bytes."""
        lines = [f"  {'all layers':22} {'size':>7}  {'predicted':>9}  mixed at that size"]
        for p in sorted(self.uniform, key=lambda p: p.bytes):
            best = min((q.loss for q in self.curve if q.bytes <= p.bytes), default=math.nan)
            lines.append(f"  {p.label:22} {p.bytes / self.source_bytes:7.2%}  {p.loss:9.3g}  {best:.3g}")
        return lines

    def _plot(self) -> list[str]:
        """Plot predicted loss over size: the curve as dots, uniform choices as their bits, the result as @."""
        result = self.attempts[-1:]
        most = 1.1 * max([a.bytes for a in result] + [p.bytes for p in self.uniform or self.curve], default=0)
        marks = [(p.bytes, p.loss, ".") for p in self.curve] + [(p.bytes, p.loss, p.label[:1]) for p in self.uniform]
        marks += [(a.bytes, a.predicted, "@") for a in result]
        fitting = [(size, loss, mark) for size, loss, mark in marks if 0 < loss < math.inf and size <= most]
        shown = [(100 * size / self.source_bytes, math.log10(loss), mark) for size, loss, mark in fitting]
        if not shown:
            return ["  no choice has a predicted loss that could be plotted"]
        start, end = _range([x for x, _, _ in shown])
        low, high = _range([y for _, y, _ in shown])
        cells = [[" "] * WIDTH for _ in range(HEIGHT)]
        for x, y, mark in shown:
            cells[round((HEIGHT - 1) * (high - y) / (high - low))][round((WIDTH - 1) * (x - start) / (end - start))] = mark
        lines = [f"  predicted {self.metric} over size (digits: uniform, dots: mixed, @: result)"]
        for i, row in enumerate(cells):
            label = f"{10 ** (high - (high - low) * i / (HEIGHT - 1)):.1e}" if i % 5 == 0 else ""
            lines.append(f"  {label:>7} |{''.join(row)}".rstrip())
        ends = f"{start:.1f}%", f"{end:.1f}% of the source"
        return [*lines, f"  {'':7} +{'-' * WIDTH}", f"  {'':7}  {ends[0]}{ends[1]:>{WIDTH - len(ends[0])}}"]


def choice_label(bits: int | None, block_size: int | None) -> str:
    """Describe a choice."""
    return "float" if bits is None else f"{bits} bits, {'per channel' if block_size is None else f'block {block_size}'}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return minimum and maximum, never equal."""
    return min(values), max(max(values), min(values) + 1e-9)
