"""Entry point of ``onnx-magr``: runs `magr_onnx.cli.app` and turns errors into messages and exit codes.

Exit codes: 0 success, 1 an explained error (a bad model, bad data, an output that cannot be written), 2 invalid or incompatible options, 70
a bug, 130 interrupted. ``validate`` also returns 3 if a threshold is missed, ``verify`` 1 if an accumulator overflows.

Imports before `main` are few, so that ``--help`` is fast and Ctrl-C is handled from the start.
"""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType

import magr_onnx
from magr_onnx.errors import MagrError, OptionError


class _Interrupted(BaseException):
    """Ctrl-C, as an exception that no library catches."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line and exit with its code.

    Characters outside the terminal's encoding are escaped, so that the name of a layer cannot fail a finished run.
    """
    try:
        signal.signal(signal.SIGINT, _interrupt)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        _run()
    except _Interrupted:
        console = sys.modules.get("magr_onnx.cli.console")  # not imported here: an import may have been interrupted
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
