"""Small graphs for tests: a builder, and one graph per form a linear layer takes in real exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
Array = npt.NDArray[Any]


class Builder:
    """Collects nodes and initializers, and makes an ``ir.Model`` of them."""

    def __init__(self, opset: int = 20) -> None:
        self.opset = opset
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def input(self, name: str, shape: list[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self.inputs.append(value)
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers.append(value)
        return value

    def node(self, op: str, inputs: list[ir.Value | None], name: str | None = None, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=name or f"{op.lower()}_{len(self.nodes)}")
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].dtype = inputs[0].dtype if inputs and inputs[0] is not None else FLOAT
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, output: ir.Value, shape: list[int | str], name: str = "y") -> ir.Model:
        output.name, output.shape = name, ir.Shape(shape)
        return self.model_of([output])

    def model_of(self, outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.initializers, opset_imports={"": self.opset}, name="graph"
        )
        return ir.Model(graph, ir_version=9)


def random(*shape: int, seed: int = 0, dtype: npt.DTypeLike = np.float32, scale: float = 0.2) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def correlated(rows: int, k: int, seed: int = 0) -> Array:
    """Rows with correlated columns, a nonzero mean and a few strong inputs: what makes quantizers differ."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((rows, k // 4)) @ rng.standard_normal((k // 4, k))
        + 0.3 * rng.standard_normal((rows, k))
        + rng.standard_normal(k)
    )
    x[:, :3] *= 6
    return x.astype(np.float32)


K, N = 40, 24


def matmul(k: int = K, n: int = N, dtype: npt.DTypeLike = np.float32, opset: int = 20) -> ir.Model:
    b = Builder(opset)
    kind = FLOAT if np.dtype(dtype) == np.float32 else ir.DataType.FLOAT16
    x = b.input("x", ["batch", "time", k], kind)
    return b.model(b.node("MatMul", [x, b.constant("w", random(k, n, dtype=dtype))], "layer"), ["batch", "time", n])


def matmul_bias(k: int = K, n: int = N, bias_first: bool = False, dtype: npt.DTypeLike = np.float32, opset: int = 20) -> ir.Model:
    b = Builder(opset)
    kind = FLOAT if np.dtype(dtype) == np.float32 else ir.DataType.FLOAT16
    x = b.input("x", ["batch", "time", k], kind)
    product = b.node("MatMul", [x, b.constant("w", random(k, n, dtype=dtype))], "layer")
    bias = b.constant("b", random(n, seed=1, dtype=dtype))
    return b.model(b.node("Add", [bias, product] if bias_first else [product, bias], "bias"), ["batch", "time", n])


def matmul_transpose(k: int = K, n: int = N) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", "time", k])
    weight = b.node("Transpose", [b.constant("w", random(n, k))], "turn", perm=[1, 0])
    return b.model(b.node("MatMul", [x, weight], "layer"), ["batch", "time", n])


def matmul_constant(k: int = K, n: int = N) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", "time", k])
    weight = b.node("Constant", [], "held", value=ir.tensor(random(k, n)))
    return b.model(b.node("MatMul", [x, weight], "layer"), ["batch", "time", n])


def gemm(k: int = K, n: int = N, trans_b: int = 1, alpha: float = 1.0, beta: float = 1.0, bias: tuple[int, ...] | None = (N,)) -> ir.Model:
    b = Builder()
    x = b.input("x", ["batch", k])
    inputs: list[ir.Value | None] = [x, b.constant("w", random(n, k) if trans_b else random(k, n))]
    if bias is not None:
        inputs.append(b.constant("b", random(*bias, seed=1)))
    return b.model(b.node("Gemm", inputs, "layer", transB=trans_b, alpha=alpha, beta=beta), ["batch", n])


FORMS: dict[str, Callable[[], ir.Model]] = {
    "matmul": matmul,
    "matmul_bias": matmul_bias,
    "matmul_bias_first": lambda: matmul_bias(bias_first=True),
    "matmul_transpose": matmul_transpose,
    "matmul_constant": matmul_constant,
    "gemm": gemm,
    "gemm_no_bias": lambda: gemm(bias=None),
    "gemm_plain": lambda: gemm(trans_b=0),
    "gemm_alpha_beta": lambda: gemm(alpha=0.5, beta=-2.0),
    "gemm_row_bias": lambda: gemm(bias=(1, N)),
    "gemm_scalar_bias": lambda: gemm(bias=(1,)),
}


def masked(k: int = K, n: int = N) -> ir.Model:
    """Two layers behind one value, with an attention_mask input that only travels through."""
    b = Builder()
    x = b.input("x", ["batch", "time", k])
    mask = b.input("attention_mask", ["batch", "time"], ir.DataType.INT64)
    first = b.node("MatMul", [x, b.constant("w1", random(k, n))], "first")
    second = b.node("MatMul", [x, b.constant("w2", random(k, n, seed=2))], "second")
    pooled = b.node("ReduceMean", [b.node("Add", [first, second], "sum"), b.constant("axes", np.array([1]))], "pool", keepdims=0)
    head = b.node("MatMul", [pooled, b.constant("w3", random(n, 8, seed=3))], "head")
    head.name, head.shape = "y", ir.Shape(["batch", 8])
    flags = b.node("Identity", [mask], "keep")
    flags.name, flags.shape, flags.dtype = "mask_out", ir.Shape(["batch", "time"]), ir.DataType.INT64
    return b.model_of([head, flags])


def chain(k: int = 48, n: int = 32, opset: int = 20) -> ir.Model:
    """Gemm, Relu, MatMul + bias, and one product of two activations that no pass may touch."""
    b = Builder(opset)
    x = b.input("x", ["batch", k])
    hidden = b.node("Relu", [b.node("Gemm", [x, b.constant("w1", random(64, k)), b.constant("b1", random(64, seed=5))], "up", transB=1)])
    down = b.node("MatMul", [hidden, b.constant("w2", random(64, n, seed=6))], "down")
    out = b.node("Add", [down, b.constant("b2", random(n, seed=7))], "down_bias")
    turned = b.node("Transpose", [out], "turn", perm=[1, 0])
    return b.model(b.node("MatMul", [out, turned], "scores"), ["batch", "batch"])


def deep(blocks: int = 5, k: int = 32) -> ir.Model:
    """Blocks of two layers each around which the input goes, as in transformers: every layer is a stage of its own."""
    b = Builder()
    x = b.input("x", ["batch", k])
    for i in range(blocks):
        hidden = b.node("Tanh", [b.node("MatMul", [x, b.constant(f"w_up_{i}", random(k, 2 * k, seed=2 * i))], f"up_{i}")], f"tanh_{i}")
        down = b.node("MatMul", [hidden, b.constant(f"w_down_{i}", random(2 * k, k, seed=2 * i + 1))], f"down_{i}")
        x = b.node("Add", [x, down], f"residual_{i}")
    return b.model(x, ["batch", k])


def proto(model: ir.Model) -> onnx.ModelProto:
    result = ir.to_proto(model)
    onnx.checker.check_model(result)
    return result


def feeds(model: ir.Model, rows: int = 12, time: int = 3, seed: int = 3) -> dict[str, Array]:
    """Correlated inputs that fit a model of this module."""
    found: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        dims = [d if isinstance(d, int) else {"batch": rows, "time": time}[str(d)] for d in value.shape]
        if value.dtype == ir.DataType.INT64:
            found[str(value.name)] = np.random.default_rng(seed).integers(0, 2, dims)
        else:
            x = correlated(int(np.prod(dims[:-1])), dims[-1], seed).reshape(dims)
            found[str(value.name)] = x.astype(np.float16 if value.dtype == ir.DataType.FLOAT16 else np.float32)
    return found
