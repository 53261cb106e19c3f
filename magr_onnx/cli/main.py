"""The program ``onnx-magr``: it runs `magr_onnx.cli.app` and turns errors into messages and exit codes.

Exit codes: 0 success, 1 an error that is explained (a bad model, bad data, no place to write to), 2 options that are wrong or do not go
together, 70 a mistake of this program, 130 interrupted. ``validate`` also returns 3 when a threshold given by the user is missed,
``verify`` 1 when an accumulator overflows.

Little is imported before `main` runs, so that ``--help`` is quick and Ctrl-C is handled from the beginning.
"""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType

import magr_onnx
from magr_onnx.errors import MagrError, OptionError


class _Interrupted(BaseException):
    """Ctrl-C, under a name that no library below catches for itself."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; explained errors are one message on standard error and exit code 1, or 2 where options are wrong.

    What the terminal's encoding has no sign for is escaped: no name of a layer makes a finished run fail.
    """
    try:
        signal.signal(signal.SIGINT, _interrupt)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        _run()
    except _Interrupted:
        console = sys.modules.get("magr_onnx.cli.console")  # nothing is imported now: what was interrupted may be an import
        outcome = "no output was changed" if console is None else console.outcome() + console.remedy()
        print(f"interrupted; {outcome}", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    from magr_onnx.cli.app import app

    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        from magr_onnx.cli import console

        if isinstance(error, MagrError):
            console.explain(error)
            sys.exit(2 if isinstance(error, OptionError) else 1)
        console.apologize(error, magr_onnx.__version__)
        sys.exit(70)


if __name__ == "__main__":
    main()
