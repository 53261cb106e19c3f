"""Terminal output: progress on long work when a person is watching, nothing of the kind in a pipe."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console, RenderableType
from rich.highlighter import RegexHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from magr_onnx.decoding import plain
from magr_onnx.report import LayerRow

Steps = Callable[[str, int, int], None]
Layers = Callable[[LayerRow], None]

LINES = 20  # of an error, on one screen
errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)
_verbose = False


def be_verbose(value: bool) -> bool:
    """Remember that everything is to be said (the callback of ``--verbose``)."""
    global _verbose
    _verbose = value
    return value


class _Bars(Progress):
    """A bar a stage, and a line about the layers below them."""

    layers = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.layers:
            yield self.layers


class _Watch:
    """What a person sees of a run: bars on a terminal, lines where all is to be said."""

    def __init__(self, bars: _Bars | None, lines: bool) -> None:
        self._bars, self._lines = bars, lines
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._worst: LayerRow | None = None

    def step(self, stage: str, done: int, total: int) -> None:
        """Steps of a stage."""
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
        if self._lines and stage not in self._begun:
            self._begun[stage] = time.perf_counter()
            self._say(f"{stage}: {total} steps")
        if self._lines and done == total:
            self._say(f"{stage}: done in {time.perf_counter() - self._begun[stage]:.1f} s{_memory()}")

    def layer(self, row: LayerRow) -> None:
        """A finished layer."""
        if (row.error or 0) >= ((self._worst and self._worst.error) or 0):
            self._worst = row
        if self._lines:
            self._say(f"{row.label}: {what(row)}")
        if self._bars is not None and self._worst is not None:
            last, worst = (f"{r.error or 0:.2%} {_short(r.label)}" for r in (row, self._worst))
            self._bars.layers = Text(f"layer error    last {last}, most {worst}", no_wrap=True, overflow="ellipsis")

    def _say(self, text: str) -> None:
        console = errors if self._bars is None else self._bars.console
        console.print(text, markup=False)


@contextmanager
def watch(quiet: bool = False) -> Iterator[tuple[Steps | None, Layers | None]]:
    """Callbacks for the steps and the layers of a run.

    They draw bars on standard error, with time left, if that is a terminal. Lines about every stage and layer are for those who want
    them. In a pipe there is nothing else.
    """
    terminal = errors.is_terminal and not errors.is_dumb_terminal
    if quiet or not (terminal or _verbose):
        yield None, None
        return
    if not terminal:
        watching = _Watch(None, _verbose)
        yield watching.step, watching.layer
        return
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with _Bars(*columns, console=errors, transient=True) as bars:
        watching = _Watch(bars, _verbose)
        yield watching.step, watching.layer


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Steps | None]:
    """The steps of `watch` alone."""
    with watch(quiet=not enabled) as (step, _):
        yield step


def what(row: LayerRow) -> str:
    """What was done to a layer, and what decided it, in a line."""
    form = "float" if row.bits is None else f"{row.bits} bits, {'one grid' if row.block_size is None else f'block {row.block_size}'}"
    found = [form, *([] if row.error is None else [f"error {row.error:.2%}"])]
    solver = row.solver or {}
    if "tried" in solver:
        order = "strong inputs first" if solver["act_order"] else "in order"
        found.append(f"best of {solver['tried']:.0f} trials: alpha {solver['alpha']:.3g}, damping {solver['damping']:.3g}, {order}")
    if row.magr is not None:
        found.append(f"largest weight {row.magr['max_before']:.3g} to {row.magr['max_after']:.3g}")
    if row.feedback is not None:
        before, after = row.feedback["held_out_before"], row.feedback["held_out_after"]
        found.append(f"feedback {before:.3g} to {after:.3g} on held-out rows")
    return "; ".join([", ".join(found), *row.notes])


def explain(error: Exception) -> None:
    """An explained error within one screen: what it is, what to do; the whole of a long list only if all is to be said."""
    lines = str(error).splitlines()
    if len(lines) > LINES and not _verbose:
        lines = [*lines[: LINES - 1], f"  ... and {len(lines) - LINES + 1} more (--verbose shows all)"]
    _error("\n".join(lines))


def apologize(error: Exception, version: str) -> None:
    """An error nobody expected: what to send to whom. The traceback is shown if all is to be said, and else kept in a file."""
    trace = "".join(traceback.format_exception(error))
    if _verbose:
        where = "The traceback is above."
        errors.print(trace, markup=False)
    else:
        with tempfile.NamedTemporaryFile("w", prefix="onnx-magr-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(f"onnx-magr {version}, Python {sys.version}\n{trace}")
        where = f"The traceback is in {Path(file.name)} (--verbose prints it)."
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    explanation = f"this should not have happened ({said}). No output was changed. Please report it with the traceback. {where}"
    _error(f"onnx-magr {version}: {explanation}")


def _error(text: str) -> None:
    """The message; on a terminal in lines that fit it, later ones indented."""
    text = f"error: {text}"
    if errors.is_terminal:
        wrapped = (textwrap.wrap(line, errors.width, subsequent_indent="    ", break_on_hyphens=False) for line in text.splitlines())
        text = "\n".join("\n".join(lines) for lines in wrapped)
    shown = Text(text)
    shown.stylize("bold red", 0, len("error:"))
    errors.print(shown)


def command_line() -> str:
    """The command that is running, as a shell takes it."""
    return shlex.join(["onnx-magr", *sys.argv[1:]])


class _Marks(RegexHighlighter):
    """What the eye should find in a report: headings, and the worst."""

    highlights: ClassVar[list[str]] = [
        r"(?m)^(?P<bold>(?:layer|left as they are|notes|validation|mixed precision)\b.*)$",
        r"(?m)^(?P<yellow>.* \*)$",
        r"(?P<red>THE GOAL IS MISSED.*)",
    ]


def say(text: str) -> None:
    """Lines of result on standard output; on a terminal some of them stand out."""
    if results.is_terminal and not results.is_dumb_terminal:
        results.print(_Marks()(Text(text)), soft_wrap=True)
    else:
        sys.stdout.write(text + "\n")


def say_json(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def show(value: Any, text: str, as_json: bool, quiet: bool = False) -> None:
    """The result of a command: as JSON if asked for, as text unless it shall be quiet."""
    if as_json:
        say_json(value)
    elif not quiet:
        say(text)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"


def _memory() -> str:
    """The most memory the process has had, where the system says."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB of memory so far"
