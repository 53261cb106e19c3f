"""What a sample of large values does to the others of its batch, by hand from runs of both kinds."""

from __future__ import annotations

import re

import numpy as np
import pytest

import magr_onnx
from magr_onnx.runtime.measure.batch_effect import MOST, batch_effect
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import random


@pytest.mark.parametrize("count", [2, 9, MOST + 5])
def test_losses_are_those_of_the_batch(count: int) -> None:
    model = graphs.gemm()
    x = random(count, 40, scale=1)
    x[1] *= 50
    quantized, _ = magr_onnx.optimize(model, format="dynamic-int8")
    (text,) = batch_effect(model, quantized, [{"x": random(3, 40)}, {"x": x}])
    x = x[:MOST]
    with Session(model) as a, Session(quantized) as b:
        y, together, alone = a.run({"x": x})[0], b.run({"x": x})[0], np.concatenate([b.run({"x": row[None]})[0] for row in x])
    errors = [np.square(v.astype(np.float64) - y).sum(axis=1) for v in (together, alone)]
    expected = [10 * np.log10(np.square(y, dtype=np.float64).sum() / e.sum()) for e in errors]
    losses = 10 * np.log10(errors[0] / errors[1])
    assert losses[0] > 10
    figures = [float(figure) for figure in re.findall(r"(-?[\d.]+) dB", text)]
    assert figures == pytest.approx([*expected, losses.max()], abs=0.06)
    assert f"sample {losses.argmax()}," in text
    assert f"{len(x)} samples together" in text


@pytest.mark.parametrize(
    "options", [{"format": "qdq-int8"}, {"bits": 8, "accuracy_level": 4}, {"format": "dynamic-int8", "row_ranges": True}]
)
def test_formats_without_ranges_of_batches_have_no_such_effect(options: dict[str, object]) -> None:
    model = graphs.gemm()
    x = random(24, 40, scale=1)
    x[1] *= 50
    quantized, _ = magr_onnx.optimize(model, [{"x": x}], **options)
    assert batch_effect(model, quantized, [{"x": x}]) == []
    with Session(quantized) as session:
        together, alone = session.run({"x": x})[0], np.concatenate([session.run({"x": row[None]})[0] for row in x])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_samples_that_are_alike_or_alone_have_none() -> None:
    model = graphs.gemm()
    quantized, _ = magr_onnx.optimize(model, format="dynamic-int8")
    assert batch_effect(model, quantized, [{"x": random(1, 40)}]) == []
    assert batch_effect(model, quantized, [{"x": np.repeat(random(1, 40), 6, axis=0)}]) == []
    assert batch_effect(model, model, [{"x": random(6, 40)}]) == []


def test_validate_says_so() -> None:
    model = graphs.gemm()
    x = random(8, 40, scale=1)
    x[1] *= 50
    quantized, _ = magr_onnx.optimize(model, format="dynamic-int8")
    found = magr_onnx.validate(model, quantized, [{"x": x}], layers=False, latency=False)
    assert any("depends on what else is in a batch" in note for note in found.notes)
