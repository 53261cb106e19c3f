"""What a person sees: bars and colour on a terminal and nowhere else, lines for those who want them, errors within one screen."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli import console
from magr_onnx.cli.app import app
from magr_onnx.config.presets import PRESETS
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.errors import OptionError
from magr_onnx.report.data import MOST, layer_table
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.workflow import progress
from tests import graphs
from tests.cli.test_cli import run
from tests.graphs import feeds, proto
from tests.helpers import PATIENCE

pty = pytest.importorskip("pty", reason="a pseudo-terminal is a thing of POSIX")

COLOUR = re.compile(r"\x1b\[[\d;]*3\dm|\x1b\[[\d;]*38;")
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terminal")
    model = graphs.chain()
    (path / "model.onnx").write_bytes(proto(model).SerializeToString())
    np.savez(path / "data.npz", **feeds(model, rows=200))
    return path


def on_terminal(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """The exit code of Python with some arguments and all it writes, on a terminal of 80 columns."""
    names = {"PATH", "PYTHONPATH", "HOME", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    own = {name: value for name, value in os.environ.items() if name in names}
    outer, inner = pty.openpty()
    command = [sys.executable, *arguments]
    own |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, cwd=cwd, env=own, close_fds=True)
    os.close(inner)
    found = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal nobody writes to any more with an error
        while part := os.read(outer, 1 << 16):
            found += part
    os.close(outer)
    return process.wait(timeout=PATIENCE), found.decode().replace("\r\n", "\n")


CLI = ("-m", "magr_onnx.cli.main")
RUN = ("optimize", "model.onnx", "-c", "data.npz", "-o", "out.onnx", "--effort", "fast")


def test_a_terminal_has_bars_with_stage_layer_error_and_time(folder: Path) -> None:
    code, text = on_terminal(*CLI, *RUN, cwd=folder)
    assert code == 0
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    assert re.search(r"quantizing +\S+ +2/2 +0:00:\d\d 0:00:00 left", plain)
    assert re.search(r"layer error +last \d+\.\d\d% down, most \d+\.\d\d% \w+", plain)
    assert COLOUR.search(text)
    report = plain[plain.index("model        model.onnx") :]  # is what stays
    assert "━" not in report
    worst = next(line for line in text.splitlines() if line.rstrip("\x1b[0m").endswith(" *"))
    assert worst.startswith("\x1b[33m")
    assert max(map(len, report.splitlines())) <= 80


@pytest.mark.parametrize(("given", "drawn"), [("", True), ("progress=True", True), ("progress=False", False), ("progress=None", False)])
def test_python_draws_bars_on_a_terminal(given: str, drawn: bool, folder: Path) -> None:
    code, text = on_terminal("-c", f"import magr_onnx; magr_onnx.optimize('model.onnx', 'data.npz', effort='fast', {given})", cwd=folder)
    assert code == 0
    assert ("quantizing" in text) is drawn


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_none_is_wanted(environment: dict[str, str], folder: Path) -> None:
    code, text = on_terminal(*CLI, *RUN, cwd=folder, **environment)
    assert code == 0
    assert not COLOUR.search(text)
    assert (ESCAPE in text) == ("NO_COLOR" in environment)


def test_quiet_is_quiet_on_a_terminal_too(folder: Path) -> None:
    assert on_terminal(*CLI, *RUN, "--quiet", cwd=folder) == (0, "")


def test_a_pipe_gets_a_line_as_a_stage_begins_and_ends(folder: Path) -> None:
    lines = run(*RUN, "--validation", "data.npz", cwd=folder).stderr.splitlines()
    stages = ["calibrating", "quantizing", "validating"]
    assert [line.split(":")[0] for line in lines if ": done in " in line] == stages
    assert [line for line in lines if ": done in " not in line] == ["calibrating: 13 steps", "quantizing: 2 layers", "validating: 13 steps"]
    assert run(*RUN, "--quiet", cwd=folder).stderr == ""


def test_verbose_adds_a_line_for_each_layer(folder: Path) -> None:
    told = run(*RUN, "--verbose", cwd=folder)
    lines = told.stderr.splitlines()
    assert [line for line in lines if line.startswith(("up: 4 bits, block 32, error ", "down: 4 bits, block 32, error "))] == [
        line for line in lines if "error" in line
    ]
    assert any(line.startswith("calibrating: done in ") for line in lines)
    stages = [line.split(":")[0] for line in lines]
    assert stages.index("quantizing") < min(stages.index("up"), stages.index("down"))
    assert any(re.search(r"quantizing: done in .* at most \d+ MB of memory so far", line) for line in lines)
    assert ESCAPE not in told.stderr + told.stdout
    chosen = run("optimize", "model.onnx", "-c", "data.npz", "-o", "out.onnx", "--batch-size", "25", "-v", cwd=folder).stderr
    assert re.search(r"down: .*best of \d+ trials: alpha .*, damping .*(strong inputs first|in order)", chosen)
    assert re.search(r"down: .*feedback \S+ to \S+ on held-out rows", chosen)


def test_errors_fit_a_screen(folder: Path) -> None:
    (folder / "long.toml").write_text("version = 1\n" + "".join(f"key_number_{i} = 1\n" for i in range(60)))
    for arguments, lines in ((("-r", "long.toml"), console.MAX_LINES), (("-r", "long.toml", "-v"), 61)):
        result = run("optimize", *arguments, cwd=folder)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, lines)
    assert "and 42 more (--verbose shows all)" in run("optimize", "-r", "long.toml", cwd=folder).stderr
    code, text = on_terminal(*CLI, "optimize", "-r", "long.toml", cwd=folder)
    assert code == 2
    assert max(len(line) for line in text.splitlines()) <= 80 + len("\x1b[1;31m\x1b[0m")


def test_what_nobody_expected_is_kept_for_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr("magr_onnx.cli.commands.optimize.run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("optimize", "model.onnx", cwd=folder)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (70, "", 1)
    assert f"onnx-magr {magr_onnx.__version__}: this should not have happened (ZeroDivisionError: a)" in result.stderr
    (file,) = tmp_path.iterdir()
    assert str(file) in result.stderr
    assert "ZeroDivisionError" in file.read_text()
    assert f"onnx-magr {magr_onnx.__version__}, Python 3" in file.read_text()
    told = run("optimize", "model.onnx", "-v", cwd=folder).stderr
    assert "Traceback" in told
    assert [file] == list(tmp_path.iterdir())
    monkeypatch.setattr("magr_onnx.cli.app.app", broken)
    assert "ZeroDivisionError" in run("passes").stderr


@pytest.mark.long
@pytest.mark.parametrize("columns", [60, 72, 80, 120])
def test_text_fits_the_terminal(folder: Path, columns: int) -> None:
    for command in (RUN, ("inspect", "model.onnx", "--exclude", "up")):
        code, text = on_terminal(*CLI, *command, cwd=folder, COLUMNS=str(columns))
        assert code == 0
        plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
        lines = [line.split("\r")[-1] for line in plain[plain.index("model") :].splitlines() if "\u2501" not in line]
        widest = max(map(len, lines))
        assert widest <= min(columns, 80)
        assert any(line.startswith("down") for line in lines)


def test_long_tables_begin_with_the_worst() -> None:
    rows = [LayerRow(f"l{i}", "MatMul", "w", 8, 8, 4, 32, 10, i / 1000, None, None, False, None) for i in range(40)]
    table = layer_table(rows, MOST)
    assert len(table) == MOST + 2
    assert table[1].split() == ["l39", "8", "x", "8", "4", "channel", "3.90%", "*"]
    assert table[-1] == "... and 15 more layers with errors from 0.00% to 1.40% (--verbose shows all)"
    assert len(layer_table(rows)) == 41
    assert [line.split()[0] for line in layer_table(rows[:MOST], MOST)[1:]] == [row.name for row in rows[:MOST]]


def completed(shell: str, words: str) -> str:
    """What the shell is told to offer."""
    environment = {"_ONNX_MAGR_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    environment |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return CliRunner().invoke(app, [], prog_name="onnx-magr", env=environment).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_names(shell: str) -> None:
    for option, names in (
        ("--preset", PRESETS),
        ("--target", TARGETS),
        ("--format", ("qdq", "qdq-int8")),
        ("--pipeline", ("magr", "quantize")),
    ):
        offered = completed(shell, f"onnx-magr optimize {option} ")
        assert all(name in offered for name in names), offered
    assert "magr,quantize" in completed(shell, "onnx-magr optimize --pipeline magr,q")
    assert "optimize" in completed(shell, "onnx-magr op")
    script = CliRunner().invoke(app, [], prog_name="onnx-magr", env={"_ONNX_MAGR_COMPLETE": f"source_{shell}"}).stdout
    assert "onnx-magr" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False, capture_output=True).returncode == 0


def test_an_explained_error_is_not_taken_for_markup() -> None:
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        console.explain(OptionError("[red]x[/red] [[layer]]"))
    assert out.getvalue() == "error: [red]x[/red] [[layer]]\n"


class Clock:
    """Time that passes when a test says so."""

    now = 1e6

    def __call__(self) -> float:
        return self.now


def test_stages_begin_again_with_the_next_model() -> None:
    lines: list[str] = []
    clock = Clock()
    watch = progress.StageReporter(say=lines.append, clock=clock)
    for pause in (2, 0):
        watch.step("calibrating", 0, 2)
        clock.now += pause
        watch.step("calibrating", 2, 2)
    assert [line.split(",")[0] for line in lines] == [
        "calibrating: 2 steps",
        "calibrating: done in 2.0 s",
        "calibrating: 2 steps",
        "calibrating: done in 0.0 s",
    ]


def test_a_long_stage_says_every_few_minutes_how_far_it_is() -> None:
    lines: list[str] = []
    clock = Clock()
    watch = progress.StageReporter(say=lines.append, every=120, clock=clock)
    for done in range(11):
        watch.step("quantizing", done, 10)
        clock.now += 50
    assert [line.split(",")[0] if "done" in line else line for line in lines] == [
        "quantizing: 10 layers",
        "quantizing: 3 of 10 layers in 2 min, about 6 min left",
        "quantizing: 6 of 10 layers in 5 min, about 3 min left",
        "quantizing: 9 of 10 layers in 8 min, about 50 s left",
        "quantizing: done in 500.0 s",
    ]


@given(step=st.floats(0.1, 1000), total=st.integers(2, 200), every=st.floats(1, 1000))
def test_lines_of_a_stage_are_no_closer_than_asked_for(step: float, total: int, every: float) -> None:
    times: list[float] = []
    clock = Clock()
    watch = progress.StageReporter(say=lambda line: times.append(clock.now), every=every, clock=clock)
    for done in range(total + 1):
        watch.step("calibrating", done, total)
        clock.now += step
    begin, *between, end = times
    assert end - begin == pytest.approx(step * total)
    gaps = np.diff([begin, *between])
    assert (gaps >= every - 1e-6).all()
    assert (gaps < every + step + 1e-6).all()
    assert len(between) <= step * total / every


def test_stages_that_run_together_have_lines_of_their_own() -> None:
    lines: list[str] = []
    clock = Clock()
    watch = progress.StageReporter(say=lines.append, every=60, clock=clock)
    for done in range(4):
        watch.step("calibrating", done, 4)
        watch.step("quantizing", done, 4)
        clock.now += 61
    assert lines[2:4] == ["calibrating: 1 of 4 steps in 1 min, about 3 min left", "quantizing: 1 of 4 layers in 1 min, about 3 min left"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_bars_begin_again_with_the_next_model() -> None:
    with progress.bars(Console(file=io.StringIO(), force_terminal=True)) as drawn:
        assert drawn is not None
        watch = progress.StageReporter(drawn)
        for done in range(3):
            watch.step("quantizing", done, 2)
        (task,) = drawn.tasks
        first, finished = task.start_time, task.finished_time
        watch.step("quantizing", 0, 2)
        assert (task.completed, task.total, task.finished_time) == (0, 2, None)
        assert first is not None
        assert finished is not None
        assert task.start_time is not None
        assert task.start_time >= first + finished


def test_an_error_that_is_no_number_is_the_most() -> None:
    with progress.bars(Console(file=io.StringIO(), force_terminal=True)) as drawn:
        assert drawn is not None
        watch = progress.StageReporter(drawn)
        for name, error in (("a", 0.1), ("b", math.nan), ("c", 0.2), ("d", None)):
            watch.layer(LayerRow(name, "MatMul", "w", 8, 8, 4, 32, 10, error, None, None, False, None))
        assert drawn.layers.plain == "layer error    last 0.00% d, most nan% b"


def test_a_traceback_with_bytes_that_are_no_text_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stderr(out):
        console.apologize(ValueError("no such thing: m\udcff.onnx"), "1.0")
    (file,) = tmp_path.iterdir()
    assert "ValueError: no such thing: m\\udcff.onnx" in file.read_text(encoding="utf-8")
