"""Entry point of ``onnx-magr``: runs `magr_onnx.cli.app` and turns errors into messages and exit codes.

Exit codes: 0 success, 1 an explained error (a bad model, bad data, an output that cannot be written), 2 invalid or incompatible options, 70
a bug, 130 interrupted, 143 terminated, 129 by a closed terminal. ``validate`` also returns 3 if a threshold is missed, ``verify`` 1 if an
accumulator overflows.

Imports before `main` are few, so that ``--help`` is fast and signals are handled from the start.
"""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType

import magr_onnx
from magr_onnx.errors import MagrError, OptionError

_ENDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}


class _Stopped(BaseException):
    """A signal to stop, as an exception that no library catches, so that temporary files, as large as the model, are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGINT:  # a second Ctrl-C ends a removal that takes too long
        signal.signal(number, signal.SIG_IGN)
    raise _Stopped(number)


def _handle_signals() -> None:
    for name in _ENDS:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and (number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL):  # ignored under nohup
            signal.signal(number, _stop)


def main() -> None:
    """Run the command line and exit with its code.

    Characters outside the terminal's encoding are escaped, so that the name of a layer cannot fail a finished run.
    """
    try:
        _handle_signals()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        _run()
    except _Stopped as stopped:
        console = sys.modules.get("magr_onnx.cli.console")  # not imported here: an import may have been interrupted
        outcome = "no output was changed" if console is None else console.outcome() + console.remedy()
        number = signal.Signals(stopped.number)
        print(f"{_ENDS[number.name]}; {outcome}", file=sys.stderr)
        sys.exit(128 + number)


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
