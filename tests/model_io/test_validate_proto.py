"""Files made to harm: each is answered with an error that says what is wrong, at once and without the memory it asks for."""

from __future__ import annotations

import io
import os
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import magr_onnx
from magr_onnx.errors import CalibrationError, MagrError, ModelError, NonFiniteError, RuntimeFailure, translate_resource_errors
from magr_onnx.model_io import files, validate_proto
from magr_onnx.models.zoo import ZOO
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.runtime.ort.session import Arithmetic, Session

W = constant("w", 16, 8)
BODY = "[fc] y = MatMul(x, w)"


def graph(body: str = BODY, extra: str = "", opset: int = 21, **initializers: Any) -> onnx.ModelProto:
    return model(f"g (float[n, 16] x{extra}) => (float[n, 8] y) {{ {body} }}", opset=opset, ir_version=10, **({"w": W} | initializers))


def attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    node.attribute.append(helper.make_attribute(name, value))


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """A gigabyte more than is used now: what unfolds a bomb fails."""
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")).split()[1]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# External data


def outside(folder: Path) -> dict[str, str]:
    (folder.parent / "secret.bin").write_bytes(bytes(W.nbytes))
    return {"location": "../secret.bin"}


def absolute(folder: Path) -> dict[str, str]:
    (folder / "in.bin").write_bytes(bytes(W.nbytes))
    return {"location": str(folder / "in.bin")}


def linked(folder: Path) -> dict[str, str]:
    outside(folder)
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    return {"location": "link.bin"}


def linked_folder(folder: Path) -> dict[str, str]:
    outside(folder)
    (folder / "link").symlink_to(folder.parent)
    return {"location": "link/secret.bin"}


def link_loop(folder: Path) -> dict[str, str]:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return {"location": "a"}


def good(**entries: str) -> Callable[[Path], dict[str, str]]:
    def make(folder: Path) -> dict[str, str]:
        (folder / "in.bin").write_bytes(bytes(2 * W.nbytes))
        return {"location": "in.bin"} | entries

    return make


def pipe(folder: Path) -> dict[str, str]:
    os.mkfifo(folder / "pipe")
    return {"location": "pipe"}


EXTERNAL: dict[str, tuple[Callable[[Path], dict[str, str]], str]] = {
    "outside": (outside, "lies outside"),
    "absolute": (absolute, "lies outside"),
    "linked": (linked, "lies outside .*a link leads there"),
    "linked-folder": (linked_folder, "lies outside"),
    "link-loop": (link_loop, "a"),
    "device": (lambda _: {"location": "/dev/zero"}, "lies outside"),
    "pipe": (pipe, "is missing"),
    "folder": (lambda _: {"location": "."}, "is missing"),
    "nothing": (lambda _: {}, "lies outside"),
    "zero-byte": (lambda _: {"location": "a\0b"}, "cannot be found"),
    "long-name": (lambda _: {"location": "a" * 5000}, "cannot be found"),
    "negative-offset": (good(offset="-4"), "offset -4"),
    "negative-length": (good(length="-512"), "is said to have -512"),
    "huge-offset": (good(offset=str(1 << 62)), "the tensor ends at"),
    "wordy-offset": (good(offset="four"), "must be whole numbers"),
    "digits": (good(offset="9" * 9000), "must be whole numbers"),
    "short-length": (good(length="510"), "is said to have 510"),
    "long-length": (good(length="1024"), "is said to have 1024"),
}


def as_external(tensor: TensorProto, entries: dict[str, str]) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def in_initializer(proto: onnx.ModelProto) -> TensorProto:
    return proto.graph.initializer[0]


def in_constant(proto: onnx.ModelProto) -> TensorProto:
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W, "held"))
    proto.graph.node.append(node)
    return proto.graph.node[-1].attribute[0].t


def in_subgraph(proto: onnx.ModelProto) -> TensorProto:
    out = helper.make_tensor_value_info("held", 1, [16, 8])
    branch = helper.make_graph([], "branch", [], [out], [numpy_helper.from_array(W, "held")])
    proto.graph.node.append(helper.make_node("If", ["flag"], ["chosen"], then_branch=branch, else_branch=branch))
    proto.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return proto.graph.node[-1].attribute[0].g.initializer[0]


def in_function(proto: onnx.ModelProto) -> TensorProto:
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W, "held"))
    proto.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 21)]))
    return proto.functions[0].node[0].attribute[0].t


def in_sparse(proto: onnx.ModelProto) -> TensorProto:
    values, indices = numpy_helper.from_array(W.reshape(-1), "s"), numpy_helper.from_array(np.arange(128), "i")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [16, 8]))
    return proto.graph.sparse_initializer[0].values


@pytest.mark.parametrize("place", [in_initializer, in_constant, in_subgraph, in_function, in_sparse])
@pytest.mark.parametrize("case", EXTERNAL)
def test_external_data_stays_in_the_folder_and_in_the_file(case: str, place: Callable[..., TensorProto], tmp_path: Path) -> None:
    make, message = EXTERNAL[case]
    folder = tmp_path / "model"
    folder.mkdir()
    proto = graph()
    as_external(place(proto), make(folder))
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=message) as caught:
        magr_onnx.optimize(path, output=folder / "out.onnx")
    assert str(path) in str(caught.value)
    assert "tensor" in str(caught.value)
    assert not (folder / "out.onnx").exists()


def test_one_short_file_cannot_stand_for_endless_tensors(tmp_path: Path) -> None:
    proto = graph()
    (tmp_path / "in.bin").write_bytes(bytes(1 << 20))
    for i in range(5000):
        tensor = proto.graph.initializer.add(name=f"t{i}", data_type=TensorProto.FLOAT, dims=[1 << 18])
        as_external(tensor, {"location": "in.bin"})
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="take 5242880000 bytes from external files that have 1048576"):
        files.load(path)


def test_a_model_in_memory_has_no_folder() -> None:
    proto = graph()
    as_external(proto.graph.initializer[0], {"location": "in.bin"})
    with pytest.raises(ModelError, match=r"in.bin.*give the model's path"):
        files.load(proto)


# Tensors


def tensor_of(change: Callable[[TensorProto], Any]) -> onnx.ModelProto:
    proto = graph()
    change(proto.graph.initializer[0])
    return proto


def strings(tensor: TensorProto) -> None:
    tensor.data_type = TensorProto.STRING


def in_two_forms(tensor: TensorProto) -> None:
    tensor.float_data.append(1.0)


def dims(*values: int) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(values)

    return change


def typed(**fields: Any) -> Callable[[TensorProto], None]:
    def change(tensor: TensorProto) -> None:
        tensor.Clear()
        tensor.name = "w"
        for name, value in fields.items():
            if isinstance(value, list):
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dims(17, 8), r"shape \[17, 8\] must hold 544 bytes, and has 512"),
        (dims(15, 8), "must hold 480 bytes"),
        (dims(-16, -8), "negative dimensions"),
        (dims(1 << 62, 1 << 62), "must hold"),
        (dims(0, 1 << 62), "must hold 0 bytes"),
        (dims(*[2] * 10000), "must hold"),
        (lambda t: setattr(t, "data_type", 77), "unknown type 77"),
        (lambda t: setattr(t, "data_type", 0), "no type"),
        (strings, "strings as raw data"),
        (in_two_forms, "one and only one value field"),
        (typed(data_type=1, dims=[16, 8], float_data=[1.0] * 127), "must hold 128 values, and has 127"),
        (typed(data_type=1, dims=[16, 8]), "must hold 128 values, and has 0"),
        (typed(data_type=1, dims=[1 << 40], float_data=[]), "must hold 1099511627776 values"),
        (typed(data_type=1, dims=[16, 8], int32_data=[1] * 128), "must hold 128 values, and has 0"),
        (typed(data_type=22, dims=[16, 8], int32_data=[1] * 128), "must hold 64 values, and has 128"),
    ],
)
def test_tensors_hold_what_they_say(change: Callable[[TensorProto], None], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        files.load(tensor_of(change))


# Constants that stand for more than they hold

HUGE = 1 << 40
SHAPE = np.array([HUGE, 16])


@pytest.mark.parametrize(
    ("body", "initializers"),
    [
        ("a = ConstantOfShape(s)", {"s": SHAPE}),
        ("s = Constant<value = int64[2] {1099511627776, 16}>() a = ConstantOfShape(s)", {}),
        ("a = Expand(one, s)", {"s": SHAPE, "one": np.ones((), np.float32)}),
        ("a = Tile(w, s)", {"s": SHAPE}),
        ("a = Range(from, to, step)", {"from": np.array(0), "to": np.array(HUGE), "step": np.array(1)}),
        ("a = RandomNormal<shape = [1099511627776, 16]>()", {}),
        ("a = Pad(w, s)", {"s": np.array([0, 0, HUGE, 0])}),
        ("a = OneHot(i, s, v)", {"i": np.arange(9), "s": np.array(HUGE), "v": np.ones(2, np.float32)}),
        ("a = MatMul(column, row)", {"column": np.ones((1 << 17, 1), np.float32), "row": np.ones((1, 1 << 17), np.float32)}),
    ],
)
def test_a_few_bytes_cannot_stand_for_terabytes(body: str, initializers: dict[str, Any], tmp_path: Path) -> None:
    proto = graph(f"{BODY} {body} b = Identity(a)", **initializers)
    with pytest.raises(ModelError, match=r"bytes of constants, more than the 4 GiB"):
        magr_onnx.optimize(proto, output=tmp_path / "out.onnx")


def sparse(values: int, indices: Any, shape: list[int]) -> onnx.ModelProto:
    proto = model("g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, w) }", opset=21, ir_version=10)
    held = numpy_helper.from_array(np.arange(1, values + 1, dtype=np.float32), "w")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(held, numpy_helper.from_array(np.asarray(indices), "i"), shape))
    return proto


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (sparse(1, [5], [HUGE, 8]), "stands for 3.52e"),
        (sparse(1, [500], [16, 8]), "indices beyond"),
        (sparse(1, [-1], [16, 8]), "indices beyond"),
        (sparse(2, [1], [16, 8]), "need as many int64 indices"),
        (sparse(1, [1], [-16, -8]), "negative dimensions"),
    ],
)
def test_sparse_tensors_that_are_wrong(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        files.load(proto)


@pytest.mark.parametrize("as_constant", [False, True])
@pytest.mark.parametrize("indices", [[0, 9, 127], [[0, 0], [1, 1], [15, 7]]])
def test_sparse_weights_are_weights(indices: Any, as_constant: bool, tmp_path: Path) -> None:
    proto = sparse(3, indices, [16, 8])
    if as_constant:
        node = helper.make_node("Constant", [], ["w"], sparse_value=proto.graph.sparse_initializer[0])
        proto.graph.ClearField("sparse_initializer")
        proto.graph.node.insert(0, node)
    before = proto.SerializeToString(deterministic=True)
    dense = np.zeros((16, 8), np.float32)
    dense[0, 0], dense[1, 1], dense[15, 7] = 1, 2, 3
    assert magr_onnx.optimize(proto, output=tmp_path / "out.onnx", bits=8).report.layers[0].weight == "w"
    assert proto.SerializeToString(deterministic=True) == before
    weight = files.load(proto).model
    found, _ = magr_onnx.passes.layers.linear.find(weight)
    np.testing.assert_array_equal(found[0].read(), dense)


# Graphs


def twice(what: str) -> onnx.ModelProto:
    proto = graph()
    items = getattr(proto.graph, what)
    items.append(items[0])
    return proto


def broken(change: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
    proto = graph()
    change(proto)
    return proto


def gemm(name: str, value: Any) -> onnx.ModelProto:
    proto = graph("[fc] y = Gemm(x, w)")
    attribute(proto.graph.node[0], name, value)
    return proto


def reference() -> onnx.ModelProto:
    proto = graph("[fc] y = Gemm(x, w)")
    proto.graph.node[0].attribute.add(name="transB", type=onnx.AttributeProto.INT, ref_attr_name="turn")
    return proto


def contradicting() -> onnx.ModelProto:
    proto = graph()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.STRING, [16, 8]))
    return proto


def recursive() -> onnx.ModelProto:
    proto = graph("h = MatMul(x, w) y = F(h)")
    proto.graph.node[1].domain = "own"
    proto.opset_import.add(domain="own", version=1)
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    proto.functions.append(helper.make_function("own", "F", ["a"], ["b"], [call], [helper.make_opsetid("own", 1)]))
    return proto


def with_body(op: str, inputs: str, outputs: str, body: str, opset: int = 21, **attributes: int) -> onnx.ModelProto:
    """A model with a Loop, Scan or If, whose body is written as ONNX's text."""
    proto = graph(f"{BODY}", ", float[2, 16] s, bool c, int64 t", opset=opset)
    graphs = {"then_branch": body, "else_branch": body} if op == "If" else {"body": body}
    bodies = {name: onnx.parser.parse_graph(text) for name, text in graphs.items()}
    proto.graph.node.append(helper.make_node(op, inputs.split(), outputs.split(), **bodies, **attributes))
    return proto


STEP = "b (float[2, 16] p, float[16] r) => (float[2, 16] p2, float[16] r2) { p2 = Identity(p) r2 = Identity(r) }"
TURN = "b (int64 i, bool g, float[2, 16] p) => (bool g2, float[2, 16] p2) { g2 = Identity(g) p2 = Identity(p) }"
BRANCH = "b () => (float[2, 16] p) { p = Identity(s) }"


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (with_body("Scan", "s x", "e f", STEP, num_scan_inputs=0), "num_scan_inputs = 0, 2 inputs and 2 outputs"),
        (with_body("Scan", "s x", "e f", STEP, num_scan_inputs=3), "num_scan_inputs = 3, 2 inputs and 2 outputs"),
        (with_body("Scan", "s s x", "e f", STEP, num_scan_inputs=1), "body 'b' of 2 inputs and 2 outputs, and runs it as one of 3 inputs"),
        (with_body("Scan", "s x", "e", STEP, num_scan_inputs=1), "runs it as one of 2 inputs and 1 outputs"),
        (with_body("Loop", "t c s s", "e", TURN), "body 'b' of 3 inputs and 2 outputs, and runs it as one of 4 inputs and 2 outputs"),
        (with_body("Loop", "t c s", "e f", TURN), "runs it as one of 3 inputs and 3 outputs"),
        (with_body("If", "c", "e f", BRANCH), "body 'b' of 0 inputs and 1 outputs, and runs it as one of 0 inputs and 2 outputs"),
        (with_body("Scan", "s x", "e f", STEP, opset=8, num_scan_inputs=1), "runs it as one of 1 inputs"),
    ],
)
def test_bodies_have_the_inputs_and_outputs_of_their_nodes(proto: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        magr_onnx.optimize(proto, output=tmp_path / "out.onnx", bits=8)


@pytest.mark.parametrize(
    "proto",
    [
        with_body("Scan", "s x", "e f", STEP, num_scan_inputs=1),
        with_body("Loop", "t c s", "e", TURN),
        with_body("Loop", "t c", "e", "b (int64 i, bool g) => (bool g2, float[16] r) { g2 = Identity(g) r = ReduceMax<keepdims = 0>(s) }"),
        with_body("If", "c", "e", BRANCH),
    ],
)
def test_bodies_that_are_right(proto: onnx.ModelProto) -> None:
    assert files.load(proto).model.graph


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (graph("a = Add(b, x) b = Add(a, x) y = MatMul(b, w)"), "topologically sorted"),
        (graph("y = MatMul(x, nowhere)"), "nowhere"),
        (twice("node"), "single static assignment"),
        (twice("initializer"), "not unique"),
        (twice("input"), "single static assignment"),
        (gemm("alpha", "text"), "alpha.*Expected: 'FLOAT', actual: 'STRING'"),
        (gemm("transB", 1.0), "transB.*Expected: 'INT', actual: 'FLOAT'"),
        (gemm("transB", [1]), "transB.*Expected: 'INT', actual: 'INTS'"),
        (gemm("alpha", float("nan")), "not finite"),
        (reference(), "refers to attribute 'turn' of a function, and is in none"),
        (contradicting(), "input w has type 8, and its initializer type 1"),
        (recursive(), "recursive"),
        (graph(f"{BODY} z = Conv<group = 0>(x, w)"), "counts from 1"),
        (graph(f"{BODY} z = MaxPool<kernel_shape = [2], strides = [0]>(x)"), "counts from 1"),
        (graph(f"{BODY} z = Cast<to = 1000000>(x)"), "is the unknown type 1000000"),
        (graph(f'{BODY} z = Einsum<equation = "a%b->a">(x)'), "is no equation"),
        (graph(f"{BODY} z = Constant()"), "must have one attribute, and has 0"),
        (broken(lambda m: attribute(m.graph.node[0], "mode", b"\xff\xfe")), "is not UTF-8"),
        (broken(lambda m: m.graph.ClearField("node")), "is not an output of any node"),
        (broken(lambda m: m.ClearField("graph")), "graph"),
        (broken(lambda m: m.ClearField("opset_import")), "opset_import"),
        (broken(lambda m: m.opset_import.add(domain="ai.onnx", version=13)), "imports opsets 21 and 13"),
        (graph(opset=6), "opset 6, and 7 to"),
        (graph(opset=999), "opset 999, and 7 to"),
        (broken(lambda m: setattr(m, "ir_version", 999)), "IR version 999"),
        (broken(lambda m: setattr(m, "ir_version", 0)), "ir_version|IR version"),
    ],
)
def test_graphs_that_are_wrong(proto: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    for source in (proto, path):
        with pytest.raises(ModelError, match=message):
            magr_onnx.optimize(source, output=tmp_path / "out.onnx", bits=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("t = Transpose<perm = [5, -3]>(w) y = MatMul(x, t)", "computed at run time|perm"),
        (f"{BODY} z = NoSuchOperator(x)", "NoSuchOperator"),
    ],
)
def test_operators_nobody_can_run(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(MagrError, match=message):
        magr_onnx.optimize(graph(body), output=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def custom() -> onnx.ModelProto:
    proto = graph("[fc] h = MatMul(x, w) z = Odd(h) y = Soft(z)")
    for node, domain in zip(proto.graph.node[1:], ("other", "their.ops"), strict=True):
        node.domain = domain
        proto.opset_import.add(domain=domain, version=3)
    return proto


def test_custom_operators_are_named_where_they_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"custom operators, which this onnxruntime lacks: other::Odd, their\.ops::Soft"):
        magr_onnx.optimize(custom(), output=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_custom_operators_are_kept_in_memory() -> None:
    result = ir.to_proto(magr_onnx.optimize(custom()).model)
    assert {(n.domain, n.op_type) for n in result.graph.node} >= {("their.ops", "Soft"), ("other", "Odd")}
    assert {(o.domain, o.version) for o in result.opset_import} >= {("their.ops", 3), ("other", 3)}


def nested(depth: int) -> bytes:
    """A model with subgraphs in subgraphs, deeper than the library that makes messages allows, as bytes."""

    def message(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    body = b""
    for _ in range(depth):
        attribute = message(1, b"then_branch") + message(6, body) + varint(20 << 3) + varint(5)
        body = message(1, message(4, b"If") + message(5, attribute)) + message(2, b"g")
    return varint(1 << 3) + varint(8) + message(7, body)


@pytest.mark.parametrize("depth", [40, 1000, 20000])
def test_depth_is_limited(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(nested(depth))
    with pytest.raises(ModelError):
        files.load(path)


def test_time_is_linear_in_the_nodes() -> None:
    def seconds(count: int) -> float:
        proto = graph()
        for i in range(count):
            proto.graph.node.add(op_type="Identity", input=["x"], output=[f"i{i}"])
        start = time.process_time()
        validate_proto.check(proto, "m", None)
        return time.process_time() - start

    seconds(1000)
    assert seconds(80000) < 32 * max(seconds(10000), 1e-3)  # 8 times the nodes; were it quadratic, 64 times the time


def test_exhausted_memory_and_stack_are_explained_and_interrupts_are_not() -> None:
    def failing(error: BaseException) -> Callable[[], None]:
        @translate_resource_errors()
        def fail() -> None:
            raise error

        return fail

    with pytest.raises(MagrError, match="out of memory"):
        failing(MemoryError("cannot have 1 TiB"))()
    with pytest.raises(ModelError, match="nested too deeply"):
        failing(RecursionError())()
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt())()


# Calibration data


def npz(folder: Path, name: str, content: bytes, compressed: bool = True) -> Path:
    path = folder / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        archive.writestr(name, content)
    return path


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def pickled(folder: Path) -> Path:
    np.savez(folder / "data.npz", x=np.array([{"a": 1}], dtype=object))
    return folder / "data.npz"


def bomb(folder: Path) -> Path:
    """A member that says it unpacks to 4 PB."""
    path = npz(folder, "x.npy", header((1 << 50,)) + bytes(100))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (0xFFFFFFFF).to_bytes(4, "little")
    extra = (1).to_bytes(2, "little") + (8).to_bytes(2, "little") + (1 << 52).to_bytes(8, "little")
    name = int.from_bytes(data[at + 28 : at + 30], "little")
    data[at + 30 : at + 32] = len(extra).to_bytes(2, "little")
    data[at + 46 + name : at + 46 + name] = extra
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = (end - at).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled, "not a readable"),
        (bomb, "unpacks to 4503599627370496 bytes"),
        (lambda f: npz(f, "x.npy", header((1 << 50,)) + bytes(100)), "not a readable"),
        (lambda f: npz(f, "x.npy", header((-1, 16))), "not a readable|cannot|negative"),
        (lambda f: npz(f, "x.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[[(((("), "not a readable"),
        (lambda f: npz(f, "x.npy", b"no array"), "are not arrays"),
        (lambda f: npz(f, "x.npy", header((4, 16), "<c16") + bytes(1024)), "complex128"),
        (lambda f: npz(f, "x.npy", header((4, 16), "<i8") + bytes(512)), "x is int64"),
        (lambda f: npz(f, "x.npy", header((4, 16)) + np.full(64, np.nan, np.float32).tobytes()), "NaN"),
    ],
)
def test_calibration_files(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        magr_onnx.optimize(graph(), make(tmp_path), output=tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"x": [[1.0] * 16, [1.0] * 15]}], "not an array"),
        ([{"x": np.array([None] * 16)[None]}], "object"),
        ([{"x": "text"}], "expects x"),
        (17, "cannot be a int"),
        ([17], "expected a dict"),
        ([], "no data"),
    ],
)
def test_calibration_data_in_memory(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        magr_onnx.optimize(graph(), data)


def test_test_data_does_not_read_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    tensor = TensorProto(name="x", data_type=1, dims=[1, 16])
    as_external(tensor, {"location": str(tmp_path / "secret.bin")})
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(CalibrationError, match="another file"):
        magr_onnx.optimize(graph(), folder)


def test_half_precision_in_a_branch_is_right_at_every_level(tmp_path: Path) -> None:
    """onnxruntime makes zeros of it where it fuses a DequantizeLinear and a MatMul inside a body."""
    trap, path = ZOO["half-precision-in-a-branch"], tmp_path / "q.onnx"
    feeds = trap.feeds(np.random.default_rng(0))
    with Session(ir.from_proto(trap.build())) as session:
        (expected,) = session.run(feeds)
    for form in ("qdq", "matmulnbits", "dynamic-int8"):
        magr_onnx.optimize(trap.build(), output=path, format=form, **({} if form == "dynamic-int8" else {"bits": 8}))
        for arithmetic in Arithmetic:
            with Session(path, arithmetic=arithmetic) as session:
                np.testing.assert_allclose(session.run(feeds)[0], expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_weights_that_cannot_be_squared_are_named(op: str) -> None:
    shape, x, y = ((16, 8), "[n, 16]", "[n, 8]") if op == "MatMul" else ((8, 16, 1), "[1, 16, n]", "[1, 8, n]")
    proto = model(f"g (float{x} x) => (float{y} y) {{ [fc] y = {op}(x, w) }}", w=constant("w", *shape) * np.float32(1e27))
    with pytest.raises(NonFiniteError, match="weight of fc: values up to"):
        magr_onnx.optimize(proto)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        *(("[fc] y = Gemm(x, w, b)", value) for value in (np.nan, np.inf, -np.inf)),
        *(("[fc] h = MatMul(x, w) y = Add(h, b)", value) for value in (np.nan, np.inf)),  # minus infinity is a mask
    ],
)
def test_a_bias_that_is_not_finite_is_named_before_any_work(body: str, value: float, tmp_path: Path) -> None:
    bias = np.ones(8, np.float32)
    bias[3] = value
    proto = model(f"g (float[n, 16] x) => (float[n, 8] y) {{ {body} }}", w=constant("w", 16, 8), b=bias)
    with pytest.raises(NonFiniteError, match="bias of fc"):
        magr_onnx.optimize(proto, output=tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_names_in_bodies_that_are_not_utf8(tmp_path: Path) -> None:
    """onnx reads them, and nothing can write them again."""
    proto = model(
        """g (float[n, 16] x, int64 turns, bool go) => (float[n, 8] y, float[n, 16] last) {
            [fc] y = MatMul(x, w)
            last = Loop(turns, go, x) <body = b (int64 i, bool c, float[n, 16] inside) => (bool d, float[n, 16] t) {
                d = Identity(c)
                t = Relu(inside)
            }>
        }""",
        w=constant("w", 16, 8),
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString().replace(b"inside", b"in\xe4\xffde"))
    with pytest.raises(MagrError):
        magr_onnx.optimize(path, output=tmp_path / "q.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_convolution_with_fewer_axes_declared_than_it_has() -> None:
    proto = model(
        """g (float[n] x, int64[r] shape) => (float y) {
            h = Reshape(x, shape)
            [c] y = Conv(h, k)
        }""",
        k=constant("k", 4, 8, 3),
    )
    data = [{"x": np.ones(128, np.float32), "shape": np.array([1, 8, 16])}]
    with pytest.raises(ModelError, match="output of c: declared"):
        magr_onnx.optimize(proto, data)


def documented() -> onnx.ModelProto:
    """A model with text in many fields: names, documentation, metadata, dimensions, domains, and a function."""
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["batch", 32], doc_string="about it") for name in "xy")
    weight = onnx.numpy_helper.from_array(np.ones((32, 32), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["h"], name="layer", doc_string="about it")
    call = onnx.helper.make_node("Twice", ["h"], ["y"], domain="own")
    function = onnx.helper.make_function(
        "own", "Twice", ["a"], ["b"], [onnx.helper.make_node("Add", ["a", "a"], ["b"])], [onnx.helper.make_opsetid("", 21)]
    )
    graph = onnx.helper.make_graph([node, call], "graph", [x], [y], [weight], "about it")
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("own", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10, doc_string="about it", domain="org")
    for message in (model, graph, node, x, weight, function):
        message.metadata_props.add(key="key", value="value")
    model.graph.CopyFrom(graph)
    return model


def texts(message: Any) -> list[tuple[Any, str, int | None]]:
    found: list[tuple[Any, str, int | None]] = []
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                found += texts(inner)
        elif kind.type == kind.TYPE_STRING:
            found += [(message, kind.name, None)] if isinstance(value, str) else [(message, kind.name, i) for i in range(len(value))]
    return found


@pytest.mark.parametrize("place", range(len(texts(documented()))))
def test_text_that_is_not_utf8(place: int, tmp_path: Path) -> None:
    mark, model = "a text that is nowhere else", documented()
    message, name, index = texts(model)[place]
    if index is None:
        setattr(message, name, mark)
    else:
        getattr(message, name)[index] = mark
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(mark.encode(), mark.encode()[:-1] + b"\xab"))
    for source in (onnx.ModelProto.FromString(path.read_bytes()), path):
        with pytest.raises(ModelError, match=rf"{message.DESCRIPTOR.name} .* has a {name} that is not UTF-8"):
            files.load(source)
