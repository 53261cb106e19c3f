"""Error feedback of convolutions: statistics behind quantized convolutions, and what solving by them gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core import error_feedback
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.layers.conv import find
from magr_onnx.runtime.calibration import conv_stages
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Session

Array = npt.NDArray[Any]
CACHE = 1 << 20


def chain(rounding: str = "") -> onnx.ModelProto:
    """A dense, a grouped and a pointwise convolution, and a sum with what the first one put out, ``rounding`` between."""
    return model(
        f"""g (float[n, 4, 9, 9] x) => (float[n, 6, 4, 4] y) {{
            [first] a = Conv<strides = [2, 2]>(x, w1, b1)
            r = Relu(a)
            [grouped] d = Conv<group = 3, pads = [1, 1, 1, 1]>(r, w2, b2)
            e = Relu(d)
            [point] p = Conv(e, w3, b3)
            {rounding or "s = Identity(p)"}
            y = Add(s, r)
        }}""",
        w1=_kernel("w1", 6, 4, 3, 3),
        b1=constant("b1", 6),
        w2=_kernel("w2", 6, 2, 3, 3),
        b2=constant("b2", 6),
        w3=_kernel("w3", 6, 6, 1, 1),
        b3=constant("b3", 6),
        scale=np.float32(0.01),
        zero=np.uint8(128),
    )


def opened(source: ir.Model, data: list[dict[str, Array]]) -> CalibrationContext:
    with Session(source) as session:
        return CalibrationContext(open_data(data, session.inputs))


def _kernel(name: str, *shape: int) -> Array:
    return np.ascontiguousarray(constant(name, int(np.prod(shape[1:])), shape[0]).T).reshape(shape)


def inputs(count: int, seed: int = 0) -> list[dict[str, Array]]:
    """Smooth images."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, 1, 4, 11, 11))
    smooth = sum(noise[..., i : i + 9, j : j + 9] for i in range(3) for j in range(3)) / 3
    return [{"x": (image + 0.3 * rng.standard_normal(image.shape)).astype(np.float32)} for image in smooth]


def patches(x: Array, kernel: int, stride: int, pad: int) -> Array:
    """Patches ``(C k k, n)`` of one sample ``(C, H, W)``, by slices."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    size = (x.shape[1] - kernel) // stride + 1
    places = [(i * stride, j * stride) for i in range(size) for j in range(size)]
    return np.stack([x[:, i : i + kernel, j : j + kernel].ravel() for i, j in places], axis=1)


def values(source: ir.Model, feeds: dict[str, Array], names: list[str]) -> list[Array]:
    copy = source.clone()
    made = {str(v.name): v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.clear()
    for name in names:
        made[name].dtype = ir.DataType.FLOAT
        copy.graph.outputs.append(made[name])
    with Session(copy, fuses=False) as session:
        return list(session.run(feeds))


@pytest.mark.parametrize("rounding", ["", "c = QuantizeLinear(p, scale, zero) s = DequantizeLinear(c, scale, zero)"])
def test_statistics_are_those_behind_the_quantized_convolutions(rounding: str) -> None:
    source = ir.from_proto(chain(rounding))
    work = source.clone()
    data = inputs(8)
    seen = []
    for layer, stats, targets in conv_stages.staged(source, work, find(work)[0], opened(source, data), (), CACHE):
        before = work.clone()
        seen.append(layer.name)
        kernel, stride, pad = (layer.kernel[0], 2, 0) if layer.name == "first" else (layer.kernel[0], 1, int(layer.name == "grouped"))
        reads, makes = str(layer.x.name), str(layer.output.name)
        grams, crosses, powers = [], [], []
        for feeds in data:
            if reads == "x":
                x_q, (y,) = feeds["x"], values(source, feeds, [makes])
            else:
                y, x_q = values(source, feeds, [makes])[0], values(before, feeds, [reads])[0]
            bias = layer.read_bias()
            assert bias is not None
            y = y - bias.astype(np.float32).reshape(1, -1, 1, 1)
            if layer.name == "point":  # what is added carries an error
                y = y + values(source, feeds, ["r"])[0] - values(before, feeds, ["r"])[0]
            p = patches(x_q[0], kernel, stride, pad).reshape(layer.group, layer.k, -1).astype(np.float64)
            t = y.reshape(layer.group, layer.n, -1).astype(np.float64)
            n = p.shape[2]
            grams.append(p @ p.transpose(0, 2, 1) / n)
            crosses.append(p @ t.transpose(0, 2, 1) / n)
            powers.append(np.square(t).mean(axis=2))
        np.testing.assert_allclose([s.gram for s in stats], np.mean(grams, axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([t.cross[:, :] for t in targets], np.mean(crosses, axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([t.power for t in targets], np.mean(powers, axis=0), rtol=1e-4, atol=1e-5)
        assert all(len(s.folds) == len(t.folds) == 4 for s, t in zip(stats, targets, strict=True))
        weight = layer.weight.tensor().numpy()
        layer.write(1, weight + 0.1 * np.random.default_rng(1).standard_normal(weight.shape).astype(np.float32))
    assert seen == ["first", "grouped", "point"]


def test_the_float_weight_is_the_target_where_nothing_before_has_changed() -> None:
    source = ir.from_proto(chain())
    work = source.clone()
    for layer, stats, targets in conv_stages.staged(source, work, find(work)[0], opened(source, inputs(8)), (), CACHE):
        for matrix, s, t in zip(layer.read(), stats, targets, strict=True):
            assert error_feedback.squared_error(matrix, s, t, True) < 1e-5 * t.power.sum()


def _decibels(found: ir.Model, proto: onnx.ModelProto, held: list[dict[str, Array]]) -> float:
    with Session(ir.from_proto(proto)) as float_session, Session(found) as session:
        pairs = [(float_session.run(feeds)[0], session.run(feeds)[0]) for feeds in held]
    noise, signal = (sum(float(np.square(a).sum()) for a in arrays) for arrays in ([y - f for y, f in pairs], [y for y, _ in pairs]))
    return 10 * np.log10(signal / noise)


@pytest.mark.parametrize("format", ["qdq-full", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qdq-int8", "matmulnbits"))])
def test_feedback_gains_in_every_format(format: str) -> None:
    proto, data, held = chain(), inputs(64), inputs(16, seed=5)
    options: dict[str, Any] = {"format": format, "conv_bits": 4, "effort": "fast", "bias": "existing"}
    gains = []
    for feedback in (False, True):
        found = magr_onnx.optimize(proto, data, feedback=feedback, **options)
        gains.append(_decibels(found.model, proto, held))
        assert ("feedback=true" in found.report.pipeline) == feedback
    assert gains[1] > gains[0]


def test_few_samples_are_no_worse_than_without() -> None:
    proto, held = chain(), inputs(16, seed=5)
    options: dict[str, Any] = {"format": "qdq-full", "conv_bits": 4}
    for count in (2, 4, 16):
        without, behind = (
            _decibels(magr_onnx.optimize(proto, inputs(count), feedback=feedback, **options).model, proto, held)
            for feedback in (False, True)
        )
        assert behind > without - 0.3


def test_convolutions_outside_stages_are_converted_too() -> None:
    """Two convolutions share a weight: they are solved together, before the third."""
    proto = model(
        """g (float[n, 4, 9, 9] x) => (float[n, 4, 9, 9] y) {
            [one] a = Conv<pads = [1, 1, 1, 1]>(x, w)
            r = Relu(a)
            [two] b = Conv<pads = [1, 1, 1, 1]>(r, w)
            s = Relu(b)
            [other] y = Conv<pads = [1, 1, 1, 1]>(s, v)
        }""",
        w=_kernel("w", 4, 4, 3, 3),
        v=_kernel("v", 4, 4, 3, 3),
    )
    found = magr_onnx.optimize(proto, inputs(16), format="qdq-full", conv_bits=8)
    assert sorted(row.name for row in found.report.layers) == ["one", "other", "two"]
    assert _decibels(found.model, proto, inputs(8, seed=5)) > 30
