"""Random graphs of odd forms: what is not a layer, but holds weights; values that are no tensors; and what files declare oddly.

These are drawn beside the forms of `tests.fuzz.generate`, and one to three oddities of declaration are put on each finished model.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.generate import DTYPES, FORMS, Form, Made, Maker, Value, make

LABELS = ("a", "bc", "größe", "")


def parameter(m: Maker, *shape: int) -> str:
    """A constant as exporters leave it: as it is, put together of two, in another shape, or in half precision."""
    array = m.floats(*shape, scale=shape[-1] ** -0.5)
    form = m.rng.randrange(6)
    if form == 0 and shape[1] > 1:
        cut = m.rng.randrange(1, shape[1])
        return m.node("Concat", [m.constant(array[:, :cut], "upper"), m.constant(array[:, cut:], "lower")], shape, axis=1).name
    if form == 1:
        return m.node("Reshape", [m.constant(array.reshape(-1), "flat"), m.integers(*shape)], shape).name
    if form == 2 and m.dtype == np.float32:
        return m.node("Cast", [m.constant(array.astype(np.float16), "half")], shape, to=TensorProto.FLOAT).name
    return m.constant(array, "parameter")


def _matmul(m: Maker, x: Value) -> Value:
    n = m.width()
    return m.node("MatMul", [x.name, m.weight(x.shape[-1], n)], (*x.shape[:-1], n))


def _recurrent(m: Maker, x: Value) -> Value:
    """LSTM, GRU or RNN over the first axis, in one direction or both; all of its states or the last one."""
    if len(x.shape) != 3 or m.dtype != np.float32:
        return _matmul(m, x)
    op, gates = m.rng.choice((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    hidden = m.rng.choice((1, 3, 8, 16))
    direction = m.rng.choice(("forward", "reverse", "bidirectional"))
    ways = 1 + (direction == "bidirectional")
    steps, batch, width = x.shape
    inputs = [x.name, parameter(m, ways, gates * hidden, width), parameter(m, ways, gates * hidden, hidden)]
    inputs += [m.rng.choice(("", m.constant(m.floats(ways, 2 * gates * hidden, scale=0.1), "b")))]
    if m.rng.random() < 0.3:
        inputs += ["", m.constant(m.floats(ways, batch, hidden), "initial")]
    attributes: dict[str, Any] = {"linear_before_reset": m.rng.randrange(2)} if op == "GRU" else {}
    if m.rng.random() < 0.2:
        attributes["clip"] = 3.0
    states, last = m.name("states"), m.name("last")
    only_last = m.rng.random() < 0.3
    outputs = ["" if only_last else states, last]
    m.nodes.append(helper.make_node(op, inputs, outputs, name=m.name(op), hidden_size=hidden, direction=direction, **attributes))
    if only_last:
        return Value(last, (ways, batch, hidden))
    turned = m.node("Transpose", [states], (steps, batch, ways, hidden), perm=[0, 2, 1, 3])
    return m.node("Reshape", [turned.name, m.integers(0, 0, -1)], (steps, batch, ways * hidden))


def _join(m: Maker, x: Value, y: Value) -> Value:
    """Two values of one shape but for their widths, added or side by side."""
    if x.shape == y.shape:
        return m.node("Add", [x.name, y.name], x.shape)
    return m.node("Concat", [x.name, y.name], (*x.shape[:-1], x.shape[-1] + y.shape[-1]), axis=len(x.shape) - 1)


def _looked_up(m: Maker, x: Value, ids: str, rows: int) -> Value:
    """Rows of a table, joined to a value; the table may be a weight as well, as it is or transposed."""
    tied = [(name, shape) for name, shape in m.weights if shape[0] >= rows]
    if tied and m.rng.random() < 0.4:
        table, (rows, width) = m.rng.choice(tied)
    else:
        width = m.rng.choice((x.shape[-1], m.width()))
        table = m.constant(m.floats(rows, width), "table")
        m.weights.append((table, (rows, width)))
    row = m.node("Gather", [table, ids], (*x.shape[:-1], width))
    return _join(m, x, _logits(m, row, table, rows) if m.rng.random() < 0.4 else row)


def _logits(m: Maker, x: Value, table: str, rows: int) -> Value:
    """Products with the rows of a table, or with half of them, or with its columns where it is square."""
    shape, form = (*x.shape[:-1], rows), len(m.nodes) % 3  # not drawn, so that seeds that failed once stay what they were
    if form == 1 and rows == x.shape[-1]:
        return m.node("MatMul", [x.name, table], shape)
    if form == 2 and m.opset >= 11:
        flat = m.node("Reshape", [x.name, m.integers(-1, x.shape[-1])], (int(np.prod(shape[:-1])), x.shape[-1]))
        half = m.node("Gemm", [flat.name, table], (flat.shape[0], rows), transB=1, alpha=0.5)
        return m.node("Reshape", [half.name, m.integers(*shape)], shape)
    turned = m.node("Transpose", [table], (x.shape[-1], rows), perm=[1, 0])
    return m.node("MatMul", [x.name, turned.name], shape)


def _table(m: Maker, x: Value) -> Value:
    """An embedding, whose table logits may be made with."""
    rows, ids = m.rng.choice((2, 7, 64)), m.name("ids")
    kind = m.rng.choice((np.int64, np.int32))
    m.draw[ids] = lambda: m.arrays.integers(0, rows, x.shape[:-1]).astype(kind)
    m.inputs[ids] = m.draw[ids]()
    return _looked_up(m, x, ids, rows)


def _text(m: Maker, x: Value) -> Value:
    """Strings that are looked up in a list, and then in a table."""
    words = m.name("words")
    m.draw[words] = lambda: np.array(LABELS)[m.arrays.integers(0, len(LABELS), x.shape[:-1])]
    m.inputs[words] = m.draw[words]()
    m.domains["ai.onnx.ml"] = 2
    numbers = {"keys_strings": LABELS, "values_int64s": list(range(len(LABELS)))}
    return _looked_up(m, x, m.node("LabelEncoder", [words], x.shape[:-1], domain="ai.onnx.ml", **numbers).name, len(LABELS))


def _sequence(m: Maker, x: Value) -> Value:
    """A list of two values, of which one is taken or both are joined; it may be an output too."""
    if m.opset < 11:
        return _matmul(m, x)
    other = m.node("Tanh", [x.name], x.shape)
    both = m.node("SequenceConstruct", [x.name, other.name], ())
    if m.rng.random() < 0.5:
        m.results.append(helper.make_tensor_sequence_value_info(both.name, DTYPES[m.dtype], None))
    if m.rng.random() < 0.5:
        position = m.constant(np.array(m.rng.choice((0, 1, -1)), np.int64), "position")
        return m.node("SequenceAt", [both.name, position], x.shape)
    return m.node("ConcatFromSequence", [both.name], (*x.shape[:-1], 2 * x.shape[-1]), axis=len(x.shape) - 1)


def _maps(m: Maker, x: Value) -> Value:
    """Probabilities by label, as an output."""
    if len(x.shape) != 2 or m.dtype != np.float32:
        return _matmul(m, x)
    m.domains.setdefault("ai.onnx.ml", 1)
    probabilities = m.node("Softmax", [x.name], x.shape, axis=1)
    named = m.rng.random() < 0.5
    labels: dict[str, Any] = (
        {"classlabels_strings": [f"c{i}" for i in range(x.shape[1])]} if named else {"classlabels_int64s": list(range(x.shape[1]))}
    )
    maps = m.node("ZipMap", [probabilities.name], (), domain="ai.onnx.ml", **labels)
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.STRING if named else TensorProto.INT64, value))
    m.results.append(helper.make_value_info(maps.name, kind))
    return x


def _optional(m: Maker, x: Value) -> Value:
    if m.opset < 18:
        return _sequence(m, x)
    wrapped = m.node("Optional", [x.name], ())
    return m.node("OptionalGetElement", [wrapped.name], x.shape)


def _tensor(m: Maker, name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(m.floats(*shape, scale=shape[0] ** -0.5), name)


def _scan(m: Maker, x: Value) -> Value:
    """A layer at every step, its weight in the body or outside; with a state that has a weight too, or without."""
    if len(x.shape) != 3 or m.opset < 9:
        return _matmul(m, x)
    steps, batch, k = x.shape
    n, kind = m.width(), DTYPES[m.dtype]
    row, product, out, new = (m.name(b) for b in ("row", "product", "out", "new"))
    inner = m.name("inner")
    held = [] if m.rng.random() < 0.5 else [_tensor(m, inner, k, n)]
    nodes = [helper.make_node("MatMul", [row, inner if held else m.weight(k, n)], [product])]
    inputs, starts, last = [helper.make_tensor_value_info(row, kind, [None, k])], [], product
    outputs = [helper.make_tensor_value_info(out, kind, [None, n])]
    if m.rng.random() < 0.5:
        state, recurrence, total, echo = (m.name(b) for b in ("state", "recurrence", "total", "echo"))
        held.append(_tensor(m, recurrence, n, n))
        nodes += [helper.make_node("MatMul", [state, recurrence], [echo]), helper.make_node("Add", [product, echo], [total])]
        nodes += [helper.make_node("Tanh", [total], [new])]
        inputs.insert(0, helper.make_tensor_value_info(state, kind, [None, n]))
        outputs.insert(0, helper.make_tensor_value_info(new, kind, [None, n]))
        starts, last = [m.constant(np.zeros((batch, n), m.dtype), "start")], new
    nodes.append(helper.make_node("Identity", [last], [out]))
    body = helper.make_graph(nodes, "body", inputs, outputs, held)
    ends = [m.name("end") for _ in starts]
    stacked = m.name("scan")
    m.nodes.append(helper.make_node("Scan", [*starts, x.name], [*ends, stacked], body=body, num_scan_inputs=1))
    return Value(stacked, (steps, batch, n))


def _nested(m: Maker, x: Value) -> Value:
    """A Loop with an If inside, and layers in both: their weights in the branch, in the body, in a Constant node, or outside."""
    k, kind = x.shape[-1], DTYPES[m.dtype]
    i, go, state, still, first, chosen, out = (m.name(b) for b in ("i", "go", "state", "still", "first", "chosen", "out"))
    held: list[onnx.TensorProto] = []
    nodes = [helper.make_node("Equal", [i, m.constant(np.array(0, np.int64), "zero")], [first])]
    branches = []
    for _ in range(2):
        product, weight, place = m.name("product"), m.name("weight"), m.rng.randrange(4)
        tensor = _tensor(m, weight, k, k)
        inside = [helper.make_node("Constant", [], [weight], value=tensor)] if place == 1 else []
        if place == 2:
            held.append(tensor)
        source = m.weight(k, k) if place == 3 else weight
        inside.append(helper.make_node("MatMul", [state, source], [product]))
        info = helper.make_tensor_value_info(product, kind, [None] * len(x.shape))
        branches.append(helper.make_graph(inside, "branch", [], [info], [tensor] if place == 0 else []))
    nodes += [
        helper.make_node("If", [first], [chosen], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Tanh", [chosen], [out]),
        helper.make_node("Identity", [go], [still]),
    ]
    flag = helper.make_tensor_value_info(go, TensorProto.BOOL, [])
    count = helper.make_tensor_value_info(i, TensorProto.INT64, [])
    shape = [None] * len(x.shape)
    inputs = [count, flag, helper.make_tensor_value_info(state, kind, shape)]
    outputs = [helper.make_tensor_value_info(still, TensorProto.BOOL, []), helper.make_tensor_value_info(out, kind, shape)]
    body = helper.make_graph(nodes, "body", inputs, outputs, held)
    trips, true = m.constant(np.array(2, np.int64), "trips"), m.constant(np.array(True), "true")
    return m.node("Loop", [trips, true, x.name], x.shape, body=body)


def _attention(m: Maker, x: Value) -> Value:
    """Products of values that are both computed."""
    rank, rows = len(x.shape), x.shape[-2]
    turned = m.node("Transpose", [x.name], (*x.shape[:-2], x.shape[-1], rows), perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = m.node("MatMul", [x.name, turned.name], (*x.shape[:-1], rows))
    shares = m.node("Softmax", [scores.name], scores.shape, axis=rank - 1)
    return m.node("MatMul", [shares.name, x.name], x.shape)


def _norm(m: Maker, x: Value) -> Value:
    """A normalization before a layer, whose scales an equalized layer may share."""
    if m.opset < 17 or m.dtype != np.float32:
        return _matmul(m, x)
    k = x.shape[-1]
    inputs = [x.name, m.constant(m.floats(k), "gamma")] + ([m.constant(m.floats(k), "beta")] if m.rng.random() < 0.5 else [])
    return _matmul(m, m.node("LayerNormalization", inputs, x.shape, axis=-1))


def _image(m: Maker, x: Value) -> Value:
    """Conv or ConvTranspose over rank 4, in groups or not, with strides, dilations and a bias or without."""
    if len(x.shape) != 4 or m.dtype != np.float32:
        return _matmul(m, x)
    batch, channels, high, wide = x.shape
    group = m.rng.choice((1, channels))
    turned = m.rng.random() < 0.3
    each = m.rng.choice((1, 3))
    shape = (channels, each, 1, 3) if turned else (group * each, channels // group, 1, 3)
    out = group * each
    kernel = m.constant(m.floats(*shape, scale=0.5), "kernel")
    inputs = [x.name, kernel] + ([m.constant(m.floats(out, scale=0.1), "b")] if m.rng.random() < 0.5 else [])
    dilation = m.rng.choice((1, 2))
    attributes: dict[str, Any] = {"group": group, "pads": [0, dilation, 0, dilation], "dilations": [1, dilation]}
    return m.node("ConvTranspose" if turned else "Conv", inputs, (batch, out, high, wide), **attributes)


def _packed(m: Maker, x: Value) -> Value:
    """A layer whose weight is put together of two, as of queries and keys."""
    k = x.shape[-1]
    widths = m.width(), m.width()
    both = m.node("Concat", [m.weight(k, n) for n in widths], (k, sum(widths)), axis=1)
    return m.node("MatMul", [x.name, both.name], (*x.shape[:-1], sum(widths)))


def _function(m: Maker, x: Value) -> Value:
    """A function with a weight inside, and with an attribute that a call gives or leaves out."""
    if m.opset < 14 or m.dtype != np.float32:
        return _matmul(m, x)
    k, n, name = x.shape[-1], m.width(), f"Own{m.count}"
    slope = helper.make_node("LeakyRelu", ["p"], ["r"])
    slope.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    nodes = [helper.make_node("Constant", [], ["w"], value=_tensor(m, "", k, n)), helper.make_node("MatMul", ["a", "w"], ["p"]), slope]
    imports, default = [helper.make_opsetid("", m.opset)], [helper.make_attribute("slope", 0.25)]
    m.domains["own.domain"] = 1
    m.functions[name] = helper.make_function("own.domain", name, ["a"], ["r"], nodes, imports, [], default)
    given = {"slope": 0.5} if m.rng.random() < 0.5 else {}
    return m.node(name, [x.name], (*x.shape[:-1], n), domain="own.domain", **given)


ODD: tuple[Form, ...] = (
    *(_recurrent, _recurrent, _table, _table, _text, _sequence, _maps, _optional, _scan, _scan, _nested, _nested),
    *(_attention, _norm, _image, _image, _packed, _function),
)


# What a file declares


def _weights_are_inputs(m: Maker, proto: onnx.ModelProto) -> None:
    declared = {v.name for v in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.name not in declared:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    if m.opset < 9 and not m.functions and m.rng.random() < 0.5:
        proto.ir_version = 3


def _sparse_weights(m: Maker, proto: onnx.ModelProto) -> None:
    declared = {v.name for v in (*proto.graph.input, *proto.graph.output)}
    for tensor in [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims and t.name not in declared]:
        if m.rng.random() < 0.5:
            array = numpy_helper.to_array(tensor)
            flat = np.flatnonzero(m.arrays.random(array.size) < 0.6)
            values = numpy_helper.from_array(array.reshape(-1)[flat], tensor.name)
            indices = numpy_helper.from_array(flat.astype(np.int64), tensor.name + "_indices")
            proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
            proto.graph.initializer.remove(tensor)


def _outputs_without_shapes(m: Maker, proto: onnx.ModelProto) -> None:
    for value in proto.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


def _outputs_without_types(m: Maker, proto: onnx.ModelProto) -> None:
    for value in proto.graph.output:
        value.ClearField("type")


def _inputs_without_shapes(m: Maker, proto: onnx.ModelProto) -> None:
    held = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in held:
            value.type.tensor_type.ClearField("shape")


def _sizes_of_minus_one(m: Maker, proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = -1


def _values_declared_twice(m: Maker, proto: onnx.ModelProto) -> None:
    names = [name for node in proto.graph.node for name in node.output if name] + ["nowhere", proto.graph.input[0].name]
    for name in m.rng.choices(names, k=3):
        proto.graph.value_info.extend([onnx.ValueInfoProto(name=name)] * 2)


def _nodes_without_names(m: Maker, proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        node.name = ""


def _more_outputs(m: Maker, proto: onnx.ModelProto) -> None:
    """Inputs, weights and inner values that are outputs as well."""
    present = {v.name for v in proto.graph.output}
    inner = [node.output[0] for node in proto.graph.node if node.op_type in ("MatMul", "Gemm", "Conv", "Identity")]
    candidates: list[onnx.ValueInfoProto] = [proto.graph.input[0], *(onnx.ValueInfoProto(name=name) for name in inner)]
    candidates += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in proto.graph.initializer]
    for value in m.rng.sample(candidates, min(2, len(candidates))):
        if value.name not in present:
            proto.graph.output.append(value)
            present.add(value.name)


def _numbers_not_bytes(m: Maker, proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.float_data.extend(array.reshape(-1).tolist())


ODDITIES = (
    _weights_are_inputs,
    _sparse_weights,
    _outputs_without_shapes,
    _outputs_without_types,
    _inputs_without_shapes,
    _sizes_of_minus_one,
    _values_declared_twice,
    _nodes_without_names,
    _more_outputs,
    _numbers_not_bytes,
)


def _finish(m: Maker, proto: onnx.ModelProto) -> None:
    for oddity in m.rng.sample(ODDITIES, m.rng.choice((0, 1, 1, 2, 3))):
        oddity(m, proto)
        m.forms.append(oddity.__name__.strip("_"))


def make_odd(rng: random.Random) -> Made:
    """A model of one to six forms, most of them odd, declared oddly."""
    return make(rng, (*FORMS, *ODD, *ODD), _finish)
