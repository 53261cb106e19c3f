"""Constants behind views and casts: what onnxruntime computes is what is read, and nothing is read before it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magr_onnx.passes.graph.constants import FOLLOW, constant_view, drop_if_unused
from magr_onnx.passes.instrument.segments import segments_of
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.graphs import Builder, random

OPSETS = (7, 11, 12, 13, 18, 21)
Array = Any


class Chain:
    """Nodes behind one constant, as a file of an opset has them."""

    def __init__(self, opset: int, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.opset, self.b = opset, Builder(opset)
        self.array = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
        self.value, self.shape = self.b.constant("w", self.array), shape

    def ints(self, values: list[int]) -> ir.Value:
        return self.b.constant(f"ints_{len(self.b.initializers)}", np.array(values, np.int64))

    def add(self, op: str, shape: tuple[int, ...], extra: list[ir.Value], outputs: int = 1, index: int = 0, **attributes: Any) -> None:
        node = ir.node(op, [self.value, *extra], attributes, num_outputs=outputs, name=f"step_{len(self.b.nodes)}")
        for i, output in enumerate(node.outputs):
            output.name = f"{node.name}_{i}"
        self.b.nodes.append(node)
        self.value, self.shape = node.outputs[index], shape

    def axes(self, op: str, name: str, values: list[int], shape: tuple[int, ...], outputs: int = 1, index: int = 0, **more: Any) -> None:
        if self.opset < 13:
            self.add(op, shape, [], outputs, index, **{name: values}, **more)
        else:
            self.add(op, shape, [self.ints(values)], outputs, index, **more)

    def computed(self) -> Array:
        """What onnxruntime makes of it."""
        x = self.b.input("x", [1])
        out = self.b.node("Cast", [self.value], "out", to=1)
        out.dtype = ir.DataType.FLOAT
        zero = self.b.node("Mul", [x, self.b.constant("zero", np.zeros(1, np.float32))], "nothing")
        with Session(
            self.b.model(self.b.node("Add", [out, zero], "sum"), list(self.shape or (1,))), arithmetic=Arithmetic.UNOPTIMIZED
        ) as s:
            return s.run({"x": np.zeros(1, np.float32)})[0].reshape(self.shape)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    opset = draw(st.sampled_from(OPSETS))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    c = Chain(opset, shape, draw(st.sampled_from([np.float32, np.float16, np.float64])))
    for op in draw(
        st.lists(st.sampled_from(["turn", "shape", "keep", "flat", "squeeze", "all", "unsqueeze", "cast", "split", "same"]), max_size=6)
    ):
        rank = len(c.shape)
        if op == "turn" and rank:
            perm = draw(st.permutations(range(rank)))
            c.add("Transpose", tuple(c.shape[p] for p in perm), [], perm=perm)
        elif op == "shape":
            new = draw(st.permutations(c.shape))
            target = list(new)
            if target:
                target[draw(st.integers(0, rank - 1))] = -1
            c.add("Reshape", tuple(new), [c.ints(target)])
        elif op == "keep" and rank > 1:
            c.add("Reshape", (c.shape[0], math.prod(c.shape[1:])), [c.ints([0, -1])])
        elif op == "flat" and rank:
            axis = draw(st.integers(0 if opset < 11 else -rank, rank))
            at = axis if axis >= 0 else axis + rank
            c.add("Flatten", (math.prod(c.shape[:at]), math.prod(c.shape[at:])), [], axis=axis)
        elif op == "squeeze" and 1 in c.shape:
            at = c.shape.index(1)
            axis = at if opset < 11 else at - rank
            c.axes("Squeeze", "axes", [axis], (*c.shape[:at], *c.shape[at + 1 :]))
        elif op == "all":
            c.add("Squeeze", tuple(d for d in c.shape if d != 1), [])
        elif op == "unsqueeze":
            at = draw(st.integers(0, rank))
            axis = at if opset < 11 else at - rank - 1
            c.axes("Unsqueeze", "axes", [axis], (*c.shape[:at], 1, *c.shape[at:]))
        elif op == "cast":
            c.add("Cast", c.shape, [], to=int(draw(st.sampled_from([ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE]))))
        elif op == "split" and rank and c.shape[0] > 1:
            first = draw(st.integers(1, c.shape[0] - 1))
            index = draw(st.integers(0, 1))
            sizes = [first, c.shape[0] - first]
            c.axes("Split", "split", sizes, (sizes[index], *c.shape[1:]), 2, index, axis=0)
        elif op == "same":
            c.add("Identity", c.shape, [])
    return c


@settings(max_examples=150, deadline=None)
@given(chains())
def test_what_is_read_is_what_onnxruntime_computes(chain: Chain) -> None:
    computed = chain.computed()
    found = constant_view(chain.value)
    assert found is not None
    assert found.shape == chain.shape
    tensor = found.tensor()
    assert tuple(tensor.shape.numpy()) == chain.shape
    array = tensor.numpy()
    assert array.dtype == found.dtype.numpy() == tensor.dtype.numpy()
    np.testing.assert_array_equal(array.astype(np.float32), computed)


def weight(*nodes: tuple[str, list[Array], dict[str, Any]], shape: tuple[int, ...] = (6, 4), dtype: Any = np.float32) -> ir.Value:
    b = Builder(20)
    value = b.constant("w", random(*shape).astype(dtype))
    for i, (op, extra, attributes) in enumerate(nodes):
        value = b.node(op, [value, *(b.constant(f"c{i}_{j}", np.asarray(e)) for j, e in enumerate(extra))], **attributes)
    ir.Graph([], [], nodes=b.nodes, initializers=b.initializers, name="g")
    return value


@pytest.mark.parametrize(
    "node",
    [
        ("Expand", [[6, 4]], {}),
        ("Tile", [[2, 1]], {}),
        ("Reshape", [[5, -1]], {}),
        ("Reshape", [[-1, -1]], {}),
        ("Reshape", [[0, 0, 0]], {}),
        ("Reshape", [[0, 24]], {"allowzero": 1}),
        ("Transpose", [], {"perm": [0, 0]}),
        ("Squeeze", [[0]], {}),
        ("Squeeze", [[7]], {}),
        ("Unsqueeze", [[9]], {}),
        ("Unsqueeze", [[0, 0]], {}),
        ("Flatten", [], {"axis": 3}),
        ("Cast", [], {"to": 6}),
        ("Split", [[2, 2]], {"axis": 0}),
        ("Split", [[6]], {"axis": 5}),
    ],
    ids=str,
)
def test_what_is_not_followed(node: tuple[str, list[Array], dict[str, Any]]) -> None:
    assert constant_view(weight(node)) is None


def test_computed_shapes_are_not_followed() -> None:
    b = Builder(20)
    x = b.input("x", [24])
    value = b.node("Reshape", [b.constant("w", random(6, 4)), b.node("Shape", [x])])
    assert constant_view(value) is None


def test_shapes_a_caller_may_override_are_not_followed() -> None:
    for overridable in (False, True):
        b = Builder(20)
        shape = b.constant("shape", np.array([4, 6]))
        out = b.node("Reshape", [b.constant("w", random(6, 4)), shape])
        b.inputs += [shape] * overridable
        b.model(out, [4, 6])
        assert (constant_view(out) is None) == overridable


def test_nothing_is_read_before_it_is_asked_for() -> None:
    reads: list[int] = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(random(6, 4).astype(np.float16))

    b = Builder(20)
    source = ir.Value(name="w", const_value=ir.LazyTensor(read, ir.DataType.FLOAT16, ir.Shape([6, 4]), name="w"))
    b.initializers.append(source)
    x = b.input("x", ["batch", 4])
    value = b.node("Cast", [b.node("Transpose", [b.node("Reshape", [source, b.constant("s", np.array([6, -1]))])])], to=1)
    model = b.model(b.node("MatMul", [x, value], "layer"), ["batch", 6])
    (layer,) = find(model)[0]
    assert (layer.k, layer.n, layer.dtype, layer.weight_name, layer.weight.tensor().shape.numpy()) == (4, 6, ir.DataType.FLOAT, "w", (4, 6))
    assert reads == []
    np.testing.assert_array_equal(layer.read(), random(6, 4).astype(np.float16).T.astype(np.float32))
    layer.read()
    assert len(reads) == 2  # nothing is kept


def test_constant_ways_are_no_values_between_stages() -> None:
    """They would be kept for every batch."""
    b = Builder(20)
    x = b.input("x", ["batch", 6])
    held_back = b.node("Constant", [], "held", value=ir.tensor(random(6, 6, seed=2)))
    first = b.node("MatMul", [x, b.node("Transpose", [b.constant("w1", random(6, 6))], perm=[1, 0])], "first")
    second = b.node("MatMul", [first, b.node("Transpose", [held_back], perm=[1, 0])], "second")
    model = b.model(b.node("Add", [second, x], "sum"), ["batch", 6])
    steps = segments_of(model, find(model)[0])
    assert [[layer.name for layer in stage] for stage in steps.stages] == [["first"], ["second"]]
    assert steps.live == (("x",), ("x", "first_out"))


def two(
    first: Callable[[Builder, ir.Value], ir.Value], second: Callable[[Builder, ir.Value], ir.Value], **of_second: Any
) -> list[LinearLayer]:
    b = Builder(20)
    x, source = b.input("x", ["batch", 6]), b.constant("w", random(6, 6))
    left = b.node("Gemm", [x, first(b, source)], "left")
    right = b.node("Gemm", [x, second(b, source)], "right", **of_second)
    return find(b.model(b.node("Add", [left, right], "sum"), ["batch", 6]))[0]


def plain(b: Builder, value: ir.Value) -> ir.Value:
    return value


def turned(b: Builder, value: ir.Value) -> ir.Value:
    return b.node("Transpose", [value], perm=[1, 0])


def viewed(b: Builder, value: ir.Value) -> ir.Value:
    return b.node("Reshape", [b.node("Identity", [value]), b.constant(f"shape_{len(b.nodes)}", np.array([-1, 6]))])


@pytest.mark.parametrize(
    ("first", "second", "attributes", "same"),
    [
        (plain, plain, {}, True),
        (turned, turned, {}, True),
        (viewed, viewed, {}, True),
        (turned, plain, {"transB": 1}, True),
        (plain, turned, {"transB": 1}, True),
        (plain, turned, {}, False),
        (plain, plain, {"transB": 1}, False),
        (plain, plain, {"alpha": 2.0}, False),
    ],
)
def test_weight_key_is_that_of_the_matrix(first: Any, second: Any, attributes: dict[str, Any], same: bool) -> None:
    a, b = two(first, second, **attributes)
    assert (a.weight_key == b.weight_key) == same
    assert np.array_equal(a.read(), b.read()) == same
    assert len({a.weight_key, b.weight_key}) == (1 if same else 2)


def test_weight_key_survives_a_copy_of_the_model() -> None:
    a, _ = two(viewed, plain)
    model = ir.Model(a.graph, ir_version=9)
    assert find(model.clone())[0][0].weight_key == a.weight_key


def test_writing_a_layer_takes_the_whole_way_to_its_weight_along() -> None:
    b = Builder(20)
    x = b.input("x", ["batch", 6])
    source, shape = b.constant("w", random(24).astype(np.float64)), b.constant("shape", np.array([4, 6]))
    value = b.node("Transpose", [b.node("Cast", [b.node("Reshape", [source, shape])], to=1)])
    bias = b.node("Squeeze", [b.constant("b", random(1, 4))])
    model = b.model(b.node("Gemm", [x, value, bias], "layer"), ["batch", 4])
    (layer,) = find(model)[0]
    new, added = random(6, 4, seed=3), random(4, seed=4).astype(np.float64)
    layer.write(new, added)
    (again,) = find(model)[0]
    np.testing.assert_array_equal(again.read(), new)
    np.testing.assert_array_equal(again.read_bias(), added.astype(np.float32))
    assert [n.op_type for n in model.graph] == ["Gemm"]
    assert set(model.graph.initializers) == {"w_magr", "w_bias"}
    onnx.checker.check_model(ir.to_proto(model))


def test_a_split_goes_with_the_last_of_its_readers() -> None:
    b = Builder(20)
    x = b.input("x", ["batch", 6])
    split = ir.node(
        "Split", [b.constant("w", random(12, 4)), b.constant("sizes", np.array([6, 6]))], {"axis": 0}, num_outputs=2, name="split"
    )
    b.nodes.append(split)
    for i, value in enumerate(split.outputs):
        value.name = f"part_{i}"
    left, right = (b.node("MatMul", [x, value], f"layer_{i}") for i, value in enumerate(split.outputs))
    model = b.model(b.node("Mul", [left, right], "product"), ["batch", 4])
    first, second = find(model)[0]
    first.write(random(6, 4), None)
    assert "w" in model.graph.initializers
    np.testing.assert_array_equal(second.read(), random(12, 4)[6:])
    second.write(random(6, 4), None)
    assert "w" not in model.graph.initializers
    assert not any(n.op_type == "Split" for n in model.graph)


def test_what_others_read_is_kept() -> None:
    b = Builder(20)
    inner = b.node("Identity", [b.constant("w", random(6, 4))], "inner")
    outer = b.node("Transpose", [inner], "outer")
    model = b.model(b.node("Relu", [inner], "reader"), [6, 4])
    drop_if_unused(outer)
    assert [n.name for n in model.graph] == ["inner", "reader"]


@pytest.mark.parametrize("zero", [None, np.uint8, np.int8])
@pytest.mark.parametrize(
    ("shape", "axis", "block"), [((), 1, 0), ((4,), 1, 0), ((6,), 0, 0), ((6,), -2, 0), ((3, 4), 0, 2), ((6, 2), 1, 2)]
)
def test_dequantized_weights_are_what_onnxruntime_makes_of_them(shape: tuple[int, ...], axis: int, block: int, zero: Any) -> None:
    b, rng = Builder(21), np.random.default_rng(0)
    kind = zero or np.int8
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    inputs = [
        b.constant("codes", rng.integers(low, high, (6, 4), endpoint=True).astype(kind)),
        b.constant("s", rng.random(shape, np.float32)),
    ]
    if zero is not None:
        inputs.append(b.constant("z", rng.integers(low, high, shape).astype(kind)))
    value = b.node("DequantizeLinear", inputs, axis=axis, **({"block_size": block} if block else {}))
    value.dtype = ir.DataType.FLOAT
    model = b.model(b.node("Mul", [value, b.input("x", [1])]), [6, 4])
    assert constant_view(value) is None
    node = value.producer()
    assert node is not None
    node.meta[FOLLOW] = True
    found = constant_view(value)
    assert found is not None
    with Session(model, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        (wanted,) = session.run({"x": np.ones(1, np.float32)})
    np.testing.assert_array_equal(found.tensor().numpy(), wanted)


@pytest.mark.parametrize("zero", [None, np.uint8, np.int8, np.int16])
@pytest.mark.parametrize(("shape", "axis"), [((), 1), ((4,), 1), ((6,), -2)])
def test_weights_rounded_in_the_graph_are_what_onnxruntime_makes_of_them(shape: tuple[int, ...], axis: int, zero: Any) -> None:
    b, rng = Builder(21), np.random.default_rng(0)
    grid = [b.constant("s", rng.random(shape, np.float32) / 100)]
    if zero is not None:
        grid.append(b.constant("z", rng.integers(0, 9, shape).astype(zero)))
    codes = b.node("QuantizeLinear", [b.constant("w", random(6, 4)), *grid], axis=axis)
    codes.dtype = ir.DataType.UINT8 if zero is None else ir.DataType.from_numpy(np.dtype(zero))
    value = b.node("DequantizeLinear", [codes, *grid], axis=axis)
    value.dtype = ir.DataType.FLOAT
    model = b.model(b.node("Mul", [value, b.input("x", [1])]), [6, 4])
    for node in model.graph:
        node.meta[FOLLOW] = True
    found = constant_view(value)
    assert found is not None
    with Session(model, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        (wanted,) = session.run({"x": np.ones(1, np.float32)})
    np.testing.assert_array_equal(found.tensor().numpy(), wanted)
