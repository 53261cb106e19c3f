"""Feeds of other types and names than the model's: what is clear is made to fit, and the rest refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import CalibrationError, ModelError
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import InputInfo
from tests import graphs
from tests.graphs import Builder, feeds

ROWS = np.array([[0, 1], [1, 0], [1, 1]])


def opened(array: Any, dtype: Any, name: str = "x") -> Batches:
    return open_data({name: array}, [InputInfo("x", np.dtype(dtype), (None, 2))])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.float32, np.float64),
        (bool, np.float32),
        (np.int64, np.int32),
        (np.int32, np.int64),
        (np.uint8, np.int64),
        (np.int64, bool),
        (bool, np.int64),
    ],
)
def test_types_that_hold_the_same_values_are_converted_with_a_note(given: Any, wanted: Any) -> None:
    data = opened(ROWS.astype(given), wanted)
    rows = np.concatenate([batch["x"] for batch in data])
    assert rows.dtype == wanted
    np.testing.assert_array_equal(rows, ROWS)
    assert f"x: {np.dtype(given)} became {np.dtype(wanted)}, as the model expects" in data.notes
    assert opened(ROWS.astype(wanted), wanted).notes == ()


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (
            ROWS.astype(np.uint8),
            np.float32,
            r"x is uint8 .*; give floats, scaled as .*: array.astype\(np.float32\)",
        ),
        (ROWS.astype(np.float32), np.int64, r"x is float32 .*; give whole numbers: array.astype\(np.int64\)"),
        (ROWS + (1 << 40), np.int32, r"x is int64 .*; the model expects x: int32"),
        (2 * ROWS, bool, "x is int64 .*; the model expects x: bool"),
        (ROWS * 1e300, np.float32, "x holds NaN or infinite values"),
    ],
)
def test_what_would_be_lost_or_guessed_is_refused(array: Any, dtype: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        opened(array, dtype)


def test_batches_of_a_list_are_converted_every_time_they_are_read() -> None:
    data = open_data([{"x": ROWS.astype(np.float64)}, {"x": ROWS.astype(np.float32)}], [InputInfo("x", np.dtype(np.float32), (None, 2))])
    for _ in range(2):
        assert [batch["x"].dtype for batch in data] == [np.float32, np.float32]
    assert len(data.notes) == 1


def test_an_array_without_a_name_is_a_model_s_only_input(tmp_path: Path) -> None:
    model = graphs.chain()
    ((name, rows),) = feeds(model).items()
    expected = magr_onnx.optimize(model, {name: rows})
    np.save(tmp_path / "rows.npy", rows.astype(np.float64))
    np.savez(tmp_path / "rows.npz", rows)
    for source in (rows, tmp_path / "rows.npy", tmp_path / "rows.npz"):
        found = magr_onnx.optimize(model, source)
        assert ir.to_proto(found.model).graph.initializer == ir.to_proto(expected.model).graph.initializer
    (tmp_path / "bad.npy").write_bytes(b"rows")
    with pytest.raises(CalibrationError, match=r"bad.npy is not a readable .npy file"):
        magr_onnx.optimize(model, tmp_path / "bad.npy")


def test_whole_graphs_without_float32_values_are_refused() -> None:
    b = Builder()
    x = b.input("x", ["n", 16], ir.DataType.FLOAT16)
    y = b.node("MatMul", [x, b.constant("w", np.ones((16, 8), np.float16))])
    y.dtype = ir.DataType.FLOAT16
    with pytest.raises(ModelError, match=r"weights are float16\); export the model in float32, or use format qdq"):
        magr_onnx.optimize(b.model(y, ["n", 8]), {"x": np.ones((8, 16), np.float16)}, format="qdq-full")
