"""The overflow proof: every form read, extremes against enumeration, boundaries, witnesses, and an independent prover."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import magr_onnx
from magr_onnx import OptionError
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.kernels import on_accumulator, on_target
from magr_onnx.core.overflow.proof import IntegerDot, KernelRegisters, Proof, hold, prove, simulate, wrap
from magr_onnx.core.overflow.targets import TARGETS, Kernel, find_target
from magr_onnx.passes.integer.dot_products import find
from magr_onnx.report.reasons import IntegerReason, Skip
from magr_onnx.report.verification import LayerVerdict, Verification
from tests import dots, graphs
from tests.cli.test_cli import run
from tests.dots import F32, S8, U8, model, node, quantized_x, scalars
from tests.helpers import PATIENCE

Array = npt.NDArray[Any]


def found_in(proto: onnx.ModelProto) -> tuple[list[IntegerDot], list[Skip]]:
    found = list(find(ir.from_proto(proto)))
    return [d for d in found if isinstance(d, IntegerDot)], [s for s in found if isinstance(s, Skip)]


def dot_of(proto: onnx.ModelProto) -> IntegerDot:
    found, skips = found_in(proto)
    assert len(found) == 1, skips
    return found[0]


def skip_of(proto: onnx.ModelProto) -> Skip:
    found, skips = found_in(proto)
    assert (found, len(skips)) == ([], 1)
    return skips[0]


def verdict(proto: Any, target: str = "x86-avx2") -> LayerVerdict:
    found = magr_onnx.verify(proto, target=target)
    assert len(found.layers) == 1, found.skipped
    return found.layers[0]


# Reading


@pytest.mark.parametrize("name", dots.FORMS)
def test_every_form_is_read(name: str) -> None:
    build, form, expected = dots.FORMS[name]
    proto = build()
    onnx.checker.check_model(proto)
    dot = dot_of(proto)
    assert (dot.form, dot.name, dot.weight) == (form, "layer", "w")
    np.testing.assert_array_equal(dot.codes, expected)


@pytest.mark.parametrize("name", dots.FORMS)
def test_every_form_runs_in_onnxruntime(name: str) -> None:
    """A form that onnxruntime does not load is no form to prove anything about."""
    if name == "MatMulInteger, vector":
        pytest.skip("onnxruntime 1.31 does not multiply by a vector in MatMulInteger")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    ort.InferenceSession(dots.FORMS[name][0]().SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", [n for n, f in dots.FORMS.items() if f[1] == "blockwise" and n.startswith("weight-only")])
def test_weight_only_forms_are_those_that_are_fused(name: str, tmp_path: Path) -> None:
    proto = dots.FORMS[name][0]()
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (fused,) = onnx.load(tmp_path / "fused.onnx").graph.node
    attributes = {a.name: a.i for a in fused.attribute}
    dot = dot_of(proto)
    assert (fused.op_type, attributes["accuracy_level"]) == ("MatMulNBits", 4)
    assert (min(attributes["block_size"], dot.k), attributes["bits"]) == (dot.block, dot.bits)


def test_types_ranges_and_zero_points() -> None:
    dot = dot_of(dots.matmul_integer(dots.WU, S8, -3, 9))
    assert (dot.x_type, dot.w_type, dot.x_range, dot.x_zeros) == ("int8", "uint8", (-128, 127), (-3,))
    assert dot.w_zeros is not None
    assert (dot.w_zeros == 9).all()
    assert dot_of(dots.dynamic_chain(dots.W)).x_zeros == (0, 255)
    assert dot_of(dots.qdq(dots.W, x=np.uint16)).x_range == (0, 65535)
    assert dot_of(dots.matmul_nbits(dots.NB)).x_range == (-127, 127)


def test_int8_from_outside_stays_outside_when_it_is_moved() -> None:
    nodes = [node("Transpose", ["x"], "t"), node("DequantizeLinear", ["t", "xs", "xz"], "dx")]
    nodes += [node("DequantizeLinear", ["w", "ws", "wz"], "dw"), node("MatMul", ["dx", "dw"])]
    assert not dot_of(model(nodes, {"w": dots.W, **dots.scalars(np.int8)}, (S8, [12, "m"]))).quantized_in_graph
    assert dot_of(dots.qdq(dots.W, x=np.int8)).quantized_in_graph


def test_biases_are_read() -> None:
    assert dot_of(dots.qgemm(dots.W, dots.BIAS)).bias.tolist() == dots.BIAS.tolist()  # type: ignore[union-attr]
    assert dot_of(dots.qdq(dots.CONV, "Conv", bias=dots.BIAS[:4])).bias.tolist() == dots.BIAS[:4].tolist()  # type: ignore[union-attr]


def test_weights_in_constants_behind_transposes_and_reshapes() -> None:
    w = dots.W
    held = helper.make_node("Constant", [], ["c"], name="c", value=onnx.numpy_helper.from_array(np.ascontiguousarray(w.T)))
    turn = node("Transpose", ["c"], "t", perm=[1, 0])
    assert (dot_of(model([held, turn, node("MatMulInteger", ["x", "t"])], {}, y=TensorProto.INT32)).codes == w).all()
    shape = {"w": w.reshape(-1), "s": np.array([12, -1])}
    reshape = [node("Reshape", ["w", "s"], "r"), node("MatMulInteger", ["x", "r"])]
    assert (dot_of(model(reshape, shape, y=TensorProto.INT32)).codes == w).all()


def test_activation_types_are_found_behind_nodes_that_move_data() -> None:
    nodes = [node("QuantizeLinear", ["x", "xs", "xz"], "q"), node("Transpose", ["q"], "t"), node("MatMulInteger", ["t", "w"])]
    assert dot_of(model(nodes, {"w": dots.W, **dots.scalars(np.int8)}, (F32, ["k", "m"]), TensorProto.INT32)).x_type == "int8"


def test_a_zero_point_that_is_cast_at_run_time_has_a_type() -> None:
    """As quantize_dynamic writes it in opset 10, which has no DynamicQuantizeLinear."""
    nodes = [node("Cast", ["zf"], "z", to=U8), node("QuantizeLinear", ["x", "xs", "z"], "q"), node("MatMulInteger", ["q", "w", "z"])]
    constants = {"w": dots.W, "xs": np.float32(1), "zf": np.float32(3)}
    dot = dot_of(model(nodes, constants, (F32, ["k", "m"]), TensorProto.INT32))
    assert (dot.x_type, dot.x_range, dot.x_zeros) == ("uint8", (0, 255), (0, 255))


@pytest.mark.parametrize(("stored", "kind", "read"), [("int4", "int8", True), ("uint8", "int8", False), ("int8", "uint8", False)])
def test_codes_behind_a_cast_that_keeps_them_are_constants(stored: str, kind: str, read: bool) -> None:
    """As convolutions with weights of 4 bits have them; a Cast that would wrap some codes of a type is not read."""
    codes = np.random.default_rng(0).integers(0, 8, (4, 3, 3, 3)).astype(ir.DataType[stored.upper()].numpy())
    tensor = ir.to_proto(ir.tensor(codes, name="stored"))
    nodes = [node("Cast", ["stored"], "w", to=ir.DataType[kind.upper()]), node("ConvInteger", ["x", "w"])]
    proto = model(nodes, {}, (U8, ["n", 3, "h", "v"]), TensorProto.INT32)
    proto.graph.initializer.append(tensor)
    proto.opset_import[0].version = 21
    if read:
        assert (dot_of(proto).codes == codes.astype(int).reshape(4, -1).T).all()
    else:
        assert skip_of(proto).reason is IntegerReason.DYNAMIC_WEIGHT


def float_model() -> onnx.ModelProto:
    return ir.to_proto(graphs.matmul())


def named(op: str, *inputs: str, constants: dict[str, Array], x: int = U8, **attributes: Any) -> onnx.ModelProto:
    return model([node(op, inputs, **attributes)], constants, (x, ["m", "k"]), TensorProto.INT32)


SKIPS: dict[str, tuple[onnx.ModelProto, IntegerReason]] = {
    "float": (float_model(), IntegerReason.FLOAT),
    "level 1": (dots.matmul_nbits(dots.NB, level=1), IntegerReason.FLOAT),
    "level unset": (dots.matmul_nbits(dots.NB, level=None), IntegerReason.FLOAT),
    "two activations": (named("MatMulInteger", "x", "x", constants={}), IntegerReason.DYNAMIC_WEIGHT),
    "constant left": (named("MatMulInteger", "w", "x", constants={"w": dots.W}), IntegerReason.CONSTANT_LEFT),
    "scale along K": (dots.qdq(dots.W, scales=np.arange(1, 13, dtype=np.float32), axis=0), IntegerReason.SCALE),
    "float activation, Gemm transB": (dots.weight_only(dots.W, np.ones(5, np.float32), op="Gemm"), IntegerReason.FLOAT),
    "other operator": (named("Einsum", "x", "x", constants={}, x=F32, equation="mk,nk->mn"), IntegerReason.OPERATOR),
    "int32 weight": (dots.qdq(dots.W.astype(np.int32)), IntegerReason.WEIGHT_TYPE),
}
SKIPS |= {
    "blocks along N": (dots.weight_only(dots.codes(12, 32), np.ones((12, 2), np.float32), 1, 16), IntegerReason.FLOAT),
    "small blocks": (dots.weight_only(dots.W[:8], np.ones((2, 5), np.float32), 0, 4), IntegerReason.FLOAT),
    "zero points do not fit": (
        named("MatMulInteger", "x", "w", "", "z", constants={"w": dots.W, "z": np.zeros(4, np.int8)}),
        IntegerReason.SHAPE,
    ),
}
SKIPS["float activation, Gemm transB"][0].graph.node[-1].attribute.append(helper.make_attribute("transB", 1))


@pytest.mark.parametrize("name", SKIPS)
def test_what_is_not_proved_says_why(name: str) -> None:
    proto, reason = SKIPS[name]
    assert skip_of(proto).reason is reason


@pytest.mark.parametrize(("slot", "reason"), [(2, IntegerReason.ZERO_POINT), (1, IntegerReason.OVERRIDABLE)])
def test_inputs_instead_of_constants(slot: int, reason: IntegerReason) -> None:
    proto = dots.matmul_integer(dots.W)
    name, kind, shape = ("wz", S8, []) if slot == 2 else ("w", S8, [12, 5])
    proto.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    if slot == 2:
        del proto.graph.initializer[[i.name for i in proto.graph.initializer].index("wz")]
    assert skip_of(proto).reason is reason


def test_a_zero_point_chosen_by_the_caller_is_any() -> None:
    proto = dots.matmul_integer(dots.W)
    del proto.graph.initializer[[i.name for i in proto.graph.initializer].index("xz")]
    proto.graph.input.append(helper.make_tensor_value_info("xz", U8, []))
    assert dot_of(proto).x_zeros == (0, 255)


def test_weights_quantized_in_the_graph_have_the_codes_onnxruntime_folds() -> None:
    """Quantization-aware exporters leave float weights behind QuantizeLinear; ties and saturation included."""
    floats = np.array([[0.25, -0.75, 1.25, 400.0], [-400.0, 0.1, 63.7, -0.25]], np.float32)
    held = {"f": floats, "s": np.full(4, 0.5, np.float32), "z": np.full(4, 3, np.int8), **dots.scalars()}
    quantize = node("QuantizeLinear", ["f", "s", "z"], "w", axis=1)
    nodes = [*dots.quantized_x(), quantize, node("DequantizeLinear", ["w", "s", "z"], "dw", axis=1), node("MatMul", ["dx", "dw"])]
    dot = dot_of(model(nodes, held, (F32, ["m", 2])))
    graph = model([node("QuantizeLinear", ["x", "s", "z"], axis=1)], {"s": held["s"], "z": held["z"]}, (F32, [2, 4]), S8)
    (expected,) = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": floats})
    np.testing.assert_array_equal(dot.codes, expected)
    assert dot.codes.tolist() == [[3, 1, 5, 127], [-128, 3, 127, 3]]
    assert dot.w_zeros is not None
    assert (dot.w_zeros == 3).all()
    held["f"] = floats * np.float32(np.nan)
    assert skip_of(model(nodes, held, (F32, ["m", 2]))).reason is IntegerReason.WEIGHT_TYPE


def test_a_constant_on_the_left_of_dequantized_products() -> None:
    held = {"w": dots.W, **dots.scalars(np.int8)}
    dq = [node("DequantizeLinear", ["w", "xs", "xz"], "dw"), *dots.quantized_x()]
    assert skip_of(model([*dq, node("MatMul", ["dw", "dx"])], held, (F32, [5, "m"]))).reason is IntegerReason.CONSTANT_LEFT


def test_attributes_and_operands_from_outside() -> None:
    proto = dots.qgemm(dots.W, dots.BIAS)
    del proto.graph.initializer[[i.name for i in proto.graph.initializer].index("b")]
    proto.graph.input.append(helper.make_tensor_value_info("b", TensorProto.INT32, [5]))
    assert skip_of(proto).reason is IntegerReason.BIAS
    nbits = dots.matmul_nbits(dots.NB)
    nbits.graph.node[0].input.extend(["", "g"])
    nbits.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(64, np.int32), "g"))
    assert (skip_of(nbits).reason, skip_of(nbits).detail) == (IntegerReason.OPERATOR, "g_idx")
    short = dots.matmul_nbits(dots.NB)
    next(a for a in short.graph.node[0].attribute if a.name == "N").i = 7
    assert skip_of(short).reason is IntegerReason.SHAPE


def test_an_attribute_given_by_the_caller_of_a_function() -> None:
    gemm = helper.make_node("QGemm", ["v", "s", "z", "c", "s", "z"], ["o"], name="g", domain="com.microsoft")
    reference = onnx.AttributeProto(name="transB", ref_attr_name="turn", type=onnx.AttributeProto.INT)
    gemm.attribute.append(reference)
    held = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(dots.W))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    function = helper.make_function("local", "F", ["v", "s", "z"], ["o"], [held, gemm], opsets, ["turn"])
    call = helper.make_node("F", ["x", "xs", "xz"], ["y"], domain="local", turn=1)
    assert skip_of(model([call], dots.scalars(), functions=[function])).reason is IntegerReason.ATTRIBUTE


def test_a_dynamic_scale_of_the_activation() -> None:
    proto = dots.qdq(dots.W)
    del proto.graph.initializer[[i.name for i in proto.graph.initializer].index("xs")]
    proto.graph.input.append(helper.make_tensor_value_info("xs", F32, []))
    assert skip_of(proto).reason is IntegerReason.SCALE


def test_subgraphs_and_functions_are_read() -> None:
    """A body that sees the constants is proved; a function whose weight its caller gives is listed."""
    inner = helper.make_node("MatMulInteger", ["x", "w"], ["inside"], name="inner")
    body = helper.make_graph([inner], "body", [], [helper.make_tensor_value_info("inside", TensorProto.INT32, ["m", 5])])
    other = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["else"], name="inner")], "other", [], [])
    other.output.append(helper.make_tensor_value_info("else", TensorProto.INT32, ["m", 5]))
    branch = helper.make_node("If", ["yes"], ["a"], name="branch", then_branch=body, else_branch=other)
    opset = [helper.make_opsetid("", 21)]
    held = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(dots.W))
    zero = helper.make_node("Constant", [], ["z"], value=onnx.numpy_helper.from_array(np.array(3, np.uint8)))
    closed = helper.make_node("MatMulInteger", ["v", "c", "z"], ["o"], name="closed")
    function = helper.make_function("local", "F", ["v"], ["o"], [held, zero, closed], opset)
    opened = helper.make_node("MatMulInteger", ["v", "u"], ["o"], name="opened")
    function2 = helper.make_function("local", "G", ["v", "u"], ["o"], [opened], opset)
    calls = [helper.make_node("F", ["x"], ["b"], domain="local"), helper.make_node("G", ["x", "w"], ["d"], domain="local")]
    sums = [helper.make_node("Sum", ["a2", "b2", "d2"], ["y"])]
    casts = [node("Cast", [v], f"{v}2", to=F32) for v in "abd"]
    proto = model([branch, *calls, *casts, *sums], {"w": dots.W, "yes": np.array(True)}, functions=[function, function2])
    onnx.checker.check_model(proto)
    found, skips = found_in(proto)
    assert sorted(d.name for d in found) == ["F/closed", "inner", "inner:inside"]
    for dot in found:
        assert dot.codes.shape == (12, 5)
    assert [(s.name, s.reason) for s in skips] == [("G/opened", IntegerReason.FUNCTION)]


def test_products_of_unknown_domains_are_listed() -> None:
    """Layout transformations write operators of ONNX in domains of their own."""
    proto = dots.matmul_integer(dots.W)
    proto.graph.node[0].domain = "com.ms.internal.nhwc"
    proto.opset_import.append(helper.make_opsetid("com.ms.internal.nhwc", 1))
    skip = skip_of(proto)
    assert (skip.reason, skip.detail) == (IntegerReason.OPERATOR, "domain com.ms.internal.nhwc")


# The proof


def every(low: int, high: int, k: int) -> Array:
    return np.array(list(itertools.product(range(low, high + 1), repeat=k)), np.int64)


def tiny_dot(codes: Array, span: tuple[int, int], zeros: tuple[int, ...], w_zero: int, bias: int, block: int | None = None) -> IntegerDot:
    n = codes.shape[1]
    w_zeros = np.full((1, n), w_zero, np.int64)
    return IntegerDot("t", "t", "integer", "w", codes, "int2", "int4", span, zeros, w_zeros, np.full(n, bias, np.int64), block)


spans = st.sampled_from([(0, 3), (-2, 1)])
columns = st.lists(st.integers(-8, 7), min_size=1, max_size=5)


@settings(max_examples=120, deadline=None)
@given(columns, spans, st.integers(0, 3), st.integers(-8, 7), st.integers(-9, 9), st.sampled_from([None, 1, 2]), st.sampled_from([0, 2]))
def test_claims_are_what_enumeration_finds(
    column: list[int], span: tuple[int, int], step: int, w_zero: int, bias: int, tile: int | None, shift: int
) -> None:
    zero = span[0] + step
    codes = np.array([column, [-c for c in column]]).T
    dot = tiny_dot(codes, span, (zero,), w_zero, bias)
    order = np.random.default_rng(len(column)).permutation(len(column))
    machine = KernelRegisters(Accumulator(16, tile, 32), (order,), shift if span[0] < 0 else -0)
    proof = prove(dot, machine)
    x = every(*span, len(column))
    raw = x + machine.x_shift
    tiles = [raw[:, part] @ codes[part] for part in np.split(order, range(tile, len(order), tile) if tile else [])]
    assert (proof.inner.low, proof.inner.high) == (min(t.min() for t in tiles), max(t.max() for t in tiles))
    whole = raw @ codes
    partial = np.concatenate([whole, whole + bias])
    assert (proof.outer.low, proof.outer.high) == (min(partial.min(), bias), max(partial.max(), bias))
    result = (x - zero) @ (codes - w_zero) + bias
    assert proof.result is not None
    assert (proof.result.low, proof.result.high) == (result.min(), result.max())


@settings(max_examples=120, deadline=None)
@given(columns, spans, st.integers(2, 7), st.sampled_from([None, 1, 2, 3]), st.booleans(), st.integers(-9, 9))
def test_a_witness_overflows_and_a_proof_has_none(
    column: list[int], span: tuple[int, int], bits: int, tile: int | None, saturating: bool, bias: int
) -> None:
    """By enumeration: a witness exists if and only if some input leaves a register, and it is such an input."""
    codes = np.array(column)[:, None]
    dot = tiny_dot(codes, span, (span[0],), 0, bias)
    machine = on_accumulator(dot, Accumulator(bits, tile, bits + 1, saturating))
    proof = prove(dot, machine)
    assert (proof.witness is None) is proof.holds
    if proof.witness is None:
        for x in every(*span, len(column)):
            assert simulate(dot, machine, x, 0) == int(x @ codes[:, 0])
        return
    check_witness(dot, machine, proof)


def check_witness(dot: IntegerDot, machine: KernelRegisters, proof: Proof) -> None:
    """The input is of the type, and the register cannot hold the sum, which is the sum of those rows."""
    w, acc = proof.witness, machine.accumulator
    assert w is not None
    assert w.x.shape == (dot.k,)
    assert dot.x_range[0] <= w.x.min()
    assert w.x.max() <= dot.x_range[1]
    codes = dot.codes[:, w.column].astype(int)
    rows = list(w.rows)
    bias = 0 if dot.bias is None else int(dot.bias[w.column])
    if w.claim == "result":
        assert dot.w_zeros is not None
        zeros = np.broadcast_to(dot.w_zeros[:, w.column], (dot.k,))
        total = sum((int(w.x[r]) - w.x_zero) * (codes[r] - int(zeros[r])) for r in rows) + bias
        assert w.exact == total
    else:
        total = sum((int(w.x[r]) + machine.x_shift) * (codes[r] + machine.w_shift) for r in rows)
        assert w.exact in ((total,) if w.claim == "inner" else (total, total + bias))
        assert all(int(w.x[r]) + machine.x_shift == 0 for r in range(dot.k) if r not in rows)
    bits = acc.bits if w.claim == "inner" else acc.outer_bits
    assert not -(2 ** (bits - 1)) <= w.exact < 2 ** (bits - 1)
    assert w.wrapped != w.exact


@pytest.mark.parametrize("pair", [(64, 64), (-64, -64), (127, 1), (127, -128), (-128, 0), (-127, -1)])
def test_pairs_that_avx2_holds(pair: tuple[int, int]) -> None:
    found = verdict(dots.matmul_integer(np.array(pair, np.int8)[:, None]))
    assert (found.verdict, found.witness) == ("proved", None)


@pytest.mark.parametrize("pair", [(65, 64), (-64, -65), (127, 2), (-128, -1)])
def test_pairs_that_saturate_on_avx2(pair: tuple[int, int]) -> None:
    found = verdict(dots.matmul_integer(np.array(pair, np.int8)[:, None]))
    assert found.verdict == "overflows"
    w = found.witness
    assert w is not None
    assert (w.claim, w.rows, w.exact, w.held) == ("inner", (0, 1), 255 * sum(pair), 32767 if pair[0] > 0 else -32768)
    assert (w.operator, w.exact_here) in (("MatMulInteger", True), ("MatMulInteger", False))
    assert w.computed in (w.dot, w.simulated)


def test_pairs_are_adjacent() -> None:
    assert verdict(dots.matmul_integer(np.array([0, 127, 127, 0], np.int8)[:, None])).verdict == "proved"


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "x86-avx2"])
def test_other_machines_hold_them(target: str) -> None:
    assert verdict(dots.matmul_integer(np.array([[127], [127]], np.int8)), target).verdict == "proved"


def test_signs_on_avx2() -> None:
    """int8 activations are exact as MatMulInteger, and uint8 ones in disguise where onnxruntime fuses QDQ nodes."""
    w = np.array([[127], [127]], np.int8)
    assert verdict(dots.matmul_integer(w, S8)).verdict == "proved"
    assert verdict(dots.matmul_integer(w.astype(np.uint8))).verdict == "proved"
    found = verdict(dots.qdq(w, x=np.int8))
    assert (found.verdict, found.x_range) == ("overflows", (0, 255))
    assert found.witness is not None
    assert found.witness.x == (127, 127)
    assert verdict(dots.qdq(w)).verdict == "overflows"
    assert magr_onnx.verify(dots.qdq(w, x=np.int8, quantize=False), target="x86-avx2").skipped[0].reason == IntegerReason.TARGET


def test_arm_pairs_are_eight_rows_apart() -> None:
    w = np.zeros((20, 1), np.int8)
    w[[1, 9]] = -128
    found = verdict(dots.matmul_integer(w, S8), "arm64-neon")
    assert found.witness is not None
    assert (found.witness.rows, found.witness.exact, found.witness.held) == ((1, 9), 32768, -32768)
    for rows in ([1, 2], [8, 16], [9, 17]):
        w[:] = 0
        w[rows] = -128
        assert verdict(dots.matmul_integer(w, S8), "arm64-neon").verdict == "proved"
    w[:] = -127
    assert verdict(dots.matmul_integer(w, S8), "arm64-neon").verdict == "proved"


def test_arm_takes_uint8_as_int8() -> None:
    w = np.full((16, 1), -128, np.int8)
    found = verdict(dots.matmul_integer(w), "arm64-neon")
    assert found.witness is not None
    assert (found.x_range, found.witness.exact, found.witness.x[0]) == ((-128, 127), 32768, 0)
    assert (found.witness.dot, found.witness.simulated) == (-128 * 14 * 128, -128 * 14 * 128 - 65536)


@pytest.mark.parametrize(("k", "holds"), [(66311, True), (66312, False)])
def test_the_int32_boundary(k: int, holds: bool) -> None:
    """255 * 127 * 66311 = 2147481735 fits; and this machine's int32 wraps, whatever it is."""
    found = verdict(dots.matmul_integer(np.full((k, 1), 127, np.int8), x_zero=0), "generic")
    assert found.verdict == ("proved" if holds else "overflows")
    if not holds:
        w = found.witness
        assert w is not None
        assert (w.exact, w.simulated, w.computed, w.exact_here) == (255 * 127 * k, 255 * 127 * k - 2**32, 255 * 127 * k - 2**32, False)


@pytest.mark.parametrize(("bias", "holds"), [(2**31 - 1 - 510, True), (2**31 - 510, False)])
def test_the_bias_is_in_the_accumulator(bias: int, holds: bool) -> None:
    w = np.array([[1], [1]], np.int8)
    proto = dots.qgemm(w, np.array([bias], np.int32))
    found = verdict(proto, "generic")
    assert found.verdict == ("proved" if holds else "overflows")
    conv = dots.qlinear_conv(w.T.reshape(1, 2, 1, 1), bias=np.array([bias], np.int32))
    assert verdict(conv, "generic").outer == found.outer
    if not holds:
        assert found.witness is not None
        assert (found.witness.claim, found.witness.exact, found.witness.exact_here) == ("outer", 2**31, False)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [["m", 2], [3, 4, 2]])
def test_an_int32_bias_added_to_a_matmul_is_in_the_accumulator(shape: list[Any], first: bool) -> None:
    """onnxruntime makes a Gemm of the two, and a QGemm of that: its sum wraps. Where it does not, the result must fit without the bias."""
    w, bias = np.array([[1], [1]], np.int8), np.array([2**31 - 510], np.int32)
    held: dict[str, Array] = {"w": w, "b": bias, "one": np.array(1, np.float32), "xz": np.array(0, np.uint8), "wz": np.array(0, np.int8)}
    nodes = [
        node("QuantizeLinear", ["x", "one", "xz"], "qx"),
        node("DequantizeLinear", ["qx", "one", "xz"], "dx"),
        node("DequantizeLinear", ["w", "one", "wz"], "dw"),
        node("DequantizeLinear", ["b", "one"], "db"),
        node("MatMul", ["dx", "dw"], "product"),
        node("Add", ["product", "db"] if first else ["db", "product"]),
    ]
    proto = model(nodes, held, (F32, shape), rank=len(shape))
    found = verdict(proto, "generic")
    assert (found.outer.low, found.outer.high, found.verdict) == (0, 2**31, "overflows")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.full([3 if d == "m" else d for d in shape], 255, np.float32)})
    assert (y == -(2.0**31)).all()
    for value in (-(2**30), 2**30):
        dot = replace(dot_of(proto), bias=np.array([value]), codes=np.array([[8421505], [0]]), x_zeros=(10,))  # raw: 2^31 + 127
        high = 245 * 8421505 + max(value, 0)
        proof = prove(dot, KernelRegisters(Accumulator(33, None, 33), (np.arange(2),)))
        assert proof.result is not None
        assert (proof.result.low, proof.result.high) == (-10 * 8421505 + min(value, 0), high)


def test_what_is_added_to_a_matmul_is_a_bias_if_it_is_int32_only() -> None:
    """Codes of 8 bits are a residual, added as floats; int32 ones that are not constant are not known."""
    for kind in (TensorProto.INT8, TensorProto.INT32):
        held = {"w": dots.W, **scalars()}
        nodes = [*quantized_x(), node("DequantizeLinear", ["w", "ws"], "dw"), node("MatMul", ["dx", "dw"], "product")]
        nodes += [node("Cast", ["x"], "codes", to=kind)]
        nodes += [node("ReduceMax", ["codes"], "most"), node("DequantizeLinear", ["most", "ws"], "db"), node("Add", ["product", "db"])]
        proto = model(nodes, held, (F32, ["m", 12]))
        proto.graph.value_info.append(helper.make_tensor_value_info("most", kind, [1, 1]))
        if kind == TensorProto.INT8:
            assert dot_of(proto).bias is None
        else:
            assert skip_of(proto).reason is IntegerReason.BIAS


def test_the_result_can_overflow_where_raw_codes_do_not() -> None:
    """Raw sums reach -255 * 128 K; with both zero points the operator's result reaches 255 * 255 K."""
    k = 40000
    found = verdict(dots.matmul_integer(np.full((k, 1), -128, np.int8), x_zero=255, w_zero=127), "generic")
    assert found.result is not None
    assert (found.inner.holds, found.outer.holds, found.result.holds) == (True, True, False)
    assert found.witness is not None
    assert (found.witness.claim, found.witness.exact) == ("result", 255 * 255 * k)
    assert (found.witness.computed, found.witness.exact_here) == (wrap(255 * 255 * k, 32), False)


def test_the_worst_zero_point_is_found_where_it_is_chosen_at_run_time() -> None:
    found = verdict(dots.dynamic_chain(np.array([[3], [-5]], np.int8)), "generic")
    assert found.result is not None
    assert (found.result.low, found.result.high) == (-5 * 255, 5 * 255)


def conv_pair(order: str, x: int = U8, w: npt.DTypeLike = np.int8) -> Array:
    """A 2 x 2 kernel over 2 channels whose large taps are neighbours in one order only."""
    weight = np.zeros((1, 2, 2, 2), w)
    large = 127 if np.dtype(w) == np.int8 else 255
    where = ((0, 0, 0), (0, 0, 1)) if order == "taps" else ((0, 0, 0), (1, 0, 0))
    for c, i, j in where:
        weight[0, c, i, j] = large
    return weight


def test_convolutions_visit_channels_last() -> None:
    assert verdict(dots.qlinear_conv(conv_pair("channels"))).verdict == "overflows"
    assert verdict(dots.qlinear_conv(conv_pair("taps"))).verdict == "proved"
    assert verdict(dots.qdq(conv_pair("channels"), "Conv")).verdict == "overflows"
    assert verdict(dots.qdq(conv_pair("taps"), "Conv")).verdict == "proved"


def test_conv_integer_takes_the_weight_on_the_left() -> None:
    assert verdict(dots.conv_integer(conv_pair("taps"))).verdict == "proved"
    unsigned = conv_pair("taps", w=np.uint8)
    assert verdict(dots.conv_integer(unsigned, S8)).verdict == "overflows"
    assert verdict(dots.conv_integer(conv_pair("channels", w=np.uint8), S8)).verdict == "proved"


def test_depthwise_convolutions_are_exact_on_x86() -> None:
    w = np.full((4, 1, 3, 3), 127, np.int8)
    assert verdict(dots.qlinear_conv(w, group=4)).verdict == "proved"
    twice = np.full((8, 1, 3, 3), 127, np.int8)
    assert verdict(dots.qlinear_conv(twice, group=4)).verdict == "overflows"


@pytest.mark.parametrize("taps", [(0, 1), (0, 2), (0, 8)])
def test_depthwise_pairs_on_arm(taps: tuple[int, int]) -> None:
    w = np.zeros((16, 1, 9), np.int8)
    w[3, 0, list(taps)] = -128
    found = verdict(dots.qlinear_conv(w.reshape(16, 1, 3, 3), S8, group=16), "arm64-neon")
    assert found.witness is not None
    assert found.witness.rows == taps
    assert verdict(dots.qlinear_conv(w.reshape(16, 1, 3, 3), S8, group=16), "arm64-dotprod").verdict == "proved"


@pytest.mark.parametrize("order", ["taps", "channels"])
def test_an_unknown_machine_must_hold_both_orders(order: str) -> None:
    found = magr_onnx.verify(dots.qlinear_conv(conv_pair(order)), accumulator=Accumulator(16, 2))
    assert not found.ok
    assert "both" in found.to_text()


def test_blocks_are_tiles_of_their_own() -> None:
    w = np.full((64, 2), 15, np.uint8)
    for block, bits in ((16, 16), (32, 17), (64, 18)):
        found = magr_onnx.verify(dots.matmul_nbits(w, block=block), accumulator=Accumulator(16, None))
        assert found.layers[0].inner.needed == bits
        assert found.layers[0].inner.high == 127 * 15 * block
        assert found.ok is (bits <= 16)
    assert magr_onnx.verify(dots.matmul_nbits(w, block=64), accumulator=Accumulator(16, 16)).layers[0].inner.high == 127 * 15 * 16


def test_blocks_with_integer_activations_are_not_claimed_on_a_target() -> None:
    """onnxruntime 1.31.1 multiplies them with one scale a column, over the whole of K."""
    scales = np.array([[1], [2]], np.float32)
    found = magr_onnx.verify(dots.qdq(np.full((64, 1), 127, np.int8), scales=scales, axis=0, block=32), target="x86-avx2", run=False)
    assert not found.layers
    assert "scales change along K" in found.skipped[0].detail


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmulnbits_cannot_overflow_its_kernels(bits: int, target: str) -> None:
    w = np.full((64, 2), 2**bits - 1, np.uint8)
    assert verdict(dots.matmul_nbits(w, bits), target).verdict == "proved"


def test_a_witness_of_matmulnbits_runs_as_itself() -> None:
    found = magr_onnx.verify(dots.matmul_nbits(np.full((64, 3), 15, np.uint8)), accumulator=Accumulator(16))
    w = found.layers[0].witness
    assert w is not None
    assert (w.operator, w.computed, w.exact, w.held) == ("MatMulNBits", 60960, 60960, 60960 - 65536)


def test_sixteen_bit_activations_need_an_accumulator_to_ask_about() -> None:
    proto = dots.qdq(dots.W, x=np.uint16)
    assert magr_onnx.verify(proto, target="generic").skipped[0].detail == "onnxruntime computes uint16 x int8 in floats"
    found = magr_onnx.verify(proto, accumulator=Accumulator(24)).layers[0]
    positive = np.maximum(dots.W.astype(int), 0).sum(axis=0).max()
    assert found.inner.high == 65535 * positive
    assert found.witness is not None
    assert found.witness.detail == "no operator multiplies uint16 by int8"


@pytest.mark.parametrize("name", dots.FORMS)
@pytest.mark.parametrize("accumulator", [Accumulator(10, 2), Accumulator(12, 3, 14), Accumulator(9), Accumulator(16, 2, 16, True)])
def test_witnesses_of_every_form(name: str, accumulator: Accumulator) -> None:
    dot = dot_of(dots.FORMS[name][0]())
    machine = on_accumulator(dot, accumulator)
    proof = prove(dot, machine)
    if not proof.holds:
        check_witness(dot, machine, proof)
    assert (proof.witness is None) is proof.holds


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", dots.FORMS)
def test_a_proof_means_that_the_simulated_registers_are_exact(name: str, target: str) -> None:
    """Random inputs and the corners of the box, column by column; a refutation means that its witness is not exact."""
    dot = dot_of(dots.FORMS[name][0]())
    machine = on_target(dot, TARGETS[target])
    if isinstance(machine, str):
        assert "float" in machine or "fused" in machine or "scales change" in machine
        return
    proof = prove(dot, machine)
    rng = np.random.default_rng(0)
    if proof.holds:
        for order in range(len(machine.orders)):
            for column in range(min(dot.n, 3)):
                for _ in range(5):
                    x = rng.choice([dot.x_range[0], dot.x_range[1], 0, 1], dot.k)
                    assert simulate(dot, machine, x, column, order) == int(x @ dot.codes[:, column].astype(int))
    else:
        check_witness(dot, machine, proof)
        assert proof.witness is not None
        assert proof.witness.simulated != proof.witness.dot


def test_large_weights_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    dot = dot_of(dots.qgemm(dots.W, dots.BIAS))
    machine = on_target(dot, TARGETS["x86-avx2"])
    assert isinstance(machine, KernelRegisters)
    whole = prove(dot, machine)
    monkeypatch.setattr("magr_onnx.core.overflow.accumulator.CHUNK", 1)
    pieces = prove(dot, machine)
    assert (pieces.inner, pieces.outer, pieces.result) == (whole.inner, whole.outer, whole.result)
    assert pieces.witness is not None
    assert whole.witness is not None
    assert (pieces.witness.exact, pieces.witness.column) == (whole.witness.exact, whole.witness.column)


@pytest.mark.parametrize(
    ("value", "bits", "saturating", "held"), [(40000, 16, False, -25536), (40000, 16, True, 32767), (-9, 4, True, -8), (7, 4, False, 7)]
)
def test_registers(value: int, bits: int, saturating: bool, held: int) -> None:
    assert hold(value, bits, saturating) == held


# Targets


def test_targets_by_name() -> None:
    assert find_target("wasm") is TARGETS["wasm"]
    with pytest.raises(OptionError, match="x86-avx2, x86-vnni, arm64-dotprod, arm64-neon, wasm, generic"):
        find_target("x86")


def test_budgets_of_targets() -> None:
    avx2 = TARGETS["x86-avx2"]
    budget = avx2.budget(False, True)
    assert (budget.accumulator.bits, budget.accumulator.tile, budget.accumulator.saturating) == (16, 2, True)
    assert (budget.x_min, budget.x_max) == (0, 255)
    assert avx2.budget(True, True).accumulator.bits == 32
    assert avx2.budget(False, False).accumulator.bits == 32
    assert avx2.budget(True, True, qdq=True) == budget
    neon = TARGETS["arm64-neon"].budget(False, True)
    assert (neon.accumulator.tile, neon.x_min, neon.x_max) == (2, -128, 127)


@given(st.integers(1, 70), st.sampled_from([1, 2, 8]))
def test_orders_visit_every_row_once(k: int, stride: int) -> None:
    order = Kernel(stride=stride).order(k)
    assert sorted(order[order >= 0]) == list(range(k))
    pairs = np.concatenate([order, np.full(len(order) % 2, -1)]).reshape(-1, 2)
    both = pairs[(pairs >= 0).all(axis=1)]
    assert (both[:, 1] - both[:, 0] == stride).all()


# An independent prover


def onnxsim_prover() -> Any:
    """An exact prover written by others. Its second route, through Z3, is taken where z3-solver is installed."""
    return pytest.importorskip("onnxsim.quant_int_verify")


Z3_TERMS = 24 if importlib.util.find_spec("z3") else 0


def random_layers() -> dict[str, onnx.ModelProto]:
    """Layers at both sides of the pair boundary and of int32."""
    found: dict[str, onnx.ModelProto] = {}
    for seed, top in enumerate((40, 64, 66, 127)):
        w = dots.codes(33, 6, seed, -top, top)
        conv = dots.codes(5, 3 * 3 * 2, seed, -top, top).reshape(5, 3, 3, 2)
        found |= {
            f"MatMulInteger {top}": dots.matmul_integer(w, x_zero=seed * 60),
            f"MatMulInteger s8 {top}": dots.matmul_integer(w, S8, 5),
            f"QLinearMatMul {top}": dots.qlinear_matmul(w),
            f"QLinearConv {top}": dots.qlinear_conv(conv),
            f"QLinearConv bias {top}": dots.qlinear_conv(conv, bias=np.full(5, 2**31 - 100_000, np.int32)),
            f"ConvInteger {top}": dots.conv_integer(conv),
            f"dynamic {top}": dots.dynamic_chain(w),
        }
    for k in (66311, 66312, 80000):
        w = np.full((k, 1), 127, np.int8)
        found |= {f"long {k}": dots.matmul_integer(w, x_zero=0), f"long {k} zero": dots.matmul_integer(w, x_zero=128)}
    return found


def test_agrees_with_onnxsim() -> None:
    seen = {name: agree(proto) for name, proto in random_layers().items()}
    assert all(seen.values())
    assert {s for found in seen.values() for s in found} == set(itertools.product(("exact", "pairs"), (True, False)))


def agree(proto: onnx.ModelProto) -> list[tuple[str, bool]]:
    """Layer by layer: its no-wrap claim is our result claim in int32, and its pair-saturating one our inner claim on AVX2."""
    other = onnxsim_prover()
    ours = {layer.name: layer for layer in magr_onnx.verify(proto, target="generic", run=False).layers}
    seen: list[tuple[str, bool]] = []
    for report in other.verify_model(proto, z3_max_k=Z3_TERMS).layers:
        for finding in report.of("no-wrap"):
            if finding.verdict != "skipped":
                result = ours[report.name].result
                assert result is not None
                assert result.holds is (finding.verdict == "proved"), (report.name, finding.detail)
                seen.append(("exact", result.holds))
    ours = {layer.name: layer for layer in magr_onnx.verify(proto, target="x86-avx2", run=False).layers}
    for report in other.verify_model(proto, z3_max_k=Z3_TERMS, semantics=other.U8S8_PAIR_SATURATING).layers:
        for finding in report.of("pair-saturation"):
            inner = ours[report.name].inner
            assert inner.holds is (finding.verdict == "proved"), (report.name, finding.detail)
            seen.append(("pairs", inner.holds))
    return seen


def test_orders_agree_with_onnxsim() -> None:
    other = onnxsim_prover()
    proto = dots.qlinear_conv(dots.CONV)
    dot = dot_of(proto)
    consts = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    layer, _ = other._extract_layer(proto.graph.node[0], consts, {"x": U8}, {}, None)
    for column in range(dot.n):
        np.testing.assert_array_equal(dot.codes[dot.channels_last(), column], other._kernel_order_taps(layer, column))


def test_simulation_agrees_with_onnxsim() -> None:
    other = onnxsim_prover()
    dot = dot_of(dots.matmul_integer(dots.codes(21, 4)))
    machine = on_target(dot, TARGETS["x86-avx2"])
    assert isinstance(machine, KernelRegisters)
    x = np.random.default_rng(2).integers(0, 256, (6, 21))
    theirs = other.u8s8_pair_saturating_matmul(x, dot.codes)
    ours = [[simulate(dot, machine, row, column) for column in range(4)] for row in x]
    np.testing.assert_array_equal(ours, theirs)


class Reader:
    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_what_onnxruntime_quantizes_by_default(form: str, signed: bool, tmp_path: Path) -> None:
    """The naive output of `quantize_static`: as operators layer by layer against onnxsim, as QDQ with the same verdicts."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    source = graphs.chain()
    feeds = [graphs.feeds(source, seed=s) for s in range(2)]
    onnx.save(graphs.proto(source), tmp_path / "float.onnx")
    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "q.onnx",
        Reader(feeds),
        quant_format=QuantFormat[form],
        activation_type=kind,
        weight_type=QuantType.QInt8,
    )
    proto = onnx.load(tmp_path / "q.onnx")
    found = magr_onnx.verify(proto, target="x86-avx2")
    assert len(found.layers) == 2
    assert {s.op for s in found.skipped} <= {"QLinearMatMul", "MatMul"}  # the product of two activations
    wide = not signed or form == "QDQ"
    assert (len(found.failed) > 0) is wide
    if form == "QOperator":
        operators = {n.op_type for n in proto.graph.node}
        seen = agree(proto)
        assert len(seen) == (1 if signed else 2), operators  # Gemm became QGemm, which onnxsim does not read


# This machine, and one without VNNI

PROBE = """
import sys, magr_onnx
found = magr_onnx.verify(sys.argv[1], target="x86-avx2")
print(*[f"{l.name} {l.witness.computed == l.witness.simulated} {l.witness.exact_here}" for l in found.failed], sep="\\n")
"""


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 to emulate a machine without VNNI")
@pytest.mark.parametrize("name", ["MatMulInteger", "QDQ MatMul, int8 x", "QLinearConv", "ConvInteger, uint8 weight"])
def test_a_machine_without_vnni_computes_what_is_simulated(name: str, tmp_path: Path) -> None:
    other = {"ConvInteger, uint8 weight": lambda: dots.conv_integer(dots.CONV.view(np.uint8), S8)}
    onnx.save((other.get(name) or dots.FORMS[name][0])(), tmp_path / "model.onnx")
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", PROBE, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.stdout == "layer True False\n", done.stderr[-500:]


# The interface


def mixed() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["a"], name="wide"),
        helper.make_node("MatMulInteger", ["x", "v"], ["b"], name="narrow"),
        node("Add", ["a", "b"], "c"),
        node("Cast", ["c"], "f", to=F32),
        helper.make_node("MatMul", ["f", "u"], ["y"], name="float"),
    ]
    narrow = dots.codes(12, 5, 1, -60, 60)
    return model(nodes, {"w": dots.W, "v": narrow, "u": np.ones((5, 2), np.float32)})


def test_the_report_says_everything(tmp_path: Path) -> None:
    found = magr_onnx.verify(mixed(), target="x86-avx2")
    assert isinstance(found, Verification)
    assert ([layer.name for layer in found.failed], found.ok) == (["wide"], False)
    value = json.loads(found.to_json())
    assert [(layer["name"], layer["verdict"]) for layer in value["layers"]] == [("wide", "overflows"), ("narrow", "proved")]
    assert value["layers"][0]["witness"]["exact"] == found.failed[0].witness.exact  # type: ignore[union-attr]
    (skipped,) = value["skipped"]
    assert (skipped["name"], skipped["op"], skipped["reason"], value["ok"]) == ("float", "MatMul", "computed in float", False)
    text = found.to_text()
    assert max(map(len, text.splitlines())) <= 80
    for part in ("1 of 2 integer dot products proved, 1 overflow", "1 other nodes", "wide", "17/16", "witness", "computed in float: float"):
        assert part in text


def test_nothing_to_prove_is_said() -> None:
    found = magr_onnx.verify(float_model(), target="generic")
    assert found.ok
    assert "nothing to prove" in found.to_text()


def test_long_tables_are_cut() -> None:
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], [f"y{i}"], name=f"a_rather_long_layer_name_number_{i}") for i in range(25)]
    nodes.append(node("Sum", [f"f{i}" for i in range(25)]))
    casts = [node("Cast", [f"y{i}"], f"f{i}", to=F32) for i in range(25)]
    text = magr_onnx.verify(model([*nodes[:-1], *casts, nodes[-1]], {"w": dots.W}), target="x86-avx2").to_text()
    assert "... and 5 more, 5 of them overflow" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("options", [{}, {"target": "wasm", "accumulator": Accumulator()}, {"target": "wasm", "outer_bits": 65}])
def test_impossible_questions(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        magr_onnx.verify(mixed(), **options)


def test_outer_bits_narrow_the_outer_register() -> None:
    w = np.full((512, 1), 1, np.int8)
    assert magr_onnx.verify(dots.matmul_integer(w), target="x86-avx2").ok
    found = magr_onnx.verify(dots.matmul_integer(w), target="x86-avx2", outer_bits=17)
    assert found.failed[0].witness is not None
    assert (found.failed[0].witness.claim, found.failed[0].inner.bits) == ("outer", 16)
    assert magr_onnx.verify(dots.matmul_integer(w), target="generic", outer_bits=17).failed[0].inner.bits == 17
    with pytest.raises(OptionError, match="outer"):
        magr_onnx.verify(dots.matmul_integer(w), target="x86-avx2", outer_bits=12)


def test_the_documentation_names_all_targets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    assert all(f"`{name}`" in text for name in TARGETS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    onnx.save(mixed(), tmp_path / "mixed.onnx")
    return tmp_path / "mixed.onnx"


def test_the_command_line(saved: Path) -> None:
    bad = run("verify", saved, "--target", "x86-avx2")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert "overflows" in bad.stdout
    good = run("verify", saved, "--target", "x86-vnni", "--json")
    assert good.returncode == 0
    assert json.loads(good.stdout)["ok"] is True
    assert run("verify", saved, "--accumulator-bits", "17", "--accumulator-tile", "2", "--quiet") == type(good)(0, "", "")
    assert run("verify", saved, "--accumulator-bits", "40").returncode == 0
    assert run("verify", saved, "-t", "generic", "--outer-bits", "12").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "(x86-avx2, x86-vnni, arm64-dotprod, arm64-neon, wasm, generic) and --accumulator-bits: neither was given"),
        (("--target", "wasm", "--accumulator-bits", "16"), "and --accumulator-bits: both were given"),
        (("--target", "pdp11"), "x86-avx2, x86-vnni, arm64-dotprod, arm64-neon, wasm, generic"),
        (("--accumulator-bits", "16", "--accumulator-tile", "0"), "tile 0"),
        (("--accumulator-bits", "1"), "2 to 64 bits"),
        (("--target", "wasm", "--accumulator-tile", "4"), "--accumulator-tile needs --accumulator-bits"),
        (("--accumulator-bits", "16", "--outer-bits", "8"), "the outer one no fewer"),
    ],
)
def test_wrong_questions_are_explained(saved: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("verify", saved, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_witnesses_of_qdq_layers_are_run(kind: str) -> None:
    """As MatMulInteger of the codes the kernel multiplies: those of int8 activations plus 128 on x86, uint8 ones as they are."""
    model = magr_onnx.optimize(
        graphs.proto(graphs.matmul()), [graphs.feeds(graphs.matmul())], format="qdq-int8", activation_type=kind, quantizer="rtn"
    ).model
    (layer,) = magr_onnx.verify(model, target="x86-avx2").layers
    assert layer.verdict == "overflows"
    assert layer.witness is not None
    assert layer.witness.operator == "MatMulInteger"
    assert layer.witness.computed is not None
