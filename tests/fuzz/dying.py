"""A worker whose second case kills it and whose third one never ends: what `isolated` is tested on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.fuzz import isolated
from tests.fuzz.judge import CONVERTED, Outcome


def run(case: str, at: Callable[[str], None]) -> Outcome:
    if case == "dies":
        at("float")
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "hangs":
        at("optimize")
        time.sleep(3600)
    return Outcome(CONVERTED)


if __name__ == "__main__":
    isolated.serve(["lives", "dies", "hangs", "lives"], run)
