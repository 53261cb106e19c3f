"""The whole graph between roundings: which values have which grids under the rules of a runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from magr_onnx.core.grid_type import GridType
from magr_onnx.core.types import ActivationGrid
from magr_onnx.errors import ModelError
from magr_onnx.passes.canonical import as_gemm
from magr_onnx.passes.emit import tensors
from magr_onnx.passes.graph.fixed_shapes import fix_batch
from magr_onnx.passes.graph.inference import inferred_types
from magr_onnx.passes.instrument.grid_inputs import feeds, with_grid_inputs
from magr_onnx.passes.layers import conv, linear
from magr_onnx.passes.tensors.backends import BACKENDS
from magr_onnx.passes.tensors.region import Region, SharedGrid
from magr_onnx.passes.tensors.rules import Rules
from magr_onnx.passes.tensors.whole import whole_graph
from magr_onnx.passes.tensors.widths import choose_wide, conversions, edges_of, may_be_wide, work
from tests.graphs import FLOAT, Builder, random

QNN = BACKENDS["qnn-htp"]
RNG = np.random.default_rng(0)
INPUT = RNG.standard_normal((1, 6, 8)).astype(np.float32)


def model(nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: list[str], weights: dict[str, Any]) -> ir.Model:
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [
            onnx.numpy_helper.from_array(np.asarray(a, None if np.asarray(a).dtype == np.int64 else np.float32), n)
            for n, a in weights.items()
        ],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output], name=output, **attributes)


def attention() -> ir.Model:
    """Scores of one head, scaled and normalized, and what they weigh; a layer with a bias behind it."""
    rng = np.random.default_rng(1)
    return model(
        [
            node("MatMul", ["x", "w"], "q"),
            node("MatMul", ["x", "v"], "k"),
            node("Transpose", ["k"], "turned", perm=[0, 2, 1]),
            node("MatMul", ["q", "turned"], "scores"),
            node("Mul", ["scores", "scale"], "scaled"),
            node("Softmax", ["scaled"], "weights"),
            node("MatMul", ["weights", "x"], "mixed"),
            node("MatMul", ["mixed", "u"], "product"),
            node("Add", ["product", "b"], "sum"),
            node("Relu", ["sum"], "r"),
            node("LayerNormalization", ["r", "gain", "offset"], "y"),
        ],
        {"x": [1, 6, 8]},
        ["y"],
        {
            "w": rng.standard_normal((8, 8)),
            "v": rng.standard_normal((8, 8)),
            "u": rng.standard_normal((8, 8)),
            "b": rng.standard_normal(8),
            "gain": rng.uniform(0.5, 2, 8),
            "offset": rng.standard_normal(8),
            "scale": 0.35,
        },
    )


def region(found: ir.Model, rules: Rules) -> Region:
    layers = [*conv.find(found)[0], *linear.find(found)[0]]
    return whole_graph(found.graph, layers, rules, inferred_types(found))


def names(found: Region) -> list[set[str]]:
    return [{str(value.name) for value in group.values} for group in found.grids]


def test_every_operator_of_the_table_is_rounded_once_and_moves_share_a_grid() -> None:
    found = region(attention(), QNN)
    assert names(found) == [{"x"}, {"q"}, {"k", "turned"}, {"scores"}, {"scaled"}, {"weights"}, {"mixed"}, {"r"}, {"y"}]
    by_name = {str(group.values[0].name): group for group in found.grids}
    assert by_name["weights"].exact == (0, 1)
    assert (by_name["r"].low, by_name["r"].high) == (0, np.inf)


def converted(*wide: str) -> list[tuple[str, int, bool, set[str]]]:
    """What is converted where these values have 16 bits: the name of the first value on the grid, bits, exactness, operators."""
    found = attention()
    whole = region(found, QNN)
    edges = edges_of(whole.units, tensors.mark(found.graph, whole), QNN)
    chosen = [group for group in whole.grids if not wide or {str(value.name) for value in group.values} & set(wide)]
    result = []
    for each in conversions(edges, chosen):
        readers = {str(reader.name).removesuffix("_rounded_mark") for reader, _ in each.readers}
        result.append((str(each.group.values[0].name), each.bits, each.exact, readers))
    return sorted(result)


def test_operands_that_are_at_most_of_8_bits_get_a_grid_of_their_own_behind_16_bits() -> None:
    assert converted() == [("k", 8, False, {"scores"}), ("x", 8, False, {"mixed"})]


def test_values_are_converted_where_operators_of_8_and_16_bits_meet() -> None:
    assert converted("scaled") == [("scores", 16, True, {"scaled"}), ("weights", 16, False, {"weights"})]
    assert converted("k") == [("k", 8, False, {"scores"}), ("x", 8, False, {"mixed", "q"})]  # scores takes it in 8 bits only
    assert converted("r") == [("mixed", 16, True, {"product"}), ("y_float", 16, False, {"y"})]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_16_bits_go_to_values_whose_rounding_costs_most_within_a_share_of_the_work(share: float) -> None:
    found = attention()
    whole = region(found, QNN)
    edges = edges_of(whole.units, tensors.mark(found.graph, whole), QNN)
    rng = np.random.default_rng(4)
    for _ in range(5):
        losses = {group: float(rng.pareto(1.0)) for group in whole.grids}
        wide = choose_wide(edges, losses, share)
        works = [(work(each.unit), each.is_wide(wide)) for each in edges]
        assert sum(w for w, is_wide in works if is_wide) <= share * sum(w for w, _ in works)
        used = {each for each in edges if each.is_wide(wide)}
        affordable = {group for group in losses if all(each in used for each in edges if group in each.groups)}
        assert affordable <= wide  # what costs nothing more
        for group in losses:  # no single value would have been better
            alone = sum(w for (w, _), each in zip(works, edges, strict=True) if each.is_wide({group}))
            assert alone > share * sum(w for w, _ in works) or losses[group] <= sum(losses[other] for other in wide)
    assert share < 1 or wide == set(losses)
    assert {name for group in may_be_wide(edges) for name in (str(v.name) for v in group.values)}.isdisjoint({"k", "turned"})


def test_choices_come_in_the_same_order_in_every_run() -> None:
    """Of equal choices the first is taken, which must not depend on where objects are in memory."""
    orders = []
    for _ in range(5):
        found = attention()
        whole = region(found, QNN)
        groups = may_be_wide(edges_of(whole.units, tensors.mark(found.graph, whole), QNN))
        orders.append([str(group.values[0].name) for group in groups])
    assert len(orders[0]) > 5
    assert orders == [orders[0]] * len(orders)


def test_fed_grids_round_as_the_written_ones() -> None:
    found = attention()
    whole = region(found, QNN)
    marks = tensors.mark(found.graph, whole)
    grids = {name: GridType(bits=8 if i % 2 else 16).of_range(-1.5 - i, 2.0) for i, name in enumerate(marks)}
    copy, inputs = with_grid_inputs(found, marks)
    fed = ort.InferenceSession(ir.to_proto(copy).SerializeToString())
    exact = ort.InferenceSession(ir.to_proto(attention()).SerializeToString()).run(None, {"x": INPUT})[0]
    np.testing.assert_allclose(fed.run(["y"], {"x": INPUT})[0], exact, rtol=1e-5, atol=1e-6)
    actual = fed.run(["y"], {"x": INPUT, **feeds(grids, inputs)})[0]
    tensors.emit(found.graph, grids)
    written = ort.InferenceSession(ir.to_proto(found).SerializeToString()).run(["y"], {"x": INPUT})[0]
    np.testing.assert_allclose(actual, written, rtol=0, atol=1e-5)


def test_nothing_is_rounded_that_the_runtime_does_not_take_or_that_is_no_float() -> None:
    found = model(
        [
            node("Shape", ["x"], "shape"),
            node("Slice", ["shape", "zero", "one"], "first"),  # moves integers
            node("Erf", ["x"], "e"),  # not in the table
            node("Concat", ["first", "rest"], "target", axis=0),
            node("Reshape", ["e", "target"], "y"),
        ],
        {"x": [2, 6]},
        ["y"],
        {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([-1])},
    )
    assert names(region(found, QNN)) == [{"e", "y"}]


def test_layers_that_are_left_out_keep_their_values() -> None:
    found = attention()
    layers = linear.find(found)[0]
    units = whole_graph(found.graph, layers[:1], QNN, inferred_types(found), {layer.node for layer in layers[1:]})
    assert {"k"} not in names(units)
    assert {"k", "turned"} in names(units)  # the Transpose reads it rounded


def rounded(found: ir.Model, bits: int = 8) -> ir.Model:
    """Round a graph to grids over the largest magnitude of each value in the float graph."""
    whole = region(found, QNN)
    groups = whole.grids
    proto = ir.to_proto(found)
    del proto.graph.output[:]
    wanted = [str(group.values[0].name) for group in groups]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in dict.fromkeys(wanted) if name != "x")
    session = ort.InferenceSession(proto.SerializeToString())
    values = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": INPUT}), strict=True)) | {"x": INPUT}
    highs = {group: float(np.abs(values[name]).max()) for group, name in zip(groups, wanted, strict=True)}

    def grid(group: SharedGrid, bits: int) -> ActivationGrid:
        kind, high = GridType(bits=bits), highs[group]
        return kind.exactly(*group.exact) if group.exact else kind.of_range(0 if group.low == 0 else -high, high)

    marks = tensors.mark(found.graph, whole)
    grids = {name: grid(group, bits) for name, group in marks.items()}
    if bits == 16:
        needed = list(conversions(edges_of(whole.units, marks, QNN), groups))
        grids |= {name: grid(each.group, each.bits) for name, each in tensors.mark_conversions(found.graph, needed).items()}
    tensors.emit(found.graph, grids)
    tensors.emit_constants(found.graph, QNN, GridType(bits=bits))
    return found


@pytest.mark.parametrize("bits", [8, 16])
def test_all_that_operators_read_and_put_out_is_rounded(bits: int) -> None:
    found = rounded(attention(), bits)
    assert "Relu" not in [n.op_type for n in found.graph]  # the grid ends at 0
    weights = {"w", "v", "u", "b"}  # of layers, which another emitter writes
    for step in found.graph:
        if step.op_type in ("QuantizeLinear", "DequantizeLinear", "Add"):
            continue
        real = [v for v in step.inputs if v is not None and v.name not in weights]
        assert [v.producer().op_type for v in real if v.producer() is not None] == ["DequantizeLinear"] * len(real), step  # type: ignore[union-attr]
    codes = {str(v.name): v.const_value.dtype for v in found.graph.initializers.values() if v.const_value is not None}
    assert codes["offset_codes"] == ir.DataType.INT32
    assert codes["gain_codes"] == ir.DataType.UINT8  # a weight
    assert codes["scale_codes"] == (ir.DataType.UINT8 if bits == 8 else ir.DataType.UINT16)


def test_constants_that_a_caller_may_override_stay_as_they_are() -> None:
    found = attention()
    found.graph.inputs.append(found.graph.initializers["scale"])
    names_of = {str(value.name) for value in rounded(found).graph.initializers.values()}
    assert "scale" in names_of
    assert "scale_codes" not in names_of
    assert "gain_codes" in names_of


@pytest.mark.parametrize("bits", [8, 16])
def test_rounded_graphs_compute_what_the_float_graph_does(bits: int) -> None:
    x = {"x": INPUT}
    expected = ort.InferenceSession(ir.to_proto(attention()).SerializeToString()).run(None, x)[0]
    actual = ort.InferenceSession(ir.to_proto(rounded(attention(), bits)).SerializeToString()).run(["y"], x)[0]
    error = np.square(actual - expected).mean() / np.square(expected).mean()
    assert error < (0.02 if bits == 8 else 0.001)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
def test_grids_cover_their_range_and_are_of_their_type(kind: str, power: bool, symmetric: bool) -> None:
    for low, high in RNG.uniform(0, 5, (50, 2)) * [-1, 1]:
        grid = GridType.named(kind, symmetric, power).of_range(low, high)
        assert grid.dtype == np.dtype(kind)
        assert grid.range[0] <= low + 0.51 * grid.scale
        assert grid.range[1] >= high - 0.51 * grid.scale
        assert not power or float(np.log2(grid.scale)).is_integer()
        assert not symmetric or grid.zero_point == (0 if kind.startswith("int") else 2 ** (grid.bits - 1))
        assert np.iinfo(kind).min <= grid.zero_point <= np.iinfo(kind).max


@pytest.mark.parametrize("power", [False, True])
def test_a_grid_with_a_limit_ends_there_or_before(power: bool) -> None:
    for high in RNG.uniform(0.1, 6, 50):
        assert np.float32(GridType(power_of_two=power).of_range(0, high, 6.0).range[1]) <= 6


def test_the_grid_of_a_fixed_range() -> None:
    assert GridType().exactly(0, 1) == ActivationGrid(1 / 256, 0)
    assert GridType(bits=16).exactly(-1, 1) == ActivationGrid(1 / 32768, 32768, False, 16)
    assert GridType(signed=True).exactly(0, 1) == ActivationGrid(1 / 256, -128, True)


def test_a_product_with_a_bias_becomes_one_operator() -> None:
    x = {"x": INPUT}
    expected = ort.InferenceSession(ir.to_proto(attention()).SerializeToString()).run(None, x)[0]
    found = attention()
    as_gemm.rewrite(found, linear.find(found)[0])
    assert [n.op_type for n in found.graph].count("Gemm") == 1
    assert {str(layer.output.name) for layer in linear.find(found)[0]} == {"q", "k", "sum_rows"}
    actual = ort.InferenceSession(ir.to_proto(found).SerializeToString()).run(None, x)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_axis_of_samples_becomes_1() -> None:
    found = model([node("Add", ["x", "z"], "y")], {"x": ["batch", 3], "z": ["batch", 3]}, ["y"], {})
    found.graph.outputs[0].shape = ir.Shape(["batch", 3])
    assert fix_batch(found, "a runtime") == ["a runtime needs fixed shapes: the axis of samples is 1 in the result"]
    assert [list(v.shape or ()) for v in (*found.graph.inputs, *found.graph.outputs)] == [[1, 3]] * 3
    assert fix_batch(found, "a runtime") == []


def test_other_unknown_axes_are_named() -> None:
    found = model([node("Add", ["x", "z"], "y")], {"x": ["batch", "length"], "z": ["batch", 3]}, ["y"], {})
    with pytest.raises(ModelError, match=r"a runtime needs fixed shapes, and input x has axis 1 \(length\)"):
        fix_batch(found, "a runtime")


def test_positions_stay_float() -> None:
    """Rounded, they would choose other rows of a table, or other angles; a mask that integers tell is rounded, since scores are."""
    b = Builder(18)
    x = b.input("x", [1, 6, 8])
    positions, mask = (b.input(name, shape, ir.DataType.INT64) for name, shape in (("positions", [1, 6]), ("mask", [1, 1, 6])))

    def cast(value: ir.Value, kind: ir.DataType) -> ir.Value:
        result = b.node("Cast", [value], to=kind.value)
        result.dtype = kind
        return result

    real = cast(b.node("Unsqueeze", [positions, b.constant("last", np.array([-1]))]), FLOAT)
    angle = b.node("MatMul", [real, b.constant("frequencies", random(1, 8))], "angle")
    logarithm = b.node("Log", [b.node("Add", [real, b.constant("one", np.float32(1))], "shifted")], "logarithm")
    index = cast(b.node("Squeeze", [logarithm, b.constant("axis", np.array([-1]))], "squeezed"), ir.DataType.INT64)
    row = b.node("Gather", [b.constant("table", random(9, 8)), index], "row")
    turned = b.node("Mul", [x, b.node("Cos", [angle])], "turned")
    causal = b.node(
        "Trilu", [b.node("Mul", [cast(mask, FLOAT), b.constant("all", np.float32(-1e38) * np.ones((1, 6, 6), np.float32))], "all")]
    )
    written = b.node("ScatterND", [causal, b.constant("at", np.array([[0, 0, 0]])), b.constant("zero", np.zeros(1, np.float32))], "written")
    seen = cast(b.node("Add", [written, b.constant("ones", np.float32(1))], "seen"), ir.DataType.BOOL)
    far = b.node("Mul", [cast(seen, FLOAT), b.constant("weight", np.float32(-1e4))], "far")
    scores = b.node("Add", [b.node("MatMul", [turned, b.node("Transpose", [x], perm=[0, 2, 1])]), far], "scores")
    model = b.model_of([b.node("Add", [b.node("MatMul", [b.node("Softmax", [scores]), x], "mixed"), row], "y")])
    region = whole_graph(model.graph, [], QNN, inferred_types(model))
    rounded = {unit.node.name for unit in region.units}
    assert {"turned", "far", "scores", "mixed", "y"} <= rounded
    assert not {"angle", "shifted", "logarithm", "squeezed", "all", "seen"} & rounded
