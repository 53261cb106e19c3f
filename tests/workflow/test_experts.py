"""Mixtures of experts: what is in the file against experts written in NumPy, and which tokens they are calibrated on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core.experts import ACTIVATIONS
from magr_onnx.errors import ModelError, NonFiniteError, OptionError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes.layers.experts import ExpertLayer, find
from magr_onnx.report.data import Report
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.expert_tokens import FEW, Tokens, staged_tokens
from magr_onnx.runtime.data.sources import in_memory
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow.experts import select
from tests.helpers import emitted_weight

Array = np.ndarray[Any, Any]
E, H, UNITS, TOKENS = 6, 64, 96, 40
MICROSOFT = ("com.microsoft",)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def activated(name: str, a: Array, alpha: float, beta: float, limit: float) -> Array:
    """By the documentation of MoE, value by value."""
    if name == "swiglu":
        gates, units = (a.reshape(len(a), -1, 2)[..., i] for i in (0, 1))
        gates, units = np.minimum(gates, limit), np.clip(units, -limit, limit)
        return np.asarray(gates / (1 + np.exp(-alpha * gates)) * (units + beta))
    functions = {
        "relu": lambda v: max(v, 0.0),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "gelu": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "identity": lambda v: v,
    }
    return np.vectorize(functions[name])(a)


def mixture(x: Array, scores: Array, weights: Array, form: dict[str, Any], biases: tuple[Array, Array] | None = None) -> Array:
    """Token by token; ``weights (E, H, F + I)`` as a read-back has them."""
    units = weights.shape[2] // (3 if form["activation"] == "swiglu" else 2)
    first, second = weights[:, :, :-units].astype(np.float64), weights[:, :, -units:].transpose(0, 2, 1).astype(np.float64)
    out = np.zeros(x.shape)
    for token, row in enumerate(x.astype(np.float64)):
        best = np.argsort(-scores[token])[: form["k"]]
        shares = softmax(scores[token, best]) if form["normalize"] else softmax(scores[token])[best]
        for expert, share in zip(best, shares, strict=True):
            b1, b2 = (0.0, 0.0) if biases is None else (biases[0][expert], biases[1][expert])
            inner = activated(form["activation"], (row @ first[expert] + b1)[None], form["alpha"], form["beta"], form["limit"])
            out[token] += share * (inner[0] @ second[expert] + b2)
    return out


def form_of(activation: str = "silu", k: int = 2, normalize: int = 1, alpha: float = 1.0, beta: float = 0.0, limit: float = np.inf) -> Any:
    return {"activation": activation, "k": k, "normalize": normalize, "alpha": alpha, "beta": beta, "limit": limit}


def attributes(form: dict[str, Any]) -> str:
    more = f", swiglu_fusion = 1, activation_alpha = {form['alpha']:.3f}, activation_beta = {form['beta']:.3f}"
    more += "" if math.isinf(form["limit"]) else f", swiglu_limit = {form['limit']:.3f}"
    text = f'k = {form["k"]}, normalize_routing_weights = {form["normalize"]}, activation_type = "{form["activation"]}"'
    return text + (more if form["activation"] == "swiglu" else "")


def arrays(form: dict[str, Any], bias: bool, width: int = H, units: int = UNITS, experts: int = E) -> dict[str, Array]:
    rows = 2 * units if form["activation"] == "swiglu" else units
    found = {
        "r": constant("r", width, experts),
        "w1": constant("w1", experts, rows, width) * np.float32(np.sqrt(rows / width)),
        "w2": constant("w2", experts, width, units) * np.float32(np.sqrt(width / units)),
    }
    more = {"b1": constant("b1", experts, rows) / 4, "b2": constant("b2", experts, width) / 4}
    return {name: a.astype(np.float32) for name, a in (found | (more if bias else {})).items()}


def experts(form: Any = None, bias: bool = False, **sizes: int) -> onnx.ModelProto:
    """A router and experts over ``x (n, H)``."""
    form = form or form_of()
    width = sizes.get("width", H)
    text = f"""g (float[n, {width}] x) => (float[n, {width}] y) {{
        [router] scores = MatMul(x, r)
        [moe] y = com.microsoft.MoE<{attributes(form)}>(x, scores, w1, {"b1" if bias else ""}, w2 {", b2" if bias else ""})
    }}"""
    return model(text, domains=MICROSOFT, **arrays(form, bias, **sizes))


def inputs(seed: int = 0, tokens: int = TOKENS, width: int = H) -> Array:
    """Rows of correlated values."""
    mixed = np.random.default_rng(99).standard_normal((width // 4, width)) / np.sqrt(width / 4)
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, width // 4)) @ mixed + 0.3 * rng.standard_normal((tokens, width))).astype(np.float32)


def batches(count: int, seed: int = 1, tokens: int = TOKENS) -> list[dict[str, Array]]:
    return [{"x": inputs(seed * 1000 + i, tokens)} for i in range(count)]


def run(source: Path | onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    with Session(source if isinstance(source, Path) else ir.from_proto(source)) as session:
        return np.asarray(session.run(feeds)[0])


def initial(source: Path | onnx.ModelProto, name: str) -> Array:
    proto = onnx.load(source) if isinstance(source, Path) else source
    return next(onnx.numpy_helper.to_array(i) for i in proto.graph.initializer if i.name == name)


def node_of(path: Path, op: str = "QMoE") -> ir.Node:
    return next(node for node in ir.load(path).graph.all_nodes() if node.op_type == op)


def row_of(report: Report, name: str = "moe") -> LayerRow:
    return next(row for row in report.layers if row.name == name)


def sqnr(reference: Array, y: Array) -> float:
    return float(10 * np.log10((reference**2).sum() / ((y - reference) ** 2).sum()))


FORMS = [
    form_of("relu"),
    form_of("gelu", k=1, normalize=0),
    form_of("silu", k=3),
    form_of("identity", normalize=0),
    form_of("swiglu", k=1),
    form_of("swiglu", normalize=0, alpha=1.75, beta=1.0, limit=0.75),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['activation']}-{form['k']}-{form['normalize']}")
def test_outputs_are_those_of_the_codes(form: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    proto, x, path = experts(form, bias), inputs(), tmp_path / "q.onnx"
    biases = (initial(proto, "b1"), initial(proto, "b2")) if bias else None
    scores = x @ initial(proto, "r")
    original = np.concatenate([initial(proto, "w1").transpose(0, 2, 1), initial(proto, "w2")], axis=2)
    np.testing.assert_allclose(run(proto, {"x": x}), mixture(x, scores, original, form, biases), rtol=1e-4, atol=1e-4)
    report = magr_onnx.optimize(proto, output=path, progress=False).report
    row = row_of(report)
    units = original.shape[2]
    assert (row.op, row.k, row.n, row.groups, row.bits, row.block_size, report.verified) == ("MoE", H, units, E, 4, 32, 1)
    node = node_of(path)
    written = emitted_weight(node)
    assert written is not None
    error = np.linalg.norm(written - original) / np.linalg.norm(original)
    assert 0.03 < error < 0.11
    np.testing.assert_allclose(run(path, {"x": x}), mixture(x, scores, written, form, biases), rtol=1e-3, atol=1e-4)
    assert report.bytes_after < 0.3 * report.bytes_before


def unpacked(codes: Array, bits: int, count: int) -> Array:
    """Codes of the last axis, the first one in the low bits; one at a time."""
    per_byte = 8 // bits
    found = [(codes[..., i // per_byte].astype(int) >> (bits * (i % per_byte))) % 2**bits for i in range(count)]
    return np.stack(found, axis=-1)


GRIDS = [(bits, block, symmetric) for bits in (2, 3, 4, 6, 8) for block in (16, None) for symmetric in (False, True)]


@pytest.mark.parametrize(("bits", "block", "symmetric"), GRIDS)
def test_layout_of_every_grid(bits: int, block: int | None, symmetric: bool, tmp_path: Path) -> None:
    """The file is read by the operator's documentation, and run."""
    form, path, x = form_of("swiglu"), tmp_path / "q.onnx", inputs()
    options: dict[str, Any] = {"bits": bits, "block_size": block, "symmetric": symmetric, "quantizer": "rtn"}
    report = magr_onnx.optimize(experts(form), output=path, progress=False, **options).report
    node, stored = node_of(path), next(width for width in (2, 4, 8) if width >= bits)
    assert node.attributes.get_int("expert_weight_bits") == stored
    wanted, block = block, block or (None if stored == 8 else 32)  # scales of channels of few bits are repeated: the kernel is faster
    assert node.attributes.get_int("block_size", 0) == (block or 0)
    assert row_of(report).block_size == (wanted or H)
    assert row_of(report).stored_block == (None if wanted else block)
    names = [None if value is None else str(value.name) for value in node.inputs]
    parts = []
    for at, k in ((0, H), (1, UNITS)):
        codes, scales = (initial(path, str(names[index])) for index in ((2, 3), (5, 6))[at])
        blocks = k // block if block else 1
        assert scales.shape == ((*codes.shape[:2], blocks) if block else codes.shape[:2])
        real = unpacked(codes, stored, k).reshape(*codes.shape[:2], blocks, -1)
        zeros: Array = np.full((*codes.shape[:2], blocks), 2 ** (stored - 1))
        if len(names) > 11 + at and (name := names[11 + at]):
            packed = initial(path, name)
            count = blocks if block else codes.shape[1]
            assert packed.shape == (*(codes.shape[:2] if block else codes.shape[:1]), -(-count * stored // 8))
            zeros = unpacked(packed, stored, count).reshape(zeros.shape)
        assert not symmetric or (zeros == 2 ** (stored - 1)).all()
        parts.append(((real - zeros[..., None]) * scales.reshape(*zeros.shape, 1)).reshape(*codes.shape[:2], k))
    weights = np.concatenate([parts[0].transpose(0, 2, 1), parts[1]], axis=2)
    np.testing.assert_allclose(emitted_weight(node), weights, rtol=1e-5, atol=1e-6)
    integer = stored == 8 and block is not None  # activations are rounded to int8
    expected = mixture(x, x @ initial(path, "r"), weights, form)
    assert sqnr(expected, run(path, {"x": x})) > (30 if integer else 90)
    assert any("rounds inputs of 8-bit blocks" in note for note in row_of(report).notes) == integer


def test_calibrated_experts_lose_less_on_other_tokens(tmp_path: Path) -> None:
    form, held_out = form_of("swiglu"), {"x": inputs(77, 2000)}
    proto = experts(form)
    expected = run(proto, held_out)

    def decibels(name: str, calibration: Any, **options: Any) -> float:
        path = tmp_path / f"{name}.onnx"
        magr_onnx.optimize(proto, calibration, output=path, progress=False, **options)
        return sqnr(expected, run(path, held_out))

    free, rounded, gptq, auto = (
        decibels("free", None),
        decibels("rtn", batches(30), quantizer="rtn"),
        decibels("gptq", batches(30), quantizer="gptq"),
        decibels("auto", batches(30)),
    )
    assert gptq > rounded + 1
    assert auto > free + 2
    assert auto > gptq


@contextlib.contextmanager
def tokens_of(work: ir.Model, layer: ExpertLayer, data: list[dict[str, Array]], mask: str | None = None) -> Iterator[Tokens]:
    """What a mixture reads."""
    context = CalibrationContext(in_memory(data, "tokens"), mask)
    with contextlib.closing(staged_tokens(work, [layer], [], context, 1 << 30, lambda done, total: None)) as stages:
        yield next(stages)


def test_moments_are_those_of_routed_tokens() -> None:
    form = form_of("swiglu", alpha=1.75, limit=0.75)
    proto = experts(form, bias=True)
    work = ir.from_proto(proto)
    (layer,), _ = find(work)
    data = batches(3)
    with tokens_of(work, layer, data) as tokens:
        counts = tokens.counts()
        moments = tokens.moments(range(E), np.full(E, 10**6))
    x = np.concatenate([batch["x"] for batch in data])
    scores = x @ initial(proto, "r")
    assert counts.sum() == 2 * len(x)
    for expert, stats in enumerate(moments):
        own = x[[expert in np.argsort(-row)[:2] for row in scores]].astype(np.float64)
        assert counts[expert] == len(own)
        hidden = activated("swiglu", own @ initial(proto, "w1")[expert].T + initial(proto, "b1")[expert], 1.75, 0.0, 0.75)
        for known, rows in zip(stats, (own, hidden), strict=True):
            assert known is not None
            assert known.rows == len(own)
            np.testing.assert_allclose(known.gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(known.mean, rows.mean(0), rtol=1e-3, atol=1e-5)


def rare(proto: onnx.ModelProto, which: int, seed: int, wanted: bool) -> Array:
    """Tokens that go to an expert, or do not."""
    x = inputs(seed, 6000)
    to = (np.argsort(-(x @ initial(proto, "r")), axis=1)[:, :2] == which).any(1)
    return x[to == wanted][:960]


def test_experts_that_saw_few_tokens_are_named_and_take_the_nearest_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto, which = experts(form_of("swiglu")), 2
    x = rare(proto, which, 5, wanted=False)
    x[:3] = rare(proto, which, 6, wanted=True)[:3]
    calibration = [{"x": part} for part in np.split(x, 24)]
    held_out = {"x": rare(proto, which, 7, wanted=True)}
    expected = run(proto, held_out)

    def decibels(name: str) -> tuple[float, tuple[str, ...]]:
        report = magr_onnx.optimize(proto, calibration, output=tmp_path / name, progress=False).report
        return sqnr(expected, run(tmp_path / name, held_out)), row_of(report).notes

    joined, notes = decibels("joined.onnx")
    assert f"expert {which} (3) saw fewer than {FEW} tokens; tokens that came nearest to it count too, for less" in notes
    assert any(note.startswith("experts saw 3 to ") for note in notes)
    monkeypatch.setattr("magr_onnx.runtime.calibration.expert_tokens.FEW", 0)
    alone, _ = decibels("alone.onnx")
    assert joined > alone + 0.3


def test_the_mask_leaves_tokens_out() -> None:
    text = f"""g (float[n, t, {H}] x, int64[n, t] attention_mask) => (float[n, t, {H}] y) {{
        flat = Reshape(x, shape)
        scores = MatMul(flat, r)
        [moe] y = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, , w2)
    }}"""
    proto = model(text, domains=MICROSOFT, shape=np.array([-1, H]), **arrays(form_of(), bias=False))
    x = inputs(0, 60).reshape(4, 15, H)
    mask = np.arange(15)[None] < np.array([15, 3, 9, 1])[:, None]
    x[~mask] = 50
    work = ir.from_proto(proto)
    (layer,), _ = find(work)
    data = [{"x": x, "attention_mask": mask.astype(np.int64)}]
    with tokens_of(work, layer, data) as tokens:
        assert tokens.counts().sum() == 2 * 60
    with tokens_of(work, layer, data, "attention_mask") as tokens:
        assert tokens.counts().sum() == 2 * 28
        moments = tokens.moments(range(E), np.zeros(E, np.intp))
    for first, _ in moments:
        assert first is not None
        assert np.abs(first.gram).max() < 50


def test_routers_stay_float_unless_included() -> None:
    report = magr_onnx.optimize(experts(), progress=False).report
    (skip,) = report.skipped
    assert (skip.name, skip.op) == ("router", "MatMul")
    assert "decides which experts see a token" in str(skip.reason)
    report = magr_onnx.optimize(experts(), include=["*"], progress=False).report
    assert {row.name for row in report.layers} == {"router", "moe"}


def test_what_does_not_fit_the_kernel_gets_another_grid(tmp_path: Path) -> None:
    """Blocks divide the inputs of both layers; where none do, there is one scale a channel."""
    for units, block in ((80, 16), (32, 16), (100, None)):  # 32: a block is not a whole column
        path, proto = tmp_path / f"{units}.onnx", experts(units=units)
        row = row_of(magr_onnx.optimize(proto, output=path, progress=False).report)
        assert row.block_size == (block or H)
        assert any(f"blocks of 32 do not divide both {H} and {units} inputs" in note for note in row.notes)
        assert sqnr(run(proto, {"x": inputs()}), run(path, {"x": inputs()})) > 15


def test_reasons_for_what_is_left_alone() -> None:
    text = f"""g (float[n, {H}] x, float[{E}, {UNITS}, {H}] fed) => (float[n, {H}] y) {{
        scores = MatMul(x, r)
        [fed] a = com.microsoft.MoE<k = 2>(x, scores, fed, , w2)
        [third] b = com.microsoft.MoE<k = 2>(x, scores, w1, , w2, , w1)
        [halves] c = com.microsoft.MoE<k = 2, activation_type = "swiglu", swiglu_fusion = 2>(x, scores, w1, , w2)
        [odd] d = com.microsoft.MoE<k = 9>(x, scores, w1, , w2)
        [out] e = com.microsoft.MoE<k = 2>(x, scores, w1, , w2)
        y = Sum(a, b, c, d, e)
    }}"""
    proto = model(text, domains=MICROSOFT, **arrays(form_of(), bias=False))
    layers, skips = find(ir.from_proto(proto), magr_onnx.passes.layers.selection.Selection(exclude=("out",)))
    assert layers == []
    kernel = "onnxruntime's kernel for CPUs has no such experts"
    assert {skip.name: (str(skip.reason), skip.detail) for skip in skips} == {
        "fed": ("weights or biases of experts are computed at run time", ""),
        "third": (kernel, "a third projection (fc3)"),
        "halves": (kernel, "swiglu_fusion 2"),
        "odd": ("shapes of experts do not fit", f"fc1 [{E}, {UNITS}, {H}], fc2 [{E}, {H}, {UNITS}], k 9"),
        "out": ("excluded by name", ""),
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "qdq"}, "experts are quantized in format matmulnbits only"),
        ({"accumulator_bits": 32}, "accumulators of experts are not proved"),
    ],
)
def test_runs_that_leave_experts_float(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        magr_onnx.optimize(experts(), progress=False, **options)


def test_kernels_of_other_providers_are_not_known() -> None:
    layers, (skip,) = select(ir.from_proto(experts()), magr_onnx.build_pipeline(), provider="cuda")
    assert (layers, skip.name, str(skip.reason)) == ([], "moe", "experts are quantized for provider cpu only")
    assert skip.bytes == 4 * E * 2 * H * UNITS


def test_quantized_experts_are_described_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    magr_onnx.optimize(experts(), output=path, progress=False)
    skip = next(skip for skip in magr_onnx.inspect(path).skipped if skip.op == "QMoE")
    assert str(skip.reason) == "weight is quantized already"
    assert skip.detail.startswith(f"2 of {E} experts see a token, 4 bits in blocks of 32; w1_q4, ")
    with pytest.raises(ModelError, match="weight is quantized already"):
        magr_onnx.optimize(path, output=tmp_path / "again.onnx", progress=False)


def test_layers_around_quantized_experts_are_converted(tmp_path: Path) -> None:
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y) {{
        [up] u = MatMul(x, w)
        [router] scores = MatMul(u, r)
        [moe] m = com.microsoft.MoE<{attributes(form_of("swiglu"))}>(u, scores, w1, , w2)
        [down] y = MatMul(m, v)
    }}"""
    proto = model(text, domains=MICROSOFT, w=constant("w", H, H), v=constant("v", H, H), **arrays(form_of("swiglu"), bias=False))
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    magr_onnx.optimize(proto, batches(4), output=first, include=["moe"], progress=False)
    report = magr_onnx.optimize(first, batches(4), output=second, effort="best", progress=False).report
    assert {row.name for row in report.layers} == {"up", "down"}
    assert {skip.name: skip.op for skip in report.skipped} == {"router": "MatMul", "moe_q4": "QMoE"}
    np.testing.assert_array_equal(emitted_weight(node_of(first)), emitted_weight(node_of(second)))
    assert sqnr(run(proto, {"x": inputs(5)}), run(second, {"x": inputs(5)})) > 12


def test_float_experts_are_listed_by_inspect() -> None:
    (row,) = magr_onnx.inspect(experts(form_of("swiglu"), bias=True)).layers
    assert (row["name"], row["op"], row["k"], row["n"], row["groups"], row["bias"]) == ("moe", "MoE", H, 3 * UNITS, E, True)


def test_experts_have_options_of_their_own(tmp_path: Path) -> None:
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y) {{
        scores = MatMul(x, r)
        [first] a = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, , w2)
        [second] y = com.microsoft.MoE<{attributes(form_of())}>(a, scores, v1, , v2)
    }}"""
    weights = arrays(form_of(), bias=False)
    proto = model(text, domains=MICROSOFT, **weights, v1=weights["w1"][::-1].copy(), v2=weights["w2"][::-1].copy())  # type: ignore[arg-type]
    tables = [{"match": "first", "bits": 8, "block_size": None}, {"match": "v1", "block_size": 16, "quantizer": "rtn"}]
    report = magr_onnx.optimize(proto, batches(4), output=tmp_path / "q.onnx", layers=tables, progress=False).report
    first, second = (row_of(report, name) for name in ("first", "second"))
    assert (first.bits, first.block_size, second.bits, second.block_size) == (8, H, 4, 16)
    assert "options of its own: block_size=16, quantizer=rtn" in second.notes
    with pytest.raises(OptionError, match="'third' matches no layer"):
        magr_onnx.optimize(proto, layers=[{"match": "third", "bits": 8}], progress=False)


def test_int8_activations_where_they_are_asked_for(tmp_path: Path) -> None:
    path, proto, x = tmp_path / "q.onnx", experts(), inputs()
    magr_onnx.optimize(proto, output=path, progress=False)
    assert "accuracy_level" not in node_of(path).attributes
    exact = mixture(x, x @ initial(path, "r"), np.asarray(emitted_weight(node_of(path))), form_of())
    assert sqnr(exact, run(path, {"x": x})) > 90
    magr_onnx.optimize(proto, output=path, accuracy_level=4, progress=False)
    assert node_of(path).attributes.get_int("accuracy_level") == 4
    assert 25 < sqnr(exact, run(path, {"x": x})) < 60


def test_experts_of_half_precision_without_data(tmp_path: Path) -> None:
    """The kernel for CPUs has them quantized only."""
    text = f"""g (float16[n, {H}] x) => (float16[n, {H}] y) {{
        scores = MatMul(x, r)
        [moe] y = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, b1, w2, b2)
    }}"""
    half = {name: a.astype(np.float16) for name, a in arrays(form_of(), bias=True).items()}
    path, x = tmp_path / "q.onnx", inputs().astype(np.float16)
    magr_onnx.optimize(model(text, domains=MICROSOFT, **half), output=path, progress=False)
    assert initial(path, "w1_q4_scales").dtype == np.float16
    weights = np.asarray(emitted_weight(node_of(path)))
    scores = x.astype(np.float32) @ half["r"].astype(np.float32)
    expected = mixture(x, scores, weights, form_of(), (half["b1"].astype(np.float64), half["b2"].astype(np.float64)))
    assert sqnr(expected, run(path, {"x": x}).astype(np.float64)) > 30


def test_nodes_that_share_experts_share_their_codes(tmp_path: Path) -> None:
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y) {{
        scores = MatMul(x, r)
        [first] a = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, , w2)
        [second] y = com.microsoft.MoE<{attributes(form_of())}>(a, scores, w1, , w2)
    }}"""
    proto, path = model(text, domains=MICROSOFT, **arrays(form_of(), bias=False)), tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, batches(8), output=path, progress=False).report
    assert {row.name: row.rows for row in report.layers} == dict.fromkeys(("first", "second"), 2 * 2 * 8 * TOKENS)
    assert all("one pair of weights for 2 operators: one solution for all" in row.notes for row in report.layers)
    nodes = [node for node in ir.load(path).graph if node.op_type == "QMoE"]
    assert nodes[0].inputs[2] is nodes[1].inputs[2]
    assert report.bytes_after < 0.3 * report.bytes_before


def test_experts_that_another_node_reads_stay_float() -> None:
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y, float[{E}, {H}, {UNITS}] z) {{
        scores = MatMul(x, r)
        [moe] y = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, , w2)
        z = Neg(w2)
    }}"""
    with pytest.raises(ModelError, match=r"its float weight would stay in the file for others"):
        magr_onnx.optimize(model(text, domains=MICROSOFT, **arrays(form_of(), bias=False)), progress=False)


def test_experts_in_a_branch_are_data_free(tmp_path: Path) -> None:
    text = f"""g (float[n, {H}] x, bool first) => (float[n, {H}] y) {{
        y = If(first)<
            then_branch = then_graph () => (float[n, {H}] a) {{
                scores = MatMul(x, r)
                [moe] a = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, , w2)
            }},
            else_branch = else_graph () => (float[n, {H}] b) {{ [fc] b = MatMul(x, w) }}
        >
    }}"""
    proto = model(text, domains=MICROSOFT, w=constant("w", H, H), **arrays(form_of(), bias=False))
    data = [{"x": inputs(i), "first": np.array(i % 2 == 0)} for i in range(4)]
    path = tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, data, output=path, progress=False).report
    assert "data-free: it is in the body of a node" in row_of(report).notes
    assert sqnr(run(proto, data[0]), run(path, data[0])) > 15


def test_experts_between_sequences_are_data_free() -> None:
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y) {{
        parts = SequenceConstruct(x)
        scores = MatMul(x, r)
        [first] a = com.microsoft.MoE<{attributes(form_of())}>(x, scores, w1, , w2)
        more = SequenceInsert(parts, a)
        both = ConcatFromSequence<axis = 0>(more)
        again = MatMul(both, r)
        [moe] b = com.microsoft.MoE<{attributes(form_of("relu"))}>(both, again, w1, , w2)
        y = Neg(b)
    }}"""
    proto = model(text, domains=MICROSOFT, **arrays(form_of(), bias=False))  # type: ignore[arg-type]
    report = magr_onnx.optimize(proto, batches(4), progress=False).report
    assert "data-free: its inputs cannot be gathered: parts between stages is no tensor" in row_of(report).notes
    assert report.verified == 2


def test_weights_and_inputs_that_are_not_finite() -> None:
    proto = experts()
    w = initial(proto, "w2").copy()
    w[1, 2, 3] = np.nan
    next(i for i in proto.graph.initializer if i.name == "w2").CopyFrom(onnx.numpy_helper.from_array(w, "w2"))
    with pytest.raises(NonFiniteError, match="weight of moe"):
        magr_onnx.optimize(proto, progress=False)
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y) {{
        scores = MatMul(x, r)
        big = Log(x)
        [moe] y = com.microsoft.MoE<{attributes(form_of())}>(big, scores, w1, , w2)
    }}"""
    with pytest.raises(NonFiniteError, match="NaN or infinite activations"):
        magr_onnx.optimize(model(text, domains=MICROSOFT, **arrays(form_of(), bias=False)), batches(2), progress=False)


@pytest.mark.long
def test_layers_behind_experts_see_them_quantized_under_every_effort(tmp_path: Path) -> None:
    """Gradients do not pass through experts, and the report says so; budgets count what is left."""
    text = f"""g (float[n, {H}] x) => (float[n, {H}] y) {{
        [up] u = MatMul(x, w)
        scores = MatMul(u, r)
        [moe] m = com.microsoft.MoE<{attributes(form_of("swiglu"))}>(u, scores, w1, , w2)
        z = Add(m, u)
        [down] y = MatMul(z, v)
    }}"""
    proto = model(text, domains=MICROSOFT, w=constant("w", H, H), v=constant("v", H, H), **arrays(form_of("swiglu"), bias=False))
    codes = []
    for options in ({}, {"max_memory": 200_000}, {"effort": "fast"}, {"effort": "best"}, {"target_size": "100KB"}):
        path = tmp_path / "q.onnx"
        report = magr_onnx.optimize(proto, batches(8), output=path, progress=False, **options).report  # type: ignore[arg-type]
        assert {row.name for row in report.layers} == {"up", "moe", "down"}, options
        assert report.verified == 3
        assert sqnr(run(proto, {"x": inputs(5)}), run(path, {"x": inputs(5)})) > 12
        assert any(note.startswith("experts saw ") for note in row_of(report).notes)
        codes.append(emitted_weight(node_of(path)))
    np.testing.assert_array_equal(codes[0], codes[1])  # run as a whole, and in parts


@pytest.mark.parametrize("options", [{}, {"bits": 8, "block_size": None, "bias": "none"}, {"bits": 3, "symmetric": True}])
def test_forecasts_count_experts(options: dict[str, Any]) -> None:
    proto = experts(form_of("swiglu"))
    data = None if options else batches(4)
    forecast = magr_onnx.forecast(proto, data, **options)
    report = magr_onnx.optimize(proto, data, progress=False, **options).report
    assert forecast.bytes_after == pytest.approx(report.bytes_after, rel=0.02)
    assert forecast.seconds["quantize"] > 0
    assert any("passes over the data that gather their tokens" in note for note in forecast.notes) == (data is not None)


def test_every_activation_is_tested() -> None:
    assert {form["activation"] for form in FORMS} == {*ACTIVATIONS}
