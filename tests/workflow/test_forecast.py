"""Forecasts: sizes are those of the files written, stages those of the report, errors those of the run; nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.errors import MagrError
from magr_onnx.models.zoo import ZOO
from tests import graphs
from tests.graphs import Builder, random

FORMATS: dict[str, dict[str, Any]] = {
    "matmulnbits": {"format": "matmulnbits"},
    "best, 3 bits": {"format": "matmulnbits", "bits": 3, "effort": "best"},
    "qdq-int8": {"format": "qdq-int8"},
    "dynamic-int8": {"format": "dynamic-int8"},
    "fast": {"format": "qdq", "effort": "fast"},
}
OUTSIDE = {"write", "arithmetic", "rewrite"}  # stages without a forecast of their own


def wide(outputs: int = 96) -> Any:
    """Two layers of 64 x 128 and 128 x ``outputs``."""
    b = Builder()
    h = b.node("Relu", [b.node("MatMul", [b.input("x", ["batch", 64]), b.constant("w", random(64, 128))], "first")], "act")
    return b.model(b.node("MatMul", [h, b.constant("v", random(128, outputs, seed=1))], "second"), ["batch", outputs])


@pytest.mark.parametrize(("name", "calibrated"), [*((name, True) for name in FORMATS), ("matmulnbits", False), ("dynamic-int8", False)])
def test_sizes_and_stages_are_those_of_the_run(name: str, calibrated: bool, tmp_path: Path) -> None:
    data, options = {"x": random(300, 64, scale=1)} if calibrated else None, FORMATS[name]
    forecast = magr_onnx.forecast(wide(), data, output=tmp_path / "q.onnx", progress=False, **options)
    assert not list(tmp_path.iterdir())
    report = magr_onnx.optimize(wide(), data, output=tmp_path / "q.onnx", progress=False, **options).report
    assert forecast.bytes_before == report.bytes_before
    assert forecast.bytes_after == pytest.approx(report.bytes_after, rel=0.05)
    assert forecast.layers == len(report.layers)
    assert forecast.weights == sum(row.k * row.n for row in report.layers)
    assert set(forecast.seconds) == set(report.seconds) - (OUTSIDE if calibrated else {*OUTSIDE, "calibrate", "compare"})
    assert all(value >= 0 for value in forecast.seconds.values())
    assert forecast.rows == pytest.approx(max(row.rows for row in report.layers), rel=0.1)


def test_a_forecast_grows_with_the_model_and_the_data() -> None:
    """In memory, by a layer of 512 times the outputs, and in rows, by a hundred times the samples."""
    few, many = {"x": random(64, 64, scale=1)}, {"x": random(6400, 64, scale=1)}
    small, large = magr_onnx.forecast(wide(64), few), magr_onnx.forecast(wide(64 * 512), many)
    assert large.memory > small.memory
    assert large.rows == pytest.approx(100 * small.rows, rel=0.1)


def test_errors_come_as_in_the_run() -> None:
    data = {"x": random(8, 63, scale=1)}
    raised = []
    for function in (magr_onnx.forecast, magr_onnx.optimize):
        with pytest.raises(MagrError) as found:
            function(wide(), data)
        raised.append(str(found.value))
    assert raised[0] == raised[1]


OTHERS = (
    "conv-depthwise-and-a-linear-layer",
    "conv-3d-bias-behind-identity",
    "weight-shared-by-three-layers",
    "tied-embedding",
    "weights-in-a-branch",
)


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_layers_have_forecasts(name: str) -> None:
    """Convolutions, one weight of several layers, a table, a body."""
    text = magr_onnx.forecast(ZOO[name].build(), include=["*"], progress=False).to_text()
    assert "nothing was written" in text


def test_the_command_line_prints_it_and_writes_nothing(tmp_path: Path) -> None:
    onnx.save(graphs.proto(wide()), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=random(64, 64, scale=1))
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "magr_onnx.cli.main", "optimize", "m.onnx", "--calibration", "x.npz", "--dry-run", "--quiet"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 2
    refused = subprocess.run([*command[:4], ".", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "--dry-run forecasts a run on one model" in refused.stderr
    assert sorted(tmp_path.iterdir()) == before
