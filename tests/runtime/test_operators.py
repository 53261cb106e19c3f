"""Where the time of a model goes, by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.report.data import validation_text
from magr_onnx.runtime.measure.operators import operator_shares, rounds_activations
from tests.edge.emitted import K, perceptron
from tests.graphs import correlated, proto

QUICK: dict[str, Any] = {"quantizer": "rtn", "bias": "none", "progress": False}


def run_by_onnxruntime(model: Path) -> set[str]:
    """The operators of its optimized graph."""
    settings = ort.SessionOptions()
    settings.optimized_model_filepath, settings.log_severity_level = str(model.with_suffix(".o.onnx")), 4
    ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node}


@pytest.mark.parametrize("form", ["qdq-int8", "dynamic-int8", "matmulnbits"])
def test_shares_are_of_the_operators_that_run(form: str, tmp_path: Path) -> None:
    path, x = tmp_path / "q.onnx", {"x": correlated(64, K).reshape(16, 4, K)}
    magr_onnx.optimize(proto(perceptron()), x, output=path, format=form, **QUICK)
    shares = operator_shares(path, x, "cpu")
    assert set(shares) == run_by_onnxruntime(path)
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert rounds_activations(path) is rounds_activations(ir.load(path)) is (form != "matmulnbits")
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("form", ["qdq-int8", "matmulnbits"])
def test_reports_say_where_the_time_of_integer_files_goes(form: str) -> None:
    x = {"x": correlated(64, K).reshape(16, 4, K)}
    report = magr_onnx.optimize(proto(perceptron()), x, format=form, validation_data=x, **QUICK).report
    assert report.validation is not None
    assert report.validation.latency is not None
    text = "time of the float model: "
    assert (text in report.validation.latency.where) is (text in "\n".join(validation_text(report.validation))) is (form == "qdq-int8")
