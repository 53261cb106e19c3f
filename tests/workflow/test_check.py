"""The comparison that every run ends with: on which samples, and what the report says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import magr_onnx
from magr_onnx.passes.emit.readback import read_weights
from tests import graphs
from tests.graphs import random


@pytest.mark.parametrize("count", [255, 256, 530])
def test_of_many_samples_some_are_kept_back(count: int) -> None:
    """Every sixteenth batch: the layers are those of a calibration without them, and the outputs are compared on them."""
    model = graphs.gemm()
    x = random(count, 40, scale=1)
    batches = [x[at : at + 16] for at in range(0, count, 16)]
    kept = [i for i in range(len(batches)) if i % 16 == 8] if count >= 256 else []
    made, report = magr_onnx.optimize(model, {"x": x})
    rest = np.concatenate([batch for i, batch in enumerate(batches) if i not in kept])
    assert report.check is not None
    assert report.check.in_sample == (not kept)
    assert f": {len(rest)} samples, {len(rest)} rows" in report.calibration
    assert report.layers[0].rows == len(rest)
    text = " ".join(report.to_text().split())
    if not kept:
        assert "kept back" not in report.calibration
        assert "that layers were solved from (others lose more)" in text
        return
    assert f"{16 * len(kept)} more kept back to compare the models on" in report.calibration
    assert "kept back from calibration" in text
    alone, _ = magr_onnx.optimize(model, [{"x": batch} for i, batch in enumerate(batches) if i not in kept], validation_data=[{"x": x}])
    expected, found = read_weights(alone), read_weights(made)
    assert list(found) == list(expected)
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=1e-4, atol=1e-6)


def test_validation_data_does_not_change_the_result() -> None:
    model = graphs.gemm()
    x = {"x": random(300, 40, scale=1)}
    (one, first), (two, second) = magr_onnx.optimize(model, x), magr_onnx.optimize(model, x, validation_data=x)
    assert (first.validation, second.check) == (None, None)
    for name, weight in read_weights(one).items():
        np.testing.assert_array_equal(read_weights(two)[name], weight)


@pytest.mark.parametrize(("n", "grows"), [(4, True), (400, False)])
def test_a_larger_file_is_called_so(n: int, grows: bool, tmp_path: Path) -> None:
    """The nodes of an integer format take more bytes than a layer of few weights has; the ratio is that of the files."""
    onnx.save(graphs.proto(graphs.matmul(8, n)), source := tmp_path / "m.onnx")
    _, report = magr_onnx.optimize(
        source, graphs.feeds(graphs.matmul(8, n)), output=(output := tmp_path / "q.onnx"), format="qdq-int8", include=["*"]
    )
    text = " ".join(report.to_text().split())
    ratio = output.stat().st_size / source.stat().st_size
    assert (ratio > 1) == grows
    assert (f"LARGER: the file is {ratio:.2f} times as large as its source" in text) == grows
    assert (f"The file is {ratio:.2f} times as large as its source." in report.to_html()) == grows
