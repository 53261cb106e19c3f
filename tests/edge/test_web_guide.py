"""The page of docs/guides/web.md, as copied: quantize, serve, open in Chromium."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.browser import chromium
from tests.docs_blocks import blocks, run
from tests.edge.targets import WEB, require
from tests.helpers import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE = ROOT / "docs" / "guides" / "web.md"


def test_the_page_of_the_guide_runs_both_models(tmp_path: Path) -> None:
    require(WEB)
    text = GUIDE.read_text()
    (serve,) = [b for b in blocks(text) if b.not_run]
    install, command = serve.text.strip().splitlines()
    assert install == "npm install onnxruntime-web"
    folder, made = tmp_path / "site", tmp_path / "given"
    folder.mkdir()
    made.mkdir()
    run(text, GUIDE.name, folder, made)
    (folder / "node_modules").symlink_to(WEB.dist.parent.parent)  # what that command installed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, *command.split()[1:-1], port, "--bind", "127.0.0.1"]
    with subprocess.Popen(program, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server, chromium() as browser:
        try:
            page = browser.new_page()
            trouble: list[str] = []
            page.on("pageerror", lambda error: trouble.append(str(error)))
            _wait(int(port))
            page.goto(f"http://127.0.0.1:{port}/")
            page.locator("body[data-done]").wait_for(timeout=1000 * PATIENCE)
            result = page.locator("#result").inner_text()
        finally:
            server.terminate()
    assert trouble == []
    sizes = [int(size) for size in re.findall(r": (\d+) bytes", result)]
    assert sizes == [(folder / name).stat().st_size for name in ("model.onnx", "model.web.onnx")], result
    assert 0 < float(re.findall(r"relative difference of \w+: ([\d.]+)", result)[0]) < 0.2


def _wait(port: int) -> None:
    for _ in range(10 * PATIENCE):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not start")
