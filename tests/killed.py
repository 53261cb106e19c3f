"""The command line in a process that kills itself: SIGKILL, as a power cut would, right before its Nth renaming of a file
that is not in a temporary folder of its own.

python tests/killed.py N optimize MODEL ...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

left = int(sys.argv.pop(1))


def watch(event: str, details: Any) -> None:
    """An audit hook: Python tells it of every rename before it is made."""
    global left
    if event == "os.rename" and "onnx-magr-" not in str(details[1]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)

from magr_onnx.cli.main import main  # noqa: E402

main()
