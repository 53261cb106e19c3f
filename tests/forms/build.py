"""A file for every odd form that exporters, converters and hands have made of ONNX.

Unless a form says otherwise it is ``y = MatMul(Relu(MatMul(x, w) + b), v)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Form = Callable[[], onnx.ModelProto]

FORMS: dict[str, Form] = {}
"""Builders by the name of their form."""

K, M, N = 64, 48, 32
RNG = np.random.default_rng(5)
W = (RNG.standard_normal((K, M)) * 0.2).astype(np.float32)
B = (RNG.standard_normal(M) * 0.2).astype(np.float32)
V = (RNG.standard_normal((M, N)) * 0.2).astype(np.float32)

LAYERS = ("h = MatMul(x, w)", "s = Add(h, b)", "r = Relu(s)", "y = MatMul(r, v)")


def form(function: Form) -> Form:
    """Register a builder under its name."""
    FORMS[function.__name__.replace("_", "-")] = function
    return function


def node(text: str, **attributes: Any) -> onnx.NodeProto:
    """A node from ``a, b = domain.Op(c, d)``; a name of ``-`` is an empty one."""
    left, right = text.split(" = ")
    op, inputs = right.removesuffix(")").split("(", 1)
    domain, _, op = op.rpartition(".")
    names = [["" if n == "-" else n for n in part.split(", ") if n] for part in (inputs, left)]
    return helper.make_node(op, *names, domain=domain, name=f"n_{names[1][0]}", **attributes)


def value(name: str, shape: Sequence[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[str | onnx.NodeProto] = LAYERS,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    opset: int = 17,
    ir_version: int = 8,
    domains: Sequence[tuple[str, int]] = (),
    constants: dict[str, Array] | None = None,
    **more: Any,
) -> onnx.ModelProto:
    """The model of the module's description, but for what is given."""
    arrays = {"w": W, "b": B, "v": V} if constants is None else constants
    graph = helper.make_graph(
        [node(n) if isinstance(n, str) else n for n in nodes],
        "graph",
        inputs or [value("x", ["n", K])],
        outputs or [value("y", ["n", N])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid(d, v) for d, v in (("", opset), *domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, **more)


def write(name: str, folder: Path) -> Path:
    """Write the file of a form."""
    path = folder / "model.onnx"
    proto = FORMS[name]()
    for tensor in proto.graph.initializer:  # its data is moved to files, as the form's locations say
        if tensor.external_data:
            entries = {e.key: e.value for e in tensor.external_data}
            file = folder / entries["location"]
            file.parent.mkdir(parents=True, exist_ok=True)
            before = file.read_bytes() if file.exists() else b""
            offset = int(entries.get("offset", 0))
            file.write_bytes(before[:offset].ljust(offset, b"\0") + tensor.raw_data + before[offset + len(tensor.raw_data) :])
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
    path.write_bytes(proto.SerializeToString())
    return path


def tensor(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


def replace_tensor(proto: onnx.ModelProto, name: str, by: onnx.TensorProto) -> onnx.ModelProto:
    by.name = name
    tensor(proto, name).CopyFrom(by)
    return proto


def as_inputs(proto: onnx.ModelProto) -> onnx.ModelProto:
    """List the initializers among the inputs."""
    proto.graph.input.extend(value(t.name, list(t.dims), t.data_type) for t in proto.graph.initializer)
    return proto


# Versions


@form
def weights_are_inputs_ir3() -> onnx.ModelProto:
    return as_inputs(model(opset=9, ir_version=3))


@form
def weights_are_inputs_ir4() -> onnx.ModelProto:
    """As PyTorch 1.2 wrote them."""
    return as_inputs(model(opset=9, ir_version=4))


@form
def weights_are_inputs_ir8() -> onnx.ModelProto:
    return as_inputs(model())


@form
def weights_come_first_among_inputs() -> onnx.ModelProto:
    proto = as_inputs(model())
    order = [*proto.graph.input[1:], proto.graph.input[0]]
    kept = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in order]
    proto.graph.ClearField("input")
    proto.graph.input.extend(kept)
    return proto


@form
def one_bias_is_an_input() -> onnx.ModelProto:
    proto = model()
    proto.graph.input.append(value("b", [M]))
    return proto


@form
def ir3_without_weights_as_inputs() -> onnx.ModelProto:
    return model(opset=9, ir_version=3)


@form
def opset_6() -> onnx.ModelProto:
    return as_inputs(model(["h = MatMul(x, w)", "r = Relu(h)", "y = MatMul(r, v)"], opset=6, ir_version=3))


@form
def opset_7() -> onnx.ModelProto:
    return as_inputs(model(opset=7, ir_version=3))


@form
def opset_newest() -> onnx.ModelProto:
    return model(opset=onnx.defs.onnx_opset_version() - 1, ir_version=11)


@form
def opset_of_the_future() -> onnx.ModelProto:
    return model(opset=99)


@form
def ir_of_the_future() -> onnx.ModelProto:
    return model(ir_version=99)


@form
def opset_gap() -> onnx.ModelProto:
    """ONNX's own operators of an old opset beside traditional ones of a new one."""
    return model(
        [*LAYERS[:3], node("t = ai.onnx.ml.Scaler(r)", offset=[0.0], scale=[2.0]), "y = MatMul(t, v)"], opset=9, domains=[("ai.onnx.ml", 5)]
    )


@form
def domain_spelled_out() -> onnx.ModelProto:
    proto = model()
    proto.opset_import[0].domain = "ai.onnx"
    for each in proto.graph.node:
        each.domain = "ai.onnx"
    return proto


@form
def opset_imported_twice() -> onnx.ModelProto:
    return model(domains=[("", 17)])


@form
def domain_nobody_uses() -> onnx.ModelProto:
    return model(domains=[("com.example.unused", 3), ("ai.onnx.training", 1)])


@form
def custom_operator() -> onnx.ModelProto:
    return model([*LAYERS[:3], "t = com.example.Twist(r)", "y = MatMul(t, v)"], domains=[("com.example", 1)])


@form
def contrib_operators() -> onnx.ModelProto:
    nodes = ["h = MatMul(x, w)", "g = com.microsoft.BiasGelu(h, b)", node("y = com.microsoft.FusedMatMul(g, v)", alpha=0.5)]
    return model(nodes, domains=[("com.microsoft", 1)])


@form
def contrib_domain_not_imported() -> onnx.ModelProto:
    return model(["h = MatMul(x, w)", "g = com.microsoft.BiasGelu(h, b)", "y = MatMul(g, v)"])


# Names


@form
def nodes_without_names() -> onnx.ModelProto:
    proto = model()
    for each in proto.graph.node:
        each.name = ""
    return proto


@form
def nodes_of_one_name() -> onnx.ModelProto:
    proto = model()
    for each in proto.graph.node:
        each.name = "node"
    return proto


@form
def graph_without_a_name() -> onnx.ModelProto:
    proto = model()
    proto.graph.name = ""
    return proto


@form
def names_of_every_kind() -> onnx.ModelProto:
    renamed = {"x": "in put:0", "h": "/модель/層/MatMul", "w": "w[0].weight", "y": "y'\"\\<>", "r": "%r", "s": "{s}"}
    proto = model()
    for names in (*(n.input for n in proto.graph.node), *(n.output for n in proto.graph.node)):
        names[:] = [renamed.get(n, n) for n in names]
    for named in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        named.name = renamed.get(named.name, named.name)
    return proto


@form
def empty_optional_inputs() -> onnx.ModelProto:
    nodes = ["h = Gemm(x, w, -)", "c = Clip(h, -, top)", "y = Gemm(c, v)"]
    return model(nodes, constants={"w": W, "v": V, "top": np.array(1, np.float32)})


@form
def empty_outputs() -> onnx.ModelProto:
    return model([*LAYERS[:3], "d, - = Dropout(r)", "y = MatMul(d, v)"])


# Declarations of values


@form
def value_info_twice() -> onnx.ModelProto:
    proto = model()
    proto.graph.value_info.extend([value("h", ["n", M]), value("h", ["n", M])])
    return proto


@form
def value_info_of_no_value() -> onnx.ModelProto:
    proto = model()
    proto.graph.value_info.extend([value("nowhere", [3]), value("x", ["n", K]), value("w", [K, M])])
    return proto


@form
def value_info_without_a_type() -> onnx.ModelProto:
    proto = model()
    proto.graph.value_info.append(onnx.ValueInfoProto(name="h"))
    return proto


@form
def value_info_that_is_wrong() -> onnx.ModelProto:
    proto = model()
    proto.graph.value_info.append(value("h", [7, M + 1]))
    return proto


@form
def output_without_a_shape() -> onnx.ModelProto:
    return model(outputs=[value("y", None)])


@form
def output_without_a_type() -> onnx.ModelProto:
    """An inner value that someone appended to the outputs."""
    proto = model()
    proto.graph.output.append(onnx.ValueInfoProto(name="h"))
    return proto


@form
def output_of_no_rank_or_type() -> onnx.ModelProto:
    return model(outputs=[onnx.ValueInfoProto(name="y")])


@form
def input_without_a_shape() -> onnx.ModelProto:
    return model(inputs=[value("x", None)])


@form
def input_in_a_body_without_a_shape() -> onnx.ModelProto:
    body = helper.make_graph([node("hh = MatMul(xx, w)"), node("yy = Identity(hh)")], "body", [value("xx", None)], [value("yy", None)])
    return model([node("y = Scan(x)", body=body, num_scan_inputs=1)], inputs=[value("x", ["t", "n", K])], outputs=[value("y", None)])


@form
def dimensions_without_names() -> onnx.ModelProto:
    return model(inputs=[value("x", [None, K])], outputs=[value("y", [None, None])])  # type: ignore[list-item]


@form
def dimension_of_minus_one() -> onnx.ModelProto:
    return model(inputs=[value("x", [-1, K])], outputs=[value("y", [-1, N])])


@form
def wrong_output_shape() -> onnx.ModelProto:
    return model(outputs=[value("y", [3, N + 1])])


@form
def rank_decided_at_run_time() -> onnx.ModelProto:
    nodes = ["q = Reshape(x, t)", "h = MatMul(q, w)", "s = Add(h, b)", "y = MatMul(s, v)"]
    return model(nodes, inputs=[value("x", ["n", K]), value("t", ["rank"], TensorProto.INT64)], outputs=[value("y", None)])


# Types


@form
def output_of_maps() -> onnx.ModelProto:
    """As sklearn-onnx ends a classifier."""
    nodes = [*LAYERS, "p = Softmax(y)", node("maps = ai.onnx.ml.ZipMap(p)", classlabels_int64s=list(range(N)))]
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    outputs = [value("y", ["n", N]), helper.make_value_info("maps", kind)]
    return model(nodes, outputs=outputs, domains=[("ai.onnx.ml", 1)])


@form
def output_of_maps_alone() -> onnx.ModelProto:
    proto = output_of_maps()
    del proto.graph.output[0]
    return proto


@form
def output_of_maps_by_string() -> onnx.ModelProto:
    proto = output_of_maps()
    attribute = proto.graph.node[-1].attribute[0]
    attribute.CopyFrom(helper.make_attribute("classlabels_strings", [f"c{i}" for i in range(N)]))
    proto.graph.output[1].type.sequence_type.elem_type.map_type.key_type = TensorProto.STRING
    return proto


@form
def input_of_maps() -> onnx.ModelProto:
    nodes = [node("x = ai.onnx.ml.DictVectorizer(features)", string_vocabulary=[f"c{i}" for i in range(K)]), *LAYERS]
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    return model(nodes, inputs=[helper.make_value_info("features", kind)], domains=[("ai.onnx.ml", 1)])


@form
def output_of_a_sequence() -> onnx.ModelProto:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    return model([*LAYERS, "all = SequenceConstruct(y, s)"], outputs=[value("y", ["n", N]), helper.make_value_info("all", kind)])


@form
def output_of_a_sequence_beside_a_mask() -> onnx.ModelProto:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    nodes = [
        *LAYERS,
        node("m = Cast(attention_mask)", to=TensorProto.FLOAT),
        "u = Unsqueeze(m, axis)",
        "z = Mul(y, u)",
        "all = SequenceConstruct(z, s)",
    ]
    inputs = [value("x", ["n", "t", K]), value("attention_mask", ["n", "t"], TensorProto.INT64)]
    outputs = [value("z", ["n", "t", N]), helper.make_value_info("all", kind)]
    return model(nodes, inputs, outputs, constants={"w": W, "b": B, "v": V, "axis": np.array([2])})


@form
def input_of_a_sequence() -> onnx.ModelProto:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", K]))
    nodes = [node("x = ConcatFromSequence(parts)", axis=0), *LAYERS]
    return model(nodes, inputs=[helper.make_value_info("parts", kind)])


@form
def optional_between_layers() -> onnx.ModelProto:
    return model([*LAYERS[:3], "o = Optional(r)", "t = OptionalGetElement(o)", "y = MatMul(t, v)"], opset=18)


@form
def optional_input() -> onnx.ModelProto:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", K]))
    return model(["x = OptionalGetElement(o)", *LAYERS], inputs=[helper.make_value_info("o", kind)], opset=18)


@form
def optional_output() -> onnx.ModelProto:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", N]))
    return model([*LAYERS, "o = Optional(y)"], outputs=[value("y", ["n", N]), helper.make_value_info("o", kind)], opset=18)


@form
def string_input() -> onnx.ModelProto:
    nodes = [node("q = ai.onnx.ml.OneHotEncoder(word)", cats_strings=[f"c{i}" for i in range(K)]), "x = Squeeze(q, one)", *LAYERS]
    constants = {"w": W, "b": B, "v": V, "one": np.array([1])}
    return model(nodes, inputs=[value("word", ["n", 1], TensorProto.STRING)], domains=[("ai.onnx.ml", 1)], constants=constants)


@form
def string_output() -> onnx.ModelProto:
    nodes = [
        *LAYERS,
        node("i = ArgMax(y)", axis=1),
        node("name = ai.onnx.ml.LabelEncoder(i)", keys_int64s=[0, 1], values_strings=["a", "b"]),
    ]
    outputs = [value("y", ["n", N]), value("name", ["n", 1], TensorProto.STRING)]
    return model(nodes, outputs=outputs, domains=[("ai.onnx.ml", 2)])


@form
def double_precision() -> onnx.ModelProto:
    constants = {"w": W.astype(np.float64), "b": B.astype(np.float64), "v": V.astype(np.float64)}
    kind = TensorProto.DOUBLE
    return model(inputs=[value("x", ["n", K], kind)], outputs=[value("y", ["n", N], kind)], constants=constants)


@form
def half_precision_as_integers() -> onnx.ModelProto:
    """float16 stored in ``int32_data``, as the specification has it."""
    kind = TensorProto.FLOAT16
    proto = model(
        inputs=[value("x", ["n", K], kind)],
        outputs=[value("y", ["n", N], kind)],
        constants={name: array.astype(np.float16) for name, array in (("w", W), ("b", B), ("v", V))},
    )
    for each in proto.graph.initializer:
        bits = numpy_helper.to_array(each).view(np.uint16).reshape(-1)
        each.ClearField("raw_data")
        each.int32_data.extend(map(int, bits))
    return proto


@form
def numbers_not_bytes() -> onnx.ModelProto:
    proto = model()
    for each in proto.graph.initializer:
        array = numpy_helper.to_array(each)
        each.ClearField("raw_data")
        each.float_data.extend(array.reshape(-1))
    return proto


@form
def bfloat16_weight() -> onnx.ModelProto:
    nodes = [node("w32 = Cast(w)", to=TensorProto.FLOAT), "h = MatMul(x, w32)", *LAYERS[1:]]
    proto = model(nodes)
    return replace_tensor(proto, "w", helper.make_tensor("w", TensorProto.BFLOAT16, W.shape, W.reshape(-1)))


@form
def float8_weight() -> onnx.ModelProto:
    nodes = ["w32 = DequantizeLinear(w, scale)", "h = MatMul(x, w32)", *LAYERS[1:]]
    proto = model(nodes, opset=19, ir_version=9, constants={"w": W, "b": B, "v": V, "scale": np.array(0.5, np.float32)})
    return replace_tensor(proto, "w", helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, W.shape, W.reshape(-1)))


@form
def int4_weight() -> onnx.ModelProto:
    nodes = ["w32 = DequantizeLinear(w, scale)", "h = MatMul(x, w32)", *LAYERS[1:]]
    proto = model(nodes, opset=21, ir_version=10, constants={"w": W, "b": B, "v": V, "scale": np.array(0.05, np.float32)})
    codes = RNG.integers(-8, 8, W.size)
    return replace_tensor(proto, "w", helper.make_tensor("w", TensorProto.INT4, W.shape, codes))


@form
def weights_without_elements() -> onnx.ModelProto:
    nodes = [*LAYERS[:3], "e = MatMul(r, none)", node("t = Concat(r, e)", axis=1), "y = MatMul(t, v)"]
    return model(nodes, constants={"w": W, "b": B, "v": V, "none": np.zeros((M, 0), np.float32), "unused": np.zeros(0, np.float32)})


@form
def sparse_initializer() -> onnx.ModelProto:
    proto = model(constants={"b": B, "v": V})
    proto.graph.sparse_initializer.append(sparse("w", W))
    return proto


@form
def sparse_constant() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["w"], sparse_value=sparse("w_values", W))
    return model([constant, *LAYERS], constants={"b": B, "v": V})


def sparse(name: str, array: Array) -> onnx.SparseTensorProto:
    """Every third element of an array."""
    flat = np.flatnonzero(np.arange(array.size) % 3 == 0)
    values = numpy_helper.from_array(array.reshape(-1)[flat], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(flat.astype(np.int64)), array.shape)


@form
def constants_of_every_kind() -> onnx.ModelProto:
    made = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W)),
        helper.make_node("Constant", [], ["b"], value_floats=B.tolist()),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Constant", [], ["shape"], value_ints=[-1, M]),
    ]
    nodes = [*made, *LAYERS[:3], "t = Reshape(r, shape)", "u = Mul(t, one)", "y = MatMul(u, v)"]
    return model(nodes, constants={"v": V})


# Where data lies


def external(proto: onnx.ModelProto, **places: tuple[str, int]) -> onnx.ModelProto:
    for name, (location, offset) in places.items():
        onnx.external_data_helper.set_external_data(tensor(proto, name), location, offset, len(tensor(proto, name).raw_data))
    return proto


@form
def data_in_a_folder_below() -> onnx.ModelProto:
    return external(model(), w=("weights/a/w.bin", 0), v=("weights/v.bin", 0))


@form
def data_at_offsets() -> onnx.ModelProto:
    return external(model(), w=("all.data", 4096), v=("all.data", 4096 + W.nbytes + 12))


@form
def data_of_two_tensors_in_one_place() -> onnx.ModelProto:
    nodes = ["h = MatMul(x, w)", "g = MatMul(x, w2)", "s = Add(h, g)", "y = MatMul(s, v)"]
    return external(model(nodes, constants={"w": W, "w2": W, "v": V}), w=("all.data", 0), w2=("all.data", 0))


# Structure


@form
def unused_initializers() -> onnx.ModelProto:
    return model(constants={"w": W, "b": B, "v": V, "unused": V, "unused2": np.zeros((3, 0), np.float32)})


@form
def unused_input() -> onnx.ModelProto:
    return model(inputs=[value("x", ["n", K]), value("unused", ["n"], TensorProto.INT64)])


@form
def layers_nobody_reads() -> onnx.ModelProto:
    return model([*LAYERS, "z = MatMul(x, w)", "zz = Relu(z)"])


@form
def output_is_an_input() -> onnx.ModelProto:
    return model(outputs=[value("y", ["n", N]), value("x", ["n", K])])


@form
def output_is_an_input_and_has_no_type() -> onnx.ModelProto:
    return model(outputs=[value("y", ["n", N]), onnx.ValueInfoProto(name="x")])


@form
def output_is_an_input_and_has_no_shape() -> onnx.ModelProto:
    return model(outputs=[value("y", ["n", N]), value("x", None)])


@form
def output_is_a_weight() -> onnx.ModelProto:
    return model(outputs=[value("y", ["n", N]), value("v", [M, N]), value("b", [M])])


@form
def an_output_twice() -> onnx.ModelProto:
    return model(outputs=[value("y", ["n", N]), value("y", ["n", N])])


@form
def an_inner_value_is_an_output() -> onnx.ModelProto:
    return model(outputs=[value("y", ["n", N]), value("h", ["n", M])])


@form
def no_inputs() -> onnx.ModelProto:
    proto = model(constants={"w": W, "b": B, "v": V, "x": np.ones((2, K), np.float32)})
    proto.graph.ClearField("input")
    return proto


@form
def no_nodes() -> onnx.ModelProto:
    return model([], outputs=[value("x", ["n", K])])


@form
def no_outputs() -> onnx.ModelProto:
    proto = model()
    proto.graph.ClearField("output")
    return proto


@form
def nodes_out_of_order() -> onnx.ModelProto:
    return model(LAYERS[::-1])


@form
def metadata_everywhere() -> onnx.ModelProto:
    proto = model(doc_string="d" * 5000, producer_name="someone", model_version=2**60)
    helper.set_model_props(proto, {"": "empty", "a key": "\n", "onnx_magr.version": "0", "labels": "{}" * 10_000})
    for each in proto.graph.node:
        each.doc_string = "traced by someone"
        each.metadata_props.append(onnx.StringStringEntryProto(key="k", value="v"))
    return proto


@form
def metadata_key_twice() -> onnx.ModelProto:
    proto = model()
    proto.metadata_props.extend([onnx.StringStringEntryProto(key="k", value="1"), onnx.StringStringEntryProto(key="k", value="2")])
    return proto


@form
def quantization_annotation() -> onnx.ModelProto:
    proto = model()
    note = proto.graph.quantization_annotation.add()
    note.tensor_name = "h"
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    return proto


@form
def training_info() -> onnx.ModelProto:
    proto = model()
    info = proto.training_info.add()
    info.algorithm.name = "step"
    info.algorithm.node.append(node("g = Identity(b)"))
    info.algorithm.output.append(value("g", [M]))
    return proto


@form
def initializer_twice() -> onnx.ModelProto:
    proto = model()
    proto.graph.initializer.append(numpy_helper.from_array(B, "b"))
    return proto


@form
def sequence_between_layers() -> onnx.ModelProto:
    nodes = [*LAYERS[:3], "q = SequenceConstruct(r, s)", "t = SequenceAt(q, zero)", "y = MatMul(t, v)"]
    return model(nodes, constants={"w": W, "b": B, "v": V, "zero": np.array(0)})


@form
def weight_of_three_dimensions() -> onnx.ModelProto:
    return model(
        ["h = MatMul(x, w3)", "r = Relu(h)", "y = MatMul(r, v)"], outputs=[value("y", [1, "n", N])], constants={"w3": W[None], "v": V}
    )


@form
def weights_of_one_row_or_column() -> onnx.ModelProto:
    nodes = ["h = MatMul(x, column)", "g = MatMul(h, row)", "y = MatMul(g, v)"]
    return model(nodes, constants={"column": W[:, :1].copy(), "row": B[None], "v": V})


@form
def tied_embedding() -> onnx.ModelProto:
    """A table that tokens are looked up in, and that logits are made with."""
    table = (np.random.default_rng(7).standard_normal((512, K)) * 0.2).astype(np.float32)
    nodes = ["e = Gather(table, ids)", node("u = Transpose(table)", perm=[1, 0]), "y = MatMul(e, u)"]
    return model(nodes, [value("ids", ["n", "t"], TensorProto.INT64)], [value("y", ["n", "t", 512])], constants={"table": table})


@form
def tied_embedding_in_branches() -> onnx.ModelProto:
    proto = tied_embedding()
    branches = [
        helper.make_graph([node(f"{p}u = Transpose(table)", perm=[1, 0]), node(f"{p}l = MatMul(e, {p}u)")], p, [], [value(f"{p}l", None)])
        for p in ("a", "b")
    ]
    nodes = [proto.graph.node[0], node("y = If(c)", then_branch=branches[0], else_branch=branches[1])]
    table = numpy_helper.to_array(proto.graph.initializer[0])
    inputs = [value("ids", ["n", "t"], TensorProto.INT64), value("c", [], TensorProto.BOOL)]
    return model(nodes, inputs, [value("y", ["n", "t", 512])], constants={"table": table})


# Functions and control flow


@form
def function_with_attributes() -> onnx.ModelProto:
    inner = [node("g = Gemm(fx, fw, fb)"), node("fy = LeakyRelu(g)")]
    for each, name, kind in ((inner[0], "transB", onnx.AttributeProto.INT), (inner[1], "alpha", onnx.AttributeProto.FLOAT)):
        each.attribute.add(name=name, ref_attr_name=name, type=kind)
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function(
        "local", "Layer", ["fx", "fw", "fb"], ["fy"], inner, imports, ["transB"], [helper.make_attribute("alpha", 0.25)]
    )
    nodes = [node("h = local.Layer(x, w, b)", transB=0), "y = MatMul(h, v)"]
    return model(nodes, domains=[("local", 1)], functions=[function], ir_version=9)


@form
def functions_of_functions() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    inner = helper.make_function("local", "Inner", ["a", "c"], ["d"], [node("d = MatMul(a, c)")], imports)
    outer = helper.make_function("local", "Outer", ["a", "c"], ["e"], [node("d = local.Inner(a, c)"), node("e = Relu(d)")], imports)
    nodes = ["h = local.Outer(x, w)", "y = local.Inner(h, v)"]
    return model(nodes, domains=[("local", 1)], functions=[inner, outer])


@form
def function_of_another_opset() -> onnx.ModelProto:
    function = helper.make_function("local", "Layer", ["a", "c"], ["d"], [node("d = MatMul(a, c)")], [helper.make_opsetid("", 13)])
    return model(["h = local.Layer(x, w)", *LAYERS[1:]], domains=[("local", 1)], functions=[function])


@form
def function_nobody_calls() -> onnx.ModelProto:
    function = helper.make_function("local", "Layer", ["a", "c"], ["d"], [node("d = MatMul(a, c)")], [helper.make_opsetid("", 17)])
    return model(functions=[function], domains=[("local", 1)])


@form
def overloaded_functions() -> onnx.ModelProto:
    parts = {"one": "d = MatMul(a, c)", "two": "d = Add(a, c)"}
    functions = []
    for overload, text in parts.items():
        functions.append(
            helper.make_function("local", "F", ["a", "c"], ["d"], [node(text)], [helper.make_opsetid("", 21)], overload=overload)
        )
    calls = [node("h = local.F(x, w)"), node("s = local.F(h, b)")]
    calls[0].overload, calls[1].overload = "one", "two"
    return model([*calls, *LAYERS[2:]], opset=21, ir_version=10, domains=[("local", 1)], functions=functions)


@form
def layers_in_branches() -> onnx.ModelProto:
    then = helper.make_graph([node("ty = MatMul(x, w)")], "then", [], [value("ty", ["n", M])])
    other = helper.make_graph([node("o = MatMul(x, w)"), node("oy = Neg(o)")], "else", [], [value("oy", ["n", M])])
    inputs = [value("x", ["n", K]), value("c", [], TensorProto.BOOL)]
    return model([node("h = If(c)", then_branch=then, else_branch=other), *LAYERS[1:]], inputs)


@form
def weight_in_a_branch() -> onnx.ModelProto:
    then = helper.make_graph([node("ty = MatMul(x, tw)")], "then", [], [value("ty", ["n", M])], [numpy_helper.from_array(W, "tw")])
    other = helper.make_graph([node("oy = MatMul(x, ow)")], "else", [], [value("oy", ["n", M])], [numpy_helper.from_array(-W, "ow")])
    inputs = [value("x", ["n", K]), value("c", [], TensorProto.BOOL)]
    return model([node("h = If(c)", then_branch=then, else_branch=other), *LAYERS[1:]], inputs, constants={"b": B, "v": V})


@form
def layer_in_a_loop() -> onnx.ModelProto:
    square = (np.random.default_rng(3).standard_normal((K, K)) * 0.1).astype(np.float32)
    body = helper.make_graph(
        [node("go = Identity(again)"), node("after = MatMul(before, square)")],
        "body",
        [value("i", [], TensorProto.INT64), value("again", [], TensorProto.BOOL), value("before", ["n", K])],
        [value("go", [], TensorProto.BOOL), value("after", ["n", K])],
    )
    constants = {"w": W, "b": B, "v": V, "square": square, "three": np.array(3), "true": np.array(True)}
    return model([node("t = Loop(three, true, x)", body=body), "h = MatMul(t, w)", *LAYERS[1:]], constants=constants)


@form
def layer_in_a_scan() -> onnx.ModelProto:
    body = helper.make_graph([node("hh = MatMul(xx, w)")], "body", [value("xx", ["n", K])], [value("hh", ["n", M])])
    nodes = [node("h = Scan(x)", body=body, num_scan_inputs=1), *LAYERS[1:]]
    return model(nodes, inputs=[value("x", ["t", "n", K])], outputs=[value("y", ["t", "n", N])])


@form
def names_shadowed_in_branches() -> onnx.ModelProto:
    """Both bodies and the graph around them use the same names for nodes."""
    then = helper.make_graph([node("z = MatMul(x, w)")], "then", [], [value("z", ["n", M])])
    other = helper.make_graph([node("z = MatMul(x, w)")], "else", [], [value("z", ["n", M])])
    inputs = [value("x", ["n", K]), value("c", [], TensorProto.BOOL)]
    return model([node("h = If(c)", then_branch=then, else_branch=other), *LAYERS[1:]], inputs)


# More types, and more places


@form
def data_of_a_constant_node() -> onnx.ModelProto:
    """Its file is written with that of the initializers."""
    constant = helper.make_node("Constant", [], ["w2"], value=numpy_helper.from_array(W, "w"))
    onnx.external_data_helper.set_external_data(constant.attribute[0].t, "all.data", 0, W.nbytes)
    constant.attribute[0].t.ClearField("raw_data")
    constant.attribute[0].t.data_location = TensorProto.EXTERNAL
    nodes = [constant, "h = MatMul(x, w2)", "k = MatMul(x, w)", "q = Add(h, k)", "s = Add(q, b)", *LAYERS[2:]]
    return external(model(nodes), w=("all.data", 0))


@form
def text_initializer() -> onnx.ModelProto:
    names = np.array([f"c{i}" for i in range(N)], dtype=object)
    nodes = [*LAYERS, node("i = ArgMax(y)", axis=1, keepdims=0), "name = Gather(names, i)"]
    outputs = [value("y", ["n", N]), value("name", ["n"], TensorProto.STRING)]
    return model(nodes, outputs=outputs, constants={"w": W, "b": B, "v": V, "names": names})


@form
def weights_behind_identities() -> onnx.ModelProto:
    return model(["w1 = Identity(w)", "w2 = Identity(w1)", "h = MatMul(x, w2)", *LAYERS[1:]])


@form
def weight_of_an_optional_bias() -> onnx.ModelProto:
    return model(["h = Gemm(x, w, b)", "r = Relu(h)", "y = Gemm(r, v, -)"])


@form
def bodies_without_shapes() -> onnx.ModelProto:
    """As PyTorch's scripts are exported: no value in a body has a shape, outputs have no type."""
    bodies = [
        helper.make_graph([node(f"{p} = MatMul(x, {w})")], p, [], [onnx.ValueInfoProto(name=p)]) for p, w in (("a", "w"), ("z", "w2"))
    ]
    inputs = [value("x", ["n", K]), value("c", [], TensorProto.BOOL)]
    nodes = [node("h = If(c)", then_branch=bodies[0], else_branch=bodies[1]), *LAYERS[1:]]
    return model(nodes, inputs, constants={"w": W, "w2": -W, "b": B, "v": V})


@form
def condition_that_is_constant() -> onnx.ModelProto:
    bodies = [helper.make_graph([node(f"{p} = MatMul(x, w)")], p, [], [value(p, ["n", M])]) for p in ("a", "z")]
    nodes = [node("h = If(c)", then_branch=bodies[0], else_branch=bodies[1]), *LAYERS[1:]]
    return model(nodes, constants={"w": W, "b": B, "v": V, "c": np.array(False)})


@form
def tree_ensemble_beside_layers() -> onnx.ModelProto:
    """A pipeline of scikit-learn: a scaler, a network, and a label with probabilities by class."""
    nodes = [
        node("q = ai.onnx.ml.Scaler(x)", offset=[0.0], scale=[0.5]),
        "h = MatMul(q, w)",
        *LAYERS[1:],
        node(
            "label, p = ai.onnx.ml.LinearClassifier(y)",
            classlabels_ints=[0, 1],
            coefficients=[0.1] * 2 * N,
            intercepts=[0.0, 0.1],
            post_transform="SOFTMAX",
        ),
        node("maps = ai.onnx.ml.ZipMap(p)", classlabels_int64s=[0, 1]),
    ]
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    outputs = [value("label", ["n"], TensorProto.INT64), helper.make_value_info("maps", kind)]
    return model(nodes, outputs=outputs, opset=15, domains=[("ai.onnx.ml", 1)])


@form
def dimension_of_zero() -> onnx.ModelProto:
    """A declared size of 0, as some tools write for any."""
    return model(inputs=[value("x", [0, K])], outputs=[value("y", [0, N])])


@form
def denotations() -> onnx.ModelProto:
    proto = model()
    proto.graph.input[0].type.denotation = "TENSOR"
    proto.graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    proto.graph.input[0].doc_string = "what it reads"
    return proto


@form
def domain_without_a_version() -> onnx.ModelProto:
    proto = model()
    proto.opset_import.add(domain="com.example", version=0)
    return proto
