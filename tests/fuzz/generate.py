"""Random valid graphs: every form a linear layer takes, between other operators, in all opsets, types, ranks and with odd names.

A graph is made from a ``random.Random``, which hypothesis shrinks and a program seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
OPSETS = range(7, 26)
DTYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.float64: TensorProto.DOUBLE}
_STYLES = ("{b}_{n}", "/model/layers.{n}/{b}", "{b}.{n}:0", "{n}", "größe {b} {n}", "{{{b}}}[{n}]*?", "{b}_{n}" + "x" * 300)


@dataclass(frozen=True, slots=True)
class Value:
    """A value ``(batch, ..., width)`` with the shape it has on the inputs that are made."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A model, inputs to compare on, more of them to calibrate with, how many MatMul and Gemm nodes it has, and what it is made of."""

    model: onnx.ModelProto
    feeds: dict[str, Array]
    calibration: list[dict[str, Array]]
    linear: int
    text: str


@dataclass(slots=True)
class Maker:
    """A graph in the making.

    Attributes:
        inputs: Arrays for the inputs beside the first one, by name.
        draw: What makes another array for such an input; the others never change.
        overridable: Constants that are inputs as well.
        outputs: Values that are outputs.
        results: Outputs that are no tensors.
        domains: Versions of domains beside ONNX's own.
        weights: Constants that another layer may use again, with their shapes.
        forms: What the graph is made of.
        count: Names so far.
    """

    rng: random.Random
    opset: int
    dtype: Any
    arrays: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    draw: dict[str, Callable[[], Array]] = field(default_factory=dict)
    functions: dict[str, onnx.FunctionProto] = field(default_factory=dict)
    overridable: list[str] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    results: list[onnx.ValueInfoProto] = field(default_factory=list)
    domains: dict[str, int] = field(default_factory=dict)
    weights: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    count: int = 0

    def name(self, base: str) -> str:
        """A fresh name in one of the styles of exporters, or a strange one."""
        self.count += 1
        return self.rng.choice(_STYLES).format(b=base, n=self.count)

    def constant(self, array: Array, base: str = "const") -> str:
        name = self.name(base)
        if self.rng.random() < 0.15:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, "")))
        else:
            self.constants[name] = array
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "shape")

    def floats(self, *shape: int, scale: float = 1.0) -> Array:
        return np.asarray(self.arrays.standard_normal(shape) * scale).astype(self.dtype)

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], domain: str = "", **attributes: Any) -> Value:
        out = self.name(op.lower())
        label = self.rng.choice(("", self.name(op), self.name(op)))
        self.nodes.append(helper.make_node(op, inputs, [out], name=label, domain=domain, **attributes))
        return Value(out, shape)

    def weight(self, k: int, n: int) -> str:
        """A constant ``(k, n)``: fresh, or one another layer has, or another one's transposed."""
        for name, shape in self.weights:
            if shape == (k, n) and self.rng.random() < 0.3:
                return name
            if shape == (n, k) and self.rng.random() < 0.3:
                return self.node("Transpose", [name], (k, n), perm=[1, 0]).name
        array = self.floats(k, n, scale=k**-0.5)
        form = self.rng.randrange(8)
        if form == 0:
            name = self.node("Transpose", [self.constant(np.ascontiguousarray(array.T), "wt")], (k, n), perm=[1, 0]).name
        elif form == 1:
            name = self.node("Identity", [self.constant(array, "w")], (k, n)).name
        elif form == 2:
            flat = self.constant(array.reshape(-1), "flat")
            name = self.node("Reshape", [flat, self.integers(k, n)], (k, n)).name
        elif form == 3 and self.dtype == np.float32:
            half = self.constant(array.astype(np.float16), "half")
            name = self.node("Cast", [half], (k, n), to=TensorProto.FLOAT).name
        elif form == 4 and self.opset >= 10 and self.dtype == np.float32:
            codes = self.constant(self.arrays.integers(-100, 100, (k, n)).astype(np.int8), "codes")
            scale, zero = self.constant(np.array(0.01, np.float32)), self.constant(np.array(0, np.int8))
            name = self.node("DequantizeLinear", [codes, scale, zero], (k, n)).name
        else:
            name = self.constant(array, "w")
            if name in self.constants and self.rng.random() < 0.05:
                self.overridable.append(name)
        self.weights.append((name, (k, n)))
        return name

    def width(self) -> int:
        return self.rng.choice((1, 2, 3, 8, 16, 17, 24, 32, 40, 64))


def _matmul(m: Maker, x: Value) -> Value:
    k, n = x.shape[-1], m.width()
    y = m.node("MatMul", [x.name, m.weight(k, n)], (*x.shape[:-1], n))
    if m.rng.random() < 0.5:
        bias = m.constant(m.floats(*(1,) * m.rng.randrange(2), m.rng.choice((n, n, 1)), scale=0.1), "b")
        y = m.node("Add", [y.name, bias] if m.rng.random() < 0.5 else [bias, y.name], y.shape)
    return y


def _gemm(m: Maker, x: Value) -> Value:
    k, n = x.shape[-1], m.width()
    rows = int(np.prod(x.shape[:-1]))
    flat = x if len(x.shape) == 2 else m.node("Reshape", [x.name, m.integers(-1, k)], (rows, k))
    turned, attributes = m.rng.random() < 0.5, {}
    if m.rng.random() < 0.3:
        attributes |= {"alpha": m.rng.choice((0.5, -2.0, 1.0)), "beta": m.rng.choice((0.0, 1.0, 3.0))}
    inputs = [flat.name, m.weight(n, k) if turned else m.weight(k, n)]
    shape = m.rng.choice((None, (n,), (1, n), (1,), (rows, 1), ()))
    if shape is not None or m.opset < 11:
        inputs.append(m.constant(m.floats(*(shape or (n,)), scale=0.1), "c"))
    elif m.rng.random() < 0.5:
        inputs.append("")
    if m.rng.random() < 0.1:
        flat = m.node("Transpose", [flat.name], (k, rows), perm=[1, 0])
        inputs[0] = flat.name
        attributes["transA"] = 1
    return m.node("Gemm", inputs, (rows, n), **attributes, **({"transB": 1} if turned else {}))


def _einsum(m: Maker, x: Value) -> Value:
    if m.opset < 12:
        return _matmul(m, x)
    k, n = x.shape[-1], m.width()
    left = "abcd"[: len(x.shape) - 1]
    if m.rng.random() < 0.5:
        return m.node("Einsum", [x.name, m.weight(k, n)], (*x.shape[:-1], n), equation=f"{left}k,kn->{left}n")
    return m.node("Einsum", [x.name, m.weight(n, k)], (*x.shape[:-1], n), equation=f"{left}k, nk -> {left}n")


def _conv(m: Maker, x: Value) -> Value:
    """Conv over rank 3, channels second; pointwise or with a window."""
    if len(x.shape) != 3 or m.dtype == np.float64:
        return _matmul(m, x)
    channels, n, window = x.shape[1], m.width(), m.rng.choice((1, 1, 3))
    weight = m.constant(m.floats(n, channels, window, scale=(channels * window) ** -0.5), "kernel")
    inputs = [x.name, weight] + ([m.constant(m.floats(n, scale=0.1), "b")] if m.rng.random() < 0.5 else [])
    pads = [window // 2, window // 2]
    return m.node("Conv", inputs, (x.shape[0], n, x.shape[2]), kernel_shape=[window], pads=pads)


def _elementwise(m: Maker, x: Value) -> Value:
    op = m.rng.choice(("Relu", "Sigmoid", "Tanh", "Mul", "Add", "Softmax", "Residual", "Identity", "Clip"))
    if op in ("Relu", "Sigmoid", "Tanh", "Identity"):
        return m.node(op, [x.name], x.shape)
    if op == "Softmax":
        return m.node(op, [x.name], x.shape, axis=len(x.shape) - 1)
    if op == "Residual":
        return m.node("Add", [x.name, m.node("Tanh", [x.name], x.shape).name], x.shape)
    if op == "Clip":
        if m.opset < 11 or (m.opset < 12 and m.dtype != np.float32):
            return m.node("Relu", [x.name], x.shape)
        return m.node("Clip", [x.name, "", m.constant(np.array(2, m.dtype), "high")], x.shape)
    return m.node(op, [x.name, m.constant(m.floats(x.shape[-1]), "vector")], x.shape)


def _turn(m: Maker, x: Value) -> Value:
    perm = [*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2]
    return m.node("Transpose", [x.name], tuple(x.shape[i] for i in perm), perm=perm)


def _casts(m: Maker, x: Value) -> Value:
    other = TensorProto.FLOAT16 if m.dtype != np.float16 else TensorProto.FLOAT
    there = m.node("Cast", [x.name], x.shape, to=other)
    return m.node("Cast", [there.name], x.shape, to=DTYPES[m.dtype])


def _left(m: Maker, x: Value) -> Value:
    """The constant on the left: ``W X``."""
    k, n = x.shape[-2], m.width()
    return m.node("MatMul", [m.constant(m.floats(n, k, scale=k**-0.5), "left"), x.name], (*x.shape[:-2], n, x.shape[-1]))


def _vector(m: Maker, x: Value) -> Value:
    """A weight of rank one, whose axis goes away and comes back."""
    k = x.shape[-1]
    y = m.node("MatMul", [x.name, m.constant(m.floats(k, scale=k**-0.5), "vector")], x.shape[:-1])
    return m.node("Reshape", [y.name, m.integers(*x.shape[:-1], 1)], (*x.shape[:-1], 1))


def _experts(m: Maker, x: Value) -> Value:
    """A stack of weights, one for each first index."""
    if len(x.shape) != 3:
        return _matmul(m, x)
    k, n = x.shape[-1], m.width()
    stack = m.constant(m.floats(m.rng.choice((1, x.shape[0])), k, n, scale=k**-0.5), "experts")
    return m.node("MatMul", [x.name, stack], (*x.shape[:-1], n))


def _branch(m: Maker, x: Value) -> Value:
    """If with a layer in one branch, its weight inside or outside."""
    k, n = x.shape[-1], m.width()
    flag = m.name("flag")
    m.inputs[flag] = np.array(m.rng.random() < 0.5)
    inner = m.name("inner")
    outside = m.rng.random() < 0.5
    weight = m.weight(k, n) if outside else inner
    held = [] if outside else [numpy_helper.from_array(m.floats(k, n, scale=k**-0.5), inner)]
    branches = []
    for factor in (1.0, 2.0):
        product, out, scale = m.name("product"), m.name("out"), m.name("factor")
        nodes = [helper.make_node("MatMul", [x.name, weight], [product]), helper.make_node("Mul", [product, scale], [out])]
        constants = [numpy_helper.from_array(np.array(factor, m.dtype), scale), *held]
        info = helper.make_tensor_value_info(out, DTYPES[m.dtype], [None] * len(x.shape))
        branches.append(helper.make_graph(nodes, "branch", [], [info], constants))
        inner = m.name("inner") if not outside else inner
        if not outside:
            weight, held = inner, [numpy_helper.from_array(m.floats(k, n, scale=k**-0.5), inner)]
    return m.node("If", [flag], (*x.shape[:-1], n), then_branch=branches[0], else_branch=branches[1])


def _loop(m: Maker, x: Value) -> Value:
    """A layer run twice by a Loop."""
    k = x.shape[-1]
    weight = m.weight(k, k)
    i, go, state, product, out, still = (m.name(b) for b in ("i", "go", "state", "product", "out", "still"))
    nodes = [
        helper.make_node("MatMul", [state, weight], [product]),
        helper.make_node("Tanh", [product], [out]),
        helper.make_node("Identity", [go], [still]),
    ]
    kind = DTYPES[m.dtype]
    body = helper.make_graph(
        nodes,
        "body",
        [
            helper.make_tensor_value_info(i, TensorProto.INT64, []),
            helper.make_tensor_value_info(go, TensorProto.BOOL, []),
            helper.make_tensor_value_info(state, kind, [None] * len(x.shape)),
        ],
        [helper.make_tensor_value_info(still, TensorProto.BOOL, []), helper.make_tensor_value_info(out, kind, [None] * len(x.shape))],
    )
    trips, true = m.constant(np.array(2, np.int64), "trips"), m.constant(np.array(True), "true")
    return m.node("Loop", [trips, true, x.name], x.shape, body=body)


def _function(m: Maker, x: Value) -> Value:
    """A function of the model with a layer inside, its weight given."""
    nodes = [helper.make_node("MatMul", ["a", "w"], ["p"], name="inside"), helper.make_node("Relu", ["p"], ["r"])]
    m.domains["own.domain"] = 1
    m.functions["Layer"] = helper.make_function("own.domain", "Layer", ["a", "w"], ["r"], nodes, [helper.make_opsetid("", m.opset)])
    k, n = x.shape[-1], m.width()
    return m.node("Layer", [x.name, m.weight(k, n)], (*x.shape[:-1], n), domain="own.domain")


def _shared(m: Maker, x: Value) -> Value:
    """Two layers with one weight, added."""
    k, n = x.shape[-1], m.width()
    weight, shape = m.weight(k, n), (*x.shape[:-1], n)
    other = m.node("Tanh", [x.name], x.shape)
    products = [m.node("MatMul", [v.name, weight], shape).name for v in (x, other)]
    return m.node("Add", products, shape)


Form = Callable[[Maker, Value], Value]
FORMS: tuple[Form, ...] = (
    _matmul,
    _matmul,
    _gemm,
    _einsum,
    _conv,
    _elementwise,
    _elementwise,
    _turn,
    _casts,
    _left,
    _vector,
    _experts,
    _branch,
    _loop,
    _function,
    _shared,
)


def make(rng: random.Random, forms: Sequence[Form] = FORMS, finish: Callable[[Maker, onnx.ModelProto], None] | None = None) -> Made:
    """A model of one to six forms on an input of rank 2 to 4.

    Args:
        rng: Where all chances come from.
        forms: What is drawn from.
        finish: Changes the finished model.
    """
    opset = rng.choice(OPSETS)
    dtype = rng.choice((np.float32, np.float32, np.float32, np.float16, np.float64))
    m = Maker(rng, opset, dtype, np.random.default_rng(rng.randrange(1 << 32)))
    x = Value(m.name("input"), (*(rng.choice((1, 2, 5)) for _ in range(rng.choice((1, 2, 2, 3)))), m.width()))
    first, value = x, x
    for _ in range(rng.randint(1, 6)):
        form = rng.choice(forms)
        m.forms.append(form.__name__.strip("_"))
        value = form(m, value)
        if rng.random() < 0.15:
            m.outputs.append(value)
    if value is first:
        value = m.node("Identity", [value.name], value.shape)
    m.outputs = [o for o in dict.fromkeys([*m.outputs, value]) if o.name != first.name]
    proto = _model(m, first)
    if finish is not None:
        finish(m, proto)
    calibration = [{first.name: m.floats(*first.shape)} | m.inputs | {k: draw() for k, draw in m.draw.items()} for _ in range(5)]
    return Made(proto, calibration[0], calibration, count(proto), f"opset {opset}, {np.dtype(dtype)}, {'+'.join(m.forms)}")


def _model(m: Maker, first: Value) -> onnx.ModelProto:
    kind = DTYPES[m.dtype]
    inputs = [helper.make_tensor_value_info(first.name, kind, _dims(m, first.shape))]
    inputs += [_info(name, array) for name, array in m.inputs.items()]
    inputs += [helper.make_tensor_value_info(name, kind, m.constants[name].shape) for name in m.overridable]
    outputs = [helper.make_tensor_value_info(o.name, kind, [None] * len(o.shape)) for o in m.outputs] + m.results
    constants = [numpy_helper.from_array(array, name) for name, array in m.constants.items()]
    imports = [helper.make_opsetid(domain, version) for domain, version in {"": m.opset, **m.domains}.items()]
    graph = helper.make_graph(m.nodes, "graph", inputs, outputs, constants)
    version = max(helper.find_min_ir_version_for(imports, ignore_unknown=True), 8 if m.functions else 4)
    return helper.make_model(graph, opset_imports=imports, functions=list(m.functions.values()), ir_version=version)


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    kind = TensorProto.STRING if array.dtype.kind == "U" else helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, [None] * array.ndim)


def _dims(m: Maker, shape: tuple[int, ...]) -> list[int | str | None]:
    """Some dimensions with a name, some unknown, the last one fixed."""
    return [*(m.rng.choice((d, None, f"dim {i}")) for i, d in enumerate(shape[:-1])), shape[-1]]


def count(proto: onnx.ModelProto) -> int:
    """MatMul and Gemm nodes, in subgraphs and functions too."""
    stack: list[Any] = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    found = 0
    while stack:
        node = stack.pop()
        found += node.op_type in ("MatMul", "Gemm")
        stack += [n for a in node.attribute for n in a.g.node]
    return found
