"""What the program imports before it is told what to do, and Ctrl-C before it has begun."""

from __future__ import annotations

import subprocess
import sys

import pytest

import magr_onnx
from magr_onnx.cli.app import commands
from magr_onnx.cli.commands import COMMANDS
from tests.helpers import PATIENCE

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "ml_dtypes", "torch", "jinja2", "magr_onnx.api", "magr_onnx.cli.console")


def modules_after(*arguments: str) -> list[str]:
    """The modules of a process that ran the command line, by name."""
    code = f"""
import sys
from magr_onnx.cli.main import main
sys.argv = ["onnx-magr", *{list(arguments)!r}]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE).stderr.split()


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_nothing_heavy_is_imported(argument: str) -> None:
    assert set(modules_after(argument)) & set(HEAVY) == set()


def test_the_version_needs_no_rich() -> None:
    assert not any(name.partition(".")[0] == "rich" for name in modules_after("--version"))


def test_commands_are_listed_as_they_describe_themselves() -> None:
    first_lines = {name: str(command.help).partition("\n")[0] for name, command in commands().items()}
    assert first_lines == COMMANDS


def test_public_names_are_imported_when_they_are_used() -> None:
    code = "import sys, magr_onnx; before = 'numpy' in sys.modules; magr_onnx.optimize; print(before, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout == "False True\n"
    assert set(magr_onnx.__all__) <= set(dir(magr_onnx))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        magr_onnx.optimise  # noqa: B018


@pytest.mark.parametrize("module", ["typer", "numpy", "magr_onnx.api"])
def test_an_interrupt_of_an_import_is_one_line(module: str) -> None:
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from magr_onnx.cli.main import main
sys.argv = ["onnx-magr", "inspect", "model.onnx"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; no output was changed\n")
