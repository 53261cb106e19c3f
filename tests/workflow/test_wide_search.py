"""A budget of loss where all layers have 8 bits: the least work in 16 bits, then layers in float."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.errors import OptionError
from magr_onnx.runtime.calibration import tensor_ranges
from magr_onnx.runtime.measure.metric import Predictions
from magr_onnx.workflow import rounded_activations, wide_inputs, wide_search
from magr_onnx.workflow.context import RunContext
from tests import graphs
from tests.graphs import Builder, random
from tests.workflow.test_wide_inputs import inputs, network

Array = np.ndarray[Any, Any]
QUICK: dict[str, Any] = {"quantizer": "rtn", "bias": "none", "progress": None}


def convolutions() -> ir.Model:
    """Two convolutions; a few channels between them are much larger than others."""
    b = Builder()
    x = b.input("x", ["n", 3, 8, 8])
    large = np.where(np.arange(8) == 0, 60.0, 1.0).astype(np.float32)
    first = b.node("Conv", [x, b.constant("w", random(8, 3, 3, 3) * large[:, None, None, None])], "first", pads=[1, 1, 1, 1])
    second = random(4, 8, 3, 3, seed=1) / large[:, None, None] ** 2
    return b.model(b.node("Conv", [first, b.constant("v", second.astype(np.float32))], "second", pads=[1, 1, 1, 1]), ["n", 4, 8, 8])


CLASSES = 6


def classes(count: int, seed: int = 0) -> tuple[dict[str, Array], Array]:
    """Images of a class's smooth pattern under noise, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    waves = np.arange(12) * np.arange(1, CLASSES + 1)[:, None] / 4
    patterns = np.cos(waves)[:, :, None] * np.sin(waves)[:, None, :]
    noise = rng.standard_normal((count, 3, 12, 12))
    return {"x": (patterns[labels][:, None] * rng.uniform(0.5, 1.5, (count, 3, 1, 1)) + 0.2 * noise).astype(np.float32)}, labels


def classifier() -> ir.Model:
    """Four convolutions; between the first and the second a channel is much larger than others. The head is trained by least squares."""

    def features(b: Builder) -> ir.Value:
        y: ir.Value = b.input("x", ["n", 3, 12, 12])
        large = np.where(np.arange(8) == 0, 400.0, 1.0).astype(np.float32)
        for i, (channels, before, behind) in enumerate([(3, 1, large), (8, large, 1), (8, 1, 1), (8, 1, 1)], start=1):
            weight = random(8, channels, 3, 3, seed=i, scale=0.6 / np.sqrt(channels))
            weight = weight * np.reshape(behind, (-1, 1, 1, 1)) / np.reshape(before, (1, -1, 1, 1))
            y = b.node("Relu", [b.node("Conv", [y, b.constant(f"w{i}", weight.astype(np.float32))], f"conv{i}", pads=[1, 1, 1, 1])])
        return b.node("Flatten", [b.node("GlobalAveragePool", [y])])

    (b, trained), (x, labels) = (Builder(), Builder()), classes(400, 5)
    session = ort.InferenceSession(graphs.proto(b.model(features(b), ["n", 8])).SerializeToString())
    values = session.run(None, x)[0].astype(np.float64)
    scale, mean = values.std(axis=0), values.mean(axis=0)
    design, ridge = (values - mean) / scale, 20 * np.eye(8)
    head = np.linalg.solve(design.T @ design + ridge, design.T @ (6.0 * np.eye(CLASSES)[labels]))
    weight = head / scale[:, None]
    bias = -mean @ weight
    inner = features(trained)
    constants = [trained.constant("head_w", weight.astype(np.float32)), trained.constant("head_b", bias.astype(np.float32))]
    return trained.model(trained.node("Gemm", [inner, *constants], "head"), ["n", CLASSES], "logits")


def images(count: int, seed: int = 0) -> dict[str, Array]:
    return {"x": random(count, 3, 8, 8, seed=seed, scale=1.0)}


def cosine_loss(model: ir.Model, result: ir.Model, data: dict[str, Array]) -> float:
    """1 minus the mean cosine along the last axis, by onnxruntime alone, a sample at a time: a result may have a fixed batch size."""
    sessions = [ort.InferenceSession(ir.to_proto(m).SerializeToString()) for m in (model, result)]
    a, b = (np.concatenate([s.run(None, {"x": x[None]})[0].astype(np.float64) for x in data["x"]]) for s in sessions)
    return float(1 - ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


def shares(report: magr_onnx.Report) -> dict[float, float]:
    """What was tried, by the note of the report."""
    note = next(note for note in report.notes if "by the share of the work" in note)
    return {int(share) / 100: float(value) for share, value in re.findall(r"(\d+)%: ([\d.e+-]+)", note)}


CASES = [
    pytest.param(network, inputs, {"format": "qdq-int8"}, id="qdq-int8"),
    pytest.param(network, inputs, {"format": "qdq-full", "backend": "qnn-htp"}, id="qdq-full"),
    pytest.param(convolutions, images, {"format": "qdq-full", "backend": "qnn-htp"}, id="convolutions"),
]


@pytest.mark.parametrize(("make", "data", "options"), CASES)
def test_the_least_share_that_keeps_to_the_loss(make: Any, data: Any, options: dict[str, Any]) -> None:
    """With a loss between those of 8 and of 16 bits; the result is that of the share that was found."""
    model, samples = make(), data(64)
    eight, sixteen = (magr_onnx.optimize(model, samples, wide_activations=share, **options, **QUICK).model for share in (0.0, 1.0))
    unseen = data(64, seed=9)
    low, high = (cosine_loss(model, result, unseen) for result in (sixteen, eight))
    assert low < high / 3
    report = magr_onnx.optimize(model, samples, max_loss=f"{np.sqrt(low * high):.2e}", **options, **QUICK).report
    tried = shares(report)
    allowed = float(f"{np.sqrt(low * high):.2e}")
    least = min(share for share, loss in tried.items() if loss <= allowed)
    assert least > 0
    assert all(loss > allowed for share, loss in tried.items() if share < least)
    assert any(f"{least:.0%} is the least" in note for note in report.notes)
    assert any("have 16 bits" in note for note in report.notes)


def test_nothing_in_16_bits_where_8_will_do(tmp_path: Path) -> None:
    model, samples = network(), inputs(64)
    options: dict[str, Any] = {"format": "qdq-int8", **QUICK}
    report = magr_onnx.optimize(model, samples, max_loss="50%", output=tmp_path / "a.onnx", **options).report
    assert list(shares(report)) == [0]
    assert not any("have 16 bits" in note for note in report.notes)
    assert {row.bits for row in report.layers} == {8}


@pytest.mark.parametrize(("make", "data", "options"), CASES)
def test_what_is_measured_once_is_what_every_model_would_measure(
    make: Any, data: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[bytes, list[str], int]:
        calls = []
        for module, name in ((rounded_activations, "output_errors"), (wide_inputs, "output_errors"), (tensor_ranges, "histograms_of")):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, f=function, **k: calls.append(1) or f(*a, **k))
        result = magr_onnx.optimize(make(), data(64), max_loss="1e-6", **options, **QUICK)
        monkeypatch.undo()
        notes = [note for note in result.report.notes if "by the share of the work" in note]
        return ir.to_proto(result.model).SerializeToString(deterministic=True), notes, len(calls)

    once, notes, calls = run()
    monkeypatch.setattr(RunContext, "once", lambda self, key, measure: measure())
    again, same_notes, more_calls = run()
    assert once == again
    assert notes == same_notes
    assert len(re.findall("%: ", notes[0])) > 2
    assert calls <= more_calls / 2


def test_one_model_is_made_where_no_input_can_have_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only layer is in a body, and reads a value of the main graph."""
    text = """<ir_version: 9, opset_import: ["": 20]> g (float[n, 8] x) => (float[n, 5] y) {
        a = Tanh(x)
        top = ReduceMax<keepdims = 0>(x)
        least = Constant<value_float = -1000.0>()
        yes = Greater(top, least)
        y = If(yes) <then_branch = yes () => (float[n, 5] z) { z = MatMul(a, w) },
                     else_branch = no () => (float[n, 5] o) { o = MatMul(a, v) }> }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(random(8, 5, seed=i), name) for i, name in enumerate("wv"))
    data = {"x": random(64, 8, scale=1.0)}
    made = []
    solve = wide_search.solve
    monkeypatch.setattr(wide_search, "solve", lambda *a: made.append(a[1].budget) or solve(*a))
    report = magr_onnx.optimize(proto, data, max_loss="1e-9", format="qdq-int8", include=["*"], **QUICK).report
    assert list(shares(report)) == [0]
    assert len(made) == 2  # and one with layers in float
    assert [goal is None for goal in made] == [True, False]
    assert any(note.startswith("no activations have 16 bits") for note in report.notes)


def test_convolutions_stay_float_where_rounding_between_them_costs_too_much(tmp_path: Path) -> None:
    """Those on both sides of the value with one large channel; others are in integers."""
    model, path, (samples, _), (unseen, labels) = classifier(), tmp_path / "q.onnx", classes(48, 1), classes(400, 9)
    options: dict[str, Any] = {"format": "qdq-int8", **QUICK}

    def outputs(source: ir.Model) -> Array:
        return ort.InferenceSession(ir.to_proto(source).SerializeToString()).run(None, unseen)[0].astype(np.float64)

    def accuracy(source: ir.Model) -> float:
        return float((outputs(source).argmax(axis=1) == labels).mean())

    def divergence(source: ir.Model) -> float:
        p, q = (y - np.log(np.exp(y).sum(axis=1, keepdims=True)) for y in (outputs(model), outputs(source)))
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())

    plain = magr_onnx.optimize(model, samples, **options).model
    mixed, report = magr_onnx.optimize(model, samples, output=path, max_loss="0.4", **options)
    assert divergence(plain) > 0.8
    assert divergence(mixed) < 0.4
    assert accuracy(plain) < accuracy(model) - 0.3
    assert accuracy(mixed) > accuracy(model) - 0.1
    least = min(share for share, loss in shares(report).items() if loss <= 0.4)
    assert 0 < least < 1
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "o.onnx")
    ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    floats = {row.name for row in report.layers if any(note.startswith("computed in float") for note in row.notes)}
    assert {"conv1", "conv2"} <= floats
    assert ops.count("QLinearConv") == 4 - len(floats) > 0
    assert sum(ops.count(op) for op in ("Conv", "FusedConv")) == len(floats)


def test_a_backend_without_16_bits_leaves_convolutions_float() -> None:
    """Also where an input of the model has a default, which the data leave out."""
    model, data = convolutions(), images(32)
    offset = ir.Value(name="offset", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(np.float32(0.5)))
    model.graph.register_initializer(offset)
    model.graph.inputs.append(offset)
    added = ir.node("Add", [model.graph.outputs[0], offset], name="shift")
    added.outputs[0].name, added.outputs[0].type, added.outputs[0].shape = "z", model.graph.outputs[0].type, model.graph.outputs[0].shape
    model.graph.append(added)
    model.graph.outputs[0] = added.outputs[0]
    options: dict[str, Any] = {"format": "qdq-full", "backend": "openvino", "keep_overridable": True, **QUICK}
    mixed, report = magr_onnx.optimize(model, data, max_loss="1e-3", **options)
    assert any("2 of 2 convolutions are computed in float" in note for note in report.notes)
    assert cosine_loss(model, mixed, images(64, seed=9)) < 1e-3


def test_layers_stay_float_where_16_bits_are_not_enough() -> None:
    """The weights themselves lose more than that."""
    report = magr_onnx.optimize(network(), inputs(64), max_loss="1e-9", format="qdq-int8", **QUICK).report
    assert 1.0 in shares(report)
    assert any("so layers stay float, too" in note for note in report.notes)
    assert report.assignment is not None
    assert any(row.bits is None for row in report.assignment.rows)


def test_the_users_own_measure() -> None:
    """The agreement with the float model on the held-out inputs."""
    model, unseen = network(), inputs(64, seed=9)
    expected = ort.InferenceSession(graphs.proto(model).SerializeToString()).run(None, unseen)[0]

    def close(predictions: Predictions) -> float:
        """Minus the relative error."""
        actual = np.concatenate([batch["y"] for batch in predictions])
        return 1 - float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))

    arguments: dict[str, Any] = {"validation_data": unseen, "metric": close, "format": "qdq-int8", **QUICK}
    _, report = magr_onnx.optimize(model, inputs(64), **arguments)
    assert report.validation is not None
    assert report.validation.metric is not None
    loss = 1 - report.validation.metric.quantized_value
    _, report = magr_onnx.optimize(model, inputs(64), max_loss=f"{loss / 3:.3g}", **arguments)
    assert report.validation is not None
    assert report.validation.metric is not None
    assert report.validation.metric.quantized_value >= 1 - loss / 3 - 1e-3
    assert min(shares(report)) == 0 < max(shares(report))


def test_a_share_that_does_nothing_is_told() -> None:
    """Too small for the readers of any value, or without any layer whose input could have 16 bits."""
    report = magr_onnx.optimize(network(), inputs(32), wide_activations=0.01, format="qdq-int8", **QUICK).report
    assert any(note.startswith("none of 2 inputs of layers have 16 bits") for note in report.notes)
    report = magr_onnx.optimize(convolutions(), images(32), wide_activations=0.5, format="qdq-int8", **QUICK).report
    assert any(note.startswith("no activations have 16 bits") for note in report.notes)


def test_a_budget_without_linear_layers_is_refused_where_no_activations_can_be_wide() -> None:
    options: dict[str, Any] = {"format": "qdq-full", "activation_type": "uint16", "backend": "qnn-htp"}
    with pytest.raises(OptionError, match="a budget chooses the bits of linear layers"):
        magr_onnx.optimize(convolutions(), images(32), max_loss="1%", **options, **QUICK)


def test_models_are_valid() -> None:
    onnx.checker.check_model(graphs.proto(convolutions()))
