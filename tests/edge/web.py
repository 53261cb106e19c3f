"""onnxruntime-web in headless Chromium: a page asks a server here for jobs, runs them, and posts the answers back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np

from tests.edge.jobs import TIMEOUT, Answer, Array, Job, Outputs, Target

PAGE = Path(__file__).with_name("page.html")
TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root, as in CI, cannot have; the only page it ever opens is ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
)


@dataclass(frozen=True)
class Web(Target):
    """The browser with the package's files.

    Attributes:
        name: How tests call it.
        dist: The ``dist`` folder of onnxruntime-web.
        saturates: See `Target`.
    """

    name: str
    dist: Path
    saturates: bool | None = False

    def missing(self) -> str | None:
        if browser_path() is None:
            return f"none of {', '.join(BROWSERS)} is installed (.ci/edge does it)"
        if not (self.dist / "ort.wasm.min.mjs").is_file():
            return f"onnxruntime-web is not in {self.dist} (.ci/edge puts it there)"
        return None

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        with Server(self.dist, jobs) as server, _open(f"http://127.0.0.1:{server.server_port}/") as errors:
            ended = server.end.wait(TIMEOUT)
            said = errors.read_text(errors="replace")[-2000:]
        trouble = server.trouble or ("the page gave no answer" if ended else f"no answer within {TIMEOUT:g} s; the browser said: {said}")
        errors_of = dict.fromkeys(range(len(jobs)), trouble) | dict.fromkeys(server.outputs, "") | server.errors
        return [Answer(server.outputs.get(i, {}), errors_of[i]) for i in range(len(jobs))]


def browser_path() -> str | None:
    """Where the browser is, if it is installed."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextlib.contextmanager
def _open(url: str) -> Iterator[Path]:
    """The browser on a page, with a home of its own; yields the file of what it has to say."""
    browser = browser_path()
    assert browser is not None
    with tempfile.TemporaryDirectory(prefix="onnx-magr-web-", ignore_cleanup_errors=True) as home:
        log = Path(home, "said.txt")
        command = [browser, *FLAGS, f"--user-data-dir={home}/profile", url]
        kept = {"PATH": os.environ["PATH"], "HOME": home, "TMPDIR": home}
        with log.open("wb") as errors:
            process = subprocess.Popen(command, env=kept, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
            try:
                yield log
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the browser and its helpers, which are a process group of their own: kindly first, so that it can tidy up."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


class Server(ThreadingHTTPServer):
    """Serves the page, the package and the jobs on this machine only, and gathers the answers."""

    daemon_threads = True

    def __init__(self, dist: Path, jobs: Sequence[Job]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.dist, self.jobs = dist, jobs
        self.outputs: dict[int, Outputs] = {}
        self.errors: dict[int, str] = {}
        self.trouble = ""
        self.end = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """The paths that page.html asks for."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match urlsplit(self.path).path.strip("/").split("/"):
            case [""]:
                self.reply(PAGE.read_bytes(), ".html")
            case ["dist", name] if (path := self.server.dist / Path(name).name).is_file():
                self.reply(path.read_bytes(), path.suffix)
            case ["jobs"]:
                self.reply(json.dumps([_describe(job) for job in self.server.jobs]).encode())
            case [index, "model"]:
                self.reply(self.server.jobs[int(index)].model.read_bytes())
            case [index, "input", position]:
                self.reply(list(self.server.jobs[int(index)].feeds.values())[int(position)].tobytes())
            case _:
                self.send_error(404)

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match url.path.strip("/").split("/"):
            case [index, "output"]:
                name, array = _array(url.query, body)
                self.server.outputs.setdefault(int(index), {})[name] = array
            case [index, "error"]:
                self.server.errors[int(index)] = body.decode()
            case ["error"]:
                self.server.trouble = body.decode()
            case ["end"]:
                self.server.end.set()
        self.reply(b"")

    def reply(self, body: bytes, suffix: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to the terminal."""


def _describe(job: Job) -> dict[str, object]:
    inputs = [{"name": name, "type": array.dtype.name, "dims": array.shape} for name, array in job.feeds.items()]
    return {"inputs": inputs, "optimize": job.optimize, "config": dict(job.config)}


def _array(query: str, body: bytes) -> tuple[str, Array]:
    values = {key: value[0] for key, value in parse_qs(query).items()}
    return values["name"], np.frombuffer(body, dtype=values["type"]).reshape(json.loads(values["dims"]))
