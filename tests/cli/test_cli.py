"""The command line as a user meets it: real processes, real files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.cli.app import commands
from magr_onnx.cli.commands import demo
from magr_onnx.cli.main import main
from magr_onnx.core.option_spec import bytes_of
from magr_onnx.models.zoo import ZOO
from magr_onnx.models.zoo.trap import constant, model
from tests import graphs
from tests.graphs import feeds, proto
from tests.helpers import PATIENCE

COMMANDS = ("optimize", "inspect", "validate", "generate", "verify", "report", "passes", "presets", "olive-config", "demo")


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, cwd: Path | None = None) -> Result:
    """The command in this process: a process each would spend a second on imports."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        patch.setattr(sys, "argv", ["onnx-magr", *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setenv("COLUMNS", "80")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), errors.getvalue())


def test_installed_command_runs(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("onnx-magr")
    result = subprocess.run([command, "inspect", "none.onnx"], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: none.onnx: no such file\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    model = graphs.chain()
    (path / "model.onnx").write_bytes(proto(model).SerializeToString())
    np.savez(path / "calibration.npz", **feeds(model, rows=200))
    np.savez(path / "heldout.npz", **feeds(model, rows=50, seed=8))
    return path


def test_commands_are_those_documented() -> None:
    assert tuple(commands()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert "Example" in result.stdout
    assert f"onnx-magr {command}" in result.stdout
    assert "--json" in result.stdout or command in ("report", "olive-config")  # which write files, and nothing but JSON


def test_optimize_then_validate(folder: Path) -> None:
    out, report = folder / "small.onnx", folder / "report.json"
    result = run(
        "optimize", folder / "model.onnx", "-o", out, "-c", folder / "calibration.npz", "--validation", folder / "heldout.npz",
        "--report", report, "--effort", "fast",
    )  # fmt: skip
    assert result.returncode == 0
    assert all(re.match(r"(calibrating|quantizing|validating): ", line) for line in result.stderr.splitlines())  # no bar in a pipe
    assert "2 converted, 1 left as they are; 2 read back and verified" in result.stdout
    assert "right side is computed at run time: scores" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()[3:] if not line.startswith("validation")) <= 80
    data = json.loads(report.read_text())
    assert [row["name"] for row in data["layers"]] == ["up", "down"]
    assert data["skipped"][0]["reason"] == "right side is computed at run time"
    assert data["pipeline"].startswith("magr{")
    assert set(data["validation"]["arithmetics"]) == {"default", "unoptimized", "float-qdq"}
    again = run("validate", folder / "model.onnx", out, "--data", folder / "heldout.npz", "--json")
    assert again.returncode == 0
    metrics = json.loads(again.stdout)["arithmetics"]["unoptimized"][0]
    assert metrics["cosine"] > 0.98
    low = run("validate", folder / "model.onnx", out, "--data", folder / "heldout.npz", "--min-cosine", "0.99999", "-q")
    assert (low.returncode, low.stdout) == (3, "")
    assert "below 0.99999" in low.stderr
    broken = onnx.load(out)
    end = broken.graph.output[0].name
    last = next(node for node in broken.graph.node if end in node.output)
    last.output[list(last.output).index(end)] = "inner"
    broken.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(np.nan), "nothing"))
    broken.graph.node.append(onnx.helper.make_node("Add", ["inner", "nothing"], [end]))
    onnx.save(broken, folder / "broken.onnx")
    never = run("validate", folder / "model.onnx", folder / "broken.onnx", "--data", folder / "heldout.npz", "--min-cosine", "0.5", "-q")
    assert (never.returncode, "cosine nan is below" in never.stderr) == (3, True)


def test_json_is_json_and_nothing_else(folder: Path) -> None:
    for arguments in (
        ("inspect", folder / "model.onnx"),
        ("passes",),
        ("optimize", folder / "model.onnx", "-o", folder / "j.onnx"),
    ):
        result = run(*arguments, "--json")
        assert result.returncode == 0
        json.loads(result.stdout)


def test_data_free_says_so(folder: Path) -> None:
    result = run("optimize", folder / "model.onnx", "-o", folder / "free.onnx")
    assert result.returncode == 0
    assert "none (data-free)" in result.stdout
    assert "data-free: no calibration data was given" in " ".join(result.stdout.split())
    assert "MagR skipped" in result.stdout


def test_default_output_name_and_quiet(folder: Path) -> None:
    result = run("optimize", "model.onnx", "-q", cwd=folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (folder / "model.magr.onnx").is_file()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0B", 0), ("512 B", 512), ("1kB", 1000), ("1.5MB", 1_500_000), ("512 mb", 512_000_000), (" 2GB ", 2_000_000_000), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


def test_effort_and_cache_reach_the_run(folder: Path) -> None:
    """Little memory gives the same file as a lot of it."""
    made = []
    for cache in ("1GB", "1KB"):
        out = folder / cache / "out.onnx"
        out.parent.mkdir()
        result = run(
            "optimize", folder / "model.onnx", "-o", out, "-c", folder / "calibration.npz", "--batch-size", "25", "--cache", cache, "--json"
        )
        assert result.returncode == 0
        assert json.loads(result.stdout)["pipeline"] == "error-feedback,quantize{method=auto},compensate-bias{bias=any},emit-matmulnbits"
        made.append(out.read_bytes())
    assert made[0] == made[1]
    best = run("optimize", folder / "model.onnx", "-o", folder / "best.onnx", "-c", folder / "calibration.npz", "-e", "best", "--json")
    assert json.loads(best.stdout)["pipeline"].startswith("error-feedback,output-hessian,quantize{method=auto}")


def test_pipeline_replaces_options(folder: Path) -> None:
    result = run(
        "optimize", folder / "model.onnx", "-o", folder / "m.onnx", "-c", folder / "calibration.npz", "--pipeline", "magr{alpha=1e-2}"
    )
    assert result.returncode == 0
    both = run("optimize", folder / "model.onnx", "--pipeline", "magr", "--bits", "4")
    assert both.returncode == 2
    assert "pipeline replaces bits; give one or the other" in both.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("optimize", "none.onnx"), 1, "no such file"),
        (("optimize", "model.onnx", "-o", "model.onnx"), 1, "would overwrite the input"),
        (("optimize", "model.onnx", "-o", "no/out.onnx"), 1, "does not exist"),
        (("optimize", "model.onnx", "-c", "none.npz"), 1, "does not exist"),
        (("optimize", "model.onnx", "--bits", "2", "--format", "qdq", "--block-size", "20"), 2, "multiple of 16"),
        (("optimize", "model.onnx", "--bits", "2", "--format", "qdq", "--block-size", "20"), 2, "2 bits with format qdq"),
        (("optimize", "model.onnx", "--block-size", "big"), 2, "a multiple of 16 or 'channel'"),
        (("optimize", "model.onnx", "--provider", "cuda"), 1, "CPUExecutionProvider"),
        (("optimize", "model.onnx", "--pipeline", "magik"), 2, "no pass is called 'magik'"),
        (("optimize", "model.onnx", "--report", "no/report.json"), 1, "report no/report.json: folder no"),
        (("optimize", "model.onnx", "--bits", "9"), 2, "'9': choose one of 2, 3"),
        (("optimize", "model.onnx", "--effort", "most"), 2, "'most': choose one of fast, balanced, best"),
        (("optimize", "model.onnx", "--effort", "best"), 2, "error feedback needs calibration data; give some, or take effort fast"),
        (("optimize", "model.onnx", "--feedback"), 2, "error feedback needs calibration data"),
        (("optimize", "model.onnx", "--effort", "fast", "--quantizer", "gptq"), 2, "an effort chooses the quantizer; give one of them"),
        (("optimize", "model.onnx", "--effort", "fast", "--pipeline", "quantize"), 2, "pipeline replaces effort"),
        (("optimize", "model.onnx", "--cache", "many"), 2, "cache = 'many': give a size such as 512MB or 2GB"),
        (("optimize", "model.onnx", "--cache", "-1MB"), 2, "give a size such as 512MB or 2GB"),
        (("optimize", "model.onnx", "--cache", "2XB"), 2, "give a size such as 512MB or 2GB"),
        (("optimise", "model.onnx"), 2, "No such command"),
        (("validate", "model.onnx", "model.onnx"), 2, "--data"),
        (("optimize", "model.onnx", "--preset", "llm_int4"), 2, "did you mean 'llm-int4'"),
        (("optimize", "model.onnx", "--target", "x86-avx"), 2, "x86-avx2"),
        (("optimize", "model.onnx", "--block-size", "33"), 2, "block size 33"),
        (("optimize", "model.onnx", "--cache", "2"), 2, "give a size such as 512MB or 2GB"),
        (("optimize", "model.onnx", "--layer", "*head*:bit=8"), 2, "did you mean 'bits'"),
        (("optimize", "--recipe", "none.toml"), 2, "cannot be read"),
        (("optimize", "model.onnx", "--quantizer", "gptqq"), 2, "choose one of"),
        (("verify", "model.onnx"), 2, "neither was given"),
        (("demo", "--folder", "model.onnx"), 1, "cannot make the folder model.onnx: File exists; give another one"),
    ],
)
def test_errors_are_one_message_and_leave_nothing(
    arguments: tuple[str, ...], code: int, message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    result = run(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminal closed")],
)
def test_signals_keep_the_old_file(number: signal.Signals, code: int, said: str, folder: Path, tmp_path: Path) -> None:
    out, job, temporary = tmp_path / "out.onnx", tmp_path / "job", tmp_path / "temporary"
    temporary.mkdir()
    out.write_bytes(b"precious")
    arguments = ["onnx-magr", "optimize", folder / "model.onnx", "-o", out, "-c", folder / "calibration.npz", "--effort", "fast"]
    arguments += ["--resume", job]
    script = f"""
import signal, sys, tempfile, time, magr_onnx.cli.main
signal.signal({int(number)}, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
from magr_onnx.runtime.calibration import moments
def slow(*args, **options):
    with tempfile.TemporaryDirectory():
        print("calibrating", flush=True)
        time.sleep(3600)
moments.collect = slow
sys.argv = {list(map(str, arguments))!r}
magr_onnx.cli.main.main()
"""
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "calibrating\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert errors.splitlines()[-1] == f"{said}; no output was changed; the same command continues where it stopped"
    assert out.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job", "out.onnx", "temporary"]
    assert {p.name for p in temporary.iterdir()} <= {".ses"}  # onnxruntime's own


@pytest.mark.long
def test_demo_makes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS[:1])
    result = run("demo", "--folder", "keep/here", "-q", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert [p.suffix for p in (tmp_path / "keep" / "here").iterdir()] == [".onnx"]


def test_version_is_the_package_s() -> None:
    assert run("--version").stdout == f"onnx-magr {magr_onnx.__version__}\n"


def test_the_package_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "magr_onnx", "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout == run("--version").stdout


def test_inspect_shows_what_would_be_skipped(folder: Path) -> None:
    result = run("inspect", folder / "model.onnx", "--exclude", "up")
    assert "1 layers to convert, 2 to leave as they are" in result.stdout
    assert "up (Gemm): excluded by name" in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80


def test_inspect_shows_how_many_experts_there_are(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ZOO["experts-with-gates"].build(), path)
    assert "6 x 32 x 144" in run("inspect", path).stdout


def test_convolutions_and_tables_have_options(tmp_path: Path) -> None:
    text = """g (int64[n, 8] i) => (float[n, 64] y) {
        [emb] h = Gather(table, i)
        t = Transpose<perm = [0, 2, 1]>(h)
        [c] a = Conv(t, k)
        p = GlobalAveragePool(a)
        f = Flatten(p)
        [fc] y = MatMul(f, w)
    }"""
    onnx.save(model(text, table=constant("table", 128, 32), k=constant("k", 16, 32, 3), w=constant("w", 16, 64)), tmp_path / "m.onnx")
    result = run(
        "optimize", "m.onnx", "--conv-bits", "4", "--conv-form", "dequantize", "--embeddings", "dequantize", "--json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {row["op"]: row["bits"] for row in report["layers"]} == {"Gather": 8, "Conv": 4, "MatMul": 4}
    assert report["pipeline"].endswith("convolutions{bits=4,form=dequantize,feedback=true},embeddings{form=dequantize}")
    result = run("optimize", "m.onnx", "--conv-bits", "none", "--quiet", "--report", "r.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {row["op"] for row in json.loads((tmp_path / "r.json").read_text())["skipped"]} == {"Gather", "Conv"}
    assert "embedding_bits=4 needs embeddings" in run("optimize", "m.onnx", "--embedding-bits", "4", cwd=tmp_path).stderr
