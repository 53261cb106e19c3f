"""Convolutions: their patches against loops, their codes in the file, and what becomes of everything around them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import magr_onnx
from magr_onnx.core.layer import join_groups
from magr_onnx.core.quantizers import batched
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.errors import NonFiniteError, OptionError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes import Plan, Quantize
from magr_onnx.passes.graph.constants import ConstantView
from magr_onnx.passes.layer_passes.convolutions import Convolutions, problems_of
from magr_onnx.passes.layers.conv import FORMS, ConvLayer, Form, find, from_matrices, split_groups, to_matrices
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.report.data import Report
from magr_onnx.report.reasons import ConvReason
from magr_onnx.runtime.calibration import conv_patches
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Arithmetic, Session
from magr_onnx.workflow import non_linear
from magr_onnx.workflow.converted import Converted
from magr_onnx.workflow.integer_convolutions import Rounding
from tests.helpers import emitted_weight, run_context

Array = np.ndarray[Any, Any]
FLOAT_FORMS: list[Form] = [form for form in FORMS if form != "integer"]


def convolution(op: str, x: Array, shape: tuple[int, ...], attributes: dict[str, Any], bias: bool = False) -> onnx.ModelProto:
    """One convolution with random weights."""
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    node = onnx.helper.make_node(op, inputs, ["y"], name="c", **attributes)
    channels = shape[0] if op == "Conv" else shape[1] * attributes.get("group", 1)
    held = {"w": constant("w", *shape)} | ({"b": constant("b", channels)} if bias else {})
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", *x.shape[1:]])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", channels, *[None] * (x.ndim - 2)])],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def collected(proto: onnx.ModelProto, batches: list[dict[str, Array]]) -> dict[str, list[LayerStats]]:
    found = ir.from_proto(proto)
    with Session(found) as session:
        data = open_data(batches, session.inputs, 4)
    return conv_patches.collect(found, find(found)[0], data)


def gathered(x: Array, kernel: tuple[int, ...], strides: list[int], dilations: list[int], pads: list[int], out: tuple[int, ...]) -> Array:
    """Patches ``(batch, positions, C * places)`` of ``x``, one output position and one place at a time."""
    rank = len(kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[rank + i]) for i in range(rank))])
    rows = np.zeros((len(x), math.prod(out), x.shape[1], math.prod(kernel)), np.float64)
    for p, at in enumerate(itertools.product(*map(range, out))):
        for t, place in enumerate(itertools.product(*map(range, kernel))):
            where = tuple(at[i] * strides[i] + place[i] * dilations[i] for i in range(rank))
            rows[:, p, :, t] = padded[(slice(None), slice(None), *where)]
    return rows.reshape(len(x), math.prod(out), -1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, tuple[int, ...], dict[str, Any]]:
    rank, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    each = st.integers(1, 3)
    kernel = tuple(draw(each) for _ in range(rank))
    attributes: dict[str, Any] = {"group": group, "strides": [draw(st.integers(1, 2)) for _ in range(rank)]}
    attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    mode = draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "pads":
        attributes["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    else:
        attributes["auto_pad"] = mode
        attributes["dilations"] = [1] * rank
    sizes = [draw(st.integers(5, 7)) for _ in range(rank)]
    inner, n = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((3, inner * group, *sizes)).astype(np.float32)
    return x, (n * group, inner, *kernel), attributes


def pads_of(attributes: dict[str, Any], x: Array, kernel: tuple[int, ...]) -> list[int]:
    """Begins and ends of the padding, by ONNX's definition of auto_pad."""
    mode = attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(attributes["pads"])
    begins, ends = [], []
    for size, k, stride in zip(x.shape[2:], kernel, attributes["strides"], strict=True):
        total = 0 if mode == "VALID" else max((-(-size // stride) - 1) * stride + k - size, 0)
        begins.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


@settings(max_examples=40, deadline=None)
@given(cases())
def test_gram_matrices_are_those_of_patches_gathered_by_loops(case: tuple[Array, tuple[int, ...], dict[str, Any]]) -> None:
    x, shape, attributes = case
    proto = convolution("Conv", x, shape, attributes)
    with Session(ir.from_proto(proto)) as session:
        (y,) = session.run({"x": x})
    kernel, group = shape[2:], attributes["group"]
    rows = gathered(x, kernel, attributes["strides"], attributes["dilations"], pads_of(attributes, x, kernel), y.shape[2:])
    parts = rows.reshape(-1, group, rows.shape[-1] // group)
    found = collected(proto, [{"x": x[:2]}, {"x": x[2:]}])["c"]
    assert {group.rows for group in found} == {len(parts)}
    np.testing.assert_allclose([group.gram for group in found], np.einsum("ngk,ngl->gkl", parts, parts) / len(parts), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([group.mean for group in found], parts.mean(axis=0), rtol=1e-4, atol=1e-5)
    product = np.einsum("ngk,gkm->ngm", parts, to_matrices(constant("w", *shape), "Conv", group)).reshape(len(x), -1, y.shape[1])
    np.testing.assert_allclose(np.moveaxis(y, 1, -1).reshape(product.shape), product, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(cases(), st.integers(0, 1))
def test_patches_of_a_transposed_convolution_explain_its_output(case: tuple[Array, tuple[int, ...], dict[str, Any]], more: int) -> None:
    """``Y = P W``: the second moments of the output follow from those of the patches, for any weight."""
    x, (m, inner, *kernel), attributes = case
    group = attributes["group"]
    shape = (inner * group, m // group, *kernel)
    attributes = {k: v for k, v in attributes.items() if k != "auto_pad"}
    attributes["pads"] = [0] * (2 * len(kernel))
    attributes["output_padding"] = [min(more, s - 1) for s in attributes["strides"]]
    proto = convolution("ConvTranspose", x, shape, attributes)
    with Session(ir.from_proto(proto)) as session:
        (y,) = session.run({"x": x})
    found = collected(proto, [{"x": x}])["c"]
    w = to_matrices(constant("w", *shape), "ConvTranspose", group).astype(np.float64)
    rows = np.moveaxis(y, 1, -1).reshape(-1, group, m // group).astype(np.float64)
    gram, mean = (np.stack([getattr(group, name) for group in found]) for name in ("gram", "mean"))
    assert {group.rows for group in found} == {len(rows)}
    np.testing.assert_allclose(
        np.einsum("gkm,gkl,gln->gmn", w, gram, w), np.einsum("ngm,ngl->gml", rows, rows) / len(rows), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(np.einsum("gkm,gk->gm", w, mean), rows.mean(axis=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("op", "shape", "group"), [("Conv", (6, 2, 3, 2), 3), ("ConvTranspose", (6, 4, 3), 2), ("Conv", (4, 5, 2, 2, 2), 1)]
)
def test_matrices_and_back(op: str, shape: tuple[int, ...], group: int) -> None:
    weight = constant("w", *shape)
    matrices = to_matrices(weight, op, group)
    np.testing.assert_array_equal(from_matrices(matrices, op, shape[2:]), weight)
    assert matrices.shape[0] == group


def image(rng: np.random.Generator, *shape: int) -> Array:
    """Smooth, positive on average: patches whose places are correlated, with a mean."""
    x = rng.standard_normal(shape)
    for axis in (2, 3):
        x = x + 0.8 * np.roll(x, 1, axis) + 0.4 * np.roll(x, 2, axis)
    return (x + 0.3).astype(np.float32)


def net(seed: str = "") -> onnx.ModelProto:
    """Plain, depthwise and pointwise convolutions, a stride, and a linear layer."""

    def kernel(name: str, *shape: int) -> Array:
        return np.ascontiguousarray(constant(name + seed, math.prod(shape[1:]), shape[0]).T).reshape(shape) * np.float32(1.3)

    return model(
        """g (float[n, 4, 16, 16] x) => (float[n, 10] y) {
            [stem] a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w1, b1)
            ar = Relu(a)
            [depthwise] d = Conv<group = 24, pads = [1, 1, 1, 1]>(ar, w2, b2)
            dr = Relu(d)
            [point] p = Conv(dr, w3, b3)
            s = Add(p, ar)
            [up] u = ConvTranspose<strides = [2, 2]>(s, w4, b4)
            ur = Relu(u)
            m = GlobalAveragePool(ur)
            f = Flatten(m)
            [fc] y = Gemm<transB = 1>(f, wf, bf)
        }""",
        w1=kernel("w1", 24, 4, 3, 3),
        b1=constant("b1", 24),
        w2=kernel("w2", 24, 1, 3, 3),
        b2=constant("b2", 24),
        w3=kernel("w3", 24, 24, 1, 1),
        b3=constant("b3", 24),
        w4=kernel("w4", 24, 16, 2, 2),
        b4=constant("b4", 16),
        wf=constant("wf", 10, 16),
        bf=constant("bf", 10),
    )


def samples(count: int, seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": image(rng, 4, 4, 16, 16)} for _ in range(count)]


def outputs(found: Any, batches: list[dict[str, Array]], arithmetic: Arithmetic = Arithmetic.DEFAULT) -> Array:
    with Session(found if isinstance(found, ir.Model | Path) else ir.from_proto(found), arithmetic=arithmetic) as session:
        return np.concatenate([session.run(b)[0] for b in batches])


def error(found: Any, proto: onnx.ModelProto, batches: list[dict[str, Array]]) -> float:
    y = outputs(proto, batches)
    return float(np.linalg.norm(outputs(found, batches) - y) / np.linalg.norm(y))


@pytest.mark.parametrize("seed", ["", "b", "c"])
def test_calibrated_4_bit_convolutions_beat_rounding_on_held_out_inputs(seed: str) -> None:
    proto, data, held = net(seed), samples(16), samples(4, seed=9)
    options = {"conv_bits": 4, "bits": 8, "bias": "existing"}
    rounded = magr_onnx.optimize(proto, quantizer="rtn", alpha=0.0, **options)
    fast = magr_onnx.optimize(proto, data, effort="fast", **options)
    best = magr_onnx.optimize(proto, data, effort="balanced", **options)
    errors = [error(found.model, proto, held) for found in (rounded, fast, best)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[0]


def with_dequantized(proto: onnx.ModelProto, found: ir.Model, report: Report) -> onnx.ModelProto:
    """The float model with the weights and biases read from the emitted one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    nodes = {node.name: node for node in found.graph}
    held = {i.name: i for i in copy.graph.initializer}
    for row in report.layers:
        mine = next(n for n in copy.graph.node if n.name == row.name)
        node, matrices = nodes[str(row.emitted)], emitted_weight(nodes[str(row.emitted)])
        assert matrices is not None
        if row.op == "Gemm":
            held[mine.input[1]].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(matrices.T), mine.input[1]))
            bias = node.inputs[5]
        else:
            kernel = onnx.numpy_helper.to_array(held[mine.input[1]]).shape[2:]
            weight = from_matrices(matrices.reshape(row.groups, row.k, row.n), row.op, kernel)
            held[mine.input[1]].CopyFrom(onnx.numpy_helper.from_array(weight, mine.input[1]))
            bias = node.inputs[2]
        assert bias is not None
        assert bias.const_value is not None
        held[mine.input[2]].CopyFrom(onnx.numpy_helper.from_array(bias.const_value.numpy(), mine.input[2]))
    return copy


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", FLOAT_FORMS)
def test_every_arithmetic_computes_what_the_codes_say(bits: int, symmetric: bool, form: Form, tmp_path: Path) -> None:
    proto, path = net(), tmp_path / "q.onnx"
    options = {"conv_bits": bits, "symmetric": symmetric, "conv_form": form, "bits": 8, "accuracy_level": 1}
    report = magr_onnx.optimize(proto, samples(8), output=path, effort="fast", **options).report  # type: ignore[arg-type]
    found = ir.load(path)
    assert [row.bits for row in report.layers] == [bits] * 4 + [8]
    assert report.verified == 5
    wanted = outputs(with_dequantized(proto, found, report), samples(2, seed=5))
    for arithmetic in Arithmetic:
        np.testing.assert_allclose(outputs(path, samples(2, seed=5), arithmetic), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["matmulnbits", "qdq", "qdq-int8", "dynamic-int8"])
def test_every_format_has_quantized_convolutions(form: Any, tmp_path: Path) -> None:
    report = magr_onnx.optimize(net(), samples(8), output=tmp_path / "q.onnx", format=form, include=["*"]).report
    assert [(r.op, r.k, r.n, r.groups) for r in report.layers] == [
        ("Conv", 36, 24, 1),
        ("Conv", 9, 1, 24),
        ("Conv", 24, 24, 1),
        ("ConvTranspose", 96, 16, 1),
        ("Gemm", 16, 10, 1),
    ]
    assert all(r.bias_compensated and r.rows >= 8 * 4 for r in report.layers)
    assert error(tmp_path / "q.onnx", net(), samples(4, seed=9)) < 0.05
    assert "24 x 9 x 1" in report.to_text()


def test_the_option_is_part_of_the_pipeline_only_where_there_are_convolutions() -> None:
    text = magr_onnx.optimize(net(), effort="fast").report.pipeline
    assert text.endswith(",convolutions{feedback=true}")
    again = magr_onnx.optimize(net(), pipeline_text=text).report
    assert [r.op for r in again.layers] == ["Conv", "Conv", "Conv", "ConvTranspose", "Gemm"]
    plain = magr_onnx.optimize(net(), effort="fast", conv_bits=None).report
    assert "convolutions" not in plain.pipeline
    assert [s.name for s in plain.skipped] == ["stem", "depthwise", "point", "up"]


def test_linear_layers_behind_make_up_for_what_convolutions_did() -> None:
    report = magr_onnx.optimize(net(), samples(16), conv_bits=3, bits=8).report
    (layer,) = (row for row in report.layers if row.op == "Gemm")
    assert layer.feedback is not None
    alone = magr_onnx.optimize(net(), samples(16), conv_bits=None, bits=8).report
    assert next(row for row in alone.layers if row.op == "Gemm").feedback is None  # the first layer reads what the float model gives


def test_one_weight_of_two_convolutions_keeps_their_biases_apart() -> None:
    proto = model(
        """g (float[n, 6, 8, 8] x) => (float[n, 6, 8, 8] y, float[n, 6, 8, 8] z) {
            [a] y = Conv<pads = [1, 1, 1, 1]>(x, k, b)
            r = Relu(y)
            [c] z = Conv<pads = [1, 1, 1, 1]>(r, k, d)
        }""",
        k=constant("k", 6, 6, 3, 3) * np.float32(0.3),
        b=constant("b", 6),
        d=constant("d", 6),
    )
    rng = np.random.default_rng(0)
    batches = [{"x": image(rng, 4, 6, 8, 8)} for _ in range(4)]
    found, report = magr_onnx.optimize(proto, batches, conv_bits=4)
    first, second = (node for node in found.graph if node.op_type == "Conv")
    assert first.inputs[1] is second.inputs[1]
    biases = [node.inputs[2].const_value.numpy() for node in (first, second)]  # type: ignore[union-attr]
    corrections = [bias - constant(name, 6) for bias, name in zip(biases, ("b", "d"), strict=True)]
    assert min(np.abs(correction).max() for correction in corrections) > 1e-4
    kernel = from_matrices(np.asarray(emitted_weight(second))[None], "Conv", (3, 3)) - constant("k", 6, 6, 3, 3) * np.float32(0.3)
    text = "g (float[n, 6, 8, 8] x) => (float[n, 6, 8, 8] y) { y = Conv<pads = [1, 1, 1, 1]>(x, k) }"
    difference, floats = (ort.InferenceSession(m.SerializeToString()) for m in (model(text, k=kernel), proto))
    images = np.concatenate([batch["x"] for batch in batches])
    relu = np.maximum(floats.run(["y"], {"x": images})[0], 0)
    for inputs, correction in zip((images, relu), corrections, strict=True):  # each makes up for the mean error at its own output
        mean = difference.run(None, {"x": inputs})[0].mean(axis=(0, 2, 3))
        factor = -(correction @ mean) / (mean @ mean)
        assert 0 < factor < 1.001
        np.testing.assert_allclose(correction, -factor * mean, atol=1e-5)
    assert all("one solution for all" in row.notes[0] for row in report.layers)
    assert report.bytes_after < report.bytes_before


def test_a_dynamic_bias_stays_and_the_weight_is_converted() -> None:
    proto = model("g (float[n, 4, 6, 6] x, float[8] b) => (float[n, 8, 4, 4] y) { [c] y = Conv(x, k, b) }", k=constant("k", 8, 4, 3, 3))
    rng = np.random.default_rng(0)
    batches = [{"x": image(rng, 4, 4, 6, 6), "b": rng.standard_normal(8).astype(np.float32)} for _ in range(4)]
    found, report = magr_onnx.optimize(proto, batches)
    assert [row.bias_compensated for row in report.layers] == [False]
    assert error(found, proto, batches) < 0.02


def test_a_bias_is_added_only_where_the_policy_says_any() -> None:
    proto = model("g (float[n, 4, 6, 6] x) => (float[n, 8, 4, 4] y) { [c] y = Conv(x, k) }", k=constant("k", 8, 4, 3, 3))
    rng = np.random.default_rng(0)
    batches = [{"x": image(rng, 4, 4, 6, 6)} for _ in range(4)]
    for bias, inputs in (("any", 3), ("existing", 2), ("none", 2)):
        found = magr_onnx.optimize(proto, batches, bias=bias, conv_bits=4).model
        assert [len(node.inputs) for node in found.graph if node.op_type == "Conv"] == [inputs]


@pytest.mark.parametrize("form", FORMS)
def test_no_convolution_of_another_form_becomes_one_of_integers(form: Form, tmp_path: Path) -> None:
    """Between integer layers a DequantizeLinear next to a convolution would be fused into QLinearConv, a float bias or not."""
    proto = model(
        """g (float[n, 16, 8] x) => (float[n, 16, 4] y) {
            [first] a = MatMul(x, w)
            [c] c = Conv(a, k)
            [last] y = MatMul(c, v)
        }""",
        w=constant("w", 8, 8),
        k=constant("k", 16, 16, 1),
        kb=constant("kb", 16),
        v=constant("v", 8, 4),
    )
    batches = [{"x": np.random.default_rng(i).standard_normal((4, 16, 8)).astype(np.float32)} for i in range(4)]
    path = tmp_path / "q.onnx"
    report = magr_onnx.optimize(
        proto, batches, output=path, format="qdq-int8", quantize_outputs=True, target="x86-avx2", conv_form=form, include=["*"]
    ).report
    assert [row.op for row in report.layers] == ["Conv", "MatMul", "MatMul"]
    assert report.proof is not None
    assert report.proof.proved == report.proof.total
    ops = set(loaded_operators(path, tmp_path / "optimized.onnx"))
    assert ("QLinearConv" in ops) is (form == "integer")
    assert report.proof.total == (3 if form == "integer" else 2)
    assert ops & {"QLinearMatMul", "MatMulIntegerToFloat"}


@pytest.mark.parametrize(("shape", "group"), [((24, 16, 3, 3), 1), ((32, 1, 3, 3), 32), ((24, 1, 5, 5), 1), ((24, 8, 7), 2)])
def test_without_data_errors_cancel_over_the_taps_of_a_channel(shape: tuple[int, ...], group: int) -> None:
    """On images that are smooth, with channels of all signs, the output is better than rounded."""
    rng, axes = np.random.default_rng(0), [1] * (len(shape) - 2)
    size = (200, shape[1] * group, *([8] * len(axes)))
    x = (rng.standard_normal((*size[:2], *axes)) + 0.3 * rng.standard_normal(size)).astype(np.float32)
    source = ir.from_proto(convolution("Conv", x, shape, {"group": group}))
    rounded, cancelled = (magr_onnx.optimize(source, conv_bits=4, quantizer=name).model for name in ("rtn", "comq"))
    (expected,), *found = (session_run(made, x) for made in (source, rounded, cancelled))
    nearest, ours = (float(np.square(y - expected).mean()) for (y,) in found)
    assert ours < 0.5 * nearest


def session_run(made: ir.Model, x: Array) -> list[Any]:
    with Session(made) as session:
        return session.run({"x": x})


def test_patches_that_do_not_fit_are_said_and_taken_as_uncorrelated() -> None:
    found = ir.from_proto(net())
    with Session(found) as session:
        data = open_data(samples(4), session.inputs, 4)
    layers = find(found)[0]
    gathered = {"stem": 36 * 64, "depthwise": 216 * 64, "point": 24 * 64, "up": 96 * 256}
    one_hot = {"stem": 4 * 81, "depthwise": 24 * 81, "point": 24, "up": 24 * 16}
    sizes = {name: 4 * (gathered[name] + one_hot[name]) for name in gathered}
    for limit in (0, 10_000, 70_000, 99_840):
        large = conv_patches.unmeasured(found, layers, data, "cpu", limit)
        assert set(large) == {name for name, size in sizes.items() if size > limit}
    plan = Plan.parse("quantize{method=comq},compensate-bias,emit-qdq,convolutions")
    result = Converted()
    non_linear.convert_convolutions(result, found, found.clone(), plan, data, Rounding(), run_context(), patch_limit=70_000)
    assert {row.name: row.rows for row in result.rows} == {"stem": 1024, "depthwise": 1024, "point": 1024, "up": 0}
    assert [len(row.notes) for row in result.rows] == [0, 0, 0, 1]
    assert result.rows[3].notes[0].startswith("data-free: its patches take")
    assert [row.bias_compensated for row in result.rows] == [True, True, True, False]


def test_groups_of_gram_matrices_change_nothing() -> None:
    whole = magr_onnx.optimize(net(), samples(4), effort="fast", conv_bits=4)
    split = magr_onnx.optimize(net(), samples(4), effort="fast", conv_bits=4, gram_budget=1)
    for a, b in zip(whole.model.graph, split.model.graph, strict=True):
        if (weight := emitted_weight(a)) is not None:
            np.testing.assert_array_equal(weight, emitted_weight(b))


def test_convolutions_that_cannot_be_viewed_say_why() -> None:
    found = ir.from_proto(
        model(
            """g (float[n, 8, 6, 6] x, bool c, float[8, 8, 1, 1] given) => (float[n, 8, 6, 6] y, float[8, 8, 1, 1] k) {
                y = If(c) <
                    then_branch = t () => (float[n, 8, 6, 6] p) { [inside] p = Conv(x, k) },
                    else_branch = e () => (float[n, 8, 6, 6] q) { [lost] u = Conv(x, k) [output] q = Identity(u) }
                >
                [shown] z = Conv(x, k)
                [overridable] o = Conv(x, given)
                xd = Cast<to = 11>(x)
                [double] od = Conv(xd, kd)
                xb = Cast<to = 16>(x)
                [brain] ob = Conv(xb, kb)
                [odd] oo = Conv<group = 3>(x, k)
            }""",
            k=constant("k", 8, 8, 1, 1),
            given=constant("k", 8, 8, 1, 1),
            kd=constant("k", 8, 8, 1, 1, dtype=np.float64),
            kb=constant("k", 8, 8, 1, 1).astype(ml_dtypes.bfloat16),
        )
    )
    layers, skips = find(found)
    assert layers == []
    assert {s.name: s.reason for s in skips} == {
        "inside": "weight is a graph output",
        "lost": "weight is a graph output",
        "shown": "weight is a graph output",
        "overridable": "weight is a graph input that a caller may override",
        "double": "weight type is not float32 or float16",
        "brain": "weight type is not float32 or float16",
        "odd": "weight is a graph output",
    }
    assert find(ir.from_proto(net()), Selection(["point", "w1"]))[0][0].name == "stem"
    assert [s.name for s in find(ir.from_proto(net()), Selection(exclude=["p*"]))[1]] == ["point"]


def test_an_opset_that_cannot_be_raised_leaves_convolutions_float() -> None:
    proto = model(
        """g (float[n, 4, 8, 8] x) => (float[n, 5] y) {
            [c] h = Conv(x, k)
            a = Add<broadcast = 1, axis = 1>(h, b)
            p = GlobalAveragePool(a)
            f = Flatten(p)
            [fc] y = MatMul(f, w)
        }""",
        opset=6,  # its Add has an axis, which no converter knows to express
        ir_version=4,
        k=constant("k", 8, 4, 3, 3),
        b=constant("b", 8),
        w=constant("w", 8, 5),
    )
    found, demand = ir.from_proto(proto), Convolutions(form="dequantize")
    before = [str(node) for node in found.graph]
    assert not demand.prepare(found, None)
    assert [str(node) for node in found.graph] == before
    layers, skips = non_linear.select_convolutions(found, Plan(convolutions=demand))
    assert layers == []
    assert [(s.name, s.reason, s.detail) for s in skips] == [("c", ConvReason.OPSET, "from 6 to 13; export it with a newer opset")]


def test_the_pass_alone_writes_a_quantized_model_of_an_old_opset() -> None:
    """It has no DequantizeLinear with an axis, which the form beside quantized values needs."""
    proto = model(
        """g (float[n, 4, 8, 8] x) => (float[n, 8, 6, 6] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            [c] y = Conv(d, k)
        }""",
        opset=11,
        ir_version=6,
        k=constant("k", 8, 4, 3, 3),
        s=np.float32(0.05),
        z=np.int8(0),
    )
    result = Convolutions()(ir.from_proto(proto)).model
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    assert [n.op_type for n in result.graph].count("DequantizeLinear") == 2
    x = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    with Session(ir.from_proto(proto)) as before, Session(result, arithmetic=Arithmetic.UNOPTIMIZED) as after:
        y = before.run({"x": x})[0]
        np.testing.assert_allclose(after.run({"x": x})[0], y, atol=0.02 * np.abs(y).max())


def loaded_operators(path: Path, optimized: Path) -> list[str]:
    """What onnxruntime makes of a file at its default level."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in ir.load(optimized).graph]


def test_folded_weights_are_small_in_the_file_and_nothing_at_run_time(tmp_path: Path) -> None:
    proto = net()
    onnx.save(proto, tmp_path / "float.onnx")
    operators = loaded_operators(tmp_path / "float.onnx", tmp_path / "optimized.onnx")
    for bits in (4, 8):
        report = magr_onnx.optimize(proto, output=tmp_path / "q.onnx", conv_bits=bits, bits=8).report
        after = loaded_operators(tmp_path / "q.onnx", tmp_path / "optimized.onnx")
        assert sorted(op for op in after if "Conv" in op) == sorted(op for op in operators if "Conv" in op)
        assert not {"Cast", "Mul", "DequantizeLinear"} & set(after)
        assert report.bytes_after < (0.55 if bits == 4 else 0.7) * report.bytes_before  # of a file that is small to begin with
        assert ir.load(tmp_path / "q.onnx").opset_imports[""] == (21 if bits == 4 else 17)


def test_the_result_is_known_as_quantized(tmp_path: Path) -> None:
    for form in FLOAT_FORMS:
        found = magr_onnx.optimize(net(), conv_form=form).model
        assert {str(s.reason) for s in find(found)[1]} == {"weight is quantized already"}
        assert len(find(found)[1]) == 4


@pytest.mark.parametrize("shape", [[0, -1, 3, 3], [-1, 3, 3, 3], [4, 3, 0, 3]])
def test_a_quantized_kernel_that_is_reshaped_is_read_as_onnxruntime_computes_it(shape: list[int]) -> None:
    codes = np.random.default_rng(2).integers(-127, 128, (4, 3, 3, 3) if shape[2] == 0 else (4, 27)).astype(np.int8)
    proto = model(
        """g (float[n, 3, 6, 6] x) => (float[n, 4, 4, 8] y) {
            d = DequantizeLinear<axis = 0>(codes, scales)
            k = Reshape(d, shape)
            c = Conv(x, k)
            y = MatMul(c, w)
        }""",
        codes=codes,
        scales=np.exp2(-np.arange(4, 8, dtype=np.float32)),
        shape=np.array(shape),
        w=constant("w", 4, 8),
    )
    conv = next(node for node in ir.from_proto(proto).graph if node.op_type == "Conv")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("k", 1, None))
    kernel = ort.InferenceSession(proto.SerializeToString()).run(["k"], {"x": np.zeros((1, 3, 6, 6), np.float32)})[0]
    del proto.graph.output[-1]
    np.testing.assert_array_equal(emitted_weight(conv), to_matrices(np.asarray(kernel), "Conv", 1)[0])
    assert [row.name for row in magr_onnx.optimize(proto, include=["*"])[1].layers] == ["MatMul:y"]


def test_a_kernel_of_one_scalar_code_is_not_read() -> None:
    proto = model(
        "g (float[n, 1, 6] x) => (float[n, 1, 6] y) { d = DequantizeLinear(codes, scale) k = Reshape(d, shape) y = Conv(x, k) }",
        codes=np.array(3, np.int8),
        scale=np.float32(0.5),
        shape=np.array([1, 1, 1]),
    )
    assert emitted_weight(next(node for node in ir.from_proto(proto).graph if node.op_type == "Conv")) is None


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for bits in (2, 9):
        with pytest.raises(OptionError, match=f"convolutions: bits={bits} is not supported"):
            magr_onnx.optimize(net(), conv_bits=bits)
    with pytest.raises(OptionError, match="form='fast' is not known"):
        magr_onnx.optimize(net(), conv_form="fast")  # type: ignore[typeddict-item]
    with pytest.raises(OptionError, match="conv_form='fold' needs conv_bits"):
        magr_onnx.optimize(net(), conv_form="fold", conv_bits=None)
    with pytest.raises(OptionError, match="convolutions needs a quantize pass"):
        magr_onnx.optimize(net(), pipeline_text="magr,convolutions")


def test_numbers_that_are_none_are_named() -> None:
    proto = net()
    weight = constant("w1", 24, 4, 3, 3)
    weight[0, 0, 0, 0] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    with pytest.raises(NonFiniteError, match="weight of stem: 1 of 864 values are NaN"):
        magr_onnx.optimize(proto)
    batch = samples(1)[0]
    batch["x"][0, 0, 0, 0] = 1e30  # its square is no float32
    with pytest.raises(NonFiniteError, match=r"input of stem \(x\): NaN or infinite"):
        magr_onnx.optimize(net(), [batch])


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_groups_together_are_no_worse_than_one_by_one(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    g, k, n = 40, 9, 2
    weights = rng.standard_normal((g, k, n)).astype(np.float32) * 0.2
    x = rng.standard_normal((g, 500, k)) @ (np.eye(k) + 0.4 * rng.standard_normal((g, k, k)))
    grams = x.transpose(0, 2, 1) @ x / 500
    node = ir.node("Conv", [None, None], name="c")
    source = ir.val("k", ir.DataType.FLOAT, [g * n, 1, 3, 3])
    layer = ConvLayer("c", node, ConstantView(source, ir.tensor(from_matrices(weights, "Conv", (3, 3))), (), False), None, True, g)
    problems = problems_of(layer, [LayerStats(gram, mean, 500) for gram, mean in zip(grams, x.mean(axis=1), strict=True)])
    for method in ("rtn", "gptq", "comq"):
        plan = Plan(quantize=Quantize(method), convolutions=(stage := Convolutions(4, symmetric, alpha=0.0))).for_channels(stage)
        assert plan.quantize is not None
        assert plan.quantize.takes_groups(g, k)
        together = plan.solve_groups(problems)
        one_by_one = join_groups(problems, [plan.solve(problem) for problem in problems], False)
        assert together.record.error is not None
        assert one_by_one.record.error is not None
        assert together.record.error < 1.001 * one_by_one.record.error
        difference = split_groups(together.weight, g) - weights
        variance = np.square(np.einsum("gik,gkn->gin", x - x.mean(axis=1, keepdims=True), weights)).sum() / 500
        relative = np.einsum("gkn,gkl,gln->", difference, grams, difference) / variance
        assert together.record.error == pytest.approx(np.sqrt(relative), rel=1e-4)


def test_small_groups_find_the_best_codes_of_all() -> None:
    """Every choice of 3-bit codes of 3 rows, on the grid that was chosen: none is better for nearly all columns."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((30, 3, 1)).astype(np.float32)
    x = rng.standard_normal((30, 40, 3)) @ (np.eye(3) + 0.5 * rng.standard_normal((30, 3, 3)))
    grams = x.transpose(0, 2, 1) @ x / 40
    found = batched.solve(weights, grams, WeightSpec(3, None, True), 0.0)
    levels = np.array(list(itertools.product(range(8), repeat=3)))
    optimal = 0
    for weight, w, gram, left in zip(found.weights, weights, grams, found.errors, strict=True):
        difference = (levels - 4) * weight.scales[0, 0] - w[:, 0]
        best = np.einsum("ak,kl,al->a", difference, gram, difference).min()
        assert left >= best * (1 - 1e-5)
        optimal += left <= best * (1 + 1e-5)
    assert optimal >= 27


def test_groups_without_input_are_rounded() -> None:
    """A channel that is always zero has no Gram matrix to speak of; its weights are kept as they are, rounded."""
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((8, 9, 1)).astype(np.float32)
    found = batched.solve(weights, np.zeros((8, 9, 9)), WeightSpec(8, None, True), 0.01)
    for weight, w in zip(found.weights, weights, strict=True):
        assert np.abs(weight.dequantize() - w).max() < 0.02 * np.abs(w).max()


def test_a_budget_counts_convolutions_and_leaves_their_bits_alone(tmp_path: Path) -> None:
    proto, path = net(), tmp_path / "q.onnx"
    size = len(proto.SerializeToString())
    report = magr_onnx.optimize(proto, samples(8), output=path, target_size="60%", conv_bits=4).report
    assert report.bytes_after <= 0.6 * size
    assert [row.bits for row in report.layers if row.op != "Gemm"] == [4] * 4
    assert report.assignment is not None
    lossy = magr_onnx.optimize(net(), samples(8), max_loss="0.000001%", conv_bits=3).report
    assert lossy.assignment is not None
    assert not lossy.assignment.met  # what convolutions lose counts too


@pytest.mark.parametrize("budget", [{"target_size": "30%"}, {"max_loss": "1%"}])
def test_a_budget_without_linear_layers_is_refused(budget: dict[str, str]) -> None:
    """It would be ignored: convolutions get the bits of ``conv_bits``, and 8 where they are integers, whatever the size is to be."""
    x = np.zeros((1, 3, 6, 6), np.float32)
    proto, data = convolution("Conv", x, (4, 3, 3, 3), {}), [{"x": x + i} for i in range(4)]
    with pytest.raises(OptionError, match=r"budget chooses the bits of linear layers, and there is none to convert.*conv_bits"):
        magr_onnx.optimize(proto, data, conv_bits=8, **budget)
    if "target_size" in budget:  # one of loss may leave convolutions float
        with pytest.raises(OptionError, match="there is none to convert"):
            magr_onnx.optimize(net(), samples(8), exclude=["fc"], format="qdq-int8", **budget)
    assert [row.bits for row in magr_onnx.optimize(proto, data).report.layers] == [8]


def test_a_model_too_large_to_run_has_data_free_convolutions(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx")
    report = magr_onnx.optimize(tmp_path / "m.onnx", samples(8), output=tmp_path / "q.onnx", max_memory=20_000).report
    assert [row.rows for row in report.layers if row.op != "Gemm"] == [0] * 4
    assert any("convolutions are data-free: the model is too large" in note for note in report.notes)
    assert error(tmp_path / "q.onnx", net(), samples(2, seed=9)) < 0.2


def test_a_run_that_goes_on_writes_the_same_bytes(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx")
    for name in ("a.onnx", "b.onnx"):
        report = magr_onnx.optimize(tmp_path / "m.onnx", samples(8), output=tmp_path / name, resume=tmp_path / "job").report
        assert len(report.layers) == report.verified == 5
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize("group", [1, 2, 16])
def test_inputs_that_hardly_differ_from_their_mean_have_gram_matrices_that_can_be_factored(effort: Any, group: int) -> None:
    proto = model(
        f"g (float[n, 32, 8, 8] x) => (float[n, 16, 8, 8] y) {{ [c] y = Conv<group = {group}>(x, k, b) }}",
        k=constant("k", 16, 32 // group, 1, 1),
        b=constant("b", 16),
    )
    rng = np.random.default_rng(0)
    mean = 50 + 100 * rng.random((1, 32, 1, 1))
    data = [{"x": (mean + 1e-3 * rng.standard_normal((4, 32, 8, 8))).astype(np.float32)} for _ in range(8)]
    found, report = magr_onnx.optimize(proto, data, effort=effort, conv_bits=4)
    assert report.layers[0].bias_compensated
    assert error(found, proto, data) < 1e-4  # the bias takes up all there is


def test_a_mask_does_not_reach_convolutions_and_that_is_said() -> None:
    proto = model(
        """g (float[n, 4, 8] x, int64[n, 8] attention_mask) => (float[n, 6, 8] y, int64[n, 8] m) {
            [c] y = Conv<pads = [1, 1]>(x, k, b)
            m = Identity(attention_mask)
        }""",
        k=constant("k", 6, 4, 3),
        b=constant("b", 6),
    )
    rng = np.random.default_rng(0)
    batch = {"x": rng.standard_normal((5, 4, 8), np.float32), "attention_mask": np.eye(5, 8, dtype=np.int64)}
    report = magr_onnx.optimize(proto, [batch]).report
    assert [row.rows for row in report.layers] == [40]
    assert "mask 'attention_mask' marks no positions of convolutions: all of theirs count" in report.notes


def test_inspection_lists_convolutions() -> None:
    found = magr_onnx.inspect(net(), exclude=["point"])
    assert [(row["name"], row["op"], row["k"], row["n"], row["groups"]) for row in found.layers] == [
        ("fc", "Gemm", 16, 10, 1),
        ("stem", "Conv", 36, 24, 1),
        ("depthwise", "Conv", 9, 1, 24),
        ("up", "ConvTranspose", 96, 16, 1),
    ]
    assert [row.name for row in found.skipped] == ["point"]
