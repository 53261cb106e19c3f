"""Terminal output: progress on long work when a person is watching, nothing of the kind in a pipe."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from magr_onnx.report import plain

errors = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback that draws a bar a stage on standard error, with time left; None unless that is a terminal."""
    if not enabled or not errors.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as bar:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


def command_line() -> str:
    """The command that is running, as a shell takes it."""
    return shlex.join(["onnx-magr", *sys.argv[1:]])


def say(text: str) -> None:
    """A line of result on standard output."""
    sys.stdout.write(text + "\n")


def say_json(value: Any) -> None:
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def show(value: Any, text: str, as_json: bool, quiet: bool = False) -> None:
    """The result of a command: as JSON if asked for, as text unless it shall be quiet."""
    if as_json:
        say_json(value)
    elif not quiet:
        say(text)
