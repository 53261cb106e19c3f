"""DAQ's ranges: its bound against Max's table, its sums against NumPy, and the grids of written files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import magr_onnx
from magr_onnx.core.activation_ranges import Histogram, candidates
from magr_onnx.core.distribution_ranges import ChannelSums, normal_bound
from magr_onnx.passes.instrument.taps import BINS, Tap, bin_edges, range_taps
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import rounded_activations
from tests import graphs
from tests.graphs import Builder, K, feeds, random
from tests.helpers import Array

MAX_1960 = {4: 0.9957, 8: 0.5860, 16: 0.3352, 32: 0.1881, 64: 0.1041, 128: 0.0569, 256: 0.0308}
"""Step of the uniform quantizer of least squared error for a standard normal value, by the number of codes (J. Max, table II)."""


@pytest.mark.parametrize("codes", MAX_1960)
def test_bounds_are_those_of_the_published_table(codes: int) -> None:
    assert 2 * normal_bound(codes - 1) / (codes - 1) == pytest.approx(MAX_1960[codes], abs=6e-5)


@pytest.mark.parametrize("steps", [7, 2000, 65535])
def test_no_other_bound_has_less_error(steps: int) -> None:
    """By the definition, of a million quantiles of the normal distribution."""
    from scipy.stats import norm

    x = norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000)

    def error(bound: float) -> float:
        step = 2 * bound / steps
        return float(np.square(np.clip(np.rint((x + bound) / step), 0, steps) * step - bound - x).mean())

    best = normal_bound(steps)
    for factor in (0.8, 0.9, 1.15, 1.4) if steps < 10000 else (0.6, 0.7):  # at 16 bits the quantiles end before the bound
        assert error(best) < error(best * factor)


def test_sums_are_those_of_all_values() -> None:
    x = np.random.default_rng(0).normal(3, [1, 2, 0.1, 5], (60, 4))
    parts = [ChannelSums(len(p), p.sum(axis=0), np.square(p).sum(axis=0)) for p in np.split(x, [10, 35])]
    low, high = parts[0].plus(parts[1]).plus(parts[2]).ends(2.5)
    assert low == pytest.approx((x.mean(axis=0) - 2.5 * x.std(axis=0)).min())
    assert high == pytest.approx((x.mean(axis=0) + 2.5 * x.std(axis=0)).max())
    assert ChannelSums(4, np.array([8.0]), np.array([16.0])).ends(9) == (2, 2)


def of(values: Array, name: str = "x") -> Histogram:
    """The histogram of values ``(n, C)`` by NumPy, with their sums."""
    edges = bin_edges()
    counts = [
        np.histogram(np.clip(np.abs(part), edges[0], edges[-1]), edges)[0].astype(float)
        for part in (values[values <= 0], values[values > 0])
    ]
    sums = ChannelSums(len(values), values.sum(axis=0), np.square(values).sum(axis=0))
    return Histogram(*counts, edges, float(values.min()), float(values.max()), channels={name: sums})


def test_a_candidate_is_the_range_of_the_channels_within_the_values_seen() -> None:
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal([0.0, 2.0, -1.0], [1.0, 0.2, 0.5], (20000, 3)), -1.8)
    x[0, 1] = 40  # an outlier, which hardly changes the deviation
    ((name, (low, high)),) = candidates(of(x), "daq", steps=15).items()
    k = normal_bound(15)
    assert name == "mean and deviation of channels"
    assert high == pytest.approx((x.mean(axis=0) + k * x.std(axis=0)).max())
    assert low == -1.8
    assert high < 10


def test_parts_of_a_value_are_added_and_other_values_are_channels_of_their_own() -> None:
    rng = np.random.default_rng(1)
    a, b, k = rng.normal(0, 1, (400, 3)), rng.normal(5, 2, (300, 2)), normal_bound(3)
    low, high = of(a[:100], "a").plus(of(b, "b")).plus(of(a[100:], "a")).spread(3)
    assert low == pytest.approx((a.mean(axis=0) - k * a.std(axis=0)).min())
    assert high == pytest.approx((b.mean(axis=0) + k * b.std(axis=0)).max())


def test_without_channels_all_values_are_one() -> None:
    x = np.random.default_rng(2).normal(1, 2, (50000, 1))
    found = replace(of(x), channels={}).spread(7)
    assert found == pytest.approx(of(x).spread(7), rel=0.02)  # bins are wide


def test_the_graph_sums_rows_and_images_by_channel() -> None:
    model = graphs.masked()
    x = feeds(model, rows=9, time=5)
    x["x"][x["attention_mask"] == 0] = 1e6
    kept = (x["x"] * x["attention_mask"][..., None].astype(np.float32)).reshape(-1, K)
    with Session(range_taps(model, [Tap("x", K, masked=True, others=(0,)), Tap("x", K, masked=True)], "attention_mask")) as session:
        *ranges, total, squares, size = session.run(x)
    assert len(ranges) == 6
    assert ranges[2].shape == (2 * BINS,)
    assert int(size) == kept.size
    np.testing.assert_allclose(total, kept.sum(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(squares, np.square(kept).sum(axis=0), rtol=1e-4)
    image = random(2, 3, 5, 6, seed=1)
    with Session(range_taps(images(), [Tap("x", 1, others=(0, 2, 3))])) as session:
        *_, total, squares, size = session.run({"x": image})
    np.testing.assert_allclose(total, image.sum(axis=(0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(squares, np.square(image).sum(axis=(0, 2, 3)), rtol=1e-4)
    assert int(size) == image.size


def images() -> ir.Model:
    """Two convolutions with Relu between; channels of the first have means and spreads of their own."""
    b = Builder()
    x = b.input("x", ["batch", 3, 5, 6])
    spreads = np.array([0.2, 1, 3, 0.5], np.float32)[:, None, None, None]
    bias = b.constant("b1", np.array([3, 0, 1, -0.5], np.float32))
    hidden = b.node("Relu", [b.node("Conv", [x, b.constant("w1", spreads * random(4, 3, 3, 3)), bias], "first", pads=[1, 1, 1, 1])], "relu")
    return b.model(b.node("Conv", [hidden, b.constant("w2", random(3, 4, 3, 3, seed=1))], "second"), ["batch", 3, 3, 4])


def steps_of(made: ir.Model) -> list[float]:
    """Scales of all activations in a file."""
    proto = ir.to_proto(made)
    values = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    return [float(values[n.input[1]]) for n in proto.graph.node if n.op_type == "QuantizeLinear" and values[n.input[1]].ndim == 0]


def range_of(x: Array, axes: tuple[int, ...]) -> tuple[float, float]:
    mean, deviation, k = x.mean(axis=axes), x.std(axis=axes), normal_bound(255)
    low, high = max((mean - k * deviation).min(), x.min()), min((mean + k * deviation).max(), x.max())
    return min(float(low), 0.0), max(float(high), 0.0)


def computed(model: ir.Model, op: str, x: Array) -> Array:
    proto = ir.to_proto(model)
    name = next(node.output[0] for node in proto.graph.node if node.op_type == op)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    with Session(ir.from_proto(proto)) as session:
        result: Array = session.run({"x": x})[1].astype(np.float64)
    return result


@pytest.mark.parametrize("form", ["qdq-int8", "qdq-full"])
def test_the_file_of_convolutions_has_these_ranges(form: str) -> None:
    x = np.random.default_rng(0).normal(0, 1, (300, 3, 5, 6)).astype(np.float32)
    options = {"format": form, "activation_range": "daq", "quantizer": "rtn", "feedback": False}
    options |= {"prefer": "size"} if form == "qdq-int8" else {}
    made, _ = magr_onnx.optimize(images(), {"x": x}, **options)
    low, high = range_of(computed(images(), "Relu", x), (0, 2, 3))
    assert low == 0
    assert any(step == pytest.approx((high - low) / 255, rel=0.02) for step in steps_of(made))  # some samples are held out
    one = computed(images(), "Relu", x)
    assert one.mean() + normal_bound(255) * one.std() < 0.85 * high < 0.7 * one.max()


def test_the_file_of_linear_layers_has_these_ranges() -> None:
    x = np.random.default_rng(0).normal(np.linspace(-1, 2, 48), 1, (600, 48)).astype(np.float32)
    x[::50, 0] = 20  # rare
    options = {"format": "qdq-int8", "activation_range": "daq", "quantizer": "rtn", "alpha": 0.0}
    made, report = magr_onnx.optimize(graphs.chain(), {"x": x}, **options)
    low, high = range_of(x.astype(np.float64), (0,))
    assert high < 0.7 * x.max()
    assert any(step == pytest.approx((high - low) / 255, rel=0.03) for step in steps_of(made))
    assert "ranges=daq" in report.pipeline


def test_percentiles_for_all_values_are_among_what_is_tried_by_the_error_at_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_t(3, (300, 3, 5, 6)).astype(np.float32)
    usual: dict[str, Any] = {"format": "qdq-int8", "prefer": "size", "quantizer": "rtn", "feedback": False}
    expected = steps_of(magr_onnx.optimize(images(), {"x": x}, activation_range="percentile", **usual).model)
    index = next(i for i, each in enumerate(rounded_activations.CANDIDATES) if each.method == "percentile")
    monkeypatch.setattr(rounded_activations, "output_errors", lambda *args: [0.1 if i == index else 1.0 for i in range(len(args[2]))])
    assert steps_of(magr_onnx.optimize(images(), {"x": x}, **usual).model) == expected
