"""Recurrent operators: what is in the file against networks written in NumPy, in every form onnxruntime runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import quantize_dynamic

import magr_onnx
from magr_onnx.errors import ModelError, NonFiniteError, OptionError
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.passes import Recurrent
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.layer_passes.recurrent import ROUNDED
from magr_onnx.passes.layers.recurrent import FORMS, GATES, find
from magr_onnx.runtime.calibration import recurrent_states
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests.helpers import emitted_weight

Array = np.ndarray[Any, Any]
WIDTH, H, T, BATCH = 40, 32, 9, 3


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def network(op: str, x: Array, w: Array, r: Array, b: Array, linear_before_reset: int = 0, start: Array | None = None) -> Array:
    """States ``(T, batch, H)`` of one direction, by the definition in ONNX: gates iofc of an LSTM, zrh of a GRU."""
    hidden = r.shape[1]
    wb, rb = np.split(b, 2)
    h = np.zeros((x.shape[1], hidden)) if start is None else start
    c, states = np.zeros_like(h), []
    for row in x:
        if op == "LSTM":
            i, o, f, g = np.split(row @ w.T + h @ r.T + wb + rb, 4, axis=-1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif op == "RNN":
            h = np.tanh(row @ w.T + h @ r.T + wb + rb)
        else:
            (xz, xr, xh), (rz, rr, rh), (bz, br, bh) = (np.split(a, 3, axis) for a, axis in ((row @ w.T + wb, -1), (r, 0), (rb, 0)))
            z, reset = sigmoid(xz + h @ rz.T + bz), sigmoid(xr + h @ rr.T + br)
            inner = reset * (h @ rh.T + bh) if linear_before_reset else (reset * h) @ rh.T + bh
            h = (1 - z) * np.tanh(xh + inner) + z * h
        states.append(h)
    return np.stack(states)


def both_ways(op: str, x: Array, w: Array, r: Array, b: Array, direction: str = "forward", **options: Any) -> Array:
    """States ``(T, D, batch, H)``."""
    reverse = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    return np.stack(
        [
            network(op, x[::-1] if back else x, *m, **options)[:: -1 if back else 1]
            for back, m in zip(reverse, zip(w, r, b, strict=True), strict=True)
        ],
        1,
    )


def recurrent(op: str, direction: str = "forward", attributes: str = "", extra: str = "", outputs: str = "y") -> onnx.ModelProto:
    d, gates = 1 + (direction == "bidirectional"), GATES[op]
    text = f"""g (float[t, n, {WIDTH}] x) => (float[a, b, c, e] y) {{
        [cell] {outputs} = {op}<hidden_size = {H}, direction = "{direction}" {attributes}>(x, w, r, b {extra})
    }}"""
    scale = np.float32(3 * np.sqrt(gates * H / H))
    return model(
        text, w=constant("w", d, gates * H, WIDTH) * scale, r=constant("r", d, gates * H, H) * scale, b=constant("b", d, 2 * gates * H)
    )


def inputs(seed: int = 0, t: int = T) -> Array:
    return np.random.default_rng(seed).standard_normal((t, BATCH, WIDTH)).astype(np.float32)


def sqnr(reference: Array, y: Array) -> float:
    return float(10 * np.log10((reference**2).sum() / ((y - reference) ** 2).sum()))


def initial(proto: onnx.ModelProto, name: str) -> Array:
    return next(onnx.numpy_helper.to_array(i) for i in proto.graph.initializer if i.name == name)


def node_of(path: Path) -> ir.Node:
    return next(n for n in ir.load(path).graph.all_nodes() if n.op_type in (*GATES, "DynamicQuantizeLSTM"))


def run(path: Path | onnx.ModelProto, x: Array, arithmetic: Arithmetic = Arithmetic.DEFAULT) -> Array:
    with Session(path if isinstance(path, Path) else ir.from_proto(path), arithmetic=arithmetic) as session:
        return np.asarray(session.run({"x": x})[0])


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", list(GATES))
def test_states_are_those_of_the_codes(op: str, form: str, direction: str, tmp_path: Path) -> None:
    proto, x, path = recurrent(op, direction), inputs(), tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, output=path, recurrent=form, progress=False).report
    (row,) = report.layers
    d, gates = 1 + (direction == "bidirectional"), GATES[op]
    assert (row.op, row.k, row.n, row.groups, row.bits, row.block) == (op, WIDTH + H, gates * H, d, 8, "channel")
    assert (report.verified, report.skipped) == (1, ())
    assert report.bytes_after < 0.55 * report.bytes_before  # of a very small model
    assert path.stat().st_size == report.bytes_after
    node = node_of(path)
    assert node.op_type == ("DynamicQuantizeLSTM" if op == "LSTM" and form == "dynamic-quantize-lstm" else op)
    assert any("LSTM only" in note for note in row.notes) == (op != "LSTM" and form == "dynamic-quantize-lstm")
    written = emitted_weight(node)
    assert written is not None
    weights = np.concatenate([initial(proto, "w"), initial(proto, "r")], axis=2).transpose(0, 2, 1)
    error = np.linalg.norm(written - weights) / np.linalg.norm(weights)
    assert row.error == pytest.approx(float(error), rel=1e-3)
    assert error < 0.01
    w, r = np.split(written.transpose(0, 2, 1).astype(np.float64), [WIDTH], axis=2)
    expected = both_ways(op, x, w, r, initial(proto, "b"), direction)
    integer = node.op_type == "DynamicQuantizeLSTM"
    for arithmetic in Arithmetic:
        assert sqnr(expected, run(path, x, arithmetic)) > (30 if integer else 100)


@pytest.mark.parametrize("before", [0, 1])
def test_both_kinds_of_gru(before: int, tmp_path: Path) -> None:
    proto, x, path = recurrent("GRU", attributes=f", linear_before_reset = {before}"), inputs(), tmp_path / "q.onnx"
    magr_onnx.optimize(proto, output=path, recurrent="fold", progress=False)
    written = emitted_weight(node_of(path))
    assert written is not None
    w, r = np.split(written.transpose(0, 2, 1).astype(np.float64), [WIDTH], axis=2)
    expected = both_ways("GRU", x, w, r, initial(proto, "b"), linear_before_reset=before)
    assert sqnr(expected, run(path, x)) > 100


FORMS_OF_LSTM = {
    "lengths": ("", ", lengths"),
    "states": ("", ", , h0, c0"),
    "peepholes": ("", ", , , , p"),
    "clip": (", clip = 0.5", ""),
    "layout": (", layout = 0", ""),
    "coupled": (", input_forget = 1", ""),
    "activations": (', activations = ["HardSigmoid", "Tanh", "Softsign", "Sigmoid", "Tanh", "Tanh"]', ""),
}


@pytest.mark.parametrize("name", FORMS_OF_LSTM)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_lstm_computes_what_it_did(form: str, name: str, tmp_path: Path) -> None:
    proto = recurrent("LSTM", "bidirectional", *FORMS_OF_LSTM[name], outputs="y, last, cells")
    more = {"lengths": np.array([T, 4, 1], np.int32), "p": constant("p", 2, 3 * H)}
    more |= {name: constant(name, 2, BATCH, H) for name in ("h0", "c0")}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in more.items() if n in proto.graph.node[0].input)
    x, path = inputs(), tmp_path / "q.onnx"
    magr_onnx.optimize(proto, output=path, recurrent=form, progress=False)
    integer = form == "dynamic-quantize-lstm"
    assert node_of(path).op_type == ("DynamicQuantizeLSTM" if integer else "LSTM")
    assert sqnr(run(proto, x), run(path, x)) > 27


def test_no_worse_than_dynamic_quantization_by_onnxruntime(tmp_path: Path) -> None:
    """Its scale is one for a whole weight."""
    proto = recurrent("LSTM", "bidirectional")
    w = initial(proto, "w") * np.linspace(0.1, 2, 4 * H, dtype=np.float32)[:, None]
    next(i for i in proto.graph.initializer if i.name == "w").CopyFrom(onnx.numpy_helper.from_array(w, "w"))
    source, theirs, ours = tmp_path / "f.onnx", tmp_path / "theirs.onnx", tmp_path / "ours.onnx"
    onnx.save(proto, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(source, theirs)
    magr_onnx.optimize(source, output=ours, recurrent="dynamic-quantize-lstm", progress=False)
    x = inputs(t=50)
    expected = run(source, x)
    assert sqnr(expected, run(ours, x)) > sqnr(expected, run(theirs, x))


def test_outputs_that_are_left_out_and_nodes_without_names(tmp_path: Path) -> None:
    text = f"""g (float[t, n, {WIDTH}] x) => (float[1, n, {H}] y) {{
        , h = GRU<hidden_size = {H}>(x, w, r)
        , y = RNN<hidden_size = {H}>(x, w2, r2, , , h)
    }}"""
    weights = {
        "w": constant("w", 1, 3 * H, WIDTH),
        "r": constant("r", 1, 3 * H, H),
        "w2": constant("v", 1, H, WIDTH),
        "r2": constant("s", 1, H, H),
    }
    proto, path = model(text, **weights), tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, output=path, recurrent="fold", progress=False).report
    assert [row.name for row in report.layers] == ["GRU:h", "RNN:y"]
    assert report.verified == 2
    assert sqnr(run(proto, inputs()), run(path, inputs())) > 35


PACKED = """
    gates = Slice(flat, zero, split, zero)
    last = Slice(flat, split, end, zero)
    joined = Concat<axis = 0>(last, gates)
    w = Unsqueeze(joined, zero)
"""
POINTS = {"zero": np.array([0]), "split": np.array([2 * H]), "end": np.array([4 * H])}


def test_weights_that_are_put_together_in_the_graph(tmp_path: Path) -> None:
    text = f"g (float[t, n, {WIDTH}] x) => (float[t, 1, n, {H}] y) {{ {PACKED} [cell] y = LSTM<hidden_size = {H}>(x, w, r) }}"
    proto, path = model(text, flat=constant("w", 4 * H, WIDTH), r=constant("r", 1, 4 * H, H), **POINTS), tmp_path / "q.onnx"
    (row,) = magr_onnx.optimize(proto, output=path, recurrent="dynamic-quantize-lstm", progress=False).report.layers
    assert row.weight == "flat"
    written = ir.load(path)
    assert [n.op_type for n in written.graph] == ["DynamicQuantizeLSTM"]
    assert "flat" not in written.graph.initializers
    assert sqnr(run(proto, inputs()), run(path, inputs())) > 30


def test_weights_that_something_else_reads_stay_float_unless_included(tmp_path: Path) -> None:
    text = f"""g (float[t, n, {WIDTH}] x) => (float[t, 1, n, {H}] y, float[{2 * H}, {WIDTH}] z) {{
        {PACKED} [cell] a = LSTM<hidden_size = {H}>(x, w, r)
        [own] y = LSTM<hidden_size = {H}>(a, w2, r)
        z = Neg(gates)
    }}"""
    arrays = {"flat": constant("w", 4 * H, WIDTH), "r": constant("r", 1, 4 * H, H), "w2": constant("w2", 1, 4 * H, H)}
    text = text.replace("LSTM<hidden_size = 32>(a,", "LSTM<hidden_size = 32>(b,").replace("z = Neg", "b = Squeeze(a, one) z = Neg")
    proto, path = model(text, **arrays, **POINTS, one=np.array([1])), tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, output=path, recurrent="fold", progress=False).report
    assert [row.name for row in report.layers] == ["own"]
    (skip,) = report.skipped
    assert (skip.name, skip.reason) == ("cell", "its float weight would stay in the file for others")
    assert "(Neg)" in skip.detail
    magr_onnx.optimize(proto, output=path, recurrent="fold", include=["cell"], progress=False)
    assert [n.op_type for n in ir.load(path).graph if n.op_type in ("Slice", "Concat", "Unsqueeze")] == ["Slice"]


@pytest.mark.parametrize("form", FORMS)
def test_branches_share_what_is_put_together_alike(form: str, tmp_path: Path) -> None:
    branch = """{name}_graph () => (float[t, 1, n, 32] {name}) {{
        {name}_w = Unsqueeze(flat, zero)
        {name}_w2 = Concat<axis = 1>({name}_w)
        [{name}_cell] {name} = LSTM<hidden_size = 32>(x, {name}_w2, r)
    }}"""
    then, other = (branch.format(name=name) for name in ("then", "other"))
    both = f"then_branch = {then}, else_branch = {other}"
    text = f"g (float[t, n, {WIDTH}] x, bool first) => (float[t, 1, n, {H}] y) {{ y = If(first)<{both}> }}"
    proto, path = model(text, flat=constant("w", 4 * H, WIDTH), r=constant("r", 1, 4 * H, H), zero=np.array([0])), tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, output=path, recurrent=form, progress=False).report
    assert [row.name for row in report.layers] == ["then_cell", "other_cell"]
    assert all("one pair of weights for 2 operators: one solution for all" in row.notes for row in report.layers)
    assert report.bytes_after < 0.4 * report.bytes_before
    for first in (True, False):
        with Session(ir.from_proto(proto)) as a, Session(path) as b:
            feeds = {"x": inputs(), "first": np.array(first)}
            assert sqnr(a.run(feeds)[0], b.run(feeds)[0]) > 30


def test_recurrent_operators_stay_float_unless_asked() -> None:
    (skip,) = magr_onnx.inspect(recurrent("LSTM")).skipped
    assert (skip.name, skip.op) == ("cell", "LSTM")
    assert skip.reason == "a recurrent operator (option recurrent quantizes its weights)"
    assert skip.bytes == 4 * 4 * H * (WIDTH + H)
    with pytest.raises(ModelError, match="option recurrent quantizes its weights"):
        magr_onnx.optimize(recurrent("LSTM"), progress=False)


def test_reasons_for_what_is_left_alone() -> None:
    text = f"""g (float[t, n, {WIDTH}] x, float[1, {H}, {WIDTH}] fed) => (float[t, 1, n, {H}] y) {{
        [fed] a = RNN<hidden_size = {H}>(x, fed, r)
        [odd] b = RNN<hidden_size = {H}>(x, w, r2)
        [codes] c = RNN<hidden_size = {H}>(x, floats, r)
        [out] d = RNN<hidden_size = {H}>(x, w, r)
        floats = DequantizeLinear(q, s)
        y = Sum(a, b, c, d)
    }}"""
    arrays = {"w": constant("w", 1, H, WIDTH), "r": constant("r", 1, H, H), "r2": constant("r2", 1, H, H + 1)}
    proto = model(text, **arrays, q=np.ones((1, H, WIDTH), np.int8), s=np.float32(0.1).reshape(()))
    layers, skips = find(ir.from_proto(proto), magr_onnx.passes.layers.selection.Selection(exclude=("out",)))
    assert layers == []
    assert {skip.name: str(skip.reason) for skip in skips} == {
        "fed": "recurrent weights are computed at run time",
        "odd": "shapes of recurrent weights do not fit",
        "codes": "weight is quantized already",
        "out": "excluded by name",
    }


def test_a_second_run_leaves_quantized_weights_alone(tmp_path: Path) -> None:
    for form in FORMS:
        path = tmp_path / f"{form}.onnx"
        magr_onnx.optimize(recurrent("LSTM"), output=path, recurrent=form, progress=False)
        with pytest.raises(ModelError, match="weight is quantized already"):
            magr_onnx.optimize(path, output=tmp_path / "again.onnx", recurrent="fold", progress=False)


def test_weights_that_are_not_finite() -> None:
    proto = recurrent("GRU")
    r = initial(proto, "r").copy()
    r[0, 3, 4] = np.nan
    next(i for i in proto.graph.initializer if i.name == "r").CopyFrom(onnx.numpy_helper.from_array(r, "r"))
    with pytest.raises(NonFiniteError, match="weight of cell"):
        magr_onnx.optimize(proto, recurrent="fold", progress=False)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_sums_are_proved_for_a_target(direction: str, tmp_path: Path) -> None:
    proto, plain, path = recurrent("LSTM", direction), tmp_path / "plain.onnx", tmp_path / "q.onnx"
    options = {"format": "dynamic-int8", "recurrent": "dynamic-quantize-lstm", "progress": False}
    magr_onnx.optimize(proto, output=plain, **options)
    (overflowing,) = magr_onnx.verify(plain, target="x86-avx2").layers
    assert overflowing.verdict == "overflows"
    for data in (None, [{"x": correlated(seed)} for seed in range(8)]):
        proof = magr_onnx.optimize(proto, data, output=path, target="x86-avx2", **options).report.proof
        assert proof is not None
        assert (proof.proved, proof.total) == (1, 1)
        node = node_of(path)
        for index in (1, 2):
            codes = node.inputs[index].const_value.numpy().astype(int)  # type: ignore[union-attr]
            pairs = codes.reshape(len(codes), -1, 2, codes.shape[2])
            assert 64 < np.maximum(pairs, 0).sum(axis=2).max() <= 128
            assert 64 < -np.minimum(pairs, 0).sum(axis=2).min() <= 128
        (layer,) = magr_onnx.verify(path, target="x86-avx2").layers
        assert (layer.verdict, layer.k, layer.n) == ("proved", WIDTH, (2 if direction == "bidirectional" else 1) * 8 * H)
        assert sqnr(run(proto, correlated(9)), run(path, correlated(9))) > 15


def test_operators_in_float_have_no_sums_to_prove(tmp_path: Path) -> None:
    data = [{"x": correlated(seed)} for seed in range(8)]
    report = magr_onnx.optimize(
        between(), data, output=tmp_path / "q.onnx", format="dynamic-int8", target="x86-avx2", recurrent="fold", progress=False
    ).report
    assert report.proof is not None
    assert (report.proof.proved, report.proof.total, report.proof.unproved) == (2, 2, 1)
    (skip,) = magr_onnx.verify(tmp_path / "q.onnx", target="x86-avx2").skipped
    assert (skip.op, skip.reason) == ("LSTM", "computed in float")


def test_blocks_that_are_sized_for_an_accumulator_are_not_those_of_an_lstm() -> None:
    with pytest.raises(OptionError, match="take fold, or format dynamic-int8"):
        magr_onnx.build_pipeline(accumulator_bits=16, accuracy_level=4, recurrent="dynamic-quantize-lstm")


def test_an_unknown_form() -> None:
    with pytest.raises(OptionError, match="recurrent='lstm' is not known"):
        magr_onnx.build_pipeline(recurrent="lstm")


def test_other_providers_get_no_operator_that_they_do_not_have() -> None:
    layers, _ = find(ir.from_proto(recurrent("LSTM")))
    stage = Recurrent()
    assert stage.form_of(layers) == ("dynamic-quantize-lstm", ROUNDED)
    assert stage.form_of(layers, "cuda") == ("fold", "DynamicQuantizeLSTM is for CPUs: computed in float")


def test_the_pass_by_itself() -> None:
    work = ir.from_proto(recurrent("LSTM"))
    assert Recurrent("fold")(work).modified
    assert not Recurrent("fold")(work).modified
    assert sqnr(run(recurrent("LSTM"), inputs()), run(ir.to_proto(work), inputs())) > 35


def test_an_opset_that_has_no_dequantize_linear_by_axis(tmp_path: Path) -> None:
    proto = recurrent("GRU")
    proto.opset_import[0].version = 9
    magr_onnx.optimize(proto, output=tmp_path / "fold.onnx", recurrent="fold", progress=False)
    assert ir.load(tmp_path / "fold.onnx").opset_imports[""] == 9
    magr_onnx.optimize(proto, output=tmp_path / "dequantize.onnx", recurrent="dequantize", progress=False)
    assert ir.load(tmp_path / "dequantize.onnx").opset_imports[""] >= 13


# --- Statistics -----------------------------------------------------------------------------------------------------------


def feeds(batches: list[dict[str, Array]]) -> Batches:
    return in_memory(batches, "in memory")


def correlated(seed: int, t: int = T) -> Array:
    """Inputs whose columns are correlated, and differ in power."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((WIDTH, WIDTH)) * np.exp(rng.standard_normal(WIDTH)) / 4
    return (np.random.default_rng(seed).standard_normal((t, BATCH, WIDTH)) @ mix + 0.3).astype(np.float32)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("op", list(GATES))
def test_moments_are_those_of_inputs_and_of_states_before_every_step(op: str, given: bool, direction: str) -> None:
    proto = recurrent(op, direction, extra=", , h0" if given else "")
    d, batches = 1 + (direction == "bidirectional"), [correlated(seed) for seed in range(3)]
    start = constant("h0", d, BATCH, H)
    if given:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(start, "h0"))
    floats = ir.from_proto(proto)
    layers = find(floats)[0]
    ((x_stats, h_stats),) = [s for s in recurrent_states.collect(floats, [layers], feeds([{"x": x} for x in batches])) if s]
    x = np.concatenate([x.reshape(-1, WIDTH) for x in batches]).astype(np.float64)
    assert len(x_stats) == len(h_stats) == d
    for stats in x_stats:
        np.testing.assert_allclose(stats.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    for i, stats in enumerate(h_stats):
        backwards, rows = direction == "reverse" or i == 1, []
        for each in batches:
            weights = [initial(proto, name)[i].astype(np.float64) for name in "wrb"]
            first = start[i] if given else np.zeros((BATCH, H))
            states = network(op, each[::-1] if backwards else each, *weights, start=first)
            rows += [first if given else np.zeros((1, H)), states[:-1].reshape(-1, H)]
        h = np.concatenate(rows)
        assert stats.rows == len(h)
        np.testing.assert_allclose(stats.gram, h.T @ h / len(h), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(stats.mean, h.mean(axis=0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("op", list(GATES))
def test_data_gains_accuracy(op: str, tmp_path: Path) -> None:
    proto, x = recurrent(op, "bidirectional"), correlated(99, 30)
    expected, results = run(proto, x), []
    for data in (None, [{"x": correlated(seed)} for seed in range(16)]):
        report = magr_onnx.optimize(proto, data, output=tmp_path / "q.onnx", recurrent="fold", progress=False).report
        results.append(sqnr(expected, run(tmp_path / "q.onnx", x)))
        assert (report.layers[0].rows > 0) == (data is not None)
    assert results[1] > results[0] + 3


BRANCHES = f"""g (float[t, n, {WIDTH}] x, bool first) => (float[t, 1, n, {H}] y) {{
    y = If(first)<
        then_branch = a () => (float[t, 1, n, {H}] then) {{ [then_cell] then = LSTM<hidden_size = {H}>(x, w, r) }},
        else_branch = b () => (float[t, 1, n, {H}] other) {{ [other_cell] other = GRU<hidden_size = {H}>(x, v, s) }}
    >
}}"""


def test_operators_in_branches_are_calibrated_on_what_reaches_them(tmp_path: Path) -> None:
    arrays = {"w": constant("w", 1, 4 * H, WIDTH), "r": constant("r", 1, 4 * H, H)}
    proto = model(BRANCHES, **arrays, v=constant("v", 1, 3 * H, WIDTH), s=constant("s", 1, 3 * H, H))
    data = [{"x": correlated(seed), "first": np.array(True)} for seed in range(4)]
    report = magr_onnx.optimize(proto, data, output=tmp_path / "q.onnx", recurrent="fold", progress=False).report
    reached, never = report.layers
    assert (reached.name, reached.rows, reached.notes) == ("then_cell", 4 * T * BATCH, ())
    assert (never.rows, never.notes) == (0, ("data-free: no calibration data reaches it: a branch is never taken, or a loop never turns",))
    floats = ir.from_proto(proto)
    (stats, nothing) = recurrent_states.collect(floats, [[layer] for layer in find(floats)[0]], feeds(data))
    assert nothing is None
    assert stats is not None
    x = np.concatenate([batch["x"].reshape(-1, WIDTH) for batch in data]).astype(np.float64)
    np.testing.assert_allclose(stats[0][0].gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_operators_of_one_pair_of_weights_are_solved_for_all_that_they_read() -> None:
    text = f"""g (float[t, n, {WIDTH}] x) => (float[t, 1, n, {H}] y) {{
        [near] a = GRU<hidden_size = {H}>(x, w, r)
        far_x = Mul(x, three)
        [far] b = GRU<hidden_size = {H}>(far_x, w, r)
        y = Add(a, b)
    }}"""
    floats = ir.from_proto(model(text, w=constant("w", 1, 3 * H, WIDTH), r=constant("r", 1, 3 * H, H), three=np.float32(3).reshape(())))
    ((x_stats, _),) = [s for s in recurrent_states.collect(floats, [find(floats)[0]], feeds([{"x": correlated(0)}])) if s]
    x = correlated(0).reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(x_stats[0].gram, 5 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)  # (1 + 9) / 2


def test_activations_that_are_not_finite() -> None:
    text = f"""g (float[t, n, {WIDTH}] x) => (float[t, 1, n, {H}] y) {{
        large = Mul(x, most)
        [cell] y = RNN<hidden_size = {H}>(large, w, r)
    }}"""
    proto = model(text, w=constant("w", 1, H, WIDTH), r=constant("r", 1, H, H), most=np.float32(3e38).reshape(()))
    with pytest.raises(NonFiniteError, match=r"input or states of cell \(large\): NaN or infinite activations"):
        magr_onnx.optimize(proto, [{"x": correlated(0)}], recurrent="fold", progress=False)


BETWEEN = f"""g (float[t, n, {WIDTH}] x) => (float[t, n, 24] y) <int64[1] one = {{1}}> {{
    [first] p = MatMul(x, a)
    [cell] s = LSTM<hidden_size = {H}>(p, w, r)
    q = Squeeze(s, one)
    [last] y = MatMul(q, o)
}}"""


def between() -> onnx.ModelProto:
    weights = {"w": constant("w", 1, 4 * H, WIDTH) * 3, "r": constant("r", 1, 4 * H, H) * 3}
    return model(BETWEEN, **weights, a=constant("a", WIDTH, WIDTH), o=constant("o", H, 24))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format_has_every_form(format: str, form: str, tmp_path: Path) -> None:
    data, path = [{"x": correlated(seed)} for seed in range(8)], tmp_path / "q.onnx"
    report = magr_onnx.optimize(between(), data, output=path, format=format, recurrent=form, bits=8, progress=False).report
    assert sorted(row.name for row in report.layers) == ["cell", "first", "last"]
    assert report.verified == 3
    for arithmetic in Arithmetic:
        least = 19 if format == "qdq-full" else 20  # outputs are rounded too
        assert sqnr(run(between(), correlated(77)), run(path, correlated(77), arithmetic)) > least


def test_a_budget_of_size_counts_what_they_take(tmp_path: Path) -> None:
    source, path = tmp_path / "f.onnx", tmp_path / "q.onnx"
    onnx.save(between(), source)
    data = [{"x": correlated(seed)} for seed in range(8)]
    magr_onnx.optimize(source, data, output=path, recurrent="fold", target_size="33%", progress=False)
    assert path.stat().st_size <= 0.33 * source.stat().st_size
    with pytest.raises(OptionError, match=r"LSTM, GRU and RNN are [0-9,]+ bytes in float \(--recurrent fold\)"):
        magr_onnx.optimize(source, data, output=path, target_size="33%", progress=False)
