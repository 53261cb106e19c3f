"""What the README says works: commands exist, options exist, snippets run."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from magr_onnx.cli import app
from tests import graphs
from tests.graphs import feeds, proto

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_commands_in_the_readme_parse() -> None:
    command = get_command(app)
    lines = re.findall(r"^onnx-magr .*$", README, re.M)
    assert len(lines) >= 3
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        command.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_options_in_the_readme_exist() -> None:
    command = get_command(app).commands["optimize"]  # type: ignore[attr-defined]
    for text in re.findall(r"`(--[^`]+)`", README):
        if text != "--calibration":
            command.make_context("optimize", ["model.onnx", *shlex.split(text)])


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.S))
def test_snippets_run(snippet: str, tmp_path: Path) -> None:
    model = graphs.chain()
    (tmp_path / "model.onnx").write_bytes(proto(model).SerializeToString())
    np.savez(tmp_path / "inputs.npz", **feeds(model))
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(None):
        exec(compile(snippet, "README.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
