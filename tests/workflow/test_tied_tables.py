"""Tables of embeddings that a last layer multiplies by: one tensor for both in the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.passes.emit.readback import read_weights
from tests.graphs import Builder, random

ROWS, WIDTH = 320, 64
INT64 = ir.DataType.INT64


def language_model(width: int = WIDTH, transposed: bool = True, inner: bool = False) -> ir.Model:
    """Tokens, a layer, and logits by the table of the tokens: through a Transpose, or of a Gemm that transposes."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "seq"], INT64)
    table = b.constant("table", random(ROWS, width, scale=1.0))
    x = b.node("Gather", [table, ids], "tokens")
    x = b.node("Tanh", [b.node("MatMul", [x, b.constant("w", random(width, width))], "middle")])
    if transposed:
        logits = b.node("MatMul", [x, b.node("Transpose", [table], "turn", perm=[1, 0])], "head")
        return b.model(logits, ["batch", "seq", ROWS], "logits")
    rows = b.node("Reshape", [x, b.constant("flat", np.array([-1, width]))])
    return b.model(b.node("Gemm", [rows, table], "head", transB=1), ["rows", ROWS], "logits")


def feeds(count: int = 4) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(0, ROWS, (2, 24))} for _ in range(count)]


def made(tmp_path: Path, model: ir.Model, data: bool = True, **options: Any) -> tuple[Any, onnx.ModelProto]:
    path = tmp_path / "made.onnx"
    arguments: dict[str, Any] = {"embeddings": "gather-block-quantized", "quantizer": "rtn", "bias": "none", **options}
    report = magr_onnx.optimize(model, feeds() if data else None, output=path, progress=False, **arguments).report
    return report, onnx.load(path)


def node(proto: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == op and (op != "MatMulNBits" or n.output[0] == "logits" or "head" in n.name))


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: n for n in proto.graph.node for name in n.output}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "embedding_bits"), [(4, 8), (2, 4), (4, 4)])
def test_one_tensor_for_both(tmp_path: Path, transposed: bool, symmetric: bool, bits: int, embedding_bits: int) -> None:
    model = language_model(transposed=transposed)
    report, proto = made(tmp_path, model, bits=bits, embedding_bits=embedding_bits, symmetric=symmetric)
    gather, head = node(proto, "GatherBlockQuantized"), node(proto, "MatMulNBits")
    flat = producers(proto)[gather.input[0]]
    assert (flat.op_type, flat.input[0]) == ("Reshape", head.input[1])
    assert list(gather.input[2:]) == [name for name in head.input[2:4] if name]
    assert {a.name: a.i for a in head.attribute}["bits"] == embedding_bits
    assert "table" not in {i.name for i in proto.graph.initializer}
    # what both read is one matrix, near the table, and the file computes with it
    by_output = read_weights(ir.load(tmp_path / "made.onnx"))
    table, weight = by_output[gather.output[0]], by_output[head.output[0]]
    np.testing.assert_array_equal(table, weight.T)
    exact = random(ROWS, WIDTH, scale=1.0)
    assert np.linalg.norm(table - exact) < (0.02 if embedding_bits == 8 else 0.2) * np.linalg.norm(exact)
    found = ort.InferenceSession(tmp_path / "made.onnx").run(["logits"], feeds(1)[0])[0]
    middle = next(y for y in by_output if y not in (gather.output[0], head.output[0]))
    expected = np.tanh(table[feeds(1)[0]["input_ids"]] @ by_output[middle]) @ table.T
    np.testing.assert_allclose(found.reshape(-1), expected.reshape(-1), atol=1e-4)
    row = next(row for row in report.layers if row.op == "Gather")
    assert (row.bits, row.notes) == (embedding_bits, (f"one tensor with {head.name}",))
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "alpha", "both ways"])
def test_products_with_another_matrix_than_the_table_share_nothing(tmp_path: Path, form: str) -> None:
    """A square table may be multiplied by as it is, and a Gemm may scale it: its columns are no embeddings then."""
    b = Builder()
    ids, table = b.input("input_ids", ["batch", "seq"], INT64), b.constant("table", random(ROWS, ROWS, scale=1.0))
    x = b.node("Gather", [table, ids], "tokens")
    x = b.node("Tanh", [b.node("MatMul", [x, b.constant("w", random(ROWS, ROWS, scale=0.1))], "middle")])
    x = b.node("Reshape", [x, b.constant("flat", np.array([-1, ROWS]))])
    if form == "MatMul":
        y = b.node("MatMul", [x, table], "head")
    elif form == "both ways":
        y = b.node("Add", [b.node("MatMul", [x, table], "head"), b.node("Gemm", [x, table], "head2", transB=1)])
    else:
        y = b.node("Gemm", [x, table], "head", **({"transB": 1, "alpha": 0.25} if form == "alpha" else {}))
    model = b.model(y, ["rows", ROWS], "logits")
    expected = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString()).run(None, feeds(1)[0])[0]
    report, proto = made(tmp_path, model, bits=8)
    assert {row.op for row in report.layers} >= {"Gather", "MatMul" if form in ("MatMul", "both ways") else "Gemm"}
    assert "table" not in {i.name for i in proto.graph.initializer}
    assert all(producers(proto).get(n.input[0]) is None for n in proto.graph.node if n.op_type == "GatherBlockQuantized")
    found = ort.InferenceSession(tmp_path / "made.onnx").run(None, feeds(1)[0])[0]
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_bits_are_solved_for_products_and_rows_alike(tmp_path: Path, seed: int) -> None:
    """Of inputs that vary in few directions alone, products would leave the rows of the table wherever nobody looks."""
    b = Builder()
    ids, table = b.input("input_ids", ["batch", "seq"], INT64), b.constant("table", random(ROWS, WIDTH, scale=1.0, seed=seed))
    b.node("Gather", [table, ids], "tokens")
    narrow = random(WIDTH, 6, seed=seed + 10) @ random(6, WIDTH, seed=seed + 20) * np.geomspace(1, 0.01, WIDTH, dtype=np.float32)
    x = b.node("MatMul", [b.node("Gather", [table, ids], "again"), b.constant("w", narrow)], "middle")
    logits = b.node("MatMul", [x, b.node("Transpose", [table], "turn", perm=[1, 0])], "head")
    model = b.model(logits, ["batch", "seq", ROWS], "logits")
    exact = random(ROWS, WIDTH, scale=1.0, seed=seed)
    held_out = exact[np.random.default_rng(99).integers(0, ROWS, 64)] @ narrow

    def errors(**options: Any) -> tuple[float, float]:
        _, proto = made(tmp_path, model, bits=4, embedding_bits=4, layers=[magr_onnx.LayerOptions(("middle",), {"bits": 8})], **options)
        off = read_weights(ir.load(tmp_path / "made.onnx"))[node(proto, "GatherBlockQuantized").output[0]] - exact
        return np.linalg.norm(off) / np.linalg.norm(exact), np.linalg.norm(held_out @ off.T) / np.linalg.norm(held_out @ exact.T)

    rows, products = errors(quantizer=None)
    nearest_rows, nearest_products = errors()
    assert rows < 1.2 * nearest_rows
    assert products < 0.6 * nearest_products


def test_a_layer_whose_codes_no_table_reads_is_solved_for_itself(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "quantizer": None,
        "feedback": False,
        "layers": [magr_onnx.LayerOptions(("head",), {"bits": 2, "block_size": 32})],
    }
    heads = []
    for embeddings in ("gather-block-quantized", "dequantize"):
        made(tmp_path, language_model(), embeddings=embeddings, **options)
        heads.append(read_weights(ir.load(tmp_path / "made.onnx"))["logits"])
    np.testing.assert_array_equal(*heads)


def test_without_data_too(tmp_path: Path) -> None:
    _, proto = made(tmp_path, language_model(), data=False)
    assert producers(proto)[node(proto, "GatherBlockQuantized").input[0]].op_type == "Reshape"


@pytest.mark.parametrize("options", [{}, {"quantizer": None}])
def test_error_feedback_does_not_move_the_table(tmp_path: Path, options: dict[str, Any]) -> None:
    """Weights of the head that make up for 2-bit layers before it would be wrong embeddings."""
    _, proto = made(tmp_path, language_model(), bits=2, feedback=True, **options)
    table = read_weights(ir.load(tmp_path / "made.onnx"))[node(proto, "GatherBlockQuantized").output[0]]
    exact = random(ROWS, WIDTH, scale=1.0)
    assert np.linalg.norm(table - exact) < 0.02 * np.linalg.norm(exact)


def test_a_layer_with_options_of_its_own_keeps_them(tmp_path: Path) -> None:
    head = magr_onnx.LayerOptions(("head",), {"bits": 4})
    _, proto = made(tmp_path, language_model(), layers=[head])
    assert {a.name: a.i for a in node(proto, "GatherBlockQuantized").attribute}["bits"] == 4


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 8),
        ({"embedding_bits": 4}, 4),
        ({"embedding_bits": 4, "layers": [magr_onnx.LayerOptions(("lm_head",), {"bits": 8})]}, 8),
    ],
)
def test_bits_asked_for_tables_win_over_those_a_preset_has_for_the_last_layer(tmp_path: Path, options: dict[str, Any], bits: int) -> None:
    model = language_model()
    next(n for n in model.graph if n.name == "head").name = "lm_head"
    report, proto = made(tmp_path, model, preset="llm-int4", **options)
    assert {a.name: a.i for a in node(proto, "GatherBlockQuantized").attribute}["bits"] == bits
    assert {row.name: row.bits for row in report.layers}["lm_head"] == bits


def test_a_table_that_is_the_transpose_of_the_weight_of_the_head(tmp_path: Path) -> None:
    """As onnxruntime-genai's builder writes tied weights in float."""
    b = Builder()
    ids, weight = b.input("input_ids", ["batch", "seq"], INT64), b.constant("lm_head.weight", random(WIDTH, ROWS, scale=1.0))
    x = b.node("Gather", [b.node("Transpose", [weight], "turn", perm=[1, 0]), ids], "tokens")
    x = b.node("Tanh", [b.node("MatMul", [x, b.constant("w", random(WIDTH, WIDTH))], "middle")])
    _, proto = made(tmp_path, b.model(b.node("MatMul", [x, weight], "head"), ["batch", "seq", ROWS], "logits"), embedding_bits=4)
    codes = {name: i for i in proto.graph.initializer for name in [i.name] if i.data_type == onnx.TensorProto.UINT8 and len(i.dims) == 3}
    assert node(proto, "MatMulNBits").input[1] in codes
    assert producers(proto)[node(proto, "GatherBlockQuantized").input[0]].input[0] == node(proto, "MatMulNBits").input[1]
    assert not any(np.prod(i.dims) >= WIDTH * ROWS and i.data_type == onnx.TensorProto.FLOAT for i in proto.graph.initializer)


@pytest.mark.parametrize(
    "options",
    [
        {"low_rank": 4},  # a table has no branch
        {"layers": [magr_onnx.LayerOptions(("head",), {"bits": 2})]},  # of no table
        {"format": "qdq"},
        {"embeddings": "dequantize"},
        {"quantizer": None, "target_size": "60%"},
    ],
)
def test_where_one_tensor_will_not_do_each_has_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    report, proto = made(tmp_path, language_model(), **options)
    assert all(producers(proto).get(n.input[0]) is None for n in proto.graph.node if n.op_type in ("GatherBlockQuantized", "Gather"))
    assert "table" not in {i.name for i in proto.graph.initializer}
    assert {"Gather", "MatMul"} <= {row.op for row in report.layers}
    session = ort.InferenceSession(tmp_path / "made.onnx")
    assert np.isfinite(session.run(["logits"], feeds(1)[0])[0]).all()


def test_names_that_are_taken(tmp_path: Path) -> None:
    model = language_model()
    for node_ in model.graph:
        if node_.name == "middle":
            node_.name, node_.outputs[0].name = "tokens_codes", "table_q8_flat"
    _, proto = made(tmp_path, model)
    assert producers(proto)[node(proto, "GatherBlockQuantized").input[0]].op_type == "Reshape"
    assert len({n.name for n in proto.graph.node}) == len(proto.graph.node)


def test_a_row_that_ends_within_a_block_keeps_its_own_codes(tmp_path: Path) -> None:
    _, proto = made(tmp_path, language_model(width=80))
    assert producers(proto).get(node(proto, "GatherBlockQuantized").input[0]) is None
