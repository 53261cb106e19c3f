"""onnxruntime in a worker process, so that an untested model cannot crash or hang the caller.

A division by zero in a kernel, on random inputs or during constant folding, terminates its process. The first request starts the worker,
later ones use the same process; a crashed worker is restarted.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir

from magr_onnx import errors
from magr_onnx.errors import MagrError
from magr_onnx.model_io.legacy import to_proto
from magr_onnx.runtime.ort.session import LIBRARIES, custom_ops

SECONDS, SECONDS_A_GIGABYTE = 120.0, 60.0  # time limit of a request: a constant and, by the size of its models, more
MEMORY = 8 << 30  # bytes that models may allocate on made-up inputs, where the system can limit them


class WorkerCrashed(MagrError):
    """onnxruntime crashed or exceeded the time limit."""


class _Worker:
    """A child process that answers requests of one JSON line each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self._lock:
            self._running()

    @property
    def started(self) -> bool:
        return self._process is not None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            timer, end = threading.Timer(seconds, process.kill), time.monotonic() + seconds
            timer.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                line = process.stdout.readline()
            except BaseException:  # after an interrupt, the answer would be mistaken for that of the next request
                process.kill()
                process.wait()
                raise
            finally:
                timer.cancel()
            if line:
                return dict(json.loads(line))
            code = process.wait()
            self.close()
            if time.monotonic() >= end:
                raise WorkerCrashed(f"onnxruntime did not finish within {seconds:.0f} s")
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise WorkerCrashed(f"onnxruntime crashed ({reason})")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        root = str(Path(__file__).resolve().parent.parent.parent)
        paths = [p for p in (root if Path(root, "magr_onnx").is_dir() else "", *sys.path) if p]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        command = [sys.executable, "-m", "magr_onnx.runtime.ort.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        return self._process

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:  # closes its pipes, and waits for its end
                pass


@functools.cache
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.close)
    return worker


def run_in_worker(function: Callable[..., Any], size: int = 0, seconds: float = SECONDS, **arguments: Any) -> Any:
    """Call a function of this package in the worker process and return its result.

    Args:
        function: The function.
        size: Bytes of the models it loads.
        seconds: Time limit, to which `SECONDS_A_GIGABYTE` adds.
        **arguments: Keyword arguments, JSON values like the result; paths as strings.

    Raises:
        WorkerCrashed: The worker crashed or exceeded the time limit.
        MagrError: Raised by the function.
    """
    request = {"module": function.__module__, "function": function.__name__, "arguments": arguments, "libraries": LIBRARIES.get()}
    answer = _worker().ask(request, seconds + SECONDS_A_GIGABYTE * size / 1e9)
    if "error" in answer:
        raise getattr(errors, answer["error"], MagrError)(answer["message"])
    return answer["result"]


def start() -> None:
    """Start the worker ahead of the first request, if it is not running."""
    _worker().start()


def wait() -> None:
    """Wait for the worker, if it was started: importing onnxruntime takes a processor for a second or two, which disturbs what is timed."""
    if _worker().started:
        with contextlib.suppress(WorkerCrashed):  # then there is nothing to wait for
            run_in_worker(_nothing)


def _nothing() -> None:
    pass


@contextlib.contextmanager
def as_file(model: ir.Model | Path) -> Iterator[str]:
    """Yield the absolute path of a model, after writing an in-memory model to a temporary folder.

    The path is absolute because the worker keeps the working directory it was started in.
    """
    if isinstance(model, Path):
        yield str(model.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="onnx-magr-") as folder:
        path = Path(folder, "model.onnx")
        try:
            copy = ir.external_data.unload_from_model(model.clone(), folder, "model.data", size_threshold_bytes=1024)
            path.write_bytes(to_proto(copy).SerializeToString())
        except Exception as error:
            raise errors.RuntimeFailure(f"the model in memory cannot be written for onnxruntime: {error}") from error
        yield str(path)


@contextlib.contextmanager
def limited_memory(size: int = MEMORY) -> Iterator[None]:
    """Limit the memory of this process to ``size`` bytes, where the system supports it."""
    try:
        import resource
    except ImportError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _serve() -> None:
    """Answer requests from standard input until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            function = getattr(import_module(request["module"]), request["function"])
            with custom_ops(request["libraries"]):
                answer: dict[str, Any] = {"result": function(**request["arguments"])}
        except MagrError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # every failure is reported to the caller
            answer = {"error": "RuntimeFailure", "message": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
