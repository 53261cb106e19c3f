"""What was chosen for every layer under a budget of size or loss, as data and as text."""

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
        bytes: By how much the choice changes the tensors in the file, in bytes; 0 for float.
        loss: The predicted loss of the model with these layers so and all others float.
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
    """A size and the predicted loss at it; with a label where all layers have one choice."""

    bytes: int
    loss: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One quantization of the model: what was predicted and what was measured."""

    bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """Mixed precision as it was decided.

    Attributes:
        goal: What was asked for, in words.
        metric: Name of the loss.
        measured_on: The batches it was measured on.
        source_bytes: Size that percentages are of.
        attempts: Every quantization made, the last one being the result.
        met: Whether the result keeps to the goal.
        rows: Choices, in graph order.
        curve: The best predicted trade-offs from the smallest to the least loss.
        uniform: The same choice for all layers.
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

    def lines(self) -> list[str]:
        """Text within 80 columns."""
        found = [f"mixed precision: {self.goal}"]
        for a in self.attempts:
            found.append(f"  {a.bytes / self.source_bytes:6.2%}  {self.metric} {a.predicted:.4g} predicted, {a.measured:.4g} measured")
        found.append(f"  measured on {self.measured_on}")
        if not self.met:
            found.append("  THE GOAL IS MISSED: the best of these attempts still loses more than was asked for")
        groups: dict[str, int] = {}
        for row in sorted(self.rows, key=lambda r: (r.bits or 99, r.block_size or 9999)):
            groups[row.label] = groups.get(row.label, 0) + len(row.layers)
        found += [f"  {count:4d} {'layer ' if count == 1 else 'layers'} {label}" for label, count in groups.items()]
        return [*found, "", *self._table(), "", *self._plot()]

    def _table(self) -> list[str]:
        """Uniform choices beside the best trade-off of no more bytes."""
        lines = [f"  {'all layers':22} {'size':>7}  {'predicted':>9}  mixed at that size"]
        for p in sorted(self.uniform, key=lambda p: p.bytes):
            best = min((q.loss for q in self.curve if q.bytes <= p.bytes), default=math.nan)
            lines.append(f"  {p.label:22} {p.bytes / self.source_bytes:7.2%}  {p.loss:9.3g}  {best:.3g}")
        return lines

    def _plot(self) -> list[str]:
        """Predicted loss over size: the curve as dots, uniform choices as their bits, the result as @."""
        result = self.attempts[-1:]
        most = 1.1 * max([a.bytes for a in result] + [p.bytes for p in self.uniform or self.curve], default=0)
        marks = [(p.bytes, p.loss, ".") for p in self.curve] + [(p.bytes, p.loss, p.label[:1]) for p in self.uniform]
        marks += [(a.bytes, a.predicted, "@") for a in result]
        fitting = [(size, loss, mark) for size, loss, mark in marks if 0 < loss < math.inf and size <= most]
        shown = [(100 * size / self.source_bytes, math.log10(loss), mark) for size, loss, mark in fitting]
        if not shown:
            return ["  no choice has a predicted loss that could be plotted"]
        left, right = _range([x for x, _, _ in shown])
        low, high = _range([y for _, y, _ in shown])
        cells = [[" "] * WIDTH for _ in range(HEIGHT)]
        for x, y, mark in shown:
            cells[round((HEIGHT - 1) * (high - y) / (high - low))][round((WIDTH - 1) * (x - left) / (right - left))] = mark
        lines = [f"  predicted {self.metric} over size (digits: uniform, dots: mixed, @: result)"]
        for i, row in enumerate(cells):
            label = f"{10 ** (high - (high - low) * i / (HEIGHT - 1)):.1e}" if i % 5 == 0 else ""
            lines.append(f"  {label:>7} |{''.join(row)}".rstrip())
        ends = f"{left:.1f}%", f"{right:.1f}% of the source"
        return [*lines, f"  {'':7} +{'-' * WIDTH}", f"  {'':7}  {ends[0]}{ends[1]:>{WIDTH - len(ends[0])}}"]


def choice_label(bits: int | None, block_size: int | None) -> str:
    """A choice in words."""
    return "float" if bits is None else f"{bits} bits, {'per channel' if block_size is None else f'block {block_size}'}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest, never the same."""
    return min(values), max(max(values), min(values) + 1e-9)
