"""Overflow proofs of graphs with QONNX's quantizers, against bounds and codes that NumPy computes by their definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import magr_onnx
from magr_onnx.core.overflow.accumulator import Accumulator

Array = np.ndarray[Any, Any]
DOMAIN = "qonnx.custom_op.general"


def quant(x: str, name: str, domain: str = DOMAIN, op: str = "Quant", **attributes: Any) -> onnx.NodeProto:
    inputs = [x, f"{name}_s", *([] if op == "BipolarQuant" else [f"{name}_z", f"{name}_b"])]
    return helper.make_node(op, inputs, [f"{name}_q"], name=f"{name}_quant", domain=domain, **attributes)


def grid(name: str, scale: Any, bits: float = 4, zero: Any = 0) -> dict[str, Array]:
    values = {f"{name}_s": scale, f"{name}_z": zero, f"{name}_b": bits}
    return {key: np.asarray(value, np.float32) for key, value in values.items()}


def model(nodes: list[onnx.NodeProto], constants: dict[str, Array], shape: list[int | str], domain: str = DOMAIN) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)], ir_version=8)


def least_bits(codes: Array, low: int, high: int, bias: Array | float = 0) -> int:
    """Bits of the narrowest register for all sums of codes ``(K, N)`` with activations of a range, one product at a time."""
    most = (np.maximum(codes * low, codes * high).sum(axis=0) + bias).max()
    least = (np.minimum(codes * low, codes * high).sum(axis=0) + bias).min()
    return max(math.floor(math.log2(max(most, 1))) + 2, math.ceil(math.log2(max(-least, 1))) + 1)


def check(proto: onnx.ModelProto, codes: Array, low: int, high: int, bias: Array | float = 0) -> None:
    """The layer fits as many bits as it needs, and no fewer, where an input is shown that overflows."""
    bits = least_bits(codes, low, high, bias)
    proved, refuted = (magr_onnx.verify(proto, accumulator=Accumulator(b, None, 32)) for b in (bits, bits - 1))
    assert [(layer.op.rpartition(" ")[2], layer.verdict) for layer in proved.layers] == [("(Quant)", "proved")], proved.skipped
    (layer,) = refuted.layers
    assert layer.verdict == "overflows"
    assert layer.witness is not None
    x = np.array(layer.witness.x)
    assert low <= x.min() <= x.max() <= high
    total = int(x @ codes[:, layer.witness.column]) + int(np.broadcast_to(bias, codes.shape[1])[layer.witness.column])
    assert not -(2 ** (bits - 2)) <= total < 2 ** (bits - 2)
    assert magr_onnx.verify(proto, target="x86-vnni").ok


@pytest.mark.parametrize("domain", [DOMAIN, "onnx.brevitas"])
@pytest.mark.parametrize(
    ("signed", "narrow", "low", "high"),
    [(0, 0, 0, 15), (0, 1, 0, 14), (1, 0, -8, 7), (1, 1, -7, 7)],
    ids=["uint", "narrow", "int", "narrow int"],
)
def test_products_of_matrices(signed: int, narrow: int, low: int, high: int, domain: str) -> None:
    w, scales = np.random.default_rng(0).standard_normal((20, 6)), np.linspace(0.1, 0.4, 6)
    codes = np.clip(np.rint(np.float32(w) / np.float32(scales)), -7, 7).astype(np.int64)
    nodes = [
        quant("x", "a", domain, signed=signed, narrow=narrow, rounding_mode="ROUND"),
        quant("w", "w", domain, signed=1, narrow=1, rounding_mode="ROUND"),
        helper.make_node("MatMul", ["a_q", "w_q"], ["y"], name="layer"),
    ]
    check(model(nodes, {"w": w, **grid("a", 0.05), **grid("w", scales)}, ["n", 20], domain), codes, low, high)


@pytest.mark.parametrize(("mode", "function"), [("FLOOR", np.floor), ("CEIL", np.ceil)])
@pytest.mark.parametrize("group", [1, 2])
def test_convolutions_with_biases_behind_pooling(group: int, mode: str, function: Any) -> None:
    """The bias is on the grid of the sums, and 5 bits of weights are in no type of ONNX."""
    rng = np.random.default_rng(1)
    w, b, scales = rng.standard_normal((6, 4 // group, 3, 3)), rng.standard_normal(6), np.full(6, 0.125)
    codes = np.clip(function(np.float32(w) / np.float32(0.125)), -16, 15).astype(np.int64).reshape(6, -1).T
    bias = np.rint(np.float32(b) / np.float32(0.03125)).astype(np.int64)
    nodes = [
        quant("x", "a", signed=0, narrow=0, rounding_mode="ROUND"),
        helper.make_node("MaxPool", ["a_q"], ["p"], kernel_shape=[2, 2]),
        quant("w", "w", op="IntQuant", signed=1, narrow=0, rounding_mode=mode),
        quant("b", "b", signed=1, narrow=0, rounding_mode="ROUND"),
        helper.make_node("Conv", ["p", "w_q", "b_q"], ["y"], name="layer", group=group),
    ]
    constants = {"w": w, "b": b, **grid("a", 0.25, 3), **grid("w", scales.reshape(-1, 1, 1, 1), 5), **grid("b", 0.125 * 0.25, 12)}
    check(model(nodes, constants, ["n", 4, 9, 9]), codes, 0, 7, bias)


def test_bipolar_weights_behind_a_transpose() -> None:
    w = np.random.default_rng(2).standard_normal((5, 33))
    nodes = [
        quant("x", "a", signed=1, narrow=0, rounding_mode="ROUND"),
        quant("w", "w", op="BipolarQuant"),
        helper.make_node("Transpose", ["w_q"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["a_q", "turned"], ["y"], name="layer"),
    ]
    check(model(nodes, {"w": w, **grid("a", 0.1, 2), **grid("w", 0.5)}, ["n", 33]), np.where(w.T >= 0, 1, -1), -2, 1)


@pytest.mark.parametrize(
    ("constants", "reason"),
    [
        (grid("a", 0.1, 3.5), "whole and at most 16 bits"),
        (grid("a", 0.1, 8, 0.5), "no whole number"),
        (grid("a", [[0.1, 0.2, 0.3, 0.4]]), "one a tensor or channel"),
        (grid("w", [[0.1], [0.2], [0.3], [0.4]]), "they change along K"),
        (grid("w", -1), "of the weight"),
    ],
)
def test_what_is_no_integer_product_is_neither_proved_nor_refuted(constants: dict[str, Array], reason: str) -> None:
    nodes = [
        quant("x", "a", signed=1, narrow=0),
        quant("w", "w", signed=1, narrow=0),
        helper.make_node("MatMul", ["a_q", "w_q"], ["y"], name="layer"),
    ]
    proto = model(nodes, {"w": np.ones((4, 3)), **grid("a", 0.1), **grid("w", 0.1), **constants}, ["n", 4])
    result = magr_onnx.verify(proto, target="generic")
    assert not result.layers
    assert any(reason in str(skip) for skip in result.skipped)
