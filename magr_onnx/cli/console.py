"""Terminal output: results on standard output; progress on standard error, as bars on a terminal and as lines elsewhere."""

from __future__ import annotations

import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text

from magr_onnx.report.data import COLUMNS, LayerRow
from magr_onnx.report.serialization import json_text, plain
from magr_onnx.workflow import progress

Steps = Callable[[str, int, int], None]
Layers = Callable[[LayerRow], None]

LINES = 20  # of an error, on one screen
NOTHING = "no output was changed"
errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False, soft_wrap=True)
_verbose = False
_awaited: tuple[Path, tuple[int, int] | None] | None = None
_resumable = False


def be_verbose(value: bool) -> bool:
    """Remember ``--verbose``, as its callback."""
    global _verbose
    _verbose = value
    return value


@contextmanager
def watch(quiet: bool = False) -> Iterator[tuple[Steps | None, Layers | None]]:
    """Callbacks for the steps and the layers of a run, which write to standard error.

    On a terminal they draw bars, with time left. Elsewhere (a pipe, a log file) they print a line as a stage begins and ends, and one every
    `progress.LINE_EVERY` seconds of a stage. ``--verbose`` adds a line for each layer; both are None where nothing is to be printed.
    """
    if quiet:
        yield None, None
        return
    with progress.bars(errors) as bars:
        lines = _verbose or bars is None
        say = partial((errors if bars is None else bars.console).print, markup=False)
        reporter = progress.StageReporter(bars, say if lines else None, progress.LINE_EVERY)
        yield reporter.step, reporter.layer if bars is not None or _verbose else None


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Steps | None]:
    """Open the steps of `watch` alone."""
    with watch(not enabled) as (step, _):
        yield step


def await_output(path: Path | None, resumable: bool = False) -> None:
    """Remember what is at ``path`` now, so that messages can say whether a run that failed has written it; None expects no output.

    ``resumable``: the run keeps what is finished, for the next one.
    """
    global _awaited, _resumable
    _awaited, _resumable = None if path is None else (path, _state(path)), resumable


def outcome() -> str:
    """Say what became of the output of a run that was broken off, as a clause."""
    if _awaited is None or _state(_awaited[0]) == _awaited[1]:
        return NOTHING
    return f"{_awaited[0]} was written before that"


def remedy() -> str:
    """Say what to do after a run was broken off, as the end of a sentence."""
    return "; the same command goes on where it was" if _resumable else ""


def _state(path: Path) -> tuple[int, int] | None:
    """Read what tells a file or a folder from another under its name."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def explain(error: Exception) -> None:
    """Print an explained error within one screen; the whole of a long list only with ``--verbose``."""
    lines = str(error).splitlines()
    if len(lines) > LINES and not _verbose:
        lines = [*lines[: LINES - 1], f"  ... and {len(lines) - LINES + 1} more (--verbose shows all)"]
    if (then := outcome()) != NOTHING:
        lines.append(then)
    _error("\n".join(lines))


def apologize(error: Exception, version: str) -> None:
    """Print an unexpected error and how to report it. The traceback is printed with ``--verbose``, else written to a file."""
    trace = "".join(traceback.format_exception(error))
    if _verbose:
        where = "The traceback is above."
        errors.print(trace, markup=False)
    else:
        with tempfile.NamedTemporaryFile(
            "w", prefix="onnx-magr-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"onnx-magr {version}, Python {sys.version}\n{trace}")
        where = f"The traceback is in {Path(file.name)} (--verbose prints it)."
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    explanation = f"this should not have happened ({summary}); {outcome()}. Please report it with the traceback. {where}"
    _error(f"onnx-magr {version}: {explanation}")


def _error(text: str) -> None:
    """Print the message; on a terminal in lines that fit it, later ones indented."""
    text = f"error: {text}"
    if errors.is_terminal:
        wrapped = (textwrap.wrap(line, errors.width, subsequent_indent="    ", break_on_hyphens=False) for line in text.splitlines())
        text = "\n".join("\n".join(lines) for lines in wrapped)
    shown = Text(text)
    shown.stylize("bold red", 0, len("error:"))
    errors.print(shown)


def command_line() -> str:
    """Write the command that is running, as a shell takes it."""
    return shlex.join(["onnx-magr", *sys.argv[1:]])


class _Marks(RegexHighlighter):
    """Headings of a report, and its worst figures."""

    highlights: ClassVar[list[str]] = [
        r"(?m)^(?P<bold>(?:layer|left as they are|notes|validation|mixed precision)\b.*)$",
        r"(?m)^(?P<yellow>.* \*)$",
        r"(?P<red>THE GOAL IS MISSED.*)",
    ]


def columns() -> int:
    """Choose the width of text: the terminal's from 60 to 80 columns, else 80."""
    return min(COLUMNS, max(results.width, 60)) if results.is_terminal else COLUMNS


def say(text: str) -> None:
    """Print lines of the result on standard output; on a terminal some of them are highlighted."""
    if results.is_terminal and not results.is_dumb_terminal:
        results.print(_Marks()(Text(text)), soft_wrap=True)
    else:
        sys.stdout.write(text + "\n")


def say_json(value: Any) -> None:
    sys.stdout.write(json_text(plain(value)) + "\n")


def show(value: Any, text: str, as_json: bool, quiet: bool = False) -> None:
    """Print the result of a command: as JSON or as text; no text with ``--quiet``."""
    if as_json:
        say_json(value)
    elif not quiet:
        say(text)
