"""Terminal output: results on standard output; progress on standard error, as bars on a terminal or as lines elsewhere."""

from __future__ import annotations

import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.text import Text

from magr_onnx.config.arguments import OnLayer, Progress
from magr_onnx.report.data import COLUMNS
from magr_onnx.report.serialization import json_text, plain
from magr_onnx.workflow import progress

MAX_LINES = 20  # of an error message
UNCHANGED = "no output was changed"
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
def watch(quiet: bool = False) -> Iterator[tuple[Progress | None, OnLayer | None]]:
    """Provide callbacks for the steps and the layers of a run, which write to standard error.

    On a terminal they draw bars with the time left. Elsewhere (a pipe, a log file) they print a line when a stage begins and ends, and one
    every `progress.LINE_EVERY` seconds in between. ``--verbose`` adds a line per layer. A callback is None if it would print nothing.
    """
    if quiet:
        yield None, None
        return
    with progress.bars(errors) as bars:
        lines = _verbose or bars is None
        say = partial((errors if bars is None else bars.console).print, markup=False)
        reporter = progress.StageReporter(bars, say if lines else None, progress.LINE_EVERY)
        yield reporter.step, reporter.layer if bars is not None or _verbose else None


def await_output(path: Path | None, resumable: bool = False) -> None:
    """Record the state of the output path before a run, so that messages can tell whether a failed run wrote it; None for no output.

    ``resumable`` tells whether the next run continues from finished layers.
    """
    global _awaited, _resumable
    _awaited, _resumable = None if path is None else (path, _state(path)), resumable


def outcome() -> str:
    """Say whether an aborted run wrote its output, as a clause."""
    if _awaited is None or _state(_awaited[0]) == _awaited[1]:
        return UNCHANGED
    return f"{_awaited[0]} was written before that"


def remedy() -> str:
    """Say how to continue an aborted run, as the end of a sentence."""
    return "; the same command continues where it stopped" if _resumable else ""


def _state(path: Path) -> tuple[int, int] | None:
    """Return inode and time of a file or folder, to detect that it was replaced; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def explain(error: Exception) -> None:
    """Print an explained error, at most `MAX_LINES` lines without ``--verbose``."""
    lines = str(error).splitlines()
    if len(lines) > MAX_LINES and not _verbose:
        lines = [*lines[: MAX_LINES - 1], f"  ... and {len(lines) - MAX_LINES + 1} more (--verbose shows all)"]
    if (consequence := outcome()) != UNCHANGED:
        lines.append(consequence)
    _error("\n".join(lines))


def apologize(error: Exception, version: str) -> None:
    """Print an unexpected error and how to report it. The traceback is printed with ``--verbose``, else written to a file."""
    trace = "".join(traceback.format_exception(error))
    if _verbose:
        location = "The traceback is above."
        errors.print(trace, markup=False)
    else:
        with tempfile.NamedTemporaryFile(
            "w", prefix="onnx-magr-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"onnx-magr {version}, Python {sys.version}\n{trace}")
        location = f"The traceback is in {Path(file.name)} (--verbose prints it)."
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    explanation = f"this should not have happened ({summary}); {outcome()}. Please report it with the traceback. {location}"
    _error(f"onnx-magr {version}: {explanation}")


def _error(text: str) -> None:
    """Print a message, on a terminal wrapped to its width with a hanging indent."""
    text = f"error: {text}"
    if errors.is_terminal:
        wrapped = (textwrap.wrap(line, errors.width, subsequent_indent="    ", break_on_hyphens=False) for line in text.splitlines())
        text = "\n".join("\n".join(lines) for lines in wrapped)
    shown = Text(text)
    shown.stylize("bold red", 0, len("error:"))
    errors.print(shown)


def command_line() -> str:
    """Format the running command for a shell."""
    return shlex.join(["onnx-magr", *sys.argv[1:]])


class _Marks(RegexHighlighter):
    """Highlighter of the headings and the worst figures of a report."""

    highlights: ClassVar[list[str]] = [
        r"(?m)^(?P<bold>(?:layer|left as they are|notes|validation|mixed precision)\b.*)$",
        r"(?m)^(?P<yellow>.* \*)$",
        r"(?P<red>THE GOAL IS MISSED.*)",
    ]


def columns() -> int:
    """Return the width of text: that of the terminal, between 60 and 80 columns, else 80."""
    return min(COLUMNS, max(results.width, 60)) if results.is_terminal else COLUMNS


def say(text: str) -> None:
    """Print lines of the result on standard output, highlighted on a terminal."""
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
