"""Twin ranges: which values get two, that nothing changes in float, what they save, the kernels and the proof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.models import bundled
from magr_onnx.passes import Plan, TwinRanges, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.rewrites.base import Context
from magr_onnx.passes.rewrites.twin_ranges import threshold
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.graphs import Array, Builder, proto, random
from tests.helpers import few_samples
from tests.passes.test_emit import fused, relative

K, N = 48, 24


def constant(b: Builder, value: float) -> ir.Value:
    return b.constant(f"c{len(b.initializers)}", np.float32(value).reshape(()))


def gelu(b: Builder, u: ir.Value) -> ir.Value:
    return b.node("Gelu", [u], "gelu")


def erf(b: Builder, u: ir.Value) -> ir.Value:
    """``0.5 u (1 + erf(u / sqrt 2))`` as torch writes it."""
    gate = b.node("Add", [b.node("Erf", [b.node("Div", [u, constant(b, 2**0.5)], "over")], "erf"), constant(b, 1)], "gate")
    return b.node("Mul", [b.node("Mul", [u, gate], "gated"), constant(b, 0.5)], "half")


def erf_half_first(b: Builder, u: ir.Value) -> ir.Value:
    gate = b.node("Add", [constant(b, 1), b.node("Erf", [b.node("Mul", [u, constant(b, 0.5**0.5)], "over")], "erf")], "gate")
    return b.node("Mul", [b.node("Mul", [u, constant(b, 0.5)], "half"), gate], "gated")


def tanh(b: Builder, u: ir.Value) -> ir.Value:
    cube = b.node("Mul", [b.node("Pow", [u, constant(b, 3)], "cube"), constant(b, 0.044715)], "small")
    inner = b.node("Mul", [b.node("Add", [u, cube], "sum"), constant(b, 0.7978845608)], "inner")
    gate = b.node("Add", [b.node("Tanh", [inner], "tanh"), constant(b, 1)], "gate")
    return b.node("Mul", [u, b.node("Mul", [gate, constant(b, 0.5)], "half")], "gated")


def silu(b: Builder, u: ir.Value) -> ir.Value:
    return b.node("Mul", [u, b.node("Sigmoid", [u], "sigmoid")], "gated")


def softmax(b: Builder, u: ir.Value) -> ir.Value:
    return b.node("Softmax", [b.node("Mul", [u, constant(b, 3)], "sharp")], "softmax", axis=-1)


SOURCES: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {f.__name__: f for f in (gelu, erf, erf_half_first, tanh, silu, softmax)}


def swiglu(b: Builder, u: ir.Value) -> ir.Value:
    up = b.node("MatMul", [u, b.constant("wu", random(K, K, seed=8))], "up")
    return b.node("Mul", [up, silu(b, u)], "unit")


def sigmoid_gate(b: Builder, u: ir.Value) -> ir.Value:
    gate = b.node("Sigmoid", [b.node("MatMul", [u, b.constant("wg", random(K, K, seed=8))], "gate")], "open")
    return b.node("Mul", [u, gate], "unit")


def relu(b: Builder, u: ir.Value) -> ir.Value:
    return b.node("Relu", [u], "relu")


def square(b: Builder, u: ir.Value) -> ir.Value:
    return b.node("Mul", [u, u], "square")


def model_of(source: Callable[[Builder, ir.Value], ir.Value], form: str = "matmul_bias", rank: int = 3) -> ir.Model:
    b = Builder()
    dims: list[int | str] = ["batch", "time"] if rank == 3 else ["batch"]
    value = source(b, b.input("x", [*dims, K]))
    value.shape = ir.Shape([*dims, K])
    weight, bias = b.constant("w", random(K, N)), b.constant("b", random(N, seed=1))
    if form.startswith("gemm"):
        y = b.node("Gemm", [value, weight, *([bias] if form == "gemm" else [])], "layer")
    else:
        y = b.node("MatMul", [value, weight], "layer")
        y = b.node("Add", [y, bias], "bias") if form == "matmul_bias" else y
    return b.model(b.node("Tanh", [y], "end"), [*dims, N])


def feed(model: ir.Model, seed: int = 0) -> dict[str, Array]:
    shape = model.graph.inputs[0].shape
    assert shape is not None
    size = (32, 3, K) if len(shape) == 3 else (96, K)
    return {"x": np.random.default_rng(seed).standard_t(3, size).astype(np.float32)}


def outputs(model: ir.Model) -> Array:
    with Session(model) as session:
        found: Array = session.run(feed(model, 9))[0].astype(np.float64)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_float_outputs_stay_the_same(source: str) -> None:
    model = model_of(SOURCES[source])
    before = outputs(model)
    t = threshold(find(model)[0][0].x, K)
    assert t == (0 if source != "softmax" else pytest.approx(96 ** (-1 / 3)))
    (note,) = TwinRanges().rewrite(model, Context())
    assert note == "twin-ranges: 1 inputs of 1 layers have two ranges (layer)"
    proto(model)
    assert relative(outputs(model), before) < 1e-6
    assert [layer.name for layer in find(model)[0]] == ["layer", "layer_large"]
    assert len(find(model, Selection(["w"]))[0]) == 2


@pytest.mark.parametrize("source", [swiglu, sigmoid_gate, relu, square])
def test_other_values_keep_one_range(source: Callable[[Builder, ir.Value], ir.Value]) -> None:
    model = model_of(source)
    assert TwinRanges().rewrite(model, Context(selection=Selection(["layer"]))) == []


@pytest.mark.parametrize("source", ["gelu", "softmax"])
def test_emitted_models_lose_less(source: str) -> None:
    model = model_of(SOURCES[source])
    expected = outputs(model)
    errors = []
    for twin in (False, True):
        made, report = magr_onnx.optimize(model, [feed(model, s) for s in range(3)], format="qdq-int8", twin_ranges=twin)
        assert report.verified == len(report.layers) == 1 + twin
        errors.append(relative(outputs(made), expected))
    assert errors[1] < 0.9 * errors[0]


FORMS = [("matmul", 3), ("matmul_bias", 3), ("matmul", 2), ("matmul_bias", 2), ("gemm", 2), ("gemm_no_bias", 2)]


@pytest.mark.parametrize(("form", "rank"), FORMS)
def test_both_halves_run_on_integer_kernels_and_neither_overflows(form: str, rank: int, tmp_path: Path) -> None:
    model = model_of(gelu, form, rank)
    made, report = magr_onnx.optimize(model, [feed(model)], format="qdq-int8", twin_ranges=True, target="x86-avx2")
    operators = fused(made, tmp_path)
    assert sum(o in ("MatMulIntegerToFloat", "QGemm") for o in operators) == 2
    assert not {"MatMul", "Gemm", "FusedGemm", "FusedMatMul"} & set(operators)
    assert report.proof is not None
    assert (report.proof.proved, report.proof.total) == (2, 2)
    checked = magr_onnx.verify(made, target="x86-avx2")
    assert [layer.verdict for layer in checked.layers] == ["proved", "proved"]


def test_layers_of_one_value_share_its_parts() -> None:
    b = Builder()
    value = gelu(b, b.input("x", ["batch", "time", K]))
    one, two = (b.node("MatMul", [value, b.constant(f"w{i}", random(K, N, seed=i))], f"layer{i}") for i in range(2))
    model = b.model(b.node("Sub", [one, two], "end"), ["batch", "time", N])
    before = outputs(model)
    assert TwinRanges().rewrite(model, Context()) == ["twin-ranges: 1 inputs of 2 layers have two ranges (layer0, layer1)"]
    assert [n.op_type for n in model.graph].count("Min") == [n.op_type for n in model.graph].count("Relu") == 1
    assert relative(outputs(model), before) < 1e-5


def test_half_precision() -> None:
    b = Builder()
    x = b.input("x", ["batch", "time", K], ir.DataType.FLOAT16)
    layer = b.node("MatMul", [gelu(b, x), b.constant("w", random(K, N, dtype=np.float16))], "layer")
    model = b.model(layer, ["batch", "time", N])
    inputs = {"x": feed(model)["x"].astype(np.float16)}
    with Session(model) as session:
        (before,) = session.run(inputs)
    made, _ = magr_onnx.optimize(model, [inputs], format="qdq-int8", twin_ranges=True)
    with Session(made) as session:
        (after,) = session.run(inputs)
    assert after.dtype == np.float16
    assert relative(after.astype(np.float64), before.astype(np.float64)) < 2e-2


@pytest.mark.slow
def test_bundled_model(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    errors = []
    for twin in (False, True):
        options: dict[str, Any] = {"format": "qdq-int8", "quantizer": "rtn", "activation_range": "min-max", "include": ["node_MatMul_*"]}
        _, report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=out, twin_ranges=twin, **options)
        assert report.verified == len(report.layers) == 20 + 5 * twin
        checked = magr_onnx.validate(
            bundled.MODEL, out, few_samples(bundled.HELD_OUT), arithmetics=(Arithmetic.DEFAULT,), layers=False, latency=False
        )
        errors.append(min(m.sqnr_db for outputs in checked.arithmetics.values() for m in outputs))
    assert errors[1] > errors[0] + 0.1


@pytest.mark.parametrize("form", ["matmulnbits", "qdq", "dynamic-int8"])
def test_other_formats_refuse_it(form: Any) -> None:
    with pytest.raises(magr_onnx.OptionError, match="twin-ranges is for static 8-bit inputs: use format qdq-int8"):
        magr_onnx.build_pipeline(format=form, twin_ranges=True)


def test_bad_order() -> None:
    with pytest.raises(magr_onnx.OptionError, match="twin-ranges must come before quantize-activations"):
        Plan.parse("quantize-activations,twin-ranges,quantize{block_size=none},emit-qdq-int8").check()
