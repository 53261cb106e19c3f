"""The command line. Each command parses, calls the Python interface and prints; no work of its own.

Exit codes: 0 success, 1 an error that is explained (a bad model, bad data, no place to write to), 2 options that are wrong or do not go
together, 70 a mistake of this program, 130 interrupted. ``validate`` also returns 3 when a threshold given by the user is missed,
``verify`` 1 when an accumulator overflows.
"""

from __future__ import annotations

import io
import re
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import magr_onnx
from magr_onnx.cli import console
from magr_onnx.cli.commands import COMMANDS
from magr_onnx.errors import MagrError, OptionError, closest

_NO_CHOICE = re.compile(r"(?:Value error, )?'(?P<given>.*)' is not one of (?P<choices>.*?)\.?")


class _Commands(TyperGroup):
    """Commands whose wrong values are told what they may have been meant to be, as those of recipes are."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if (found := _NO_CHOICE.fullmatch(error.message)) is not None:
                choices = found["choices"].replace("'", "").split(", ")
                error.message = f"{found['given']!r}: choose one of {', '.join(choices)}{closest(found['given'], choices)}"
            raise


app = typer.Typer(
    name="onnx-magr",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        console.say(f"onnx-magr {magr_onnx.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Quantize ONNX models to 2 to 8 bits with MagR, GPTQ and bias compensation.

    Try [bold]onnx-magr demo[/bold] first: it needs no model and no data.
    """


for _name, _module in COMMANDS.items():
    app.command(_name, epilog=_module.EPILOG)(getattr(_module, _name.replace("-", "_")))


class _Interrupted(BaseException):
    """Ctrl-C, under a name that no library below catches for itself."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; explained errors are one message on standard error and exit code 1, or 2 where options are wrong.

    What the terminal's encoding has no sign for is escaped: no name of a layer makes a finished run fail.
    """
    console.await_output(None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except MagrError as error:
        console.explain(error)
        sys.exit(2 if isinstance(error, OptionError) else 1)
    except _Interrupted:
        console.errors.print(f"interrupted; {console.outcome()}{console.remedy()}", markup=False)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        console.apologize(error, magr_onnx.__version__)
        sys.exit(70)


if __name__ == "__main__":
    main()
