"""Tuning of scales by the loss at the outputs, on small networks whose best scales are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.instrument.scale_inputs import with_scale_inputs
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.runtime.calibration import scale_tuning
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import Batch, Session
from tests.graphs import Array, Builder, random


def network(output: str = "y", mask: bool = False) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", "time", 24])
    if mask:
        b.input("attention_mask", ["batch", "time"], ir.DataType.INT64)
    hidden = b.node("Tanh", [b.node("MatMul", [x, b.constant("w1", random(24, 16))], "first")])
    return b.model(b.node("MatMul", [hidden, b.constant("w2", random(16, 12, seed=1))], "second"), ["batch", "time", 12], output)


def data_of(model: ir.Model, source: Batch | Sequence[Batch], batch_size: int = 8) -> Batches:
    with Session(model) as session:
        return open_data(source, session.inputs, batch_size)


def spoiled(model: ir.Model, factor: float) -> tuple[ir.Model, list[str]]:
    """The model in 8 bits, with all scales too large by a factor."""

    def solution(layer: LinearLayer) -> LayerSolution:
        weight = layer.read()
        quantized = rtn.quantize(weight * np.float32(factor), np.ones(len(weight)), WeightSpec(8, None), beta=1.0)
        return LayerSolution(quantized.dequantize(), None, weight, (), quantized, changed=True)

    copy, inputs = with_scale_inputs(model, solution, {layer.name for layer in find(model)[0]})
    return copy, list(inputs.values())


@pytest.mark.parametrize("output", ["y", "logits"])
def test_scales_that_are_too_large_are_found(output: str) -> None:
    model = network(output)
    student, inputs = spoiled(model, 1.1)
    data = data_of(model, {"x": random(96, 3, 24, scale=1.0)})
    result = scale_tuning.tune(model, student, inputs, data, epochs=6, rate=0.02)
    assert result.after < 0.1 * result.before
    assert result.held_out == 12
    for name in inputs:
        assert np.median(result.values[name]) == pytest.approx(1 / 1.1, abs=0.03)
    again = scale_tuning.tune(model, student, inputs, data, epochs=6, rate=0.02)
    assert all(np.array_equal(result.values[name], again.values[name]) for name in result.values)


def test_what_is_right_stays_as_it_is() -> None:
    model = network()
    student, inputs = spoiled(model, 1.0)
    data = data_of(model, {"x": random(64, 3, 24, scale=1.0)})
    result = scale_tuning.tune(model, student, inputs, data, epochs=1, rate=0.5)
    assert result.values == {}
    assert result.before == result.after


def test_masked_rows_do_not_count() -> None:
    """Rows that the mask leaves out are so large that they would decide."""
    model = network(mask=True)
    student, inputs = spoiled(model, 1.1)
    x, mask = random(64, 4, 24, scale=1.0), np.ones((64, 4), np.int64)
    mask[:, 3] = 0
    outcomes = []
    for size in (1.0, 1e3):
        x[:, 3] *= size
        data = data_of(model, {"x": x, "attention_mask": mask})
        outcomes.append(scale_tuning.tune(model, student, inputs, data, epochs=1, rate=0.01, mask="attention_mask"))
    assert outcomes[0].values.keys() == outcomes[1].values.keys()
    assert all(np.allclose(outcomes[0].values[name], outcomes[1].values[name]) for name in outcomes[0].values)
    assert outcomes[0].before == pytest.approx(outcomes[1].before)


def test_batches_are_split_into_enough_steps() -> None:
    model = network()
    x = random(200, 3, 24)
    with Session(model) as session:
        data = scale_tuning.in_steps(data_of(model, {"x": x}, 16), session)
        assert scale_tuning.STEPS <= len(data) <= 2 * scale_tuning.STEPS
        np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in data]), x)
        few = scale_tuning.in_steps(data_of(model, {"x": x[:6]}, 16), session)
        assert [len(batch["x"]) for batch in few] == [1] * 6


def test_models_of_one_batch_size_keep_their_batches() -> None:
    b = Builder()
    model = b.model(b.node("MatMul", [b.input("x", [4, 8]), b.constant("w", random(8, 6))]), [4, 6])
    batches = [{"x": random(4, 8, seed=i)} for i in range(5)]
    with Session(model) as session:
        data = scale_tuning.in_steps(data_of(model, batches), session)
    assert [batch["x"].shape for batch in data] == [(4, 8)] * 5


def test_fewer_than_four_batches_are_not_enough() -> None:
    model = network()
    student, inputs = spoiled(model, 1.1)
    result = scale_tuning.tune(model, student, inputs, data_of(model, {"x": random(3, 3, 24)}), epochs=1, rate=0.01)
    assert (result.values, result.held_out) == ({}, 0)
    assert result.why_not == "that takes 4 samples or batches at least"


def test_some_of_every_few_steps_are_held_out() -> None:
    held: list[int] = [step for step in range(20) if scale_tuning.is_held_out(step)]
    assert held == [3, 11, 19]
    values: Array = np.array(held)
    assert (np.diff(values) == scale_tuning.HELD_OUT).all()
