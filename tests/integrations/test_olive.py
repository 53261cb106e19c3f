"""The pass for Olive in real workflows: one by the command ``olive run``, and many in one other process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import magr_onnx
from magr_onnx.cli.commands.olive_config import olive_config
from magr_onnx.config.options import Options
from magr_onnx.errors import OutputError
from magr_onnx.passes.emit.readback import read_weights
from tests import graphs
from tests.graphs import Builder, proto, random
from tests.helpers import PATIENCE, ROOT, run_program

if importlib.util.find_spec("olive") is None:
    pytest.skip("olive-ai is not installed", allow_module_level=True)
OFFLINE = {"CI": "1", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
K, ROWS = 64, 96


def environment() -> dict[str, str]:
    return {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}


def layers() -> ir.Model:
    """Two layers and an Identity that a peephole optimizer takes out."""
    b = Builder()
    x = b.input("x", ["batch", K])
    up = b.node("Relu", [b.node("MatMul", [b.node("Identity", [x]), b.constant("w1", random(K, 96))], "up")])
    return b.model(b.node("MatMul", [up, b.constant("w2", random(96, 32, seed=1))], "down"), ["batch", 32])


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(proto(layers()).SerializeToString())
    np.savez(folder / "inputs.npz", x=graphs.correlated(ROWS, K))


def outputs(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    return found


def operators(path: Path) -> list[str]:
    return [n.op_type for n in onnx.load(path).graph.node]


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where ``olive run`` ran one of Olive's passes, ours, and another of Olive's."""
    folder = tmp_path_factory.mktemp("olive")
    write(folder)
    steps = {
        "input_model": {"type": "OnnxModel", "model_path": "model.onnx"},
        "passes": {
            "before": {"type": "OnnxPeepholeOptimizer"},
            "quantize": {"type": "OnnxMagr", "bits": 4, "calibration": "inputs.npz", "validation": "inputs.npz"},
            "after": {"type": "OnnxPeepholeOptimizer"},
        },
        "output_dir": "out",
        "cache_dir": "cache",
    }
    (folder / "workflow.json").write_text(json.dumps(steps))
    commands = (
        [sys.executable, "-m", "magr_onnx.cli.main", "olive-config", "-o", "olive_package.json"],
        [sys.executable, "-m", "olive", "run", "--config", "workflow.json", "--package-config", "olive_package.json"],
    )
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.long
def test_olive_run_writes_what_this_package_would(workflow: Path, tmp_path: Path) -> None:
    made = workflow / "out" / "model.onnx"
    assert operators(made) == ["MatMulNBits", "Relu", "MatMulNBits"]
    direct = magr_onnx.optimize(workflow / "model.onnx", workflow / "inputs.npz", output=tmp_path / "direct.onnx", bits=4)
    assert direct.report.verified == 2
    expected, found = (list(read_weights(ir.load(path)).values()) for path in (tmp_path / "direct.onnx", made))
    assert len(found) == 2
    for ours, olives in zip(expected, found, strict=True):
        np.testing.assert_array_equal(olives, ours)


@pytest.mark.long
def test_the_result_runs_and_is_close(workflow: Path) -> None:
    x = graphs.correlated(400, K, seed=9)
    wanted, found = (outputs(workflow / name, x) for name in ("model.onnx", "out/model.onnx"))
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.long
def test_the_report_goes_along(workflow: Path) -> None:
    attributes = json.loads((workflow / "out" / "model_config.json").read_text())["config"]["model_attributes"]
    short = attributes["onnx_magr"]
    assert (short["converted"], short["verified"]) == (2, 2)
    report = json.loads((workflow / "out" / short["report"]).read_text())
    assert [row["name"] for row in report["layers"]] == ["up", "down"]
    assert report["validation"] is not None


@pytest.mark.long
def test_the_package_configuration_keeps_all_of_olives_own(workflow: Path) -> None:
    made = json.loads((workflow / "olive_package.json").read_text())
    spec = importlib.util.find_spec("olive")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    own = json.loads((Path(spec.submodule_search_locations[0]) / "olive_config.json").read_text())
    assert made["passes"].pop("OnnxMagr")["module_path"] == "magr_onnx.integrations.olive.OnnxMagr"
    assert made == own


def test_a_package_configuration_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are a thing of POSIX")
    file = tmp_path / "package.json"
    file.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # as a disk that is full after 200 bytes
        with pytest.raises(OutputError, match=r"package configuration .*package.json: cannot be written: File too large"):
            olive_config(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("olive", "error: Olive is not installed; pip install 'onnx-magr[olive]'"),
        ("requests", "error: Olive is installed, and fails to import: No module named 'requests'"),
    ],
)
def test_what_is_missing_is_named(hidden: str, said: str) -> None:
    script = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
sys.argv = ["onnx-magr", "olive-config"]
from magr_onnx.cli.main import main
main()
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workflows")
    write(folder)
    write(folder / "parts")
    for name in ("a", "b"):
        for source in ("model.onnx", "inputs.npz"):
            (folder / "parts" / f"{name}{Path(source).suffix}").write_bytes((folder / "parts" / source).read_bytes())
    return run_program("olive_workflows", folder, environment=environment())


@pytest.mark.long
def test_the_cache_gives_the_same_and_knows_other_data(many: dict[str, Any]) -> None:
    assert many["again"]["codes"] == many["first"]["codes"]
    assert many["runs"] == {"again": 0, "other_data": 1}
    assert many["other_data"]["codes"] != many["first"]["codes"]


@pytest.mark.long
def test_data_of_olives_own_containers(many: dict[str, Any]) -> None:
    assert many["data_config"]["codes"] == many["other_data"]["codes"]


@pytest.mark.long
def test_errors_name_the_parameters(many: dict[str, Any]) -> None:
    assert "nowhere.npz does not exist" in many["wrong"]["error"]
    assert "accuracy_level is for format matmulnbits only" in many["wrong"]["error"]
    assert "choose one of matmulnbits, qdq, qdq-int8, dynamic-int8" in many["mistyped"]["error"]
    assert "unknown key 'bitz'; did you mean 'bits'?" in many["unknown"]["error"]
    assert "nowhere.toml': cannot be read: No such file" in many["no_recipe"]["error"]
    assert "bits=9" in many["out_of_range"]["error"] or "bits = 9" in many["out_of_range"]["error"]
    assert "the model's inputs are x: float32" in many["data_misfit"]["error"]


@pytest.mark.long
def test_what_the_run_would_refuse_is_refused_before_it(many: dict[str, Any]) -> None:
    refusals = many["refusals"]
    assert "static 8-bit activations need calibration data" in refusals["ranges"]
    assert "target size 30% needs calibration data" in refusals["size"]
    assert "loss at most 1% needs calibration data" in refusals["loss"]
    assert "error feedback needs calibration data" in refusals["feedback"]
    assert "bogus" in refusals["provider"]
    assert "accuracy_level is for format matmulnbits only" in refusals["provider"]
    assert "bits" in refusals["layer"]
    assert refusals["data"] == refusals["shards"] == ""


@pytest.mark.long
def test_recipes_and_layers_of_their_own(many: dict[str, Any]) -> None:
    """The recipe's 8 bits but for one layer, and the format that was given beside it."""
    pipelines = {row["name"]: row["bits"] for row in many["recipe"]["layers"]}
    assert pipelines == {"up": 3, "down": 8}
    assert many["recipe"]["models"]["model.onnx"].count("DequantizeLinear") == 2


@pytest.mark.long
def test_components_have_data_and_reports_of_their_own(many: dict[str, Any]) -> None:
    assert list(many["composite"]["models"]) == ["a.onnx", "b.onnx"]
    assert all(ops.count("MatMulNBits") == 2 for ops in many["composite"]["models"].values())
    assert many["composite"]["reports"] == ["a.magr.json", "b.magr.json"]
    parts = many["composite"]["config"]["config"]["model_components"]
    data = [part["config"]["model_attributes"]["onnx_magr"]["calibration"] for part in parts]
    assert [f"{name}.npz" in text for name, text in zip("ab", data, strict=True)] == [True, True]


@pytest.mark.long
def test_a_search_leaves_out_what_cannot_be(many: dict[str, Any]) -> None:
    """Of 8, 4 and 2 bits the smallest that this format has is 4."""
    ops = many["searched"]["models"]["model.onnx"]
    assert ops.count("DequantizeLinear") == 2
    summary = many["searched"]["config"]["config"]["model_attributes"]["onnx_magr"]
    assert "bits=8" not in summary["pipeline"]
    assert summary["bytes_after"] < summary["bytes_before"] / 4


@pytest.mark.long
def test_every_option_is_a_parameter_that_is_described(many: dict[str, Any]) -> None:
    for name in Options.__annotations__:
        assert len(many["described"][name]) > len(name) + 10
