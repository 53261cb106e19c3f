"""Tests of what candidates for a float model are compared with."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow.trials import OnData
from tests.helpers import run_context


def model(op: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": 17]> g (float[n, 4] x) => (float[n, 4] y) {{ y = {op}(x) }}"""
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def difference(first: str, second: str) -> float:
    batches = [{"x": np.array([[0, 1, 2, 3]], np.float32)}, {"x": np.array([[-1, 1, 2, 4]], np.float32)}]
    with Session(model(first)) as session:
        data = open_data(batches, session.inputs)
    return OnData.of(model(first), data, run_context()).difference(model(second))


def test_the_largest_relative_difference_of_all_batches() -> None:
    assert difference("Identity", "Neg") == pytest.approx(2)
    assert difference("Identity", "Abs") == pytest.approx(2 / np.sqrt(22))
    assert difference("Identity", "Identity") == 0


def test_the_same_infinities_and_nan_are_no_difference_and_others_are() -> None:
    assert difference("Log", "Log") == 0
    assert difference("Identity", "Log") == difference("Abs", "Sqrt") + np.inf == np.inf
    assert difference("Log", "Identity") == np.inf
