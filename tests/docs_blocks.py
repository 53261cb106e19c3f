"""Fenced blocks of a Markdown page, and running them as a reader would.

A page runs from top to bottom in one fresh folder: ``bash`` blocks by ``bash -euo pipefail`` with the environment's programs, ``python``
blocks in one namespace, ``toml`` and ``json`` blocks are parsed. Comments before a block say what else is to be known:

- ``<!-- given: model.onnx inputs.npz -->``: files that lie there already (`tests.docs_given`).
- ``<!-- file: recipe.toml -->``: the block is the contents of that file.
- ``<!-- not run: reason -->``: the block cannot be run here.

``text`` and ``console`` blocks show output; blocks in braces are for the site generator. Any other language needs a comment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import docs_given

SHOWN = {"text", "console"}
_FENCE = re.compile(r"^(?P<indent> {0,3})(?P<ticks>`{3,}|~{3,})(?P<language>[^`]*)$")
_COMMENT = re.compile(r"^<!-- (given|file|not run): (.+) -->$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        language: What stands behind the fence.
        text: Its lines.
        line: Number of its first line in the page.
        given: Files it starts from.
        file: File whose contents it is, or None.
        not_run: Why it is not run, or None.
    """

    language: str
    text: str
    line: int
    given: tuple[str, ...] = ()
    file: str | None = None
    not_run: str | None = None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of Markdown text.

    Raises:
        ValueError: A fence is not closed, or a comment is before no block.
    """
    found: list[Block] = []
    comments: dict[str, str] = {}
    lines = enumerate(page.splitlines(), 1)
    for number, line in lines:
        if comment := _COMMENT.match(line):
            comments[comment[1]] = comment[2]
        elif fence := _FENCE.match(line):
            text: list[str] = []
            for _, inner in lines:
                if inner.strip() == fence["ticks"]:
                    break
                text.append(inner.removeprefix(fence["indent"]))
            else:
                raise ValueError(f"line {number}: the fence is not closed")
            given = tuple(comments.get("given", "").split())
            body = "\n".join(text) + "\n"
            found.append(Block(fence["language"].strip(), body, number + 1, given, comments.get("file"), comments.get("not run")))
            comments = {}
        elif comments and line and not line.startswith("<!--"):
            raise ValueError(f"line {number}: a comment ({', '.join(comments)}) must be right before its block")
    return found


def run(page: str, name: str, folder: Path, made: Path) -> None:
    """Run a page in ``folder``, with given files from ``made``.

    Raises:
        AssertionError: A bash block fails; with what it wrote.
        ValueError: A block has a language that nothing is known of, or does not parse.
        Exception: What a python block raises.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{name}, line {block.line}"
        if block.language in SHOWN or block.language.startswith("{") or block.not_run:
            continue
        docs_given.give([file for file in block.given if not (folder / file).exists()], made, folder)
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif block.language == "bash":
            _bash(block, where, folder)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, name, "exec", dont_inherit=True)
            with contextlib.chdir(folder):
                exec(code, namespace)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        else:
            raise ValueError(f"{where}: what is done with {block.language!r}? Say 'file' or 'not run' in a comment, or call it text")


def _bash(block: Block, where: str, folder: Path) -> None:
    programs = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={**os.environ, "PATH": programs + os.pathsep + os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{block.text}\n{done.stdout[-4000:]}"
