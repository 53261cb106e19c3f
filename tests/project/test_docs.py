"""What the README and the documentation say works: blocks run, commands and options exist, links lead somewhere, the site builds."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import magr_onnx
from magr_onnx.cli.app import commands
from magr_onnx.config.options import KEYS, PANELS
from magr_onnx.passes.registry import stages
from tests.docs_blocks import Block, blocks, run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SLOW = {
    f"docs/methods/{name}.md"
    for name in (
        "accumulators",
        "bias-correction",
        "comq",
        "low-rank",
        "magr",
        "mixed-precision",
        "output-hessian",
        "adaptive-hessian",
        "split-salient",
    )
}
COMMANDS = commands()


def _blocks() -> list[tuple[str, Block]]:
    return [(name, block) for page, name in zip(PAGES, NAMES, strict=True) for block in blocks(page.read_text())]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("given")


def _cases() -> list[Any]:
    """All pages; those that take longest, and show what other tests run as well, are slow."""
    return [pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for page, name in zip(PAGES, NAMES, strict=True)]


@pytest.mark.parametrize("page", _cases())
def test_page_runs(page: Path, tmp_path: Path, made: Path) -> None:
    with contextlib.redirect_stdout(None):
        run(page.read_text(), page.name, tmp_path, made)


def test_reasons_not_to_run_are_short() -> None:
    for name, block in _blocks():
        if block.not_run is not None:
            assert 5 <= len(block.not_run) <= 80, f"{name}, line {block.line}: {block.not_run!r}"


def test_commands_that_are_not_run_or_only_shown_parse() -> None:
    lines = [
        (name, line)
        for name, block in _blocks()
        if block.language in ("bash", "console")
        for line in re.findall(r"^(?:\$ )?(onnx-magr \w.*)$", block.text.replace("\\\n", " "), re.M)
    ]
    assert len(lines) >= 10
    for name, line in lines:
        command, *arguments = shlex.split(re.split(r"&& | \| | > |;|  #", line)[0])[1:]
        assert command in COMMANDS, f"{name}: {line}"
        COMMANDS[command].make_context(command, arguments)


def test_options_in_the_readme_parse() -> None:
    command = COMMANDS["optimize"]
    for text in re.findall(r"`(--[^`]+)`", (ROOT / "README.md").read_text()):
        if text != "--calibration":
            command.make_context("optimize", ["model.onnx", *shlex.split(text)])


def test_options_named_on_user_pages_exist() -> None:
    known = {o for c in COMMANDS.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    known |= {"--help", "--version"}
    for page in PAGES:
        if page.parent.name in ("methods", "guides") or page.name in ("quickstart.md", "choose.md"):
            for option in re.findall(r"`(--[\w-]+)", page.read_text()):
                assert option in known, f"{page.name}: {option}"


def _programs() -> dict[str, set[str]]:
    """The benchmark programs that pages name, and the options they give them."""
    found: dict[str, set[str]] = {}
    for _, block in _blocks():
        for program, rest in re.findall(r"python (tests/\S+\.py)(.*)$", block.text, re.M):
            found.setdefault(program, set()).update(re.findall(r"--[\w-]+", rest))
    return found


@pytest.mark.parametrize("program", _programs())
def test_programs_take_the_options_that_pages_give_them(program: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / program), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for option in _programs()[program]:
        assert re.search(rf"{option}\b", done.stdout), f"{program} has no {option}"


def test_links_lead_somewhere() -> None:
    for page, name in zip(PAGES, NAMES, strict=True):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name} links to {target}"


@pytest.mark.skipif(
    shutil.which("dot") is None and os.environ.get("ONNX_MAGR_REQUIRE_EDGE") != "1", reason="the picture of the code needs Graphviz (dot)"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r'<(?:script|img|link)[^>]+(?:src|href)="https?:')
    for page in (tmp_path / "site").rglob("*.html"):
        assert not fetched.search(page.read_text()), f"{page.name} fetches something from the network"
    _holds(tmp_path / "site" / "reference" / "passes.html", stages(), [o for kind in stages().values() for o in kind.options()])
    options = [o for c in COMMANDS.values() for p in c.params if p.param_type_name == "option" and p.name != "help" for o in p.opts]
    _holds(tmp_path / "site" / "reference" / "options.html", PANELS, KEYS)
    python = (tmp_path / "site" / "reference" / "python.html").read_text()
    assert [name for name in magr_onnx.__all__ if f'id="magr_onnx.{name}"' not in python] == []
    _holds(tmp_path / "site" / "reference" / "command-line.html", [f"onnx-magr {name}" for name in COMMANDS], options)


def _holds(page: Path, headings: Iterable[str], names: Iterable[str]) -> None:
    text = page.read_text()
    for heading in headings:
        assert f"<h2>{heading}<a" in text, f"{page.name} has no section {heading}"
    for name in names:
        assert f">{name}</span>" in text, f"{page.name} does not name {name}"


# --- The harness itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "error", "said"),
    [
        ("```bash\necho before\nfalse\necho after\n```\n", AssertionError, "before"),
        ("```bash\nfalse | true\n```\n", AssertionError, "line 2"),
        ("```bash\necho $NOT_SET_ANYWHERE\n```\n", AssertionError, "NOT_SET_ANYWHERE"),
        ("```python\n1 / 0\n```\n", ZeroDivisionError, "zero"),
        ("```toml\na = \n```\n", ValueError, "nvalid"),
        ("```json\n{'a': 1}\n```\n", ValueError, "Expecting"),
        ("```perl\nprint 1;\n```\n", ValueError, "perl"),
        ("```bash\ntrue\n", ValueError, "not closed"),
        ("<!-- not run: it is long -->\nText.\n```bash\nfalse\n```\n", ValueError, "right before"),
        ("<!-- given: nothing.onnx -->\n```bash\ntrue\n```\n", KeyError, "nothing.onnx"),
    ],
)
def test_a_page_that_fails_is_seen_to_fail(page: str, error: type[Exception], said: str, tmp_path: Path, made: Path) -> None:
    with pytest.raises(error, match=said):
        run(page, "page.md", tmp_path, made)


def test_blocks_of_a_page_share_a_folder_and_a_namespace(tmp_path: Path, made: Path) -> None:
    page = """
<!-- given: inputs.npz -->
<!-- file: settings/a.toml -->
```toml
size = 3
```

```python
import tomllib
from pathlib import Path
from typing import Any
size = tomllib.loads(Path("settings/a.toml").read_text())["size"]
```

<!-- not run: shows what is not run -->
```bash
false
```

```python
Path("size.txt").write_text(str(size + 1))
```

```bash
test "$(cat size.txt)" = 4 && test -f inputs.npz && onnx-magr --version > version.txt
```
"""
    run(page, "page.md", tmp_path, made)
    assert "onnx-magr" in (tmp_path / "version.txt").read_text()
