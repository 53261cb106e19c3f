"""Values between integer operators: what onnxruntime makes of every operator in its table, and which values are rounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.emit import hard_activations, tensors
from magr_onnx.passes.tensors.connected import connected
from magr_onnx.passes.tensors.ort_cpu import RULES
from magr_onnx.passes.tensors.region import Region, region_of

IMAGE = ("n", 4, 8, 8)
OPERANDS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "AveragePool": ([], {"kernel_shape": [2, 2]}),
    "Concat": ([None], {"axis": 1}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "MaxPool": ([], {"kernel_shape": [2, 2]}),
    "Mul": ([None], {}),
    "Add": ([None], {}),
    "Reshape": ([np.array([0, -1])], {}),
    "Resize": ([np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
    "Slice": ([np.array([0]), np.array([2]), np.array([2])], {}),
    "Squeeze": ([np.array([0])], {}),
    "Tile": ([np.array([1, 1, 2, 1])], {}),
    "Transpose": ([], {"perm": [0, 2, 3, 1]}),
    "Unsqueeze": ([np.array([0])], {}),
}
"""More inputs (None for another value, arrays for constants) and attributes of operators that need them."""


def network(nodes: list[onnx.NodeProto], outputs: list[str], weights: dict[str, Any] | None = None, batch: int | str = "n") -> ir.Model:
    arrays = {"w": np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32), **(weights or {})}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(name, 1, [batch, *IMAGE[1:]]) for name in ("x", "z")],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output], name=output, **attributes)


def region(model: ir.Model) -> Region:
    convolutions = [n for n in model.graph if n.op_type == "Conv"]
    return region_of(model.graph, convolutions, RULES)


def groups(model: ir.Model) -> list[set[str]]:
    return [{str(value.name) for value in group.values} for group in region(model).grids]


def optimized(model: ir.Model, folder: Path) -> list[str]:
    """Operators of the graph that onnxruntime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node]


def rounded(model: ir.Model) -> ir.Model:
    """Round the region of a model; onnxruntime rounds its float weights."""
    found = region(model)
    marks = tensors.mark(model.graph, found)
    grids = {name: ActivationGrid(0.02 if group.high > 1 else 0.0039, 0 if group.low == 0 else 128) for name, group in marks.items()}
    tensors.emit(model.graph, grids)
    hard_activations.lower(model.graph)
    return model


@pytest.mark.parametrize("op", [*RULES.computed, *RULES.moved])
def test_onnxruntime_runs_every_operator_of_its_table_on_integers(op: str, tmp_path: Path) -> None:
    more, attributes = OPERANDS.get(op, ([], {}))
    constants = {f"k{i}": value for i, value in enumerate(more) if value is not None}
    inputs = ["a", *("b" if value is None else f"k{i}" for i, value in enumerate(more))]
    batch = 1 if op == "Squeeze" else "n"
    first = [node("Conv", ["x", "w"], "a"), node("Conv", ["z", "w"], "b"), node(op, inputs, "y", **attributes)]
    shape = [node("Reshape", ["y", "image"], "again"), node("Conv", ["again", "w"], "out")]
    model = network([*first, *shape], ["out", "b"], {**constants, "image": np.array([-1, 4, 2, 1])}, batch)
    assert {"y"} <= set.union(*groups(model))
    ops = optimized(rounded(model), tmp_path)
    assert ops.count("DequantizeLinear") == 2, ops  # of the outputs: nothing before them reads floats
    assert op not in ops or op in RULES.moved


@pytest.mark.parametrize("op", RULES.moved)
def test_onnxruntime_loads_int8_behind_every_move(op: str) -> None:
    """In opset 21, also where what is moved is read as floats; and what is moved is what was rounded."""
    more, attributes = OPERANDS.get(op, ([], {}))
    constants = {f"k{i}": value for i, value in enumerate(more)}
    nodes = [node("Conv", ["x", "w"], "a"), node(op, ["a", *constants], "moved", **attributes), node("Tanh", ["moved"], "out")]
    model = network(nodes, ["out"], constants, 1 if op == "Squeeze" else 2)
    model.graph.opset_imports[""] = 21
    found = region_of(model.graph, [model.graph[0]], RULES, all_moves=True)
    assert {"a", "moved"} in [{str(value.name) for value in group.values} for group in found.grids]
    tensors.emit(model.graph, dict.fromkeys(tensors.mark(model.graph, found), ActivationGrid(0.02, 0, signed=True)))
    x = np.random.default_rng(1).standard_normal((1 if op == "Squeeze" else 2, *IMAGE[1:])).astype(np.float32)
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    ours, expected = (
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(["out"], {"x": x, "z": x})[0]
        for options in (None, plain)
    )
    np.testing.assert_allclose(ours, expected, atol=0.03)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("op", "attributes"), [("HardSwish", {}), ("HardSigmoid", {}), ("HardSigmoid", {"alpha": 0.3, "beta": 0.4})])
def test_hard_activations_of_every_code_are_within_a_step_of_the_function(op: str, attributes: dict[str, float], signed: bool) -> None:
    x_grid = ActivationGrid(0.04, 0 if signed else 128, signed)
    y_grid = ActivationGrid.of_range(-0.375, 5) if op == "HardSwish" else ActivationGrid(1 / 256, 0)
    y_grid = replace(y_grid, zero_point=y_grid.zero_point - 128 * signed, signed=signed)
    model = network([node("Identity", ["x"], "a"), node(op, ["a"], "b", **attributes), node("Identity", ["b"], "y")], ["y"])
    tensors.emit(model.graph, {"a": x_grid, "y": y_grid})
    hard_activations.lower(model.graph)
    assert not {"HardSwish", "HardSigmoid"} & {n.op_type for n in model.graph}
    low, high = x_grid.limits
    codes = np.arange(low, high + 1)
    x = ((codes - x_grid.zero_point) * x_grid.scale).astype(np.float32).reshape(1, *IMAGE[1:])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(["y"], {"x": x, "z": x})[0]
    slope, offset = attributes.get("alpha", 1 / 6 if op == "HardSwish" else 0.2), attributes.get("beta", 0.5)
    expected = np.clip(slope * x.astype(np.float64) + offset, 0, 1) * (x if op == "HardSwish" else 1)
    assert np.abs(y - np.clip(expected, *y_grid.range)).max() < y_grid.scale
    assert y.min() < y.max()


def test_a_hard_sigmoid_whose_grid_goes_on_stays() -> None:
    model = network([node("Identity", ["x"], "a"), node("HardSigmoid", ["a"], "b"), node("Identity", ["b"], "y")], ["y"])
    tensors.emit(model.graph, dict.fromkeys(("a", "y"), ActivationGrid(0.02, 128)))
    hard_activations.lower(model.graph)
    assert [n.op_type for n in model.graph].count("HardSigmoid") == 1


def test_what_reads_a_float_value_or_is_read_as_one_stays_float() -> None:
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("Add", ["a", "z"], "sum"),  # z is no integer
        node("Conv", ["sum", "w"], "b"),
        node("Sigmoid", ["b"], "out"),  # nobody reads it as an integer
    ]
    assert sorted(map(sorted, groups(network(nodes, ["out"])))) == [["a"], ["b"], ["sum"], ["x"]]


def test_a_residual_block_is_integers_throughout_with_the_grids_of_activations() -> None:
    nodes = [
        node("Conv", ["x", "w"], "a"),
        node("Relu", ["a"], "ra"),
        node("Conv", ["ra", "w"], "b"),
        node("Add", ["b", "ra"], "sum"),
        node("Clip", ["sum", "zero", "six"], "rs"),
        node("MaxPool", ["rs"], "pool", kernel_shape=[2, 2]),
        node("Conv", ["pool", "w"], "out"),
    ]
    model = network(nodes, ["out"], {"zero": np.float32(0), "six": np.float32(6)})
    found = {frozenset(str(v.name) for v in group.values): (group.low, group.high) for group in region(model).grids}
    free = (-np.inf, np.inf)
    expected = {("x",): free, ("ra",): (0, np.inf), ("b",): free, ("rs", "pool"): (0, 6), ("out",): free}
    assert found == {frozenset(names): limits for names, limits in expected.items()}


def test_an_activation_that_is_read_beside_it_is_not_part_of_a_grid() -> None:
    nodes = [node("Conv", ["x", "w"], "a"), node("Relu", ["a"], "ra"), node("Add", ["a", "ra"], "out")]
    assert sorted(map(sorted, groups(network(nodes, ["out"])))) == [["a"], ["x"]]


@pytest.mark.parametrize("bounds", [(-1, 1), (0.5, 6), (0, -1)])
def test_a_clip_that_no_grid_replaces_stays(bounds: tuple[float, float]) -> None:
    nodes = [node("Conv", ["x", "w"], "a"), node("Clip", ["a", "low", "high"], "c"), node("Conv", ["c", "w"], "out")]
    model = network(nodes, ["out"], {"low": np.float32(bounds[0]), "high": np.float32(bounds[1])})
    assert {"a"} in groups(model)


def test_outputs_of_the_graph_keep_their_names_and_are_rounded(tmp_path: Path) -> None:
    model = rounded(network([node("Conv", ["x", "w"], "a"), node("Relu", ["a"], "y")], ["y"]))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(
        ["y"],
        {"z": np.zeros((1, *IMAGE[1:]), np.float32), "x": np.random.default_rng(1).standard_normal((2, *IMAGE[1:])).astype(np.float32)},
    )
    np.testing.assert_allclose(y / 0.02, np.rint(y / 0.02), atol=1e-3)
    assert y.min() == 0


def test_connected_members_are_those_that_a_graph_search_reaches() -> None:
    rng = np.random.default_rng(0)
    for pairs in (rng.integers(0, 40, (count, 2)).tolist() for count in range(0, 60, 3)):
        members = rng.permutation(40).tolist()
        groups = connected(members, map(tuple, pairs))
        assert [group[0] for group in groups] == sorted((group[0] for group in groups), key=members.index)
        for group in groups:
            reached, before = {group[0]}, set[int]()
            while reached != before:
                before, reached = reached, reached | {m for pair in pairs if reached & set(pair) for m in pair}
            assert group == [member for member in members if member in reached]
