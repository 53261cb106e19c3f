"""onnxruntime in a process of its own, where a model nobody has run yet may crash or hang it without taking the caller along.

A division by zero in a kernel, on inputs that were made up or while constants are folded, ends the process it happens in. The first
request starts the process, others go to the same one; one that died is started again.
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
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir as ir

from magr_onnx import errors
from magr_onnx.errors import MagrError
from magr_onnx.runtime.ort.custom_ops import LIBRARIES, using

SECONDS = 120.0
"""Most time for a request, beside what its bytes need."""
SECONDS_A_GIGABYTE = 60.0


class Died(MagrError):
    """onnxruntime crashed, or did not come to an end."""


class _Worker:
    """A child process that answers requests, a line of JSON each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self._lock:
            self._running()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                line = process.stdout.readline()
            except BaseException:  # an interrupt: the answer would be taken for that of the next request
                process.kill()
                raise
            finally:
                timer.cancel()
            if line:
                answer: dict[str, Any] = json.loads(line)
                return answer
            code = process.wait()
            self.close()
            if late.is_set():
                raise Died(f"onnxruntime did not come to an end within {seconds:.0f} s")
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise Died(f"onnxruntime crashed ({how})")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        root = str(Path(__file__).resolve().parent.parent.parent)
        places = [p for p in (root if Path(root, "magr_onnx").is_dir() else "", *sys.path) if p]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}
        command = [sys.executable, "-m", "magr_onnx.runtime.ort.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        return self._process

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@functools.cache
def _worker() -> _Worker:
    worker = _Worker()
    atexit.register(worker.close)
    return worker


def call(function: Callable[..., Any], size: int = 0, **arguments: Any) -> Any:
    """What a function of a module of this package returns, computed apart.

    Args:
        function: The function.
        size: Bytes of the models it loads.
        **arguments: Paths as texts, numbers and other things that JSON holds; as what it returns.

    Raises:
        Died: It crashed, or took longer than it may.
        MagrError: What it raised.
    """
    request = {"module": function.__module__, "function": function.__name__, "arguments": arguments, "libraries": LIBRARIES.get()}
    answer = _worker().ask(request, SECONDS + SECONDS_A_GIGABYTE * size / 1e9)
    if "error" in answer:
        raise getattr(errors, answer["error"], MagrError)(answer["message"])
    return answer["result"]


def start() -> None:
    """Start the process if there is none, so that it is ready when it is asked."""
    _worker().start()


@contextlib.contextmanager
def as_file(model: ir.Model | Path) -> Iterator[str]:
    """The absolute path of a model, written to a temporary folder where it is in memory.

    Absolute, because the other process stays in the folder it was started in.
    """
    if isinstance(model, Path):
        yield str(model.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="onnx-magr-") as folder:
        path = Path(folder, "model.onnx")
        try:
            ir.save(model, path, external_data="model.data", size_threshold_bytes=1024)
        except Exception as error:
            raise errors.RuntimeFailure(f"the model in memory cannot be written for onnxruntime: {error}") from error
        yield str(path)


def _serve() -> None:
    """Answer requests until there are no more."""
    import_module("magr_onnx.runtime.ort.opset_check")  # and with it onnxruntime, before anybody waits
    for line in sys.stdin:
        request = json.loads(line)
        try:
            function = getattr(import_module(request["module"]), request["function"])
            with using(request["libraries"]):
                answer: dict[str, Any] = {"result": function(**request["arguments"])}
        except MagrError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except Exception as error:  # whatever it is, the caller must hear of it
            answer = {"error": "RuntimeFailure", "message": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
