"""A grid of small line charts with a logarithmic vertical axis, written as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 290, 226  # of a panel
LEFT, TOP, RIGHT, BOTTOM = 48, 42, 8, 34  # its margins
COLORS = ("#1f4e9c", "#4aa3df", "#8a8a8a", "#d95f02", "#b3123f", "#2a8f4e")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart: its title, the names of its axes, and points by the name of their line."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]


def write(path: Path, rows: Sequence[tuple[str, Sequence[Panel]]]) -> None:
    """Rows of panels with a title each, one legend above them; the panels of a row share their axes."""
    names = list(dict.fromkeys(name for _, row in rows for panel in row for name in panel.lines))
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    width, height = WIDTH * max(len(row) for _, row in rows), HEIGHT * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    at = LEFT
    for name in names:
        parts += [f'<path d="M{at} 16h18" stroke="{color[name]}" stroke-width="2"/>', _text(at + 23, 20, name, "start")]
        at += 40 + 6 * len(name)
    for i, (title, row) in enumerate(rows):
        parts.append(_text(LEFT, i * HEIGHT + 44, title, "start", 'font-weight="bold" font-size="12"'))
        values = [y for panel in row for line in panel.lines.values() for _, y in line if y > 0]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        xs = sorted({x for panel in row for line in panel.lines.values() for x, _ in line})
        for j, panel in enumerate(row):
            parts += _panel(panel, j * WIDTH, i * HEIGHT + 30, xs, (low, max(high, low + 1)), color)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>", ""]))


def _panel(panel: Panel, left: float, top: float, xs: Sequence[float], powers: tuple[int, int], color: dict[str, str]) -> list[str]:
    low, high = powers
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, top + HEIGHT - BOTTOM, top + TOP

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(max(y, 10.0**low)) - low) / (high - low)  # what is not positive lies on the axis
        return x0 + (x1 - x0) * (x - xs[0]) / (xs[-1] - xs[0] or 1), y0 + (y1 - y0) * share

    parts = [_text((x0 + x1) / 2, top + TOP - 8, panel.title, "middle")]
    parts.append(_text((x0 + x1) / 2, y0 + 28, panel.x, "middle"))
    parts.append(_text(left + 10, (y0 + y1) / 2, panel.y, "middle", f'transform="rotate(-90 {left + 10:g} {(y0 + y1) / 2:g})"'))
    for power in range(low, high + 1):
        y = place(xs[0], 10.0**power)[1]
        parts.append(f'<path d="M{x0:g} {y:.1f}H{x1:g}" stroke="#dddddd"/>')
        parts.append(_text(x0 - 4, y + 3, f"{10.0**power:g}", "end"))
    for x in range(2 * math.ceil(xs[0] / 2), math.floor(xs[-1]) + 1, 2):
        parts.append(_text(place(x, 1)[0], y0 + 13, f"{x:g}", "middle"))
    for name, line in reversed(panel.lines.items()):  # the first line on top
        points = [place(x, y) for x, y in sorted(line)]
        if points:
            trace = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{trace}" fill="none" stroke="{color[name]}" stroke-width="1.8"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color[name]}"/>' for x, y in points]
    return parts


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{" " if more else ""}{more}>{escape(text)}</text>'
