"""A model larger than its memory limit, through the command line: minutes to hours, so only when asked for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "large.py"
LIMIT = 3 << 30


@pytest.fixture(scope="module")
def large() -> Any:
    spec = importlib.util.spec_from_file_location("large", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["large"] = module
    spec.loader.exec_module(module)
    return module


def test_the_program_builds_and_measures_a_small_one(large: Any, tmp_path: Path) -> None:
    model = large.build(tmp_path, 2, hidden=64, ffn=96, heads=4)
    data = large.calibration(tmp_path, 4, 8, 64)
    arguments = ["--calibration", str(data), "--batch-size", "1", "--effort", "fast", "--max-memory", "100kB"]
    found = large.measure(model, tmp_path / "out.onnx", "small", arguments, LIMIT)
    assert found.layers_read_back == 14
    assert found.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert 0 < found.max_rss < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("run", ["data-free", "calibrated"])
def test_more_than_eight_gib_within_three(run: str, large: Any, tmp_path: Path) -> None:
    arguments = ["--max-memory", "3.2GB"]
    if run == "calibrated":
        arguments += ["--calibration", str(large.calibration(tmp_path)), "--batch-size", "1", "--effort", "fast"]
    seconds = []
    for layers in (1, 11):
        model = large.build(tmp_path, layers)
        found = large.measure(model, tmp_path / "out.onnx", run, arguments, LIMIT)
        assert found.layers_read_back == 7 * layers
        assert found.anonymous < LIMIT
        seconds.append(found.cpu_seconds / found.parameters)
        size = (tmp_path / f"{model.name}.data").stat().st_size
        for path in [*tmp_path.glob(f"{model.name}*"), *tmp_path.glob("out.onnx*")]:
            path.unlink()
    assert size > 8 << 30
    assert seconds[1] < 1.3 * seconds[0]
