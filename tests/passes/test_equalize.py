"""Equalization: where scales may go, that they change nothing in float, and that they pay where inputs differ in strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.models import bundled
from magr_onnx.passes import Equalize, Plan, Quantize, attach, find
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.weighted import FLOATS
from magr_onnx.passes.rewrites.base import Context
from magr_onnx.passes.rewrites.equalize import candidates, search
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.graphs import Array, Builder, proto, random
from tests.helpers import few_samples, gram_of

K, N = 32, 24
GAINS = np.where(np.arange(K) % 11 == 5, 20, 1).astype(np.float32)  # a few strong channels


def layer_norm(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("LayerNormalization", [x, b.constant("g", GAINS), b.constant("s", random(K, seed=3))], "norm", axis=-1)


def rms_norm(b: Builder, x: ir.Value) -> ir.Value:
    """Decomposed, with a scale and a shift."""
    power = b.node("ReduceMean", [b.node("Mul", [x, x], "square"), b.constant("last", np.array([-1]))], "power", keepdims=1)
    root = b.node("Sqrt", [b.node("Add", [power, b.constant("eps", np.float32(1e-5).reshape(()))], "safe")], "root")
    scaled = b.node("Mul", [b.constant("g", GAINS.reshape(1, 1, K)), b.node("Div", [x, root], "unit")], "scaled")
    return b.node("Add", [scaled, b.constant("s", random(K, seed=3))], "shifted")


def simplified(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("SimplifiedLayerNormalization", [x, b.constant("g", GAINS)], "norm", axis=-1)


def rms_operator(b: Builder, x: ir.Value) -> ir.Value:
    b.opset = 23
    return b.node("RMSNormalization", [x, b.constant("g", GAINS)], "norm", axis=-1)


def linear(b: Builder, x: ir.Value) -> ir.Value:
    product = b.node("MatMul", [x, b.constant("w0", random(K, K, seed=4) * GAINS)], "before")
    return b.node("Add", [product, b.constant("b0", random(K, seed=6) * GAINS)], "before_bias")


def relu(b: Builder, x: ir.Value) -> ir.Value:
    return b.node("Relu", [linear(b, x)], "relu")


def gated(b: Builder, x: ir.Value) -> ir.Value:
    gate = b.node("Sigmoid", [b.node("MatMul", [x, b.constant("wg", random(K, K, seed=8))], "gate")], "open")
    return b.node("Mul", [linear(b, x), gate], "gated")


SOURCES: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    f.__name__: f for f in (layer_norm, rms_norm, rms_operator, simplified, linear, relu, gated)
}


def model_of(source: str, opset: int = 20) -> ir.Model:
    """A value of uneven channels that two layers read, and something behind them."""
    b = Builder(opset)
    value = SOURCES[source](b, b.input("x", ["batch", "time", K]))
    one = b.node("Add", [b.node("MatMul", [value, b.constant("w1", random(K, N))], "one"), b.constant("b1", random(N, seed=1))], "one_bias")
    two = b.node("MatMul", [value, b.constant("w2", random(K, N, seed=2))], "two")
    return b.model(b.node("Tanh", [b.node("Mul", [one, two], "product")], "end"), ["batch", "time", N])


def inputs(seed: int = 3, rows: int = 64) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"x": (rng.standard_normal((rows, 3, K)) + 0.3 * rng.standard_normal(K)).astype(np.float32)}


def context(model: ir.Model, **options: Any) -> Context:
    with Session(model) as session:
        data = open_data([inputs(s) for s in range(3)], session.inputs, 64)

    def statistics(current: ir.Model, layers: Sequence[LinearLayer]) -> list[tuple[Sequence[LinearLayer], Mapping[str, LayerStats]]]:
        return [(layers, moments.collect(current, layers, CalibrationContext(data)).stats)]

    return Context(statistics=statistics, **options)


def outputs(model: ir.Model) -> Array:
    with Session(model) as session:
        found: Array = session.run(inputs(9))[0].astype(np.float64)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_float_outputs_stay_the_same_and_rounding_loses_less(source: str) -> None:
    model = model_of(source)
    before = outputs(model)
    weights = {layer.name: layer.read() for layer in find(model)[0]}
    errors = [added(model_of(source)), added(model_of(source), Equalize())]
    notes = Equalize().rewrite(model, context(model, spec=WeightSpec(4, 16)))
    if source != "simplified":  # onnxruntime's own
        proto(model)
    assert len(notes) == 1
    assert np.linalg.norm(outputs(model) - before) < 1e-5 * np.linalg.norm(before)
    scaled = {layer.name: layer.read() for layer in find(model)[0]}
    factors = scaled["one"] / weights["one"]
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), rtol=1e-5)
    np.testing.assert_allclose(scaled["two"] / weights["two"], factors, rtol=1e-4)
    assert factors.max() / factors.min() > 2
    assert errors[1] < 0.8 * errors[0]


def added(model: ir.Model, *rewrites: Equalize) -> float:
    """Output error after rounding to nearest, relative, on inputs not calibrated on."""
    expected = outputs(model)
    passes = (*rewrites, Quantize(method="rtn", block_size=16))
    found, _ = magr_onnx.optimize(model, [inputs(s) for s in range(3)], pipeline_text=passes, include=["w1", "w2"])
    return float(np.linalg.norm(outputs(found) - expected) / np.linalg.norm(expected))


def untouched(change: Callable[[Builder, ir.Value], ir.Value], **options: Any) -> bool:
    """Whether a graph whose norm's value is also given to ``change`` offers nothing to scale."""
    b = Builder()
    value = layer_norm(b, b.input("x", ["batch", "time", K]))
    one = b.node("MatMul", [value, b.constant("w1", random(K, N))], "one")
    end = b.node("Tanh", [one], "end")
    other = change(b, value)
    end.name, end.shape = "y", ir.Shape(["batch", "time", N])
    other.name, other.shape = "z", ir.Shape(["batch", "time", None])
    return not list(candidates(b.model_of([end, other]), Context(**options)))


def test_a_value_with_any_other_reader_is_left_alone() -> None:
    assert untouched(lambda b, v: b.node("Softmax", [v], "other", axis=-1))
    assert untouched(lambda b, v: v)  # a graph output
    assert untouched(lambda b, v: b.node("MatMul", [b.constant("left", random(4, 3)), v], "mixed"))  # not a layer
    second = lambda b, v: b.node("Tanh", [b.node("MatMul", [v, b.constant("w2", random(K, 8))], "two")], "tail")  # noqa: E731
    assert not untouched(second)
    assert untouched(second, selection=Selection(exclude=["two"]))
    assert untouched(second, selection=Selection(["w1"]))
    assert untouched(lambda b, v: b.node("MatMul", [v, b.constant("w2", random(K, 8))], "head"))  # its result is an output


def test_what_is_read_in_between_is_not_scaled() -> None:
    b = Builder()
    before = linear(b, b.input("x", ["batch", "time", K]))
    value = b.node("Relu", [before], "relu")
    end = b.node("Tanh", [b.node("MatMul", [value, b.constant("w1", random(K, N))], "one")], "end")
    end.name, end.shape = "y", ir.Shape(["batch", "time", N])
    other = b.node("Sigmoid", [before], "other")
    other.name, other.shape = "z", ir.Shape(["batch", "time", K])
    assert not [c for c in candidates(b.model_of([end, other]), Context()) if c[0][0].name == "one"]


def test_constants_shared_with_other_nodes_keep_their_value_for_them() -> None:
    b = Builder()
    x = b.input("x", ["batch", "time", K])
    gain, shift = b.constant("g", GAINS), b.constant("s", random(K, seed=3))
    value = b.node("LayerNormalization", [x, gain, shift], "norm", axis=-1)
    one = b.node("MatMul", [value, b.constant("w1", random(K, N))], "one")
    two = b.node("MatMul", [b.node("Mul", [x, gain], "scaled"), b.constant("w2", random(K, N))], "two")
    model = b.model(b.node("Tanh", [b.node("Add", [one, two], "sum")], "end"), ["batch", "time", N])
    before = outputs(model)
    assert Equalize().rewrite(model, context(model, spec=WeightSpec(4, 16)))
    np.testing.assert_allclose(outputs(model), before, atol=1e-5 * np.abs(before).max())


def test_half_precision_stays_half_precision() -> None:
    b = Builder()
    x = b.input("x", ["batch", "time", K], ir.DataType.FLOAT16)
    constants = [b.constant(n, a.astype(np.float16)) for n, a in (("g", GAINS), ("s", random(K, seed=3)), ("w1", random(K, N)))]
    value = b.node("LayerNormalization", [x, *constants[:2]], "norm", axis=-1)
    model = b.model(b.node("Tanh", [b.node("MatMul", [value, constants[2]], "one")], "end"), ["batch", "time", N])
    feed = {"x": inputs()["x"].astype(np.float16)}
    with Session(model) as session:
        (before,) = session.run(feed)
    made, report = magr_onnx.optimize(model, [feed], pipeline_text="equalize,quantize{bits=8}")
    assert any(n.startswith("equalize: scaled 1 of 1 values") for n in report.notes)
    assert {v.dtype for v in made.graph.initializers.values()} <= set(FLOATS)
    with Session(made) as session:
        (after,) = session.run(feed)
    np.testing.assert_allclose(after.astype(np.float32), before.astype(np.float32), atol=5e-2)


def naive_error(w: Array, gram: Array, spec: WeightSpec, s: Array) -> float:
    found = rtn.quantize(w * s[:, None], gram.diagonal() / s**2, spec).dequantize() / s[:, None]
    return layer_error(found.astype(np.float64) - w, gram)


def test_search_lowers_the_error_it_says_and_does_nothing_for_even_channels() -> None:
    rng = np.random.default_rng(0)
    w, spec = random(64, 20), WeightSpec(3, 32)
    uneven = rng.standard_normal((500, 64)) * np.exp(1.5 * rng.standard_normal(64))
    gram = gram_of(uneven)
    found = search([w], LayerStats(gram, uneven.mean(axis=0), 500), [False], spec)
    assert found.scales is not None
    before, after = (naive_error(w, gram, spec, s) for s in (np.ones(64, np.float32), found.scales))
    assert after / before == pytest.approx(found.ratio, rel=1e-3)
    assert found.ratio < 0.8
    signs = np.where(rng.random((64, 20)) < 0.5, -1.0, 1.0).astype(np.float32)
    even = search([signs], LayerStats(np.eye(64), np.zeros(64), 500), [False], spec)
    assert even.scales is None


def test_eight_bit_inputs_are_part_of_the_search() -> None:
    """At 8 bits weights hardly matter beside one range for all channels of the input."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 64))
    x[:, 3] *= 60
    stats = LayerStats(gram_of(x), x.mean(axis=0), 500)
    found = search([random(64, 20)], stats, [False], WeightSpec(8, None, True), activations=True)
    assert found.scales is not None
    assert found.scales[3] > 5 * np.median(found.scales)


@pytest.mark.parametrize("seed", range(4))
def test_channels_that_few_rows_show_hardly_active_do_not_leave_the_range(seed: int) -> None:
    """Every channel is strong in a twentieth of all rows: which of them are strong in 16 rows is chance."""
    rng = np.random.default_rng(seed)

    def rows(n: int) -> Array:
        return rng.standard_normal((n, 200)) * np.where(rng.random((n, 200)) < 0.05, 10, 0.1)

    x, fresh, w = rows(16), rows(500), random(200, 20, seed=seed)
    found = search([w], LayerStats(gram_of(x), x.mean(axis=0), 16), [True], WeightSpec(8, None, True), activations=True)
    scales = np.ones(200) if found.scales is None else found.scales

    def error(s: Array) -> float:
        """Of fresh rows on an 8-bit grid over the range of the 16, behind the weights."""
        step = np.ptp(x / s) / 255
        low, high = np.rint([(x / s).min() / step, (x / s).max() / step])
        return float(np.square((np.clip(np.rint(fresh / s / step), low, high) * step * s - fresh) @ w).sum())

    assert error(scales) < 10 * error(np.ones(200))  # 60 times and more by what the 16 rows alone say


@pytest.mark.long
@pytest.mark.parametrize("form", ["matmulnbits", "qdq-int8"])
def test_bundled_model(form: Any) -> None:
    options: dict[str, Any] = {"format": form, "quantizer": "gptq", "include": ["node_MatMul_*"]}
    model, report = magr_onnx.optimize(bundled.MODEL, few_samples(), equalize=True, **options)
    assert any(n.startswith("equalize: ") for n in report.notes)
    assert report.pipeline.startswith("equalize,")
    assert report.verified == len(report.layers) == 20
    checked = magr_onnx.validate(
        bundled.MODEL, model, few_samples(bundled.HELD_OUT), arithmetics=(Arithmetic.DEFAULT,), layers=False, latency=False
    )
    for (metrics,) in checked.arithmetics.values():
        assert metrics.cosine > 0.995


def test_bundled_model_in_float_is_the_same() -> None:
    model = ir.load(bundled.MODEL)
    with Session(bundled.MODEL) as session:
        data = open_data(bundled.CALIBRATION, session.inputs, 16).limit(2)
    layers = find(model)[0]
    stats = moments.collect(model, layers, CalibrationContext(data)).stats
    for layer in layers:
        attach(layer, stats[layer.reads])
    result = ir.passes.Sequential(Equalize())(model)
    assert result.modified
    ids = {"input_ids": np.load(bundled.HELD_OUT)["input_ids"][:4]}
    with Session(bundled.MODEL) as before, Session(model) as after:
        a, b = before.run(ids)[0], after.run(ids)[0]
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_under_an_accumulator() -> None:
    model = model_of("rms_norm")
    made, report = magr_onnx.optimize(model, [inputs()], format="qdq-int8", target="x86-avx2", equalize=True)
    assert any(n.startswith("equalize: scaled") for n in report.notes)
    assert report.proof is not None
    assert report.proof.proved == report.proof.total == 2
    assert magr_onnx.verify(made, target="x86-avx2").ok


def test_without_data_nothing_is_known_and_the_report_says_so() -> None:
    _, report = magr_onnx.optimize(model_of("layer_norm"), equalize=True)
    assert any("equalize changed nothing" in n for n in report.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magr,equalize,quantize", "equalize must come before magr"),
        ("equalize", "equalize needs a quantize pass after it"),
        ("equalize,equalize,quantize", "equalize appears twice"),
    ],
)
def test_bad_pipelines(text: str, message: str) -> None:
    with pytest.raises(magr_onnx.OptionError, match=message):
        Plan.parse(text).check()


def test_the_user_s_model_and_patterns_survive() -> None:
    model = model_of("layer_norm")
    before = proto(model).SerializeToString(deterministic=True)
    data = [inputs(s) for s in range(3)]
    _, report = magr_onnx.optimize(model, data, equalize=True, include=["w1", "w2"], validation_data=data[:1])
    assert [r.name for r in report.layers] == ["one", "two"]
    assert proto(model).SerializeToString(deterministic=True) == before
    assert report.validation is not None
    _, one = magr_onnx.optimize(model, data, equalize=True, exclude=["w2"])
    assert [r.name for r in one.layers] == ["one"]
