"""Whole graphs between QuantizeLinear and DequantizeLinear, by the rules of every runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.errors import ModelError, OptionError
from magr_onnx.passes.tensors.backends import BACKENDS
from magr_onnx.passes.tensors.rules import Rules
from tests.graphs import Builder, random
from tests.passes.test_compounds import gelu, layer_norm, rms_norm
from tests.passes.test_whole_graph import attention
from tests.workflow.test_integer_convolutions import images, network, sqnr

Array = np.ndarray[Any, Any]
CASES = [(rules, kind) for rules in BACKENDS.values() for kind in rules.types]
NAMES = [f"{rules.name} {kind}" for rules, kind in CASES]


def transformer() -> onnx.ModelProto:
    model = ir.to_proto(attention())
    assert isinstance(model, onnx.ModelProto)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


def decoder(*, computed_mask: bool = False) -> onnx.ModelProto:
    """Return a block of a decoder as exporters write it: norms and GELU in several operators, and scores with a causal mask of -inf.

    A mask that is computed holds biases of the scores, too.
    """
    b = Builder(17)

    def product(x: ir.Value, k: int, n: int, seed: int) -> ir.Value:
        return b.node("MatMul", [x, b.constant(f"weight_{seed}", random(k, n, seed=seed, scale=k**-0.5))])

    x = b.input("x", ["batch", 6, 8])
    normed = rms_norm(b, x, 8)
    q, k, v = (product(normed, 8, 8, seed) for seed in (1, 2, 3))
    scores = b.node("Mul", [b.node("MatMul", [q, b.node("Transpose", [k], perm=[0, 2, 1])]), b.constant("root", np.float32(8**-0.5))])
    causal = np.tri(6, dtype=bool)
    mask = b.constant("mask", np.where(causal, 0, -np.inf).astype(np.float32))
    if computed_mask:
        bias = b.node("Mul", [b.node("ReduceMean", [x], axes=[-1]), b.constant("slope", np.float32(3))])
        mask = b.node("Where", [b.constant("causal", causal), bias, b.constant("infinity", np.float32(-np.inf))])
        mask.dtype = ir.DataType.FLOAT
    weights = b.node("Softmax", [b.node("Add", [scores, mask])], axis=-1)
    mixed = b.node("Add", [x, product(b.node("MatMul", [weights, v]), 8, 8, 4)])
    hidden = gelu(b, product(layer_norm(b, mixed, 8), 8, 16, 5))
    proto = ir.to_proto(b.model(b.node("Add", [mixed, product(hidden, 16, 8, 6)]), ["batch", 6, 8]))
    assert isinstance(proto, onnx.ModelProto)
    return proto


def sequences(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 6, 8)).astype(np.float32)


def run(path: Path | bytes, name: str, data: Array) -> Array:
    """Run as written: onnxruntime's CPU provider would make 8-bit products of 16-bit activations."""
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {name: data[i : i + 1]})[0] for i in range(len(data))])


def check_rules(model: onnx.ModelProto, rules: Rules, kind: str) -> None:
    """Look at every rounding, and at what is between them."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    kinds = {kind, kind.replace("16", "8")} if rules.narrow else {kind}
    quantize = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert quantize
    for node in quantize:
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        assert zero.dtype.name in kinds
        assert not rules.symmetric or zero == 0
        assert not rules.power_of_two or float(np.log2(scale)).is_integer()
        before = maker.get(node.input[0])
        if before is not None and before.op_type in rules.ranges:
            low, high = rules.ranges[before.op_type]
            assert scale == np.float32((high - low) / 2 ** (8 * zero.dtype.itemsize))
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    bias = {node.input[0] for node in model.graph.node if node.op_type == "Add" and maker[node.input[0]].op_type == "MatMul"}
    for node in model.graph.node:
        if node.op_type in rules.computed and node.domain == "":
            made = {maker[name].op_type for name in node.input if name in maker and name not in bias}
            kept = node.op_type in rules.absorbed and made <= {"Conv", "Gemm", "Add"}  # a symmetric grid does not end at 0
            assert kept or made <= {"DequantizeLinear"}, node
            after = readers.get(node.output[0], [])
            assert set(after) <= {"QuantizeLinear", "Relu", "Clip"} or node.output[0] in bias, node


@pytest.mark.parametrize(("rules", "kind"), CASES, ids=NAMES)
def test_a_convolutional_network(rules: Rules, kind: str, tmp_path: Path) -> None:
    proto, path = network(), tmp_path / "q.onnx"
    report = magr_onnx.optimize(
        proto, {"x": images(32, 1)}, output=path, batch_size=4, format="qdq-full", backend=rules.name, activation_type=kind
    ).report
    assert {row.name for row in report.layers if row.emitted} == {"stem", "deep", "point", "gate", "boxes", "scores", "head"}
    check_rules(onnx.load(path), rules, kind)
    x = images(16, 2)
    quality = sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x))
    assert quality > (12 if rules.power_of_two else 34 if "16" in kind else 20), quality


@pytest.mark.parametrize(("rules", "kind"), CASES, ids=NAMES)
def test_a_transformer(rules: Rules, kind: str, tmp_path: Path) -> None:
    proto, path = transformer(), tmp_path / "q.onnx"
    magr_onnx.optimize(
        proto, {"x": sequences(64, 1)}, output=path, batch_size=4, format="qdq-full", backend=rules.name, activation_type=kind
    )
    model = onnx.load(path)
    check_rules(model, rules, kind)
    assert [value.name for value in model.graph.output] == ["y"]
    x = sequences(16, 2)
    quality = sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x))
    assert quality > (12 if rules.power_of_two else 30 if "16" in kind else 18), quality


def widths_of(model: onnx.ModelProto) -> list[set[int]]:
    """Bits of the activations around every operator of the table, but for operands that are in 8 bits only."""
    zeros = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    quantized = {node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    result = []
    for node in model.graph.node:
        if node.op_type in BACKENDS["qnn-htp"].computed:
            weighted = node.op_type in ("Conv", "Gemm", "MatMul", "LayerNormalization")
            steps = [maker[name] for name in node.input[: 1 if weighted else None] if name in maker]
            steps = [step for step in steps if step.op_type == "DequantizeLinear"]
            steps += [quantized[name] for name in node.output if name in quantized]
            result.append({8 * zeros[step.input[2]].dtype.itemsize for step in steps})
    return result


@pytest.mark.parametrize(("make", "inputs"), [(network, images), (transformer, sequences)], ids=["network", "transformer"])
def test_the_activations_that_cost_most_have_16_bits(make: Any, inputs: Any, tmp_path: Path) -> None:
    proto, path, x, quality = make(), tmp_path / "q.onnx", inputs(32, 2), []
    for share in (0.0, 0.3, 1.0):
        options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "wide_activations": share}
        report = magr_onnx.optimize(proto, {"x": inputs(64, 1)}, output=path, batch_size=4, **options).report
        quality.append(sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x)))
        found = widths_of(onnx.load(path))
        assert all(len(widths) == 1 for widths in found)
        assert {0.0: {8}, 0.3: {8, 16}, 1.0: {16}}[share] == set.union(*found)
        assert share == 0 or any("activations have 16 bits, in" in note for note in report.notes)
    assert quality[0] + 1 < quality[1] < quality[2], quality


@pytest.mark.parametrize("bits", [4, 8])
def test_int4_weights_and_a_transposed_convolution(bits: int, tmp_path: Path) -> None:
    proto, path = network(last="ConvTranspose"), tmp_path / "q.onnx"
    options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "activation_type": "uint16", "conv_bits": bits}
    report = magr_onnx.optimize(proto, {"x": images(32, 1)}, output=path, batch_size=4, **options).report
    assert "head" in {row.name for row in report.layers if row.emitted}
    check_rules(onnx.load(path), BACKENDS["qnn-htp"], "uint16")
    x = images(16, 2)
    assert sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x)) > (30 if bits == 8 else 12)


@pytest.mark.parametrize("backend", [name for name, rules in BACKENDS.items() if rules.int4])
@pytest.mark.parametrize(("make", "inputs"), [(network, images), (transformer, sequences)], ids=["network", "transformer"])
def test_weights_of_4_bits(make: Any, inputs: Any, backend: str, tmp_path: Path) -> None:
    """They are stored in int4, with zero points where the runtime multiplies int4, since Qualcomm's takes others for int8."""
    proto, path, x = make(), tmp_path / "q.onnx", inputs(16, 2)
    options: dict[str, Any] = {"format": "qdq-full", "backend": backend, "bits": 4, "conv_bits": 4, "quantizer": "rtn"}
    report = magr_onnx.optimize(proto, {"x": inputs(32, 1)}, output=path, batch_size=4, **options).report
    assert {row.bits for row in report.layers} == {4}
    assert report.verified == len(report.layers)
    model = onnx.load(path)
    kinds, maker = {t.name: t.data_type for t in model.graph.initializer}, {name: node for node in model.graph.node for name in node.output}
    for node in (node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")):
        step = maker.get(node.input[1], node)
        if step.op_type != "DequantizeLinear" or (step.input[0] in maker and maker[step.input[0]].op_type == "QuantizeLinear"):
            continue  # a product of activations
        cast = maker.get(step.input[0])
        assert (cast is not None) == (BACKENDS[backend].int4 == "cast")
        assert kinds[step.input[0] if cast is None else cast.input[0]] == onnx.TensorProto.INT4
        assert cast is not None or kinds[step.input[2]] == onnx.TensorProto.INT4
    expected = run(proto.SerializeToString(), "x", x)
    assert sqnr(run(path, "x", x), expected) > 12
    if backend == "ort-cpu":  # its optimizer makes integer operators of them
        optimized = ort.SessionOptions()
        optimized.optimized_model_filepath = str(tmp_path / "o.onnx")
        ort.InferenceSession(path, optimized, providers=["CPUExecutionProvider"])
        ops = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
        assert sum(ops.count(op) for op in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")) >= len(report.layers)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("masked", [-1e2, -1e4, -1e9, float(np.finfo(np.float32).min), -np.inf])
def test_masks_take_no_resolution_from_the_scores(masked: float, kind: str, tmp_path: Path) -> None:
    proto, path = transformer(), tmp_path / "q.onnx"
    softmax = next(node for node in proto.graph.node if node.op_type == "Softmax")
    proto.graph.node.insert(list(proto.graph.node).index(softmax), onnx.helper.make_node("Add", ["scaled", "mask"], ["masked"]))
    softmax.input[0] = "masked"
    mask = np.where(np.tri(6, dtype=bool), 0, masked).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
    options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "activation_type": kind}
    magr_onnx.optimize(proto, {"x": sequences(64, 1)}, output=path, batch_size=4, **options)
    x = sequences(64, 2)
    assert sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x)) > (18 if kind == "uint8" else 30)


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_a_decoder_in_pieces(kind: str, computed: bool, tmp_path: Path) -> None:
    """Its norms and GELU become one operator each, and no grid spans a mask: devices cannot rescale numbers such as 1e38."""
    proto, path = decoder(computed_mask=computed), tmp_path / "q.onnx"
    options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "activation_type": kind}
    report = magr_onnx.optimize(proto, {"x": sequences(64, 1)}, output=path, batch_size=4, **options).report
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert [kinds.count(name) for name in ("RMSNormalization", "LayerNormalization", "Gelu")] == [1, 1, 1]
    assert not {"Erf", "Sqrt", "Pow", "Div"} & set(kinds)
    assert sum(note.startswith("several operators written as one") for note in report.notes) == 3
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    ranges = [
        constants[node.input[1]].max() * (np.iinfo(constants[node.input[2]].dtype).max if len(node.input) > 2 else 1)
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert max(ranges) < 150
    x = sequences(64, 2)
    assert sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x)) > (25 if kind == "uint8" else 40)


def test_sizes_of_a_resize_are_no_values(tmp_path: Path) -> None:
    b = Builder(18)
    x = b.node("Conv", [b.input("x", ["batch", 3, 8, 8]), b.constant("weight", random(4, 3, 1, 1))])
    scales = b.constant("scales", np.float32([1, 1, 2.5, 2.5]))
    proto, path = ir.to_proto(b.model(b.node("Resize", [x, None, scales], mode="linear"), ["batch", 4, 20, 20])), tmp_path / "q.onnx"
    assert isinstance(proto, onnx.ModelProto)
    magr_onnx.optimize(proto, {"x": images(16, 1)[:, :, :8, :8]}, output=path, format="qdq-full", backend="qnn-htp")
    model = onnx.load(path)
    (resize,) = [node for node in model.graph.node if node.op_type == "Resize"]
    assert {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}[resize.input[2]].tolist() == [1, 1, 2.5, 2.5]
    x = images(8, 2)[:, :, :8, :8]
    assert sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x)) > 30


def test_options_that_do_not_fit_are_named() -> None:
    with pytest.raises(OptionError, match=r"backend 'qnn' is not known; .*qnn-htp"):
        magr_onnx.build_pipeline(format="qdq-full", backend="qnn")
    with pytest.raises(OptionError, match="activation type uint16 is not for tensorrt, which takes int8"):
        magr_onnx.build_pipeline(format="qdq-full", backend="tensorrt", activation_type="uint16")
    with pytest.raises(OptionError, match="activation type uint16 is not for ort-cpu, which takes uint8 or int8"):
        magr_onnx.build_pipeline(format="qdq-int8", activation_type="uint16")
    with pytest.raises(OptionError, match="qnn-htp has no accumulators to be proved; use target and accumulator_bits with format qdq-int8"):
        magr_onnx.build_pipeline(format="qdq-full", backend="qnn-htp", target="x86-avx2")
    with pytest.raises(OptionError, match=r"^bits of 4 or less: tensorrt has no such .* these have: ort-cpu, qnn-htp, openvino$"):
        magr_onnx.build_pipeline(format="qdq-full", backend="tensorrt", bits=4)
    with pytest.raises(OptionError, match="conv_bits of 4 or less: coreml has no such"):
        magr_onnx.build_pipeline(format="qdq-full", backend="coreml", conv_bits=4)
    with pytest.raises(OptionError, match="backend is for format qdq-full only"):
        magr_onnx.build_pipeline(format="qdq-int8", backend="qnn-htp")
    with pytest.raises(OptionError, match=r"wide activations of 16 bits are for .* a backend that has uint16"):
        magr_onnx.build_pipeline(format="qdq-full", wide_activations=0.1)
    with pytest.raises(OptionError, match=r"wide activations 2: give a share of the work, 0 to 1, such as 0\.1"):
        magr_onnx.build_pipeline(format="qdq-full", backend="qnn-htp", wide_activations=2)


def test_there_are_no_ranges_without_data() -> None:
    with pytest.raises(OptionError, match="activations need calibration data"):
        magr_onnx.optimize(network(), format="qdq-full")
    with pytest.raises(ModelError, match="too large for max_memory; raise it"):
        magr_onnx.optimize(network(), {"x": images(8, 1)}, format="qdq-full", max_memory="1kB")


def test_layers_in_bodies_stay_float(tmp_path: Path) -> None:
    body = onnx.parser.parse_graph("branch () => (float[n, 6, 5] z) { z = MatMul(m, u) }")
    other = onnx.parser.parse_graph("other () => (float[n, 6, 5] o) { o = MatMul(m, v) }")
    rng = np.random.default_rng(3)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["m"], name="first"),
            onnx.helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            onnx.helper.make_node("Greater", ["top", "zero"], ["yes"]),
            onnx.helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=other),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 6, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 6, 5])],
        [
            *(
                onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
                for name, shape in (("w", (8, 8)), ("u", (8, 5)), ("v", (8, 5)))
            ),
            onnx.numpy_helper.from_array(np.float32(0), "zero"),
        ],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "q.onnx"
    options: dict[str, Any] = {"format": "qdq-full", "backend": "qnn-htp", "activation_type": "uint16"}
    report = magr_onnx.optimize(proto, {"x": sequences(32, 1)}, output=path, **options).report
    assert [row.name for row in report.layers if row.emitted] == ["first"]
    assert len(report.skipped) == 2  # one of them also since no calibration data reaches it
    assert "format qdq-full rounds the main graph only" in [skip.detail for skip in report.skipped]
    x = sequences(8, 2)
    assert sqnr(run(path, "x", x), run(proto.SerializeToString(), "x", x)) > 30


def test_axes_without_a_size_are_named_before_the_work() -> None:
    proto = network()
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(ModelError, match=r"qnn-htp needs fixed shapes, and input x has axis 2 \(height\)"):
        magr_onnx.optimize(proto, {"x": images(8, 1)}, format="qdq-full", backend="qnn-htp")
