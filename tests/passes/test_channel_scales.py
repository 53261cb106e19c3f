"""Equalization across convolutions: the float model stays the same, and rounding it loses less."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.layers.conv import find
from magr_onnx.passes.tensors.channel_scales import ChannelClass, Samples, classes_of, headroom, scale, scales
from magr_onnx.runtime.ort.session import Session

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
SPREAD = np.geomspace(0.02, 2, 8)


def network(activation: str = "Relu", between: list[onnx.NodeProto] | None = None, outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    """Two convolutions with channels of very different ranges between them, and a depthwise one."""
    arrays = {"first": RNG.standard_normal((8, 3, 3, 3)) * SPREAD[:, None, None, None], "first_b": 0.1 * SPREAD}
    arrays |= {"deep": RNG.standard_normal((8, 1, 3, 3)), "last": RNG.standard_normal((4, 8, 1, 1)) / SPREAD[None, :, None, None]}
    nodes = [onnx.helper.make_node("Conv", ["x", "first", "first_b"], ["a"], name="first", pads=[1] * 4)]
    nodes += between or [onnx.helper.make_node(activation, ["a", "zero", "top"] if activation == "Clip" else ["a"], ["b"], name="act")]
    nodes.append(onnx.helper.make_node("Conv", ["b", "deep"], ["c"], name="deep", group=8))
    nodes.append(onnx.helper.make_node("Conv", ["c", "last"], ["y"], name="last"))
    x = onnx.helper.make_tensor_value_info("x", 1, ["n", 3, 8, 8])
    given = [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs]
    initializers = [onnx.numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    initializers += [onnx.numpy_helper.from_array(np.float32(v), name) for name, v in (("zero", 0), ("top", 2))]
    inside = [onnx.helper.make_tensor_value_info(name, 1, ["n", 8, 8, 8]) for name in ("a", "b")]
    graph = onnx.helper.make_graph(nodes, "g", [x], given, initializers, value_info=inside)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))


def classes(model: ir.Model) -> list[ChannelClass]:
    return classes_of(model.graph, find(model)[0])


def names(groups: list[ChannelClass]) -> list[list[str]]:
    return [[str(value.name) for value in group.values] for group in groups]


def outputs(model: ir.Model, x: Array) -> Array:
    with Session(model) as session:
        return session.run({"x": x})[0]


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Identity"])
def test_factors_of_channels_leave_the_model_as_it_is(activation: str) -> None:
    model, x = network(activation), RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected, groups = outputs(model, x), classes(model)
    assert names(groups) == [["a", "b"], ["c"]]
    for group in groups:
        scale(group, RNG.uniform(0.1, 10, 8))
    np.testing.assert_allclose(outputs(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("between", "left"),
    [
        ([("Sigmoid", ["a"], "b")], [["c"]]),
        ([("Add", ["a", "a"], "b")], [["a", "b"], ["c"]]),
        ([("Mul", ["a", "a"], "b")], [["c"]]),
        ([("Add", ["a", "first_b8"], "b")], [["c"]]),
        ([("Relu", ["a"], "b"), ("Exp", ["a"], "z")], [["c"]]),
    ],
)
def test_what_does_not_commute_with_factors_fixes_a_class(between: list[tuple[str, list[str], str]], left: list[list[str]]) -> None:
    nodes = [onnx.helper.make_node(op, inputs, [output], name=output) for op, inputs, output in between if "first_b8" not in inputs]
    nodes += [onnx.helper.make_node("Add", ["a", "zero"], ["b"], name="b") for _, inputs, _ in between if "first_b8" in inputs]
    model = network(between=nodes, outputs=("y", "z") if len(nodes) > 1 else ("y",))
    assert names(classes(model)) == left


@pytest.mark.parametrize(("beyond", "found"), [(0.0, [["a", "b"], ["c"]]), (1.0, [["c"]])])
def test_a_resize_that_puts_a_value_beyond_the_image_fixes_a_class(beyond: float, found: list[list[str]]) -> None:
    attributes = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": beyond}
    resize = onnx.helper.make_node("Resize", ["a", "roi", "", "sizes"], ["b"], name="resize", **attributes)
    model = network(between=[resize])
    for name, array in (("roi", np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32)), ("sizes", np.array([2, 8, 8, 8]))):
        model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        model.graph[1].replace_input_with(["a", "roi", "", "sizes"].index(name), model.graph.initializers[name])
    assert names(classes(model)) == found


def test_outputs_of_the_graph_are_not_scaled() -> None:
    assert names(classes(network(outputs=("y", "a")))) == [["c"]]


def peaks(model: ir.Model, name: str, x: Array) -> Samples:
    tapped = model.clone()
    tapped.graph.outputs[0] = next(v for node in tapped.graph for v in node.outputs if v.name == name)
    value = outputs(tapped, x)
    parts = np.stack([np.abs(part).max(axis=(0, 2, 3)) for part in np.split(value, 4)])
    return Samples(np.moveaxis(value, 1, -1).reshape(-1, value.shape[1]), parts)


def test_channels_of_small_range_lose_less_when_they_are_scaled() -> None:
    """The error behind the last convolution, of the value rounded in one grid, before and after."""
    model, x = network(), RNG.standard_normal((16, 3, 8, 8)).astype(np.float32)
    group = next(g for g in classes(model) if len(g.values) == 2)

    def error() -> float:
        samples = peaks(model, "b", x)
        grid = ActivationGrid.of_range(0, float(samples.rows.max()))
        change = np.rint(samples.rows / grid.scale) * grid.scale - samples.rows
        weight = model.graph.initializers["deep"].const_value.numpy().astype(float)  # type: ignore[union-attr]
        last = model.graph.initializers["last"].const_value.numpy().astype(float)[:, :, 0, 0]  # type: ignore[union-attr]
        return float((np.square(change).mean(axis=0) * np.square(weight).sum(axis=(1, 2, 3)) * np.square(last).sum(axis=0)).sum())

    before = error()
    factors = scales(group, [peaks(model, "a", x), peaks(model, "b", x)], 8)
    assert factors is not None
    assert factors[0] > factors[-1] > 0
    scale(group, factors)
    assert error() < before / 10


def test_a_clip_bounds_the_factors_of_channels_below_it() -> None:
    model, x = network("Clip"), RNG.standard_normal((64, 3, 8, 8)).astype(np.float32)
    expected = outputs(model, x)
    group = next(g for g in classes(model) if len(g.values) == 2)
    assert group.limit == 2
    samples = [peaks(model, "b", x)]
    factors = scales(group, samples, 8)
    assert factors is not None
    reach = samples[0].peaks.max(axis=0)
    assert (factors[reach >= 2] == 1).all()
    assert (factors * reach <= 2 + 1e-6).all()
    scale(group, factors)
    np.testing.assert_allclose(outputs(model, x), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_headroom_grows_with_the_differences_between_parts_and_is_infinite_for_one() -> None:
    steady = np.full((4, 6), 2.0)
    assert (headroom(steady) == 1.1).all()
    rising = steady.copy()
    rising[0, 0] = 2.4
    np.testing.assert_allclose(headroom(rising)[0], 1.44)
    erratic = np.array([0.2, 1.0, 0.5, 0.4])[:, None]
    assert np.isinf(headroom(steady * erratic)).all()
    assert np.isinf(headroom(steady[:1])).all()
