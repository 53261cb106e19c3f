"""Targets that are a Python process: this machine's own, or one behind an emulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.edge.jobs import TIMEOUT, Answer, Job, Target

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Process(Target):
    """A command that runs a Python file with numpy and onnxruntime.

    Attributes:
        name: How tests call it.
        command: The emulator and its interpreter.
        saturates: See `Target`.
        find_missing: Why the command cannot run here, or None.
        environment: Variables of the process beside the few that every process gets: what is set for this Python is not
            meant for another one.
    """

    name: str
    command: tuple[str, ...]
    saturates: bool | None
    find_missing: Callable[[], str | None]
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        return self.find_missing()

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        with tempfile.TemporaryDirectory(prefix="onnx-magr-edge-") as name:
            folder = Path(name)
            _write(folder, jobs)
            kept = {k: os.environ[k] for k in ("PATH", "HOME", "TMPDIR") if k in os.environ}
            command = [*self.command, str(WORKER), str(folder)]
            try:
                process = subprocess.run(
                    command,
                    env={**kept, **ENVIRONMENT, **self.environment},
                    cwd=folder,  # where a process that dies may leave what it likes
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT,
                    check=False,
                )
                end = _end(process.returncode, process.stderr)
            except subprocess.TimeoutExpired:
                end = f"no answer within {TIMEOUT:g} s"
            return [_read(folder, index, end) for index in range(len(jobs))]


def _write(folder: Path, jobs: Sequence[Job]) -> None:
    listed = [
        {"model": str(job.model.resolve()), "inputs": list(job.feeds), "optimize": job.optimize, "config": dict(job.config)} for job in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(listed))
    for index, job in enumerate(jobs):
        np.savez(folder / f"{index}.in.npz", *job.feeds.values())


def _read(folder: Path, index: int, end: str) -> Answer:
    error, output = folder / f"{index}.error.txt", folder / f"{index}.out.npz"
    if error.exists():
        return Answer({}, error.read_text())
    if not output.exists():
        return Answer({}, end)
    with np.load(output) as arrays:
        return Answer({str(name): arrays[f"arr_{i}"] for i, name in enumerate(arrays["names"])})


def _end(code: int, errors: str) -> str:
    """What to say of a process that did not end well, or nothing."""
    if code == 0:
        return ""
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    said = [line for line in errors.splitlines() if "TCG doesn't support" not in line]
    return f"the process ended with {how}: " + "\n".join(said[-15:])
