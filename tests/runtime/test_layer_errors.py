"""Errors at the outputs of layers, computed again with NumPy from the outputs of both models, and what reports make of them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.report.layer_row import LayerRow, with_measured
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.measure.layer_errors import ELEMENTS, layer_errors, output_elements, some
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Builder, random

Array = npt.NDArray[Any]
K, N = 40, 24


def values(model: ir.Model, feeds: Sequence[dict[str, Array]], name: str) -> list[Array]:
    """A value of the model's main graph, batch by batch."""
    copy = model.clone()
    copy.graph.outputs[:] = [value for node in copy.graph for value in node.outputs if value.name == name]
    with Session(copy) as session:
        return [session.run(batch)[0].astype(np.float64) for batch in feeds]


def relative(y: Array, y_hat: Array) -> float:
    """Error of rows ``(n, N)`` over their standard deviation."""
    return float(np.sqrt(np.square(y - y_hat).mean(axis=0).sum() / y.var(axis=0).sum()))


def measured(model: ir.Model, quantized: ir.Model, feeds: Sequence[dict[str, Array]], **options: Any) -> dict[str, float]:
    with Session(model) as session:
        data = open_data(feeds, session.inputs)
    return {m.layer: m.relative_error for m in layer_errors(model, quantized, data, **options)}


def sequences() -> ir.Model:
    """A layer of large mean on padded sequences, and a head on their means."""
    b = Builder()
    x = b.input("x", ["batch", "time", K])
    b.input("attention_mask", ["batch", "time"], ir.DataType.INT64)
    product = b.node("MatMul", [x, b.constant("w", random(K, N))], "inner")
    y = b.node("Add", [product, b.constant("b", np.full(N, 50, np.float32))], "lifted")
    pooled = b.node("ReduceMean", [y, b.constant("axis", np.array([1]))], "pooled", keepdims=0)
    return b.model(b.node("MatMul", [pooled, b.constant("head", random(N, 8, seed=1))], "scores"), ["batch", 8])


@pytest.mark.parametrize("budget", [10**9, 2000])
def test_errors_are_those_of_the_rows_that_count(budget: int) -> None:
    model = sequences()
    feeds = [graphs.feeds(model, seed=seed) for seed in range(3)]
    quantized, report = magr_onnx.optimize(model, feeds, bits=3)
    errors = measured(model, quantized, feeds, mask="attention_mask", budget=budget)
    assert list(errors) == [row.output for row in report.layers]
    step = max(1, -(-4 * sum(values(model, feeds[:1], name)[0].size for name in errors) // budget))
    assert (step > 1) == (budget == 2000)
    inner, *_ = errors
    keep = [batch["attention_mask"][:, ::step] != 0 for batch in feeds]
    y, y_hat = (np.concatenate([v[:, ::step][k] for v, k in zip(values(m, feeds, inner), keep, strict=True)]) for m in (model, quantized))
    assert errors[inner] == pytest.approx(relative(y, y_hat), rel=1e-3)
    y, y_hat = (np.concatenate([v[::step] for v in values(m, feeds, "y")]) for m in (model, quantized))
    assert errors["y"] == pytest.approx(relative(y, y_hat), rel=1e-3)


def test_channels_of_images_are_axis_1() -> None:
    b = Builder()
    x = b.input("x", ["batch", 3, 10, 8])
    kernel, bias = b.constant("w", random(6, 3, 3, 3)), b.constant("b", random(6, scale=30))  # means that differ from channel to channel
    model = b.model(b.node("Conv", [x, kernel, bias], "conv"), ["batch", 6, 8, 6])
    feeds = [{"x": random(4, 3, 10, 8, seed=seed)} for seed in range(2)]
    quantized, _ = magr_onnx.optimize(model, feeds, conv_bits=4)
    errors = measured(model, quantized, feeds)
    y, y_hat = (np.concatenate([np.moveaxis(v, 1, -1).reshape(-1, 6) for v in values(m, feeds, "y")]) for m in (model, quantized))
    assert errors == {"y": pytest.approx(relative(y, y_hat), rel=1e-3)}


def test_an_output_that_is_constant_is_measured_by_its_size() -> None:
    model = graphs.gemm()
    feeds = [{name: np.ones_like(array) for name, array in graphs.feeds(model).items()}]
    quantized, _ = magr_onnx.optimize(model, bits=2)
    (error,) = measured(model, quantized, feeds).values()
    y, y_hat = values(model, feeds, "y")[0], values(quantized, feeds, "y")[0]
    assert error == pytest.approx(np.linalg.norm(y - y_hat) / np.linalg.norm(y), rel=1e-3)


def row(name: str, depth: int, estimate: float | None, fitted: float | None) -> LayerRow:
    arrays: dict[str, Any] = dict.fromkeys(("magr", "solver", "emitted"))
    return LayerRow(name, "MatMul", "w", 8, 8, 4, 32, 16, estimate, **arrays, bias_compensated=False, depth=depth, output=name,
                    estimate=estimate, fitted_error=fitted)  # fmt: skip


def test_errors_on_the_samples_solved_from_are_enlarged() -> None:
    """By the layer's own ratio of errors on held-out rows and on its rows, or by that of all layers before it."""
    rows = [row("second", 1, 0.03, 0.03), row("first", 0, 0.08, 0.02), row("third", 2, 0.05, 0.01), row("unknown", 3, None, None)]
    errors = {"first": 0.1, "second": 0.1, "third": 0.1, "unknown": 0.1}
    before = np.sqrt((0.08**2 + 0.03**2) / (0.02**2 + 0.03**2))
    all_of_them = np.sqrt((0.08**2 + 0.03**2 + 0.05**2) / (0.02**2 + 0.03**2 + 0.01**2))
    enlarged = with_measured(rows, errors, True)
    assert [r.name for r in enlarged] == [r.name for r in rows]
    assert [r.error for r in enlarged] == pytest.approx([0.1 * before, 0.1 * 4, 0.1 * 5, 0.1 * all_of_them])
    assert [r.error for r in with_measured(rows, errors, False)] == pytest.approx([0.1] * 4)
    assert [(r.error, r.measured) for r in with_measured(rows, {"third": 0.1}, False)] == [
        (0.03, False),
        (0.08, False),
        (0.1, True),
        (None, False),
    ]


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"format": "qdq-int8"}, {"format": "dynamic-int8"}, {"format": "qdq"}])
@pytest.mark.parametrize("samples", [48, 96])
def test_reported_errors_are_those_on_other_samples(options: dict[str, Any], samples: int) -> None:
    """Of layers one behind another, of which the last see the errors of all before; estimates of integer formats leave most of it out."""
    model = graphs.deep()
    inputs = {name: np.shape(array)[1:] for name, array in graphs.feeds(model).items()}
    ((name, shape),) = inputs.items()
    batches = [{name: random(8, *shape, seed=seed, scale=1)} for seed in range(samples // 8 + 20)]
    given, fresh = batches[: samples // 8], batches[samples // 8 :]
    quantized, report = magr_onnx.optimize(model, given, **options)
    expected = [
        relative(*(np.concatenate([v.reshape(-1, v.shape[-1]) for v in values(m, fresh, str(r.output))]) for m in (model, quantized)))
        for r in report.layers
    ]
    assert all(r.measured for r in report.layers)
    ratios = np.array([r.error for r in report.layers]) / expected
    assert ratios.min() > 1 / 1.5
    assert ratios.max() < 1.5


def test_models_of_large_outputs_are_compared_on_fewer_batches() -> None:
    b = Builder()
    y = b.node("MatMul", [b.input("x", ["batch", "time", K]), b.constant("w", random(K, N))])
    model = b.model(y, ["batch", "time", N])
    feeds = [{"x": random(2, 16, K, seed=seed)} for seed in range(40)]
    with Session(model) as session:
        data = open_data(feeds, session.inputs)
    assert output_elements(model, data) == 2 * 16 * N
    assert [len(some(data, elements)) for elements in (0, ELEMENTS // 32, ELEMENTS // 16, ELEMENTS)] == [32, 32, 16, 4]
    y.shape = ir.Shape(["rows", None, 1 << 21])  # of which one dimension is known
    assert output_elements(model, data) == 1 << 21
    y.shape = None
    assert output_elements(model, data) == 0


def test_wide_outputs_are_compared_a_few_rows_at_a_time() -> None:
    """In float64, of which a copy of each would take four times the memory of both outputs."""
    b, width = Builder(), 20_000
    y = b.node("MatMul", [b.input("x", ["batch", "time", K]), b.constant("w", random(K, width))])
    model = b.model(y, ["batch", "time", width])
    quantized, _ = magr_onnx.optimize(model, quantizer="rtn")
    feeds = [{"x": random(4, 64, K, seed=seed)} for seed in range(2)]
    tracemalloc.start()
    try:
        errors = measured(model, quantized, feeds)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * (4 * 4 * 64 * width)  # outputs of both models, of this batch and the one before, and a few rows
    exact, rounded = (np.concatenate(values(m, feeds, "y")).reshape(-1, width) for m in (model, quantized))
    assert list(errors.values()) == [pytest.approx(relative(exact, rounded), rel=1e-4)]
