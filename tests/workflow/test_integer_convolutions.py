"""Convolutions in integers: what onnxruntime runs, how near it is to the float model, and when they stay float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.errors import OptionError
from magr_onnx.report.data import Report

Array = np.ndarray[Any, Any]


def images(count: int, seed: int) -> Array:
    """Smooth 8-bit images, scaled as (p - 127) / 128."""
    rng = np.random.default_rng(seed)
    waves = sum(np.cos(np.arange(12) * f + rng.uniform(0, 6, (count, 3, 12, 1))) / f for f in (0.5, 1, 2))
    pixels = np.clip(127 + 40 * (waves + np.swapaxes(waves, 2, 3)) + 5 * rng.standard_normal((count, 3, 12, 12)), 0, 255)
    return ((np.rint(pixels) - 127) / 128).astype(np.float32)


def network(bias: float = 0.1, last: str = "Conv", seed: int = 0) -> onnx.ModelProto:
    """A small residual network with depthwise convolutions, squeeze-and-excite, and a head that concatenates."""
    rng = np.random.default_rng(seed)
    sizes = {"stem": (8, 3, 3, 3), "deep": (8, 1, 3, 3), "point": (8, 8, 1, 1), "gate": (8, 8, 1, 1), "boxes": (4, 8, 1, 1)}
    arrays = {
        name: rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))
        for name, s in (sizes | {"scores": (4, 8, 1, 1), "head": (5, 8, 3, 3)}).items()
    }
    arrays |= {f"{name}_b": bias * rng.standard_normal(len(array)) for name, array in arrays.items()}

    def conv(name: str, x: str, op: str = "Conv", **attributes: Any) -> onnx.NodeProto:
        return onnx.helper.make_node(op, [x, name, f"{name}_b"], [f"{name}_y"], name=name, **attributes)

    def act(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return onnx.helper.make_node(op, inputs, [output], name=output, **attributes)

    nodes = [
        conv("stem", "x", pads=[1] * 4),
        act("Relu", ["stem_y"], "a"),
        conv("deep", "a", group=8, pads=[1] * 4),
        act("Clip", ["deep_y", "zero", "six"], "b"),
        conv("point", "b"),
        act("GlobalAveragePool", ["point_y"], "squeeze"),
        conv("gate", "squeeze"),
        act("Sigmoid", ["gate_y"], "excite"),
        act("Mul", ["point_y", "excite"], "scaled"),
        act("Add", ["scaled", "a"], "sum"),
        act("MaxPool", ["sum"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv("boxes", "pool"),
        conv("scores", "pool"),
        act("Concat", ["boxes_y", "scores_y"], "both", axis=1),
        conv("head", "both", last),
    ]
    if last == "ConvTranspose":
        arrays["head"] = rng.standard_normal((8, 5, 3, 3))
        arrays["head_b"] = rng.standard_normal(5)
    initializers = [onnx.numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    initializers += [onnx.numpy_helper.from_array(np.float32(v), name) for name, v in (("zero", 0), ("six", 6))]
    x = onnx.helper.make_tensor_value_info("x", 1, ["n", 3, 12, 12])
    y = onnx.helper.make_tensor_value_info("head_y", 1, ["n", 5, None, None])
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def converted(proto: onnx.ModelProto, folder: Path, data: Any = "images", **options: Any) -> tuple[Report, list[str], Array, Array]:
    """Quantize a network; return the report, the operators that onnxruntime runs, and outputs of both on other images."""
    path, x = folder / "q.onnx", images(32, 2)
    calibration = {"x": images(32, 1)} if isinstance(data, str) else data
    options = {"format": "qdq-int8", **options}
    report = magr_onnx.optimize(proto, calibration, output=path, batch_size=4, **options).report
    settings = ort.SessionOptions()
    settings.optimized_model_filepath, settings.log_severity_level = str(folder / "o.onnx"), 3
    quantized = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    original = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(folder / "o.onnx").graph.node]
    return report, ops, quantized.run(None, {"x": x})[0], original.run(None, {"x": x})[0]


def sqnr(actual: Array, expected: Array) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected.astype(float) - actual).sum()))


@pytest.mark.parametrize(("bits", "least"), [(8, 30), (4, 16)])
def test_a_network_is_integers_from_end_to_end(bits: int, least: float, tmp_path: Path) -> None:
    report, ops, actual, expected = converted(network(), tmp_path, conv_bits=bits)
    assert ops.count("QLinearConv") == 7
    assert not {"Conv", "Relu", "Clip", "Sigmoid", "Add", "Mul", "Concat"} & set(ops)
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") == 1
    assert report.verified == 7
    assert sqnr(actual, expected) > least
    stored = {t.data_type for t in onnx.load(tmp_path / "q.onnx").graph.initializer if len(t.dims) == 4}
    assert stored == {onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.INT4}


def test_images_of_8_bits_are_read_without_loss(tmp_path: Path) -> None:
    converted(network(), tmp_path)
    model = onnx.load(tmp_path / "q.onnx")
    quantize = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x")
    grid = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert grid[quantize.input[1]] == np.float32(1 / 128)
    levels = (np.arange(256) - 127) / 128
    seen = np.unique(images(32, 1) * 128 + 127)
    codes = np.rint(levels * 128) + grid[quantize.input[2]]
    assert 0 <= codes[int(seen.min())] <= codes[int(seen.max())] <= 255


def test_a_channel_of_tiny_weights_keeps_its_bias(tmp_path: Path) -> None:
    """Its scale would be so small that the bias overflows int32 in units of it."""
    proto = network(bias=1.0)
    for tensor in proto.graph.initializer:
        if tensor.name in ("stem", "boxes"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[1] *= 1e-13
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    _, ops, actual, expected = converted(proto, tmp_path)
    assert ops.count("QLinearConv") == 7
    assert sqnr(actual, expected) > 30


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"symmetric": False}, "symmetric weights"),
        ({"conv_form": "dequantize"}, ""),
    ],
)
def test_convolutions_stay_float_and_the_report_says_why(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    report, ops, actual, expected = converted(network(), tmp_path, **options)
    assert "QLinearConv" not in ops
    assert any(f"computed in float: {reason}" in note or reason in note for note in report.notes) or not reason
    assert sqnr(actual, expected) > 35


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"target": "x86-avx2"}, 28),
        ({"target": "x86-avx2", "conv_bits": 4}, 16),
        ({"target": "arm64-neon", "activation_type": "int8"}, 28),
        ({"accumulator_bits": 17}, 26),
        ({"accumulator_bits": 13, "accumulator_tile": 16, "conv_bits": 4, "bits": 4}, 12),
        ({"accumulator_bits": 15, "quantizer": "gptq"}, 18),
    ],
)
def test_sums_of_convolutions_fit(options: dict[str, Any], least: float, tmp_path: Path) -> None:
    """They stay integers, and are proved; by worst inputs of the codes that onnxruntime runs, in both orders of the rows."""
    report, ops, actual, expected = converted(network(), tmp_path, **options)
    assert ops.count("QLinearConv") == 7 or "activation_type" in options
    assert report.proof is not None
    assert (report.proof.proved, report.proof.total) == (7, 7)
    assert sqnr(actual, expected) > least
    if "accumulator_bits" not in options:
        return
    bits, tile = options["accumulator_bits"], options.get("accumulator_tile")
    optimized = onnx.load(tmp_path / "o.onnx").graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in optimized.initializer}
    largest = 0
    for node in (node for node in optimized.node if node.op_type == "QLinearConv"):
        codes = arrays[node.input[3]].astype(int).reshape(*arrays[node.input[3]].shape[:2], -1)
        for ordered in (codes, codes.swapaxes(1, 2)):
            flat = ordered.reshape(len(codes), -1)
            for at in range(0, flat.shape[1], tile or flat.shape[1]):
                part = flat[:, at : at + (tile or flat.shape[1])]
                high, low = 255 * np.maximum(part, 0).sum(axis=1).max(), 255 * np.minimum(part, 0).sum(axis=1).min()
                largest = max(largest, int(high), -1 - int(low))
    assert 2 ** (bits - 2) <= largest < 2 ** (bits - 1)


def test_a_transposed_convolution_stays_float_behind_integers(tmp_path: Path) -> None:
    report, ops, actual, expected = converted(network(last="ConvTranspose"), tmp_path)
    assert ops.count("QLinearConv") == 6
    assert "ConvTranspose" in ops
    assert report.verified == 7
    assert sqnr(actual, expected) > 28


def test_int8_activations(tmp_path: Path) -> None:
    report, _, actual, expected = converted(network(), tmp_path, activation_type="int8")
    assert any("int8 activations that several nodes read" in note for note in report.notes)
    assert sqnr(actual, expected) > 30


@pytest.mark.parametrize(
    "options",
    [
        {"format": "matmulnbits", "conv_form": "integer"},
        {"format": "matmulnbits", "conv_form": "integer", "conv_bits": 8},
        {"pipeline_text": "quantize{method=rtn},emit-matmulnbits,convolutions{form=integer}"},
        {
            "pipeline_text": "quantize-activations{type=dynamic},quantize{bits=8,block_size=channel},emit-dynamic-int8,"
            "convolutions{form=integer}"
        },
    ],
)
def test_other_formats_have_no_integer_convolutions(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="conv_form=integer needs static 8-bit activations; use format qdq-int8") as raised:
        magr_onnx.optimize(network(), **options)
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize("name", ["zero", "six", "gamma", "mean"])
@pytest.mark.parametrize("format", ["qdq-int8", "matmulnbits"])
def test_constants_that_a_caller_may_override_stay(name: str, format: str, tmp_path: Path) -> None:
    """Bounds of a Clip, and parameters of a BatchNormalization behind the first convolution: other values of them still count."""
    proto = network()
    proto.graph.node[1].input[0] = "normalized"
    parameters = ["gamma", "beta", "mean", "variance"]
    proto.graph.node.insert(1, onnx.helper.make_node("BatchNormalization", ["stem_y", *parameters], ["normalized"], name="norm"))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.ones(8, np.float32), p) for p in parameters)
    proto.graph.input.append(onnx.helper.make_tensor_value_info(name, 1, [] if name in ("zero", "six") else [8]))
    path = tmp_path / "q.onnx"
    magr_onnx.optimize(proto, {"x": images(32, 1)}, format=format, output=path, keep_overridable=True, equalize=format == "qdq-int8")
    plain = {"x": images(8, 2)}
    other = plain | {name: np.full([] if name in ("zero", "six") else 8, 0.5, np.float32)}
    quantized, original = (ort.InferenceSession(m, providers=["CPUExecutionProvider"]) for m in (str(path), proto.SerializeToString()))
    expected, unchanged = (original.run(None, feeds)[0] for feeds in (other, plain))
    actual = quantized.run(None, other)[0]
    assert sqnr(actual, expected) > sqnr(actual, unchanged)


def test_the_source_stays_as_it_is(tmp_path: Path) -> None:
    model = ir.from_proto(network())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    magr_onnx.optimize(model, {"x": images(8, 1)}, format="qdq-int8", output=tmp_path / "q.onnx")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_equalized_channels_between_convolutions_lose_less(tmp_path: Path) -> None:
    """Channels of very different ranges, which one grid for all of them would drown."""
    proto = network()
    spread = np.geomspace(0.01, 1, 8)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
        if tensor.name in ("stem", "stem_b"):
            array *= spread.reshape(-1, *[1] * (array.ndim - 1))
        elif tensor.name == "deep":
            array /= spread.reshape(-1, 1, 1, 1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    del proto.graph.node[9]  # the sum with the stem, which would be the larger ones' only
    proto.graph.node[9].input[0] = "scaled"
    _, _, plain, expected = converted(proto, tmp_path)
    report, _, equalized, _ = converted(proto, tmp_path, equalize=True)
    assert any("activations between convolutions were scaled" in note for note in report.notes)
    assert sqnr(equalized, expected) > sqnr(plain, expected) + 3


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_linear_layers_read_what_convolutions_put_out_from_the_same_grid(effort: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 1, 1)), "v": rng.standard_normal((12, 6)) / 3, "u": rng.standard_normal((6, 5)) / 2}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
            onnx.helper.make_node("MatMul", ["c", "v"], ["p"], name="first"),
            onnx.helper.make_node("Relu", ["p"], ["r"]),
            onnx.helper.make_node("MatMul", ["r", "u"], ["y"], name="second"),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 3, 12, 12])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 4, 12, 5])],
        [onnx.numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    data = {"x": images(64, 1)}
    report = magr_onnx.optimize(
        path, data, format="qdq-int8", effort=effort, batch_size=4, include=["*"], output=tmp_path / "out.onnx"
    ).report
    nodes = onnx.load(tmp_path / "out.onnx").graph.node
    assert sum(node.op_type == "QuantizeLinear" and node.input[0] == "c" for node in nodes) == 1
    assert [row.name for row in report.layers if row.emitted] == ["conv", "first", "second"]
    y, expected = (ort.InferenceSession(p).run(None, {"x": images(16, 2)})[0] for p in (tmp_path / "out.onnx", path))
    assert np.square(y - expected).mean() < 1e-3 * np.square(expected).mean()
