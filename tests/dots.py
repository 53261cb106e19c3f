"""Hand-made models with one integer dot product, one for every operator and form `magr_onnx.verify` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
CONTRIB = "com.microsoft"
U8, S8, F32 = TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT


def node(op: str, inputs: Sequence[str], output: str = "y", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name="layer" if output == "y" else output, domain=domain, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Array],
    x: tuple[int, Sequence[int | str]] = (U8, ["m", "k"]),
    y: int = F32,
    functions: Sequence[onnx.FunctionProto] = (),
    rank: int = 2,
) -> onnx.ModelProto:
    """A model of input ``x``, output ``y``, and initializers."""
    initializers = [a if isinstance(a, TensorProto) else numpy_helper.from_array(a, name) for name, a in constants.items()]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", x[0], x[1])],
        [helper.make_tensor_value_info("y", y, [f"d{i}" for i in range(rank)])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def codes(k: int, n: int, seed: int = 0, low: int = -128, high: int = 127, dtype: npt.DTypeLike = np.int8) -> Array:
    return np.random.default_rng(seed).integers(low, high + 1, (k, n)).astype(dtype)


def scalars(x: npt.DTypeLike = np.uint8, w: npt.DTypeLike = np.int8, x_zero: int = 3, w_zero: int = 0) -> dict[str, Array]:
    one = np.array(0.5, np.float32)
    return {"xs": one, "xz": np.array(x_zero, x), "ws": one, "wz": np.array(w_zero, w), "ys": one, "yz": np.array(7, x)}


def matmul_integer(w: Array, x: int = U8, x_zero: int = 3, w_zero: int = 0) -> onnx.ModelProto:
    held = {"w": w, "xz": np.array(x_zero, helper.tensor_dtype_to_np_dtype(x)), "wz": np.array(w_zero, w.dtype)}
    return model(
        [node("MatMulInteger", ["x", "w", "xz", "wz"])], held, (x, ["m", w.shape[-min(w.ndim, 2)]]), TensorProto.INT32, rank=w.ndim
    )


def qlinear_matmul(w: Array, x: int = U8, x_zero: int = 3) -> onnx.ModelProto:
    kind = helper.tensor_dtype_to_np_dtype(x)
    held = {"w": w, **scalars(kind, w.dtype, x_zero)}
    return model([node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"])], held, (x, ["m", len(w)]), x)


def qgemm(w: Array, bias: Array | None = None, transpose: bool = False) -> onnx.ModelProto:
    held = {"w": np.ascontiguousarray(w.T) if transpose else w, **scalars(), **({} if bias is None else {"b": bias})}
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "" if bias is None else "b", "ys", "yz"]
    return model([node("QGemm", inputs, domain=CONTRIB, transB=int(transpose))], held, (U8, ["m", len(w)]), U8)


def qlinear_conv(w: Array, x: int = U8, bias: Array | None = None, group: int = 1, x_zero: int = 3) -> onnx.ModelProto:
    kind = helper.tensor_dtype_to_np_dtype(x)
    held = {"w": w, **scalars(kind, w.dtype, x_zero), **({} if bias is None else {"b": bias})}
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", *(() if bias is None else ("b",))]
    shape = [1, w.shape[1] * group, *(["h", "v"][: w.ndim - 2])]
    return model([node("QLinearConv", inputs, group=group)], held, (x, shape), x, rank=w.ndim)


def conv_integer(w: Array, x: int = U8, group: int = 1) -> onnx.ModelProto:
    held = {"w": w, "xz": np.array(3, helper.tensor_dtype_to_np_dtype(x))}
    shape = [1, w.shape[1] * group, "h", "v"]
    return model([node("ConvInteger", ["x", "w", "xz"], group=group)], held, (x, shape), TensorProto.INT32, rank=4)


def dynamic_quantize_matmul(w: Array) -> onnx.ModelProto:
    held = {"w": w, **scalars()}
    return model([node("DynamicQuantizeMatMul", ["x", "w", "ws", "wz"], domain=CONTRIB)], held, (F32, ["m", len(w)]))


def matmul_integer_to_float(w: Array) -> onnx.ModelProto:
    held = {"w": w, **scalars()}
    return model([node("MatMulIntegerToFloat", ["x", "w", "xs", "ws", "xz", "wz"], domain=CONTRIB)], held, (U8, ["m", len(w)]))


def dynamic_chain(w: Array) -> onnx.ModelProto:
    """What `quantize_dynamic` writes."""
    held = {"w": w, "wz": np.array(0, w.dtype)}
    quantize = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="q")
    multiply = helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["a"], name="layer")
    chain = [quantize, multiply, node("Cast", ["a"], "f", to=F32), helper.make_node("Mul", ["f", "s"], ["y"], name="scale")]
    return model(chain, held, (F32, ["m", len(w)]))


def quantized_x(quantize: bool = True) -> list[onnx.NodeProto]:
    first = [node("QuantizeLinear", ["x", "xs", "xz"], "q")] if quantize else []
    return [*first, node("DequantizeLinear", ["q" if quantize else "x", "xs", "xz"], "dx")]


def qdq(
    w: Array | TensorProto,
    op: str = "MatMul",
    x: npt.DTypeLike = np.uint8,
    quantize: bool = True,
    transpose: bool = False,
    scales: Array | None = None,
    axis: int = 1,
    block: int = 0,
    bias: Array | None = None,
    x_zero: int = 3,
    **attributes: Any,
) -> onnx.ModelProto:
    """DequantizeLinear of both sides, with a Transpose behind the weight or not."""
    kind = np.dtype(x)
    held: dict[str, Any] = {"w": w, "xs": np.array(0.5, np.float32), "xz": np.array(x_zero, kind)}
    held["ws"] = np.array(0.5, np.float32) if scales is None else scales
    nodes = [*quantized_x(quantize), node("DequantizeLinear", ["w", "ws"], "dw", axis=axis, **({"block_size": block} if block else {}))]
    if transpose:
        nodes.append(node("Transpose", ["dw"], "turned", perm=[1, 0]))
    inputs = ["dx", "turned" if transpose else "dw"]
    if bias is not None:
        held |= {"b": bias, "bs": np.array(0.25, np.float32)}
        nodes.append(node("DequantizeLinear", ["b", "bs"], "db"))
        inputs.append("db")
    nodes.append(node(op, inputs, **attributes))
    dims = w.dims if isinstance(w, TensorProto) else w.shape
    shape = [1, dims[1] * attributes.get("group", 1), "h", "v"] if op == "Conv" else ["m", "k"]
    elem = F32 if quantize else helper.np_dtype_to_tensor_dtype(kind)
    return model(nodes, held, (elem, shape), rank=4 if op == "Conv" else 2)


def weight_only(w: Array, scales: Array, axis: int = 1, block: int = 0, transpose: bool = False, op: str = "MatMul") -> onnx.ModelProto:
    nodes = [node("DequantizeLinear", ["w", "ws"], "dw", axis=axis, **({"block_size": block} if block else {}))]
    if transpose:
        nodes.append(node("Transpose", ["dw"], "turned", perm=[1, 0]))
    nodes.append(node(op, ["x", "turned" if transpose else "dw"]))
    return model(nodes, {"w": w, "ws": scales}, (F32, ["m", w.shape[1] if transpose else w.shape[0]]))


def matmul_nbits(w: Array, bits: int = 4, block: int = 32, level: int | None = 4) -> onnx.ModelProto:
    """``w (K, N)`` unsigned codes."""
    k, n = w.shape
    count = -(-k // block)
    padded = np.zeros((n, count * block), np.uint8)
    padded[:, :k] = w.T
    per = 8 // bits
    packed = sum(padded.reshape(n, count, -1, per)[..., i].astype(np.uint8) << np.uint8(i * bits) for i in range(per))
    held = {"w": np.asarray(packed, np.uint8), "ws": np.ones((n, count), np.float32)}
    more = {} if level is None else {"accuracy_level": level}
    return model(
        [node("MatMulNBits", ["x", "w", "ws"], domain=CONTRIB, K=k, N=n, bits=bits, block_size=block, **more)], held, (F32, ["m", k])
    )


def unrolled(w: Array) -> Array:
    """A convolution's weight as ``(K, M)``."""
    return w.reshape(len(w), -1).T


W = codes(12, 5)
WU = codes(12, 5, 1, 0, 255, np.uint8)
W1 = codes(12, 1)[:, 0]
WB = np.stack([codes(12, 5, s) for s in (1, 2)])
CONV = codes(4, 3 * 2 * 2).reshape(4, 3, 2, 2)
GROUPED = codes(4, 2 * 2 * 2).reshape(4, 2, 2, 2)
DEPTH = codes(4, 9).reshape(4, 1, 3, 3)
BIAS = np.array([5, -6, 7, -8, 9], np.int32)
NB = codes(40, 6, 3, 0, 15, np.uint8)
INT4 = helper.make_tensor("w", TensorProto.INT4, [4, 2], [-8, 7, 1, 2, -3, 4, 5, -6])

FORMS: dict[str, tuple[Callable[[], onnx.ModelProto], str, Array]] = {
    "MatMulInteger": (lambda: matmul_integer(W), "integer", W),
    "MatMulInteger, uint8 weight": (lambda: matmul_integer(WU, w_zero=9), "integer", WU),
    "MatMulInteger, int8 x": (lambda: matmul_integer(W, S8, -3), "integer", W),
    "MatMulInteger, vector": (lambda: matmul_integer(W1), "integer", W1[:, None]),
    "MatMulInteger, batch": (lambda: matmul_integer(WB), "integer", np.concatenate(list(WB), axis=1)),
    "QLinearMatMul": (lambda: qlinear_matmul(W), "integer", W),
    "QGemm": (lambda: qgemm(W, BIAS), "integer", W),
    "QGemm, transposed": (lambda: qgemm(W, None, True), "integer", W),
    "DynamicQuantizeMatMul": (lambda: dynamic_quantize_matmul(W), "integer", W),
    "MatMulIntegerToFloat": (lambda: matmul_integer_to_float(W), "integer", W),
    "dynamic chain": (lambda: dynamic_chain(W), "integer", W),
    "ConvInteger": (lambda: conv_integer(CONV), "integer", unrolled(CONV)),
    "QLinearConv": (lambda: qlinear_conv(CONV), "integer", unrolled(CONV)),
    "QLinearConv, groups": (lambda: qlinear_conv(GROUPED, group=2), "integer", unrolled(GROUPED)),
    "QLinearConv, depthwise": (lambda: qlinear_conv(DEPTH, group=4), "integer", unrolled(DEPTH)),
    "QDQ MatMul": (lambda: qdq(W), "qdq", W),
    "QDQ MatMul, int8 x": (lambda: qdq(W, x=np.int8), "qdq", W),
    "QDQ MatMul, uint8 input": (lambda: qdq(W, quantize=False), "qdq", W),
    "QDQ MatMul, Transpose": (lambda: qdq(np.ascontiguousarray(W.T), transpose=True), "qdq", W),
    "QDQ MatMul, channels": (lambda: qdq(W, scales=np.arange(1, 6, dtype=np.float32)), "qdq", W),
    "QDQ Gemm, transB": (lambda: qdq(np.ascontiguousarray(W.T), "Gemm", transB=1, bias=BIAS), "qdq", W),
    "QDQ Gemm, transA": (lambda: qdq(W, "Gemm", transA=1), "qdq", W),
    "QDQ Conv": (lambda: qdq(CONV, "Conv", bias=BIAS[:4]), "qdq", unrolled(CONV)),
    "QDQ Conv, depthwise": (lambda: qdq(DEPTH, "Conv", group=4), "qdq", unrolled(DEPTH)),
    "QDQ int4 weight": (lambda: qdq(INT4), "qdq", np.array([[-8, 7], [1, 2], [-3, 4], [5, -6]])),
    "QDQ uint16 x": (lambda: qdq(W, x=np.uint16), "qdq", W),
    "QDQ blocks": (lambda: qdq(W[:8], scales=np.arange(1, 11, dtype=np.float32).reshape(2, 5), axis=0, block=4), "qdq", W[:8]),
    "MatMulNBits": (lambda: matmul_nbits(NB), "blockwise", NB),
    "MatMulNBits, 2 bits": (lambda: matmul_nbits(NB & 3, 2), "blockwise", NB & 3),
    "MatMulNBits, 8 bits": (lambda: matmul_nbits(NB * 16, 8, 16), "blockwise", NB * 16),
    "weight-only QDQ": (lambda: weight_only(W, np.ones(5, np.float32)), "blockwise", W.astype(int) + 128),
    "weight-only QDQ, Transpose": (
        lambda: weight_only(np.ascontiguousarray(W.T), np.ones(5, np.float32), 0, transpose=True),
        "blockwise",
        W.astype(int) + 128,
    ),
    "weight-only QDQ, blocks": (lambda: weight_only(NB[:32], np.ones((2, 6), np.float32), 0, 16), "blockwise", NB[:32]),
}
