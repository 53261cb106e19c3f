"""Raising opsets: outputs are checked not to change, and nothing that was written beside the graph is lost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import magr_onnx
from magr_onnx.errors import ModelError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.graph.opset import raise_opset
from magr_onnx.runtime.data.made_up import random_inputs
from magr_onnx.runtime.ort import opset_check
from magr_onnx.runtime.ort.session import Session

W = constant("w", 16, 8)
FORMATS: dict[str, dict[str, Any]] = {
    "matmulnbits": {"format": "matmulnbits", "block_size": 16},
    "qdq": {"format": "qdq", "block_size": 16, "bits": 4},
    "dynamic-int8": {"format": "dynamic-int8"},
    "qdq-int8": {"format": "qdq-int8"},
}


def annotate(message: Any, **properties: str) -> None:
    for key, value in properties.items():
        message.metadata_props.add(key=key, value=value)


def labelled(opset: int) -> onnx.ModelProto:
    """A model that has everything one may write beside a graph."""
    proto = model(
        """g (float[batch, 16] x, bool flag) => (float[batch, 8] y, float[batch, 16] z, float[batch, 8] u) {
            [first] h = MatMul(x, w)
            [gelu] a = com.microsoft.Gelu(h)
            [same] y = Identity(a)
            [reshaped] r = Reshape(x, shape)
            [branch] z = If(flag) <
                then_branch = t () => (float[batch, 16] tz) { [inner] tz = Add(r, k) },
                else_branch = e () => (float[batch, 16] ez) { ez = Identity(r) }
            >
            [relu] u = Relu(a)
        }""",
        opset=opset,
        ir_version=10,
        domains=("com.microsoft",),
        w=W,
        shape=np.array([-1, 16]),
        k=np.ones(16, np.float32),
    )
    proto.producer_name, proto.producer_version, proto.domain = "maker", "1.2", "org.example"
    proto.model_version, proto.doc_string = 7, "about the model"
    graph = proto.graph
    graph.doc_string, graph.initializer[2].doc_string = "about the graph", "about a tensor"
    graph.node[3].name = "reshaped/ odd name é"
    for node in graph.node:
        node.doc_string = f"about {node.name}"
        annotate(node, source=node.op_type)
    annotate(proto, author="someone")
    annotate(graph, exported="today")
    for name, width in (("a", 8), ("r", 16)):
        info = helper.make_tensor_value_info(name, 1, ["batch", width])
        info.doc_string = f"about {name}"
        annotate(info, range="narrow")
        graph.value_info.append(info)
    graph.input[0].doc_string = "about x"
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    annotate(graph.input[0], kind="tokens")
    annotate(graph.output[0], kind="logits")
    graph.quantization_annotation.add(tensor_name="a").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="k")
    return proto


def plain(message: Any) -> bytes:
    """A message, with the default domain left out where it was written."""
    copy = type(message)()
    copy.CopyFrom(message)
    nodes = [copy] if isinstance(copy, onnx.NodeProto) else []
    while nodes:
        node = nodes.pop()
        if not node.domain:
            node.ClearField("domain")
        nodes += [n for a in node.attribute for n in a.g.node]
    return bytes(copy.SerializeToString(deterministic=True))


def by_name(messages: Iterable[Any]) -> dict[str, bytes]:
    return {m.name: plain(m) for m in messages}


@pytest.mark.parametrize("opset", [21, 18, 14, 13])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_quantized_is_kept_to_the_letter(form: str, opset: int, tmp_path: Path) -> None:
    before, path = labelled(opset), tmp_path / "out.onnx"
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((4, 16)).astype(np.float32), "flag": np.array(True)} for _ in range(4)]
    magr_onnx.optimize(before, data, output=path, effort="fast", include=["*"], **FORMATS[form])
    after = onnx.load(path)
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(after, name) == getattr(before, name)
    assert {(p.key, p.value) for p in before.metadata_props} <= {(p.key, p.value) for p in after.metadata_props}
    ours, theirs = after.graph, before.graph
    assert (ours.name, ours.doc_string) == (theirs.name, theirs.doc_string)
    assert [plain(p) for p in ours.metadata_props] == [plain(p) for p in theirs.metadata_props]
    assert [plain(v) for v in ours.input] == [plain(v) for v in theirs.input]
    assert [plain(v) for v in ours.output] == [plain(v) for v in theirs.output]
    assert [plain(a) for a in ours.quantization_annotation] == [plain(a) for a in theirs.quantization_annotation]
    assert by_name(theirs.value_info).items() <= by_name(ours.value_info).items()
    kept = {name: message for name, message in by_name(theirs.initializer).items() if name != "w"}
    assert kept.items() <= by_name(ours.initializer).items()
    layer = next(n for n in theirs.node if n.name == "first")
    written = {n.name: n for n in ours.node}
    changed = {"first", *({theirs.node[3].name} if opset < 14 else ())}  # Reshape has an attribute more from 14 on
    for node in theirs.node:
        if node.name not in changed:
            assert plain(written[node.name]) == plain(node)
    assert written[theirs.node[3].name].doc_string == theirs.node[3].doc_string
    assert any(n.doc_string == layer.doc_string and list(n.metadata_props) == list(layer.metadata_props) for n in ours.node)
    assert {(o.domain, o.version) for o in after.opset_import} >= {("com.microsoft", 1)}


def test_functions_stay_where_the_opset_does(tmp_path: Path) -> None:
    proto = model(
        """g (float[n, 16] x) => (float[n, 8] y) { h = MatMul(x, w) y = own.F(h) }
        <domain: "own", opset_import: ["": 21], doc_string: "about F">
        F (a) => (b) { [in] c = Sigmoid(a) [out] b = Mul(c, a) }""",
        opset=21,
        ir_version=10,
        domains=("own",),
        w=W,
    )
    annotate(proto.functions[0], kept="yes")
    magr_onnx.optimize(proto, output=tmp_path / "out.onnx")
    (function,) = onnx.load(tmp_path / "out.onnx").functions
    assert (function.name, function.doc_string, list(function.metadata_props)) == ("F", "about F", list(proto.functions[0].metadata_props))
    assert [plain(n) for n in function.node] == [plain(n) for n in proto.functions[0].node]


def test_training_info_is_left_out_and_the_report_says_so(tmp_path: Path) -> None:
    proto = model("g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, w) }", opset=21, ir_version=10, w=W)
    step = helper.make_graph([helper.make_node("Identity", ["w"], ["w2"])], "step", [], [helper.make_tensor_value_info("w2", 1, [16, 8])])
    info = onnx.TrainingInfoProto(algorithm=step)
    info.update_binding.add(key="w", value="w2")
    proto.training_info.append(info)
    report = magr_onnx.optimize(proto, output=tmp_path / "out.onnx").report
    assert any("training info" in note for note in report.notes)


def old_model(opset: int) -> onnx.ModelProto:
    """Operators whose form changed between opsets 7 and 21: attributes that became inputs, types of shapes, defaults of axes."""
    body = ["[a] h = MatMul(x, w)", "n = BatchNormalization(h, one, zero, zero, one)"]
    if opset < 13:
        body += ["m = Unsqueeze<axes = [1]>(n)", "s = Squeeze<axes = [1]>(m)", "p = Softmax<axis = 1>(s)"]
    else:
        body += ["m = Unsqueeze(n, axis)", "s = Squeeze(m, axis)", "p = Softmax<axis = 1>(s)"]
    body += ["c = Clip<min = 0.0, max = 0.1>(p)" if opset < 11 else "c = Clip(p, low, high)"]
    body += ["r = Dropout(c)", "[b] y = Gemm<transB = 1>(r, v, zero)"]
    arrays: dict[str, Any] = {"w": W, "v": constant("v", 8, 8), "one": np.ones(8, np.float32), "zero": np.zeros(8, np.float32)}
    if opset >= 13:
        arrays["axis"] = np.array([1])
    if opset >= 11:
        arrays |= {"low": np.array(0, np.float32), "high": np.array(0.1, np.float32)}
    return model(f"g (float[n, 16] x) => (float[n, 8] y) {{ {' '.join(body)} }}", opset=opset, ir_version=8, **arrays)


@pytest.mark.parametrize("opset", range(7, 26))
def test_every_opset_is_raised_without_a_word_and_without_a_change(opset: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    proto, path = old_model(opset), tmp_path / "out.onnx"
    report = magr_onnx.optimize(proto, output=path, format="qdq", bits=8, block_size=16, include=["*"]).report
    assert [row.name for row in report.layers] == ["a", "b"]
    assert capfd.readouterr().err == ""
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    with Session(ir.from_proto(proto)) as session, Session(path) as quantized:
        (expected,), (got,) = session.run({"x": x}), quantized.run({"x": x})
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())


def test_an_operator_that_becomes_several_keeps_one_name(tmp_path: Path) -> None:
    text = "g (float[n, m, 16] x) => (float[n, m, 8] y) { h = MatMul(x, w) [soft] y = Softmax<axis = 1>(h) }"
    proto, path = model(text, opset=11, ir_version=6, w=W), tmp_path / "out.onnx"
    magr_onnx.optimize(proto, output=path, format="qdq", bits=8)
    assert [n.name for n in onnx.load(path).graph.node].count("soft") == 1


def test_opsets_are_raised_no_further_than_the_format_needs(tmp_path: Path) -> None:
    proto = old_model(11)
    made = {form: magr_onnx.optimize(proto, include=["*"], **FORMATS[form]).model for form in ("matmulnbits", "qdq", "dynamic-int8")}
    opsets = {form: model.opset_imports[""] for form, model in made.items()}
    assert opsets == {"matmulnbits": 11, "qdq": 21, "dynamic-int8": 13}


@pytest.mark.parametrize("ir_version", [3, 4])
def test_constants_among_the_inputs_of_old_files(ir_version: int, tmp_path: Path) -> None:
    """Before IR version 4 an initializer had to be an input, which nobody could override; from then on it may be one, and kept so."""
    proto, path = old_model(9), tmp_path / "old.onnx"
    proto.ir_version = ir_version
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    path.write_bytes(proto.SerializeToString())
    if ir_version >= 4:
        with pytest.raises(ModelError, match="may override"):
            magr_onnx.optimize(path, output=tmp_path / "out.onnx", keep_overridable=True)
    assert len(magr_onnx.optimize(path, output=tmp_path / "out.onnx", include=["*"]).report.layers) == 2
    with Session(path) as old, Session(tmp_path / "out.onnx") as new:
        assert [i.name for i in old.inputs] == [i.name for i in new.inputs] == ["x"]


def simple(body: str, **initializers: Any) -> ir.Model:
    text = f"g (float[n, 16] x) => (float[n, 16] y, int64[n] i) {{ {body} i = ArgMax<axis=1, keepdims=0>(x) }}"
    return ir.from_proto(model(text, **initializers))


def test_a_conversion_that_changes_outputs_is_refused() -> None:
    before = simple("y = Relu(x)")
    assert opset_check.check(before, before, None, "cpu") == []
    with pytest.raises(ModelError, match=r"changed output 'y' \(by up to .*newer opset"):
        opset_check.check(before, simple("y = Abs(x)"), None, "cpu")
    with pytest.raises(ModelError, match="changed the model's inputs or outputs"):
        opset_check.check(before, ir.from_proto(model("g (float[n, 16] x) => (float[n, 16] y) { y = Relu(x) }")), None, "cpu")
    with pytest.raises(ModelError, match="broke the model"):
        opset_check.check(before, simple("t = Transpose<perm=[1,0]>(x) p = MatMul(x, x) y = Add(x, x)"), None, "cpu")


@pytest.mark.parametrize(("kind", "same", "other"), [("float", 5e-4, 2e-3), ("float16", 5e-3, 2e-2)])
def test_how_much_outputs_may_change(kind: str, same: float, other: float) -> None:
    """Of their largest value: a thousandth, and a hundredth in half precision."""

    def scaled(factor: float) -> ir.Model:
        text = f"g ({kind}[n, 16] x) => ({kind}[n, 16] y) {{ y = Mul(x, c) }}"
        return ir.from_proto(model(text, c=np.array(factor, np.float32 if kind == "float" else np.float16)))

    for sign in (1, -1):
        assert opset_check.check(scaled(1), scaled(1 + sign * same), None, "cpu") == []
        with pytest.raises(ModelError, match="changed output 'y'"):
            opset_check.check(scaled(1), scaled(1 + sign * other), None, "cpu")


def test_outputs_that_are_random_are_not_compared() -> None:
    drawn = simple("r = RandomNormalLike(x) y = Add(x, r)")
    assert opset_check.check(drawn, drawn, None, "cpu") == []


def test_a_model_that_made_up_inputs_do_not_fit_is_not_judged() -> None:
    picky = simple("s = Constant<value = int64[2] {7, 16}>() y = Reshape(x, s)")
    (note,) = opset_check.check(picky, picky, None, "cpu")
    assert "not known" in note


def test_made_up_inputs_have_the_model_s_types() -> None:
    proto = model("g (float16[n, 3] a, int32[2, m] b, bool c, string[k] d) => (float16[n, 3] y) { y = Relu(a) }")
    with Session(ir.from_proto(proto)) as session:
        batch = random_inputs(session.inputs)[1]
        assert len(session.run(batch)) == 1
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "a": ((1, 3), "float16"),
        "b": ((2, 8), "int32"),
        "c": ((), "bool"),
        "d": ((1,), "object"),
    }
    assert numpy_helper.from_array(batch["d"]).data_type == onnx.TensorProto.STRING


def test_nodes_that_the_converter_adds_have_names_of_their_own(tmp_path: Path) -> None:
    proto = model(
        """g (float[2, 3, 48] x) => (float[2, 3, 24] y) {
            [soft] s = Softmax<axis = 1>(x)
            [fc] y = MatMul(s, w)
        }""",
        opset=11,
        w=constant("w", 48, 24),
    )
    report = magr_onnx.optimize(proto, output=tmp_path / "q.onnx", format="qdq", bits=8, block_size=None).report
    assert [row.name for row in report.layers] == ["fc"]
    names = [node.name for node in ir.load(tmp_path / "q.onnx").graph if node.name]
    assert len(set(names)) == len(names)
    assert "soft" in names


@pytest.mark.parametrize("inner", ["hidden", "other", "w"])
def test_what_a_converter_makes_does_not_hide_a_value_of_a_body(inner: str) -> None:
    text = """g (float[n, 4, 5] x, bool c) => (float[n, 4, 5] y) {
        a = Softmax<axis = 1>(x)
        read = Identity(a)
        b = If(c) <
            then_branch = t () => (float[n, 4, 5] u) { hidden = Relu(read) u = Exp(hidden) },
            else_branch = e () => (float[n, 4, 5] w) { other = Neg(read) w = Exp(other) }
        >
        y = LogSoftmax<axis = 1>(b)
    }"""
    for new in ("a_intermediate", "y_intermediate"):  # what onnx calls them
        proto = model(re.sub(rf"\b{inner}\b", new, text), opset=11)
        converted = ir.from_proto(proto)
        raise_opset(converted, 18)
        onnx.checker.check_model(ir.to_proto(converted), full_check=True)
        for flag in (True, False):
            feeds = {"x": constant("x", 2, 4, 5), "c": np.array(flag)}
            with Session(ir.from_proto(proto)) as before, Session(converted) as after:
                np.testing.assert_allclose(after.run(feeds)[0], before.run(feeds)[0], atol=1e-6)


def test_shapes_that_the_converter_infers_do_not_go_into_the_file() -> None:
    source = model("g (float[n, 16] x) => (float[n, 8] y) { h = MatMul(x, w) a = Relu(h) y = Softmax<axis = 1>(a) }", opset=12, w=W)
    source.graph.value_info.append(helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["n", 8]))
    raised = ir.from_proto(source)
    assert raise_opset(raised, 21)
    assert {value.name for value in ir.to_proto(raised).graph.value_info} == {"a", "w"}  # onnx-ir writes those of initializers too


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("opset", [10, 13, 17])
def test_data_in_files_of_weights_in_bodies_is_found(opset: int, format_: str, tmp_path: Path) -> None:
    source = model(
        """g (float[n, 16] x, bool c) => (float[n, 16] y) {
            h = If(c) <
                then_branch = t () => (float[n, 16] z) {
                    z = If(c) <
                        then_branch = tt () => (float[n, 16] a) { a = MatMul(x, aw) },
                        else_branch = te () => (float[n, 16] b) { b = MatMul(x, bw) }
                    >
                },
                else_branch = e () => (float[n, 16] d) { d = MatMul(x, dw) }
            >
            y = MatMul(h, w)
        }""",
        opset=opset,
        w=constant("w", 16, 16),
    )
    arrays = {name: constant(name, 16, 16) for name in ("aw", "bw", "dw")}
    outer = {a.name: a.g for a in source.graph.node[0].attribute}
    inner = {a.name: a.g for a in outer["then_branch"].node[0].attribute}
    places = {"aw": inner["then_branch"], "bw": inner["else_branch"], "dw": outer["else_branch"]}
    (tmp_path / "data.bin").write_bytes(b"".join(array.tobytes() for array in arrays.values()))
    for i, (name, graph) in enumerate(places.items()):
        tensor = numpy_helper.from_array(arrays[name], name)
        onnx.external_data_helper.set_external_data(tensor, "data.bin", 1024 * i, 1024)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(source.SerializeToString())
    x = constant("x", 5, 16)
    data = [{"x": x, "c": np.array(flag)} for flag in (True, False) for _ in range(2)]
    magr_onnx.optimize(tmp_path / "m.onnx", data, output=tmp_path / "out.onnx", **(FORMATS[format_] | {"bits": 8}))
    with Session(tmp_path / "out.onnx") as after:
        for flag, first in ((True, "aw"), (False, "dw")):
            expected = x @ arrays[first] @ constant("w", 16, 16)
            np.testing.assert_allclose(after.run({"x": x, "c": np.array(flag)})[0], expected, atol=0.05 * np.abs(expected).max())


def scan_of_batches(outputs: int) -> onnx.ModelProto:
    """A Scan of opset 8 over two sequences, with a state that is a weight, and another that all steps are added to."""
    declared = {"end": [2, 1, 16], "y": [2, "t", 1, 16]}
    inputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("weight", [16, 16]), ("sum", [1, 16]), ("row", [1, 16]))]
    results = [helper.make_tensor_value_info(name, 1, None) for name in ("same", "next", "each")]
    nodes = [
        helper.make_node("MatMul", ["row", "weight"], ["product"], name="inner"),
        helper.make_node("Add", ["product", "sum"], ["next"]),
        helper.make_node("Identity", ["weight"], ["same"]),
        helper.make_node("Tanh", ["next"], ["each"]),
    ]
    body = helper.make_graph(nodes[: 3 + outputs], "body", inputs, results[: 2 + outputs])
    scan = helper.make_node("Scan", ["", "weights", "zeros", "x"], ["weights_end", "end", "y"][: 2 + outputs], body=body, num_scan_inputs=1)
    graph = helper.make_graph(
        [scan, helper.make_node("MatMul", ["end", "w"], ["last"], name="outer")],
        "g",
        [helper.make_tensor_value_info("x", 1, [2, "t", 1, 16])],
        [helper.make_tensor_value_info("last", 1, None), *(helper.make_tensor_value_info(n, 1, declared[n]) for n in ("y",)[:outputs])],
        [
            numpy_helper.from_array(np.random.default_rng(1).standard_normal((2, 16, 16)).astype(np.float32), "weights"),
            numpy_helper.from_array(np.zeros((2, 1, 16), np.float32), "zeros"),
            numpy_helper.from_array(np.random.default_rng(2).standard_normal((16, 8)).astype(np.float32), "w"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=4)


@pytest.mark.parametrize("outputs", [0, 1])
def test_a_scan_over_a_batch_of_sequences_stays_as_it_is(outputs: int) -> None:
    proto = scan_of_batches(outputs)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 1, 16)).astype(np.float32)}
    made = magr_onnx.optimize(proto, [feeds] * 4, bits=8, block_size=16, effort="fast").model
    with Session(ir.from_proto(proto)) as floats, Session(made) as session:
        for ours, original in zip(session.run(feeds), floats.run(feeds), strict=True):
            np.testing.assert_allclose(ours, original, atol=0.1)


@pytest.mark.parametrize("format", ["qdq", "dynamic-int8", "qdq-int8"])
def test_a_scan_over_a_batch_of_sequences_cannot_be_converted(format: Any) -> None:
    """Onnx's converter makes one of it that takes a single sequence."""
    with pytest.raises(ModelError, match="opset 8, whose Scan runs over a batch of sequences, and cannot be converted to opset"):
        magr_onnx.optimize(scan_of_batches(1), [{"x": np.zeros((2, 4, 1, 16), np.float32)}] * 2, format=format)
