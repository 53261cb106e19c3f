"""Running many cases in processes of their own, with little memory and time, so that a crash is one more outcome.

The worker says where it is on its standard output; when it dies or hangs, that case gets the outcome and the next process goes on
behind it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.fuzz.judge import Outcome

MEMORY = 3 << 30
SECONDS = 240.0
"""Most time for a case, from when the worker begins with it."""
START = 900.0
"""Most time until a worker begins with its first case: what it imports takes long on a busy machine."""
ENDED = "the worker ended between two cases"
ROOT = Path(__file__).parents[2]


def limit_memory(size: int = MEMORY) -> None:
    """Bound what this process may allocate."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(cases: Sequence[Any], run: Callable[[Any, Callable[[str], None]], Outcome]) -> None:
    """The worker's side: run the cases named by numbers on standard input, until it ends."""
    limit_memory()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print is no message of ours

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    for line in sys.stdin:
        index = int(line)
        say(at="start", case=index)
        outcome = run(cases[index], lambda stage, index=index: say(at=stage, case=index))  # type: ignore[misc]
        say(case=index, **asdict(outcome))


def outcomes(module: str, arguments: Sequence[str], indices: Sequence[int], seconds: float = SECONDS) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of cases, in order, from workers started as ``python -m module *arguments``."""
    waiting = list(indices)
    while waiting:
        done = 0
        for index, outcome in _one_worker(module, arguments, waiting, seconds):
            if not done and outcome in (Outcome("crash", "at nothing: exit 1"), Outcome("crash", ENDED)):
                raise RuntimeError(f"python -m {module} {' '.join(arguments)} does not start; run it to see why")
            done += 1
            yield index, outcome
        waiting = waiting[done:]


def _one_worker(module: str, arguments: Sequence[str], indices: Sequence[int], seconds: float) -> Iterator[tuple[int, Outcome]]:
    """Outcomes until the worker dies, its death included."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", None)  # a package that other tests import sets it
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines = _Lines(process.stdout.fileno())
    try:
        for index in indices:
            try:
                process.stdin.write(f"{index}\n".encode())
                process.stdin.flush()
            except BrokenPipeError:
                yield index, Outcome("crash", ENDED)
                return
            stage, deadline = "nothing", time.monotonic() + max(seconds, START)
            while True:
                line = lines.next(deadline)
                if line is None:
                    hung = process.poll() is None and time.monotonic() >= deadline
                    if hung:
                        process.kill()
                    code = process.wait()
                    name = signal.Signals(-code).name if code < 0 else f"exit {code}"
                    yield index, Outcome("timeout", f"at {stage}") if hung else Outcome("crash", f"at {stage}: {name}")
                    return
                message = json.loads(line)
                if "kind" in message:
                    message.pop("case")
                    yield index, Outcome(**message)
                    break
                stage = message["at"]
                if stage == "start":
                    deadline = time.monotonic() + seconds
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


class _Lines:
    """Lines from a pipe, with a deadline."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._held = descriptor, b""

    def next(self, deadline: float) -> bytes | None:
        """The next line, or None at the end or the deadline."""
        while b"\n" not in self._held:
            ready, _, _ = select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._descriptor, 1 << 16) if ready else b""
            if not data:
                return None
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line


def table(found: Sequence[Outcome]) -> str:
    """Counts by outcome and reason, largest first."""
    counts: dict[str, int] = {}
    for outcome in found:
        key = outcome.kind + (f": {outcome.detail}" if outcome.detail and not outcome.bug else "")
        counts[key] = counts.get(key, 0) + 1
    rows = sorted(counts.items(), key=lambda item: -item[1])
    return "\n".join(f"{count:7d}  {key[:150]}" for key, count in rows)
