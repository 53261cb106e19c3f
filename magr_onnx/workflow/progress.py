"""What a person sees of long work: bars on a terminal or in a notebook, and lines in a log file."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import rich.progress
from rich.console import Console, RenderableType
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from magr_onnx.config.arguments import Progress
from magr_onnx.report.data import name_end
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.report.validation import severity

NAME = 22
"""Characters of a layer's name below the bars."""
LINE_EVERY = 120.0
"""Seconds between lines about one long stage where no bars are drawn."""
LOGGER = logging.getLogger("magr_onnx")
"""Gets two lines a stage at level INFO, from every function of the Python interface that takes long."""


class Bars(rich.progress.Progress):
    """A bar a stage, and a line about the layers below them."""

    layers = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.layers:
            yield self.layers


@contextlib.contextmanager
def bars(console: Console) -> Iterator[Bars | None]:
    """Bars on a console, with the time left, while the block runs; None where nobody would see them, or others are drawing there."""
    if not (console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)):
        yield None
        return
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with contextlib.ExitStack() as stack:
        drawn: Bars | None = Bars(*columns, console=console, transient=True)
        try:
            stack.enter_context(cast(Bars, drawn))
        except LiveError:
            drawn = None
        yield drawn


class StageReporter:
    """The callbacks of a run, in bars, in lines, or in both.

    Args:
        bars: Where to draw.
        say: Called with a line as a stage begins and as it ends, and with one for each finished layer.
        every: Seconds between more lines of one stage, with steps done, of how many, and the time left. None for no such lines.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        bars: Bars | None = None,
        say: Callable[[str], None] | None = None,
        every: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._bars, self._say, self._every, self._clock = bars, say, math.inf if every is None else every, clock
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._last_line: dict[str, float] = {}
        self._worst: LayerRow | None = None

    def step(self, stage: str, done: int, total: int) -> None:
        """Steps of a stage. One that is done begins again with the next step: that of another model."""
        begins = stage not in self._begun
        if begins:
            self._begun[stage] = self._last_line[stage] = self._clock()
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            elif begins:
                self._bars.reset(self._tasks[stage])
            self._bars.update(self._tasks[stage], completed=done, total=total)
        if self._say is not None:
            self._say_step(self._say, stage, done, total, begins)
        if done == total:
            del self._begun[stage]

    def _say_step(self, say: Callable[[str], None], stage: str, done: int, total: int, begins: bool) -> None:
        now, unit = self._clock(), "layers" if stage == "quantizing" else "steps"
        seconds = now - self._begun[stage]
        if begins:
            say(f"{stage}: {total} {unit}" if total > 1 else f"{stage} ...")
        if done == total:
            say(f"{stage}: done in {seconds:.1f} s{_memory()}")
        elif done > 0 and now - self._last_line[stage] >= self._every:
            self._last_line[stage] = now
            say(f"{stage}: {done} of {total} {unit} in {duration(seconds)}, about {duration(seconds / done * (total - done))} left")

    def layer(self, row: LayerRow) -> None:
        """A finished layer."""
        if severity(row.error or 0) >= severity((self._worst and self._worst.error) or 0):
            self._worst = row
        if self._say is not None:
            self._say(f"{row.label}: {layer_summary(row)}")
        if self._bars is not None and self._worst is not None:
            last, worst = (f"{r.error or 0:.2%} {name_end(r.label, NAME)}" for r in (row, self._worst))
            self._bars.layers = Text(f"layer error    last {last}, most {worst}", no_wrap=True, overflow="ellipsis")


def duration(seconds: float) -> str:
    """A time in the two largest units that matter: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


@contextlib.contextmanager
def reporter(progress: Progress | bool | None) -> Iterator[Progress]:
    """Pass steps of long work on: to `LOGGER` in any case, to ``progress`` if it is callable, to bars if it is True."""
    with bars(Console(stderr=True)) if progress is True else contextlib.nullcontext() as drawn:
        listeners: list[Progress] = [StageReporter(drawn, LOGGER.info).step, *([progress] if callable(progress) else [])]

        def step(stage: str, done: int, total: int) -> None:
            for listener in listeners:
                listener(stage, done, total)

        yield step


def layer_summary(row: LayerRow) -> str:
    """What was done to a layer, and what decided it, in a line."""
    form = "float" if row.bits is None else f"{row.bits} bits, {f'block {row.block}' if row.block.isdecimal() else f'per {row.block}'}"
    parts = [form, *([] if row.error is None else [f"error {row.error:.2%}"])]
    solver = row.solver or {}
    if "tried" in solver:
        order = "strong inputs first" if solver["act_order"] else "in order"
        parts.append(f"best of {solver['tried']:.0f} trials: alpha {solver['alpha']:.3g}, damping {solver['damping']:.3g}, {order}")
    if row.magr is not None:
        before, after = (f"{row.magr[name]:.3g}" for name in ("max_before", "max_after"))
        parts.append(f"MagR: largest weight {before} before, {after} after" if before != after else f"MagR: largest weight still {after}")
    if row.feedback is not None:
        before, after = (f"{row.feedback[name]:.3g}" for name in ("held_out_before", "held_out_after"))
        parts.append(f"feedback {before} to {after} on held-out rows")
    return "; ".join([", ".join(parts), *row.notes])


def _memory() -> str:
    """The most memory the process has had, where the system says."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB of memory so far"
