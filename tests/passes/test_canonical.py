"""Layers in disguise: what they become computes the same, is found, and goes through every format."""

from __future__ import annotations

import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magr_onnx import inspect, optimize
from magr_onnx.models.zoo import ZOO, Trap
from magr_onnx.models.zoo.disguised import TRAPS
from magr_onnx.models.zoo.trap import CONVERTED, Tensor, constant, model
from magr_onnx.passes.canonical import canonicalize
from magr_onnx.passes.canonical.einsum import parse
from magr_onnx.passes.layers.linear import find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.unconverted import unconverted_weights
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.pairwise import each_value

FORMATS: dict[str, dict[str, Any]] = {
    "matmulnbits": {"bits": 8, "block_size": 16},
    "qdq": {"bits": 8, "block_size": None},
    "qdq-int8": {},
    "dynamic-int8": {},
}


def run(proto: onnx.ModelProto | ir.Model, feeds: dict[str, Tensor]) -> list[Tensor]:
    of = proto if isinstance(proto, ir.Model) else ir.from_proto(proto)
    with Session(of, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        return session.run(feeds)


def fates(proto: onnx.ModelProto, **options: Any) -> dict[str, tuple[str, str]]:
    """Every layer and every node left alone: its fate, and details."""
    found = inspect(proto, **options)
    return {row["name"]: (CONVERTED, "") for row in found.layers} | {row.name: (row.reason, row.detail) for row in found.skipped}


@pytest.mark.parametrize("trap", [t for t in ZOO.values() if t.refused is None], ids=lambda t: t.name)
def test_the_canonical_model_computes_the_same_and_stays_as_it_is(trap: Trap) -> None:
    proto, feeds = trap.build(), trap.feeds(np.random.default_rng(5))
    work = ir.from_proto(proto)
    canonicalize(work, requantized=True)
    onnx.checker.check_model(ir.to_proto(work), full_check=True)
    for value, before in zip(work.graph.outputs, proto.graph.output, strict=True):
        assert value.name == before.name
        assert str(ir.to_proto(value)) == str(before)
    for got, wanted in zip(run(work, feeds), run(proto, feeds), strict=True):
        fine = 2e-2 if wanted.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(got, wanted, rtol=fine, atol=fine)
    assert canonicalize(work, requantized=True) == []


@pytest.mark.parametrize(("trap", "form"), each_value(TRAPS, list(FORMATS)))
def test_every_format_with_calibration_and_feedback(trap: Trap, form: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / "q.onnx"
    proto, data = trap.build(), [trap.feeds(rng) for _ in range(12)]
    options: Any = {"format": form, "effort": "balanced", "include": ["*"], **FORMATS[form], **trap.options}
    report = optimize(proto, data, output=path, **options).report
    assert {row.name for row in report.layers} == {name for name, fate in trap.layers.items() if fate == CONVERTED}
    onnx.checker.check_model(str(path))
    feeds = trap.feeds(rng)
    with Session(path) as session:
        outputs = session.run(feeds)
    for got, wanted in zip(outputs, run(proto, feeds), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: t.name)
def test_magr_alone_writes_floats(trap: Trap, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / "q.onnx"
    proto, data = trap.build(), [trap.feeds(rng) for _ in range(12)]
    report = optimize(proto, data, output=path, pipeline_text="magr{alpha=1e-4}").report
    assert {row.name for row in report.layers} == {name for name, fate in trap.layers.items() if fate == CONVERTED}
    feeds = trap.feeds(rng)
    changed = False
    for got, wanted in zip(run(ir.load(path), feeds), run(proto, feeds), strict=True):
        changed |= bool((got != wanted).any())
        assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()
    assert changed


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, dict[str, int], bool]:
    """An equation that is a product with a constant, the sizes of its labels, and whether the constant is first."""
    left_out = draw(st.booleans())
    letters = draw(st.permutations(string.ascii_lowercase if left_out else string.ascii_letters))  # onnxruntime's limits
    counts = [draw(st.integers(low, high)) for low, high in ((0, 2), (0, 2), (1, 2), (0, 2), (0, 1))]
    parts = []
    for count in counts:
        parts.append("".join(letters[:count]))
        letters = letters[count:]
    rows, batch, inner, outer, summed = parts
    x = "".join(draw(st.permutations(rows + batch + inner + summed)))
    w = "".join(draw(st.permutations(batch + inner + outer)))
    out = "".join(draw(st.permutations(rows + batch + outer)))
    sizes = {c: draw(st.integers(1, 4)) for c in rows + batch + inner + outer + summed}
    implicit = left_out and not batch and not summed
    if implicit:
        out = "".join(sorted(rows + outer))
    first = draw(st.booleans())
    if draw(st.booleans()) and not implicit and rows and rows[0] == x[0] == out[0]:  # an axis that is written as dots
        x, out = "..." + x[1:], "..." + out[1:]
        sizes["..."] = sizes.pop(rows[0])
    left = f"{w},{x}" if first else f"{x}, {w}"
    return left if implicit else f"{left} -> {out}", sizes, first


@settings(max_examples=60, deadline=None)
@given(equations())
def test_einsum_of_any_labels_is_a_layer(case: tuple[str, dict[str, int], bool]) -> None:
    equation, sizes, first = case
    terms = equation.replace(" ", "").split("->")[0].split(",")
    shapes = [[sizes[c] for c in (["..."] if "..." in term else []) + list(term.replace("...", ""))] for term in terms]
    x = np.random.default_rng(0).standard_normal(shapes[first]).astype(np.float32)
    w = constant("w", *shapes[not first])
    wanted = np.einsum(equation, *((w, x) if first else (x, w)))
    names = "w, x" if first else "x, w"
    dims = ", ".join(f"d{i}" if i % 2 else str(d) for i, d in enumerate(x.shape))  # every other size known
    out = ", ".join(f"o{i}" for i in range(wanted.ndim))
    ends = [f"float[{t}] {n}" if t else f"float {n}" for t, n in ((dims, "x"), (out, "y"))]
    proto = model(f'g ({ends[0]}) => ({ends[1]}) {{ [fc] y = Einsum<equation = "{equation}">({names}) }}', w=w)
    floats = ir.from_proto(proto)
    canonicalize(floats)
    unstretched = not [n for n in floats.graph if n.op_type == "Einsum"]
    np.testing.assert_allclose(run(floats, {"x": x})[0], wanted, rtol=1e-4, atol=1e-5)
    own = terms[not first]
    of_x = dict(zip((["."] if "..." in terms[first] else []) + list(terms[first].replace("...", "")), range(x.ndim), strict=True))
    known_one = {c for c in own if c in of_x and sizes[c] == 1 and of_x[c] % 2}  # of one, in an axis that may be anything
    assert unstretched == (not known_one)
    if unstretched:
        quantized, report = optimize(proto, bits=8, block_size=16, include=["*"])
        assert all(row.name.startswith("fc") for row in report.layers)
        both = [np.abs(a) for a in ((w, x) if first else (x, w))]
        assert (np.abs(run(quantized, {"x": x})[0] - wanted) <= 0.03 * np.einsum(equation, *both).max() + 1e-6).all()


@st.composite
def products(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, Tensor], int, int]:
    """A MatMul or Gemm with a constant on one side, its input, the axes of the constant before its matrix, and matrices in it."""
    m, k, n = (draw(st.integers(1, 5)) for _ in range(3))
    opset, kind = draw(st.sampled_from([7, 11, 13, 18, 21])), draw(st.sampled_from([np.float32, np.float64]))
    left = draw(st.booleans())
    extra: dict[str, Any] = {}
    if draw(st.booleans()):
        turns = {name: draw(st.integers(0, 1)) for name in ("transA", "transB")}
        a = (k, m) if turns["transA"] else (m, k)
        b = (n, k) if turns["transB"] else (k, n)
        if opset < 11 or draw(st.booleans()):
            extra["c"] = constant("c", *draw(st.sampled_from([(n,), (1, n), (m, n), (m, 1), (1,), ()])), dtype=kind)
        options = ", ".join(f"{name} = {value}" for name, value in {**turns, "alpha": 0.5, "beta": 2.0}.items())
        op, rank, lead = f"Gemm<{options}>", 2, (1,)
    else:
        lead = draw(st.sampled_from([(), (1,), (3,), (1, 3), (3, 1), (2, 3)]))
        other = tuple(draw(st.sampled_from([1, d])) for d in lead[draw(st.integers(0, len(lead))) :])
        other = (*draw(st.sampled_from([(), (2,)])), *other) if len(other) == len(lead) else other
        a, b = ((*lead, m, k), (*other, k, n)) if left else ((*other, m, k), (*lead, k, n))
        a = a[-1:] if len(a) == 2 and draw(st.booleans()) else a
        b = b[:1] if len(b) == 2 and draw(st.booleans()) else b
        op, rank = "MatMul", max(len(a) - 1, 0) + max(len(b) - 1, 0) if min(len(a), len(b)) == 1 else max(len(a), len(b))
    shape, w = (b, a) if left else (a, b)
    extra["w"] = constant("w", *w, dtype=kind) if len(w) > 1 else constant("w", 1, *w, dtype=kind)[0]
    name = "float" if kind is np.float32 else "double"
    dims = ", ".join(str(d) if draw(st.booleans()) else f"d{i}" for i, d in enumerate(shape))
    out = ", ".join(f"o{i}" for i in range(rank))
    names = ["w, x" if left else "x, w", *(["c"] if "c" in extra else [])]
    text = f"g ({name}[{dims}] x) => ({name}{f'[{out}]' if rank else ''} y) {{ [fc] y = {op}({', '.join(names)}) }}"
    x = np.random.default_rng(1).standard_normal(shape).astype(kind)
    matrices = int(np.prod(lead)) if op == "MatMul" and len(w) > 2 else 1
    return model(text, opset=opset, **extra), {"x": x}, sum(d > 1 for d in lead), matrices


@settings(max_examples=200, deadline=None)
@given(products())
def test_products_of_any_side_rank_and_type_are_layers(case: tuple[onnx.ModelProto, dict[str, Tensor], int, int]) -> None:
    proto, feeds, axes, matrices = case
    work = ir.from_proto(proto)
    canonicalize(work)
    onnx.checker.check_model(ir.to_proto(work), full_check=True)
    layers, skips = find(work)
    if axes < 2 and not skips:
        assert [layer.name for layer in layers] == (["fc"] if matrices == 1 else [f"fc[{i}]" for i in range(matrices)])
    else:
        assert not layers
        assert [skip.reason for skip in skips] == ["weight is not two-dimensional"]
        assert axes == 2 or "no Expand" in skips[0].detail
    (got,), (wanted,) = run(work, feeds), run(proto, feeds)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "operands", "result"),
    [
        (" i j , jk ", ("ij", "jk"), "ik"),
        ("ba,cb", ("ba", "cb"), "ac"),
        ("...d,df", ("012d", "df"), "012f"),
        ("...d,df->f...", ("012d", "df"), "f012"),
        ("bsd,...->bs", ("bsd", ""), "bs"),
    ],
)
def test_equations(equation: str, operands: tuple[str, str], result: str) -> None:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    ranks = [len(t.replace("...", "")) + (3 if t == "...d" else 0) for t in terms]
    found = parse(equation, (ranks[0], ranks[1]))
    assert (found.operands, found.result) == (operands, result)


@pytest.mark.parametrize("equation", ["ij,jk,kl->il", "ij,jk->iz", "ij,jk->ii", "ijk,jk->i", "i1,1k->ik", "ij,jk->i->k"])
def test_what_is_no_equation_of_two_matrices(equation: str) -> None:
    with pytest.raises(ValueError):
        parse(equation, (2, 2))


@pytest.mark.parametrize(
    ("equation", "w", "detail"),
    [
        ("bk,kk->b", (6, 6), "a label stands twice in one operand"),
        ("bk,kn->bk", (6, 4), "n is summed in the constant alone"),
        ("bk,bk->bk", (5, 6), "nothing is summed over"),
        ("bk,n->bkn", (4,), "nothing is summed over"),
        ("bk,kn->bn", (1, 4), "the axis k is one on a side, and may be stretched"),
        ("sk,skn->sn", (600, 6, 2), "a stack of 600 matrices; layers are made of 512 at most"),
    ],
)
def test_einsums_that_are_left_alone(equation: str, w: tuple[int, ...], detail: str) -> None:
    rows = 600 if w[0] == 600 else 5
    out = ", ".join(f"d{i}" for i in range(len(equation.partition("->")[2])))
    text = f'g (float[{rows}, 6] x) => (float[{out}] y) {{ [e] y = Einsum<equation = "{equation}">(x, w) }}'
    proto = model(text, w=constant("w", *w))
    work = ir.from_proto(proto)
    assert canonicalize(work) == []
    (skip,) = unconverted_weights(work.graph)
    assert skip.reason == "an Einsum that is no product with a constant matrix"
    assert skip.detail.startswith(f"{equation}: {detail}; w: ")


OPSETS: dict[str, Callable[[], tuple[str, dict[str, tuple[int, ...]], tuple[int, ...]]]] = {
    "left": lambda: ("g (float[n, 48, t] x) => (float[n, 24, t] y) { [fc] y = MatMul(w, x) }", {"x": (2, 48, 3)}, (24, 48)),
    "vector": lambda: ("g (float[n, t, 48] x) => (float[n, t] y) { [fc] y = MatMul(x, w) }", {"x": (2, 3, 48)}, (48,)),
    "ones": lambda: ("g (float[n, 48] x) => (float[1, 1, n, 8] y) { [fc] y = MatMul(x, w) }", {"x": (3, 48)}, (1, 1, 48, 8)),
    "shared": lambda: ("g (float[n, 48] x) => (float[3, n, 8] y) { [fc] y = MatMul(x, w) }", {"x": (5, 48)}, (3, 48, 8)),
    "own": lambda: ("g (float[3, n, 48] x) => (float[3, n, 8] y) { [fc] y = MatMul(x, w) }", {"x": (3, 5, 48)}, (3, 48, 8)),
    "transposed": lambda: ("g (float[48, n] x) => (float[n, 8] y) { [fc] y = Gemm<transA = 1>(x, w, c) }", {"x": (48, 5)}, (48, 8)),
}


@pytest.mark.parametrize("opset", [7, 8, 11, 12, 13, 18, 21, 23])
@pytest.mark.parametrize("form", OPSETS)
def test_forms_in_every_opset(form: str, opset: int) -> None:
    text, shapes, w = OPSETS[form]()
    more = {"c": constant("c", 8)} if form == "transposed" else {}
    proto = model(text, opset=opset, ir_version=10, w=constant("w", *w), **more)
    feeds = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    work = ir.from_proto(proto)
    assert canonicalize(work)
    assert work.opset_imports[""] == opset
    onnx.checker.check_model(ir.to_proto(work), full_check=True)
    assert [row.name for row in find(work)[0]] in (["fc"], [f"fc[{i}]" for i in range(3)])
    np.testing.assert_allclose(run(work, feeds)[0], run(proto, feeds)[0], rtol=1e-5, atol=1e-5)
    quantized, _ = optimize(proto, bits=8, block_size=None, format="qdq")
    np.testing.assert_allclose(run(quantized, feeds)[0], run(proto, feeds)[0], atol=0.1)


def test_bfloat16_runs_as_float32_where_onnxruntime_has_no_such_product() -> None:
    text = """g (float[n, 48] x) => (float[n, 24] y) {
        small = Cast<to = 16>(x)
        [fc] h = MatMul(small, w)
        y = Cast<to = 1>(h)
    }"""
    proto = model(text)
    w = constant("w", 48, 24)
    proto.graph.initializer.append(onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, w.shape, w.reshape(-1)))
    quantized, report = optimize(proto, bits=8, block_size=16)
    assert [row.name for row in report.layers] == ["fc"]
    assert any("bfloat16" in note and "fc" in note for note in report.notes)
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    np.testing.assert_allclose(run(quantized, {"x": x})[0], x @ w, atol=0.05)


def stack_of_experts() -> onnx.ModelProto:
    return model(
        """g (float[n, 48] x) => (float[3, n, 24] y, float[n, 24] z) {
            [moe] y = MatMul(x, experts)
            [fc] z = MatMul(x, w)
        }""",
        experts=constant("stack", 3, 48, 24),
        w=constant("w", 48, 24),
    )


@pytest.mark.parametrize(
    ("patterns", "converted"),
    [
        ({"exclude": ["moe"]}, {"fc"}),
        ({"exclude": ["experts"]}, {"fc"}),
        ({"exclude": ["moe[1]"]}, {"fc", "moe[0]", "moe[2]"}),
        ({"include": ["moe"]}, {"moe[0]", "moe[1]", "moe[2]"}),
        ({"include": ["experts"]}, {"moe[0]", "moe[1]", "moe[2]"}),
        ({"include": ["moe[2]"]}, {"moe[2]"}),
        ({"include": ["f*"]}, {"fc"}),
    ],
)
def test_patterns_know_layers_by_the_names_of_their_nodes(patterns: dict[str, list[str]], converted: set[str]) -> None:
    proto, x = stack_of_experts(), np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    quantized, report = optimize(proto, bits=8, block_size=16, **patterns)
    assert {row.name for row in report.layers} == converted
    why = {"exclude": "excluded by name", "include": "not among the layers to include"}[next(iter(patterns))]
    assert {row.reason for row in report.skipped} == {why}
    for got, wanted in zip(run(quantized, {"x": x}), run(proto, {"x": x}), strict=True):
        np.testing.assert_allclose(got, wanted, atol=0.05)


def test_excluded_nodes_are_not_touched() -> None:
    work = ir.from_proto(stack_of_experts())
    before = str(ir.to_proto(work))
    assert canonicalize(work, Selection(exclude=["moe"])) == []
    assert str(ir.to_proto(work)) == before


def test_layers_under_a_budget_of_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((64, 48)).astype(np.float32)} for _ in range(8)]
    path = tmp_path / "m.onnx"
    onnx.save(stack_of_experts(), path)
    report = optimize(path, data, output=tmp_path / "q.onnx", target_size="40%").report
    assert {row.name for row in report.layers} == {"fc", "moe[0]", "moe[1]", "moe[2]"}
    assert report.bytes_after <= 0.4 * report.bytes_before


def test_the_matrices_of_a_stack_stay_where_they_are(tmp_path: Path) -> None:
    """In the data file, and in the memory of a tensor, with no node between; where another node reads the stack, it is not stored twice."""
    onnx.save(stack_of_experts(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    for source in (ir.load(tmp_path / "m.onnx"), ir.from_proto(stack_of_experts())):
        whole = source.graph.initializers["experts"].const_value
        assert whole is not None
        canonicalize(source)
        assert "experts" not in source.graph.initializers
        assert not any(node.op_type == "Split" for node in source.graph)
        for i in range(3):
            part = source.graph.initializers[f"experts[{i}]"].const_value
            assert part is not None
            np.testing.assert_array_equal(part.numpy(), constant("stack", 3, 48, 24)[i])
            if isinstance(whole, ir.ExternalTensor):
                assert isinstance(part, ir.ExternalTensor)
                assert (part.location, part.offset, part.length) == ("m.data", (whole.offset or 0) + i * 4 * 48 * 24, 4 * 48 * 24)
            else:
                assert part.numpy().base is not None


def test_a_stack_that_others_read_is_not_stored_twice() -> None:
    text = """g (float[n, 48] x) => (float[3, n, 24] y, float[3, 48, 24] z, float[3, n, 24] v) {
        [moe] y = MatMul(x, experts)
        z = Relu(experts)
        [again] v = MatMul(x, experts)
    }"""
    work = ir.from_proto(model(text, experts=constant("stack", 3, 48, 24)))
    canonicalize(work)
    assert {name for name in work.graph.initializers if not name.startswith("onnx_magr_")} == {"experts"}
    layers = find(work)[0]
    assert [layer.name for layer in layers] == ["moe[0]", "moe[1]", "moe[2]", "again[0]", "again[1]", "again[2]"]
    assert [layer.weight_key for layer in layers[:3]] == [layer.weight_key for layer in layers[3:]]
    assert len({layer.weight_key for layer in layers}) == 3


def test_sizes_stay_in_the_file_when_tensors_go_beside_it(tmp_path: Path) -> None:
    """onnxruntime infers shapes from them, and does not read data files for that."""
    many = model("g (float[200, n, 16] x) => (float[200, n, 4] y) { [fc] y = MatMul(x, w) }", w=constant("w", 200, 16, 4))
    outputs = [f"p{i}" for i in range(200)]
    many.graph.node.append(onnx.helper.make_node("Split", ["x", "ones"], outputs, axis=0))
    many.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(200, np.int64), "ones"))
    x = np.random.default_rng(0).standard_normal((200, 2, 16)).astype(np.float32)
    report = optimize(many, [{"x": x}] * 2, output=tmp_path / "q.onnx", bits=8, block_size=16, external_data=True, include=["*"]).report
    assert len(report.layers) == 200
    np.testing.assert_allclose(run(ir.load(tmp_path / "q.onnx"), {"x": x})[0], run(many, {"x": x})[0], atol=0.1)


def test_layers_that_read_one_value_still_do() -> None:
    """So that they share statistics, and the quantized input of the integer formats."""
    work = ir.from_proto(
        model(
            """g (float[n, 48, t] x) => (float[n, t, 4, 6] y, float[n, t, 24] z) {
                [q] y = Einsum<equation = "bdt,dhk->bthk">(x, q)
                [k] z = Einsum<equation = "bdt,dn->btn">(x, k)
            }""",
            q=constant("q", 48, 4, 6),
            k=constant("k", 48, 24),
        )
    )
    canonicalize(work)
    first, second = find(work)[0]
    assert first.x is second.x


def test_layers_in_bodies_are_brought_into_form_too() -> None:
    text = """g (float[n, 48] x, bool c) => (float[n, 24] y) {
        y = If(c) <
            then_branch = t () => (float[n, 24] a) { [first] a = Einsum<equation = "bk,hk->bh">(x, w) },
            else_branch = e () => (float[n, 24] a) {
                h = Transpose(x)
                [second] p = MatMul(w, h)
                a = Transpose(p)
            }
        >
    }"""
    proto, x = model(text, w=constant("w", 24, 48)), np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    work = ir.from_proto(proto)
    assert len(canonicalize(work)) == 2
    onnx.checker.check_model(ir.to_proto(work), full_check=True)
    assert [n.op_type for n in work.graph.all_nodes()] == ["If", "Transpose", "MatMul", "Transpose", "MatMul", "Transpose", "Transpose"]
    for c in (np.array(True), np.array(False)):
        np.testing.assert_allclose(run(work, {"x": x, "c": c})[0], run(proto, {"x": x, "c": c})[0], rtol=1e-5, atol=1e-5)


def test_weights_with_computed_scales_are_not_requantized() -> None:
    text = """g (float[n, 48] x, float step) => (float[n, 24] y) {
        floats = DequantizeLinear(codes, step)
        [old] h = MatMul(x, floats)
        [fc] p = MatMul(x, w)
        y = Add(h, p)
    }"""
    proto = model(text, w=constant("w", 48, 24), codes=np.ones((48, 24), np.int8))
    assert fates(proto, requantize=True) == {"fc": (CONVERTED, ""), "old": ("weight is quantized already", "")}


def test_what_holds_weights_is_reported_with_its_bytes() -> None:
    text = """g (float[n, t, 64] x, uint8[64, 64] q, float s, uint8 z) => (float[n, t, 64] y) {
        [nbits] a = com.microsoft.MatMulNBits<K = 64, N = 64, bits = 4, block_size = 32>(x, codes, scales)
        [moe] b = com.microsoft.QMoE<k = 1, block_size = 32>(a, router, experts, scales3, , experts, scales3)
        [lstm] c = LSTM<hidden_size = 16>(b, lw, lr)
        [attention] d = com.microsoft.MultiHeadAttention<num_heads = 4>(x, x, x, bias)
        [big] e = Mul(x, mask)
        [small] f = Mul(x, row)
        [dequantized] codes8 = DequantizeLinear(int8, s8)
        [sum] g1 = Add(codes8, x)
        [chain] turned = Transpose(mask)
        [table] g2 = Where(cond, turned, turned)
    }"""
    work = ir.from_proto(
        model(
            text,
            domains=("com.microsoft",),
            codes=np.zeros((64, 2, 16), np.uint8),
            scales=np.ones((64, 2), np.float32),
            router=np.zeros((8, 4), np.float32),
            experts=np.zeros((4, 64, 32), np.uint8),
            scales3=np.ones((4, 64, 2), np.float32),
            lw=constant("lw", 1, 64, 64),
            lr=constant("lr", 1, 64, 16),
            bias=np.zeros(192, np.float32),
            mask=constant("mask", 64, 64),
            row=np.ones((1, 64), np.float32),
            int8=np.zeros((64, 64), np.int8),
            s8=np.ones((), np.float32),
            cond=np.ones((64, 64), bool),
        )
    )
    found = {skip.name: (str(skip.reason), skip.detail) for skip in unconverted_weights(work.graph)}
    other = "an operator without a quantized form"
    assert found == {
        "nbits": ("weight is quantized already", "codes, scales: 0.00 MB"),
        "moe": ("weight is quantized already", "1 of 4 experts see a token, 4 bits in blocks of 32; router, experts, scales3: 0.01 MB"),
        "sum": ("weight is quantized already", "int8: 0.00 MB"),
        "big": (other, "mask: 0.02 MB"),
        "table": (other, "mask: 0.02 MB"),
    }


def test_a_squeeze_of_no_axes_is_not_followed() -> None:
    """onnxruntime takes it for one of all axes, ONNX for none."""
    w = constant("w", 1, 16, 16)
    proto = model(
        "g (float[n, 16] x) => (float[n, 16] y, float[n, 16] z) { m = Squeeze(w, none) [a] y = MatMul(x, m) [b] z = MatMul(x, v) }",
        w=w,
        none=np.zeros(0, np.int64),
        v=w[0],
    )
    report = optimize(proto, bits=8, block_size=16).report
    assert [row.name for row in report.layers] == ["b"]
    assert [row.name for row in report.skipped if row.op == "MatMul"] == ["a"]


def test_a_vector_quantized_in_blocks_is_quantized_again() -> None:
    codes = np.arange(64, dtype=np.int8) - 30
    scales = np.linspace(0.01, 0.04, 4, dtype=np.float32)
    proto = model(
        """g (float[n, 64] x) => (float[n] y) {
            w = DequantizeLinear<axis = 0, block_size = 16>(c, s)
            [fc] y = MatMul(x, w)
        }""",
        opset=21,
        ir_version=10,
        c=codes,
        s=scales,
    )
    made, report = optimize(proto, bits=8, block_size=16, requantize=True)
    assert [row.name for row in report.layers] == ["fc"]
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    with Session(made) as session:
        np.testing.assert_allclose(session.run({"x": x})[0], x @ (codes * scales.repeat(16)), atol=0.05)


def test_inputs_without_a_type_end_no_process() -> None:
    result = subprocess.run([sys.executable, "-m", "tests.passes.untyped"], capture_output=True, text=True, check=False)
    assert result.stdout.endswith("all\n"), f"{result.stdout.splitlines()[-1]}: {result.stderr}"
