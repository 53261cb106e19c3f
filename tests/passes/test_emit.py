"""Emitters: the graph they write, the codes in it, and what onnxruntime computes with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from magr_onnx.core.types import LayerStats
from magr_onnx.errors import OptionError
from magr_onnx.models.zoo import trap
from magr_onnx.passes import CompensateBias, EmitMatMulNBits, EmitQDQ, LayerPass, Plan, Quantize, SolvedLayer, attach, find, run_layers
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests import graphs
from tests.graphs import FORMS, feeds, proto


def emit(model: ir.Model, *passes: LayerPass) -> tuple[ir.Model, list[SolvedLayer]]:
    solved: list[SolvedLayer] = []
    plan = Plan.of(passes)
    plan.check()
    plan.prepare(model)
    run_layers(plan, find(model)[0], lambda _: None, solved.append)
    proto(model)  # valid for onnx's checker
    return model, solved


def run(model: ir.Model, arithmetic: Arithmetic = Arithmetic.UNOPTIMIZED) -> np.ndarray:
    with Session(model, arithmetic=arithmetic) as session:
        return session.run(feeds(model))[0].astype(np.float64)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


EMITTERS: dict[str, LayerPass] = {"matmulnbits": EmitMatMulNBits(), "qdq": EmitQDQ()}


@pytest.mark.parametrize("emitter", EMITTERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_with_the_chosen_codes(form: str, emitter: str) -> None:
    model, (done,) = emit(FORMS[form](), Quantize(method="rtn"), EMITTERS[emitter])
    assert done.solution.quantized is not None
    assert np.array_equal(read_weights(model)["y"], done.solution.quantized.dequantize())
    assert [n for n in model.graph if n.op_type in ("Gemm", "Transpose", "Constant")] == []
    assert "w" not in model.graph.initializers
    x = feeds(model)["x"].astype(np.float64)
    bias = done.layer.read_bias()
    expected = x @ done.solution.quantized.dequantize() + (0 if bias is None else bias)
    assert relative(run(model), expected) < 1e-5
    assert relative(run(model, Arithmetic.FLOAT_QDQ), expected) < 1e-5
    assert relative(run(model, Arithmetic.DEFAULT), expected) < 2e-2  # int8 activations


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [16, 32, 48, 64, 256, 512, None])
@pytest.mark.parametrize(("emitter", "bits"), [(e, b) for e in EMITTERS for b in (2, 3, 4, 8) if (e, b) != ("qdq", 2)])
def test_every_grid_runs(emitter: str, bits: int, block: int | None, symmetric: bool) -> None:
    k = 600 if block in (256, 512, None) else 100
    quantize = Quantize(method="rtn", bits=bits, block_size=block, symmetric=symmetric)
    model, (done,) = emit(graphs.matmul_bias(k, 24), quantize, EMITTERS[emitter])
    assert done.solution.quantized is not None
    weight = done.solution.quantized.dequantize()
    assert np.array_equal(read_weights(model)["y"], weight)
    bias = done.layer.read_bias()
    expected = feeds(model)["x"].astype(np.float64) @ weight + bias
    for arithmetic, bound in ((Arithmetic.UNOPTIMIZED, 1e-5), (Arithmetic.FLOAT_QDQ, 1e-5), (Arithmetic.DEFAULT, 2e-2)):
        assert relative(run(model, arithmetic), expected) < bound


@pytest.mark.parametrize("emitter", EMITTERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision(emitter: str, bits: int) -> None:
    model, (done,) = emit(graphs.matmul_bias(64, 24, dtype=np.float16), Quantize(method="rtn", bits=bits), EMITTERS[emitter])
    assert done.solution.quantized is not None
    weight = done.solution.quantized.dequantize()
    assert np.array_equal(read_weights(model)["y"], weight)
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    bias = done.layer.read_bias()
    expected = feeds(model)["x"].astype(np.float64) @ weight + bias
    for arithmetic in (Arithmetic.UNOPTIMIZED, Arithmetic.FLOAT_QDQ):
        assert relative(run(model, arithmetic), expected) < 3e-3
    assert relative(run(model, Arithmetic.DEFAULT), expected) < 2e-2


def test_values_of_shared_codes_are_named_after_their_readers() -> None:
    """The first reader finds the codes unread, and names its value after them."""
    text = "g (float[n, 64] x) => (float[n, 24] y, float[n, 24] z) { [a] y = MatMul(x, w)\n [b] h = Neg(x)\n [c] z = MatMul(h, w) }"
    shared = trap.model(text, w=trap.constant("w", 64, 24))
    model, _ = emit(ir.from_proto(shared), Quantize(method="rtn"), EmitQDQ())
    assert [n.outputs[0].name for n in model.graph if n.op_type == "DequantizeLinear"] == ["w_q4_dequantized", "c_dequantized"]


@pytest.mark.parametrize(
    ("make", "nodes"),
    [
        (graphs.matmul, ["MatMul", "Add"]),
        (lambda: graphs.gemm(bias=None, alpha=0.5, beta=0.25), ["Gemm"]),
        (lambda: graphs.gemm(beta=0.0), ["Gemm"]),
        (lambda: graphs.gemm(beta=2.0), ["Gemm"]),
        (lambda: graphs.matmul_bias(bias_first=True), ["MatMul", "Add"]),
    ],
)
def test_a_float_layer_gets_the_bias_that_a_plan_gives_it(make: Callable[[], ir.Model], nodes: list[str]) -> None:
    """Without an emitter, layer by layer and in a sequence."""
    plan = Plan.parse("quantize{method=rtn,bits=2},compensate-bias{bias=any}")
    x = feeds(make())["x"].astype(np.float64)
    flat = x.reshape(-1, x.shape[-1])
    stats = LayerStats(flat.T @ flat / len(flat), flat.mean(axis=0), len(flat))
    model, sequence, done = make(), make(), list[SolvedLayer]()
    run_layers(plan, find(model)[0], lambda _: stats, done.append)
    attach(find(sequence)[0][0], stats)
    ir.passes.Sequential(*plan.passes)(sequence)
    solution = done[0].solution
    assert solution.bias is not None
    for result in (model, sequence):
        assert [n.op_type for n in result.graph][-len(nodes) :] == nodes
        assert [v.name for v in result.graph.outputs] == ["y"]
        assert relative(run(result), x @ solution.weight + solution.bias) < 1e-6
        layer = find(result)[0][0]
        np.testing.assert_allclose(layer.read_bias(), solution.bias, rtol=1e-6, atol=1e-7)


def fused(model: ir.Model, tmp_path: object) -> list[str]:
    """Operators after onnxruntime's default optimizations."""
    path = f"{tmp_path}/optimized.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = path
    ort.InferenceSession(proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(path).graph.node]


@pytest.mark.parametrize("block", [32, 48, 512, None])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_onnxruntime_fuses_every_qdq_form(bits: int, block: int | None, tmp_path: object) -> None:
    for make in (graphs.matmul_bias, graphs.gemm):
        model, _ = emit(make(600, 24), Quantize(method="rtn", bits=bits, block_size=block), EmitQDQ())
        operators = fused(model, tmp_path)
        assert "MatMulNBits" in operators
        assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(operators)


@pytest.mark.parametrize("clip", ["Relu", "Clip", "Tanh"])
@pytest.mark.parametrize("shape", ["batch, 64", "batch, time, 64"])
@pytest.mark.parametrize("product", ["MatMul(x, w)", "MatMul(x, w) a = Add(p, b)", "Gemm(x, w, b)", "MatMul(x, w) a = Add(p, x)"])
def test_onnxruntime_fuses_products_before_any_operator(product: str, shape: str, clip: str, tmp_path: object) -> None:
    if "Gemm" in product and "time" in shape:
        pytest.skip("a Gemm has two axes")
    limits = ", zero, six" if clip == "Clip" else ""
    name = "a" if "a =" in product else "p"
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ p = {product} c = {clip}({name}{limits}) y = MatMul(c, v) }}"
    constants = {"w": trap.constant("w", 64, 64), "v": trap.constant("v", 64, 64), "b": trap.constant("b", 64)}
    limit = {"zero": np.float32(0), "six": np.float32(6)} if limits else {}
    source = ir.from_proto(trap.model(text, opset=21, ir_version=10, **constants, **{n: np.asarray(v) for n, v in limit.items()}))
    expected = run(source)
    model, done = emit(source, Quantize(method="rtn", bits=8), EmitQDQ())
    assert {layer.layer.output.name for layer in done} <= set(read_weights(model))
    operators = fused(model, tmp_path)
    assert not {"MatMul", "Gemm", "FusedGemm", "DequantizeLinear"} & set(operators)
    assert relative(run(model, Arithmetic.FLOAT_QDQ), expected) < 0.03


def test_golden_matmulnbits() -> None:
    model, _ = emit(graphs.chain(), Quantize(method="rtn"), EmitMatMulNBits())
    nodes = [(n.domain, n.op_type, [None if v is None else v.name for v in n.inputs], n.outputs[0].name) for n in model.graph]
    assert nodes == [
        ("com.microsoft", "MatMulNBits", ["x", "w1_q4", "w1_q4_scales", "w1_q4_zero_points", None, "w1_bias"], "up_out"),
        ("", "Relu", ["up_out"], "relu_1_out"),
        ("com.microsoft", "MatMulNBits", ["relu_1_out", "w2_q4", "w2_q4_scales", "w2_q4_zero_points", None, "w2_bias"], "down_bias_out"),
        ("", "Transpose", ["down_bias_out"], "turn_out"),
        ("", "MatMul", ["down_bias_out", "turn_out"], "y"),
    ]
    node = next(iter(model.graph))
    assert {a: v.as_int() for a, v in node.attributes.items()} == {"K": 48, "N": 64, "bits": 4, "block_size": 32}
    shapes = {name: list(v.shape.numpy()) for name, v in model.graph.initializers.items() if v.shape is not None}
    assert shapes == {
        "w1_q4": [64, 2, 16],
        "w1_q4_scales": [64, 2],
        "w1_q4_zero_points": [64, 1],
        "w1_bias": [64],
        "w2_q4": [32, 2, 16],
        "w2_q4_scales": [32, 2],
        "w2_q4_zero_points": [32, 1],
        "w2_bias": [32],
    }
    assert model.opset_imports == {"": 20, "com.microsoft": 1}


def test_golden_qdq_raises_opset_and_ir_version() -> None:
    model, _ = emit(graphs.chain(), Quantize(method="rtn"), EmitQDQ())
    assert (model.opset_imports, model.ir_version) == ({"": 21}, 10)
    nodes = [(n.op_type, [v and v.name for v in n.inputs], n.outputs[0].name) for n in model.graph]
    assert nodes[:4] == [
        ("DequantizeLinear", ["w1_q4", "w1_q4_scales", "w1_q4_zero_points"], "w1_q4_dequantized"),
        ("MatMul", ["x", "w1_q4_dequantized"], "up_out_product"),
        ("Add", ["up_out_product", "w1_bias"], "up_out_summed"),
        ("Sum", ["up_out_summed"], "up_out"),
    ]
    weight = model.graph.initializers["w1_q4"]
    assert (weight.dtype, list(weight.shape.numpy())) == (ir.DataType.UINT4, [48, 64])  # type: ignore[union-attr]


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_qdq_converts_older_opsets_without_changing_results(opset: int) -> None:
    before, after = graphs.chain(opset=opset), graphs.chain(opset=opset)
    emit(after, Quantize(method="rtn", bits=8), EmitQDQ())
    assert after.opset_imports[""] == 21
    assert relative(run(after), run(before)) < 0.02


@pytest.mark.parametrize(("dtype", "opset"), [(np.float32, 13), (np.float16, 19)])
def test_qdq_of_a_channel_needs_no_new_opset(dtype: type, opset: int) -> None:
    model, _ = emit(graphs.matmul_bias(64, 24, dtype=dtype, opset=13), Quantize(method="rtn", bits=8, block_size=None), EmitQDQ())
    assert (model.opset_imports[""], model.ir_version) == (opset, 9)
    run(model)


def test_qdq_alone_after_other_passes() -> None:
    model = graphs.chain()
    ir.passes.Sequential(Quantize(method="rtn"), EmitQDQ())(model)
    assert model.opset_imports[""] == 21
    assert len(read_weights(model)) == 2


def test_symmetric_three_bits_need_no_zero_points() -> None:
    model, _ = emit(graphs.matmul(), Quantize(method="rtn", bits=3, symmetric=True), EmitMatMulNBits())
    node = next(n for n in model.graph if n.op_type == "MatMulNBits")
    assert len(node.inputs) == 3
    assert node.attributes["bits"].as_int() == 4


def test_bias_any_gives_matmulnbits_a_bias() -> None:
    model = graphs.matmul()
    solved: list[SolvedLayer] = []
    x = feeds(model)["x"].reshape(-1, graphs.K).astype(np.float64)
    stats = LayerStats(x.T @ x / len(x), x.mean(axis=0), len(x))
    plan = Plan(quantize=Quantize(bits=2), bias=CompensateBias("any"), emitter=EmitMatMulNBits())
    run_layers(plan, find(model)[0], lambda _: stats, solved.append)
    node = next(iter(model.graph))
    assert node.inputs[5] is not None
    expected = run(graphs.matmul())
    np.testing.assert_allclose((run(model) - expected).reshape(len(x), -1).mean(axis=0), 0, atol=1e-4 * np.abs(expected).max())


def test_qdq_refuses_two_bits() -> None:
    with pytest.raises(OptionError, match="use format matmulnbits"):
        Plan.of((Quantize(bits=2), EmitQDQ())).check()


@pytest.mark.parametrize("emitter", EMITTERS.values())
def test_odd_blocks_and_missing_quantize_are_refused(emitter: LayerPass) -> None:
    with pytest.raises(OptionError, match="multiple of 16") as caught:
        Plan.of((Quantize(block_size=20), emitter)).check()
    assert "32" not in str(caught.value)  # 48 is as good
    with pytest.raises(OptionError, match="needs a quantize pass"):
        Plan.of((emitter,)).check()


def test_weight_shared_by_two_nodes_is_emitted_for_both() -> None:
    b = graphs.Builder()
    x = b.input("x", ["batch", "time", 40])
    weight = b.constant("w", graphs.random(40, 40))
    hidden = b.node("MatMul", [x, weight], "one")
    model = b.model(b.node("MatMul", [hidden, weight], "two"), ["batch", "time", 40])
    emit(model.clone(), Quantize(method="rtn"), EmitQDQ())
    emit(model, Quantize(method="rtn"), EmitMatMulNBits())
    assert [n.op_type for n in model.graph] == ["MatMulNBits"] * 2
    assert "w" not in model.graph.initializers
    first, second = model.graph
    assert second.inputs[0] is first.outputs[0]  # not a value of the replaced graph that has the same name
