"""Arrays of one file as samples along the axes that the model has them on, as one feed, or refused with a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import CalibrationError
from magr_onnx.runtime.data.sources import Batches, load_npz, open_data
from magr_onnx.runtime.ort.session import inputs_of
from tests.forms.build import write

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Shape = Sequence[int | str | None]


def model(**shapes: Shape) -> ir.Model:
    """A model with nothing but inputs."""
    values = [ir.val(name, INT64 if name == "rate" else FLOAT, ir.Shape(shape)) for name, shape in shapes.items()]
    return ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 17}), ir_version=8)


def opened(arrays: Mapping[str, Any], batch_size: int = 4, **shapes: Shape) -> Batches:
    return open_data(arrays, inputs_of(model(**shapes)), batch_size)


def random(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rate", [np.array(16_000), np.array([16_000])])
def test_samples_lie_on_the_axis_that_the_model_names(rate: Any) -> None:
    arrays = {"wave": random(12, 20), "state": random(2, 12, 8), "rate": rate}
    data = opened(arrays, wave=["batch", "time"], state=[2, "batch", 8], rate=rate.shape)
    assert data.samples == 12
    parts = list(data)
    assert all(len(part["wave"]) == part["state"].shape[1] for part in parts)
    assert all(np.array_equal(part["rate"], rate) for part in parts)
    assert np.array_equal(np.concatenate([part["state"] for part in parts], axis=1), arrays["state"])
    assert np.array_equal(np.concatenate([part["wave"] for part in parts]), arrays["wave"])
    assert len(parts) > 1


def test_one_sample_with_a_state_of_two_layers_is_one_sample() -> None:
    data = opened({"wave": random(1, 20), "state": random(2, 1, 8)}, wave=["n", "time"], state=[2, "n", 8])
    assert (data.samples, len(data)) == (1, 1)


def test_arrays_that_fit_as_they_stand_are_one_feed() -> None:
    arrays = {"wave": random(16, 20), "state": random(2, 16, 8), "rate": np.array(8_000)}
    data = opened(arrays, wave=[None, None], state=[2, None, 8], rate=[])
    assert len(data) == 1
    assert all(np.array_equal(array, arrays[name]) for name, array in next(iter(data)).items())
    assert "is one feed, since its arrays have different sizes" in data.notes[0]


def test_others_are_refused_with_the_remedy() -> None:
    with pytest.raises(CalibrationError, match=r"different numbers of samples \(wave 16, state 3\); give a folder of \.npz files"):
        opened({"wave": random(16, 20), "state": random(3, 16, 8)}, wave=[None, None], state=[2, None, 8])


def test_what_is_fixed_is_shared_by_all_samples() -> None:
    arrays = {"x": random(12, 6), "anchors": random(3, 2)}
    data = opened(arrays, x=["n", 6], anchors=[3, 2])
    assert data.samples == 12
    assert all(np.array_equal(part["anchors"], arrays["anchors"]) for part in data)


def test_text_is_taken_and_objects_are_not(tmp_path: Path) -> None:
    path, words = write("string-input", tmp_path), np.array([[f"c{i % 64}"] for i in range(40)])
    np.savez(tmp_path / "text.npz", word=words)
    _, report = magr_onnx.optimize(path, tmp_path / "text.npz", output=tmp_path / "out.onnx", progress=False)
    assert {row.rows for row in report.layers} == {40}
    given = magr_onnx.optimize(path, {"word": words.astype(object)}, progress=False).report
    assert [row.error for row in given.layers] == [row.error for row in report.layers]
    np.savez(tmp_path / "objects.npz", word=words.astype(object))
    with pytest.raises(CalibrationError, match=r"Python objects, which are never loaded; text is saved as array\.astype\(str\)"):
        load_npz(tmp_path / "objects.npz")
