"""A run with the user's own measure: in the report, in the terminal, and as the budget of mixed precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import magr_onnx
from magr_onnx.cli.app import app
from magr_onnx.errors import OptionError
from magr_onnx.report.data import Report
from magr_onnx.runtime.measure.metric import Predictions
from tests import graphs
from tests.graphs import Array, correlated
from tests.workflow.test_mixed_precision import unequal

SCRIPT = """
import numpy as np

labels = np.load({labels!r})


def top1(predictions):
    return float((np.concatenate([batch["y"] for batch in predictions]).argmax(axis=1) == labels).mean())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a script that counts the samples whose class is that of the float model."""
    folder = tmp_path_factory.mktemp("metric")
    (folder / "model.onnx").write_bytes(graphs.proto(unequal()).SerializeToString())
    x = correlated(800, 64)
    np.savez(folder / "inputs.npz", x=x[:400])
    np.savez(folder / "heldout.npz", x=x[400:])
    np.save(folder / "labels.npy", classes(folder / "model.onnx", x[400:]))
    (folder / "accuracy.py").write_text(SCRIPT.format(labels=str(folder / "labels.npy")))
    return folder


def classes(model: Path, x: Array) -> Array:
    return np.asarray(ort.InferenceSession(model).run(None, {"x": x})[0]).argmax(axis=1)


def accuracy(model: Path, folder: Path) -> float:
    """The share of held-out samples of the float model's class, by onnxruntime alone."""
    return float((classes(model, np.load(folder / "heldout.npz")["x"]) == np.load(folder / "labels.npy")).mean())


def arguments(files: Path, **more: Any) -> dict[str, Any]:
    paths = {name: str(files / file) for name, file in (("calibration", "inputs.npz"), ("validation_data", "heldout.npz"))}
    return {**paths, "effort": "fast", "progress": None, **more}


def test_both_models_are_measured(files: Path, tmp_path: Path) -> None:
    """A function in Python and a script on the command line give the same, in the report, its text, JSON and page, and in the terminal."""
    labels = np.load(files / "labels.npy")

    def top1(predictions: Predictions) -> Any:
        return (np.concatenate([batch["y"] for batch in predictions]).argmax(axis=1) == labels).mean()

    options = {"bits": 2, "block_size": 32}
    _, report = magr_onnx.optimize(files / "model.onnx", output=tmp_path / "a.onnx", metric=top1, **arguments(files, **options))
    assert report.validation is not None
    measured = report.validation.metric
    assert measured is not None
    assert (measured.name, measured.float_value) == ("top1", 1.0)
    assert measured.quantized_value == accuracy(tmp_path / "a.onnx", files) < 1
    assert Report.from_json(report.to_json()).validation == report.validation
    assert f"top1 1 -&gt; {measured.quantized_value:.6g}" in report.to_html()
    command = f"optimize {files}/model.onnx -o {tmp_path}/b.onnx -c {files}/inputs.npz --validation {files}/heldout.npz --bits 2"
    command += f" --block-size 32 --effort fast --metric {files}/accuracy.py --save-recipe {tmp_path}/recipe.toml"
    done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    last = " ".join(done.stdout.splitlines()[-2:])
    assert str(measured) in last
    assert "400 samples" in last
    again = CliRunner().invoke(app, ["optimize", "--recipe", f"{tmp_path}/recipe.toml", "--json"], catch_exceptions=False)
    assert json.loads(again.stdout)["validation"]["metric"]["quantized_value"] == measured.quantized_value
    judged = ["validate", f"{files}/model.onnx", f"{tmp_path}/b.onnx", "--data", f"{files}/heldout.npz", "--metric"]
    assert str(measured) in CliRunner().invoke(app, [*judged, f"{files}/accuracy.py:top1"], catch_exceptions=False).stdout


@pytest.mark.parametrize("loss", ["0", "5%", "0.03"])
def test_the_smallest_file_that_keeps_to_a_loss(loss: str, files: Path, tmp_path: Path) -> None:
    """The result keeps to the loss, and the next smaller one of those that were made does not."""
    metric = files / "accuracy.py"
    _, report = magr_onnx.optimize(files / "model.onnx", output=tmp_path / "a.onnx", metric=metric, **arguments(files, max_loss=loss))
    decided = report.assignment
    assert decided is not None
    assert decided.met
    assert decided.measure == "top1"
    allowed = 1 - (float(loss.removesuffix("%")) / (100 if "%" in loss else 1))
    result = decided.attempts[-1]
    assert result.measured == accuracy(tmp_path / "a.onnx", files) >= allowed
    smaller = [a for a in decided.attempts if a.bytes < result.bytes]
    assert all(a.measured < allowed for a in smaller)
    assert "top1" in report.to_text()
    assert "MISSED" not in report.to_text()


def test_a_loss_that_nothing_keeps_to_is_told(files: Path) -> None:
    """A measure that only the float model passes."""
    calls: list[int] = []

    def passes(predictions: Predictions) -> float:
        calls.append(len(list(predictions)))
        return 1.0 if len(calls) == 1 else 0.0

    _, report = magr_onnx.optimize(files / "model.onnx", metric=passes, **arguments(files, max_loss="10%"))
    assert report.assignment is not None
    assert not report.assignment.met
    assert "THE GOAL IS MISSED" in report.to_text()


def test_what_is_wrong_is_said_before_the_work(files: Path, tmp_path: Path) -> None:
    def nothing(predictions: Predictions) -> None: ...

    layers: list[Any] = []
    with pytest.raises(OptionError, match="metric nothing: expected a number"):
        magr_onnx.optimize(files / "model.onnx", metric=nothing, on_layer=layers.append, **arguments(files))
    assert not layers
    data = arguments(files)
    del data["validation_data"]
    with pytest.raises(OptionError, match="metric nothing is of predictions on held-out inputs"):
        magr_onnx.optimize(files / "model.onnx", metric=nothing, **data)
    with pytest.raises(OptionError, match="give a loss of the metric, as '1%'"):
        magr_onnx.optimize(files / "model.onnx", metric=nothing, **arguments(files, max_loss="much"))
    with pytest.raises(OptionError, match="no such file"):
        magr_onnx.validate(files / "model.onnx", files / "model.onnx", files / "heldout.npz", metric=tmp_path / "none.py")
