"""Weights that several layers multiply by: one solve for all, codes stored once, biases of their own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx import Report
from magr_onnx.core.types import LayerStats
from magr_onnx.model_io.writing import tensor_bytes
from magr_onnx.models.zoo import ZOO
from magr_onnx.models.zoo.nested import TABLE, W
from magr_onnx.passes import Plan, SolvedLayer, find, run_layers
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.passes.instrument import segments
from magr_onnx.passes.layer_passes.shared_weights import SharedWeight, remarks
from magr_onnx.passes.layers.weighted import sharing
from magr_onnx.report.html import summary
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.staged import Schedule, staged
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Array, Builder, correlated, random

K, N = 32, 24
WEIGHT = random(K, N, seed=3)


def readers(count: int, biased: tuple[int, ...] = ()) -> ir.Model:
    """Layers ``fc0``, ``fc1`` ... of one weight, each on an input of its own; those of ``biased`` have a bias."""
    b = Builder()
    w, outputs = b.constant("w", WEIGHT), []
    for i in range(count):
        y = b.node("MatMul", [b.input(f"x{i}", [f"rows{i}", K]), w], f"fc{i}")
        outputs.append(b.node("Add", [y, b.constant(f"b{i}", random(N, seed=i))], f"bias{i}") if i in biased else y)
    return b.model_of(outputs)


def rows_of(i: int) -> Array:
    return correlated(64 + 32 * i, K, seed=i).astype(np.float64) * (i + 1)


def stats_of(x: Array) -> LayerStats:
    return LayerStats(x.T @ x / len(x), x.mean(axis=0), len(x))


def solved(model: ir.Model, pipeline: str, stats: dict[str, LayerStats]) -> dict[str, SolvedLayer]:
    """Layers after a pipeline, by name."""
    results: dict[str, SolvedLayer] = {}
    layers, _ = find(model)
    run_layers(Plan.parse(pipeline), layers, lambda layer: stats.get(layer.name), lambda done: results.update({done.layer.name: done}))
    return results


QUANTIZE = "magr,quantize{method=gptq,bits=3,block_size=16}"


def balanced(rows: list[Array], seen: list[Array] | None = None) -> Array:
    """All rows, those of every reader ``seen`` so strong that its outputs have the mean square of all, and count the same."""
    powers = [np.square(x @ WEIGHT).sum() / len(x) for x in rows]
    shares = [np.mean(powers) / power * sum(map(len, rows)) / len(x) / len(rows) for power, x in zip(powers, rows, strict=True)]
    return np.concatenate([np.sqrt(share) * x for share, x in zip(shares, seen or rows, strict=True)])


def test_the_shared_solve_is_the_solve_on_all_rows() -> None:
    rows = [rows_of(i) for i in range(3)]
    many = solved(readers(3), QUANTIZE, {f"fc{i}": stats_of(x) for i, x in enumerate(rows)})
    one = solved(readers(1), QUANTIZE, {"fc0": stats_of(balanced(rows))})["fc0"]
    alone = solved(readers(1), QUANTIZE, {"fc0": stats_of(rows[0])})["fc0"]
    assert one.solution.quantized is not None
    assert alone.solution.quantized is not None
    assert (alone.solution.quantized.codes != one.solution.quantized.codes).any()
    for done in many.values():
        assert done.solution.quantized is not None
        assert (done.solution.quantized.codes == one.solution.quantized.codes).mean() > 0.999  # statistics are the same up to rounding
        np.testing.assert_allclose(done.solution.quantized.scales, one.solution.quantized.scales, rtol=1e-4)


def test_a_strong_reader_does_not_hide_a_weak_one() -> None:
    """An input of other units has the same part in the codes (until its power is 1,000 times that of the other)."""
    rows = [rows_of(i) for i in range(2)]
    plain, strong = (
        solved(readers(2), QUANTIZE, {f"fc{i}": stats_of(f * x) for i, (f, x) in enumerate(zip(factors, rows, strict=True))})["fc0"]
        for factors in ((1, 1), (1, 8))
    )
    assert plain.solution.quantized is not None
    assert strong.solution.quantized is not None
    assert (plain.solution.quantized.codes == strong.solution.quantized.codes).mean() > 0.999


@pytest.mark.parametrize("biased", [(), (0, 1), (1,)], ids=["none", "both", "one"])
def test_rows_are_centred_where_a_bias_takes_up_their_mean(biased: tuple[int, ...]) -> None:
    rows = [rows_of(i) for i in range(2)]
    compensated = QUANTIZE + ",compensate-bias{bias=existing}"
    many = solved(readers(2, biased), compensated, {f"fc{i}": stats_of(x) for i, x in enumerate(rows)})
    seen = balanced(rows, [x - x.mean(axis=0) if i in biased else x for i, x in enumerate(rows)])
    one = solved(readers(1), QUANTIZE, {"fc0": stats_of(seen)})["fc0"]
    assert one.solution.quantized is not None
    for i, done in enumerate(many.values()):
        assert done.solution.quantized is not None
        assert (done.solution.quantized.codes == one.solution.quantized.codes).mean() > 0.999  # statistics are the same up to rounding
        if i in biased:
            wanted = random(N, seed=i) + (WEIGHT - done.solution.weight).T.astype(np.float64) @ rows[i].mean(axis=0)
            np.testing.assert_allclose(np.asarray(done.solution.bias), wanted, rtol=1e-5, atol=1e-6)


def test_errors_are_each_reader_s_own() -> None:
    rows = [rows_of(i) for i in range(2)]
    for done, x in zip(solved(readers(2), QUANTIZE, {f"fc{i}": stats_of(x) for i, x in enumerate(rows)}).values(), rows, strict=True):
        wanted = np.sqrt(np.square(x @ (done.solution.weight - WEIGHT)).sum(axis=1).mean() / (x @ WEIGHT).var(axis=0).sum())
        assert done.solution.record.error == pytest.approx(wanted, rel=1e-4)


def test_low_rank_figures_are_each_reader_s_own() -> None:
    rows = [rows_of(i) for i in range(3)]
    pipeline = "magr,quantize{method=gptq,bits=2,block_size=16},low-rank{rank=4}"
    for done, x in zip(solved(readers(3), pipeline, {f"fc{i}": stats_of(x) for i, x in enumerate(rows)}).values(), rows, strict=True):
        assert done.solution.quantized is not None
        assert done.solution.record.low_rank is not None
        weights = {"error_before": done.solution.quantized.dequantize(), "error_after": done.solution.weight}
        for name, weight in weights.items():
            expected = np.sqrt(np.square(x @ (weight - WEIGHT)).sum(axis=1).mean() / (x @ WEIGHT).var(axis=0).sum())
            assert done.solution.record.low_rank[name] == pytest.approx(expected, rel=1e-4)


def test_a_reader_without_data_takes_no_part() -> None:
    layers, _ = find(readers(2))
    seen = stats_of(rows_of(0))
    shared = SharedWeight([(layers[0], seen), (layers[1], None)])
    np.testing.assert_allclose(shared.stats(None, WEIGHT).gram, seen.gram)
    assert SharedWeight([(layer, None) for layer in layers]).stats(None, WEIGHT).is_data_free


def test_held_out_rows_are_those_of_all_readers() -> None:
    layers, _ = find(readers(2))
    parts = [[rows_of(i)[:16], rows_of(i)[16:]] for i in range(2)]
    stats = [replace(stats_of(np.concatenate(p)), folds=tuple(map(stats_of, p))) for p in parts]
    shared = SharedWeight(list(zip(layers, stats, strict=True))).stats(None, WEIGHT)
    assert [fold.rows for fold in shared.folds] == [32, sum(len(p[1]) for p in parts)]
    factors = [1 / np.square(np.concatenate(p) @ WEIGHT).sum() for p in parts]
    for index, fold in enumerate(shared.folds):  # with the factors of all rows: a fold is no reader of its own
        expected = sum(f * p[index].T @ p[index] for f, p in zip(factors, parts, strict=True)) * shared.rows / fold.rows
        total = sum(f * s.gram.trace() * s.rows for f, s in zip(factors, stats, strict=True))
        np.testing.assert_allclose(fold.gram / shared.gram.trace(), expected / total, rtol=1e-5, atol=1e-9)


FORMATS: dict[str, tuple[dict[str, Any], int]] = {
    "matmulnbits": ({"bits": 4, "block_size": 16}, 0),
    "qdq": ({"bits": 4, "block_size": 16, "format": "qdq"}, 0),
    "static": ({"format": "qdq-int8"}, 4 + 1),  # scale and zero point of the other input
    "dynamic": ({"format": "dynamic-int8"}, 0),
    "low rank": ({"bits": 4, "block_size": 16, "low_rank": 4}, 0),
    "magr": ({"pipeline_text": "magr"}, 0),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_are_stored_once(kind: str) -> None:
    options, more = FORMATS[kind]
    feeds = {f"x{i}": rows_of(i).astype(np.float32) for i in range(2)}
    if "pipeline_text" not in options:
        options = {"bias": "none"} | options
    one, _ = magr_onnx.optimize(readers(1), [{"x0": feeds["x0"]}] * 4, **options)
    two, report = magr_onnx.optimize(readers(2), [feeds] * 4, **options)
    assert tensor_bytes(two) == tensor_bytes(one) + more
    assert "w" not in two.graph.initializers
    assert len(report.layers) == 2
    with Session(two) as session, Session(readers(2)) as floats:
        for ours, original in zip(session.run(feeds), floats.run(feeds), strict=True):
            assert np.linalg.norm(ours - original) < 0.15 * np.linalg.norm(original)


def test_one_weight_in_a_branch_and_outside_is_stored_once() -> None:
    trap, rng = ZOO["weight-shared-by-three-layers"], np.random.default_rng(0)
    data = [trap.feeds(rng) for _ in range(8)]
    made, report = magr_onnx.optimize(trap.build(), data, bits=8, block_size=16, bias="existing")
    codes = [v for v in made.graph.initializers.values() if str(v.name).endswith("_q8")]
    assert len(codes) == 1
    weights = list(read_weights(made).values())
    assert len(weights) == len(report.layers) == 3
    for other in weights[1:]:
        np.testing.assert_array_equal(weights[0], other)


def test_notes_name_the_others() -> None:
    def notes(name: str, **options: Any) -> dict[str, tuple[str, ...]]:
        return {row.name: row.notes for row in magr_onnx.optimize(ZOO[name].build(), bits=8, block_size=16, **options).report.layers}

    shared = notes("weight-shared-by-three-layers")
    assert any("shares its weight with second, third" in note for note in shared["first"])
    turned = notes("weight-and-its-transpose")
    assert turned["down"] == ("up reads the same weight transposed or scaled, so that their codes cannot be shared",)
    (tied,) = notes("tied-embedding", include=["*"])["head"]
    assert f"its float weight ({TABLE.nbytes} bytes) stays in the file for " in tied
    assert "(Gather)" in tied


def test_a_layer_that_is_converted_for_nothing_says_so_and_what_to_do(tmp_path: Path) -> None:
    """The table stays float for the Gather, so codes of the layer come on top."""
    model = ZOO["table-tied-to-the-last-layer"].build()

    def written(name: str, **options: Any) -> tuple[ir.Model, Report]:
        return magr_onnx.optimize(model, output=tmp_path / f"{name}.onnx", block_size=16, **options)

    made, report = written("tied", include=["*"])
    (row,) = report.layers
    codes = sum(v.const_value.nbytes for name, v in made.graph.initializers.items() if "_q4" in name)
    assert row.added == codes
    (note,) = [note for note in row.notes if "saved nothing" in note]
    assert f"added {codes} bytes" in note
    (finding,) = [f for f in summary.findings(report, summary.lines_of(report)) if "saved nothing" in f.text]
    assert (finding.layer, f"added {codes} bytes" in finding.text) == (0, True)
    for text in (note, finding.text):
        assert 'embeddings="gather-block-quantized"' in text
    assert "exclude=['head']" in note
    tables = written("both", embeddings="gather-block-quantized")[1]
    assert not any(row.added or "saved nothing" in " ".join(row.notes) for row in tables.layers)
    left_out = written("out", embeddings="gather-block-quantized", exclude=["head"])[1]
    assert not any(row.added for row in left_out.layers)
    assert tables.bytes_after < report.bytes_after > report.bytes_before


def test_a_layer_whose_floats_stay_for_others_is_left_alone(tmp_path: Path) -> None:
    """By default: codes would make the file larger. It is converted where the table is, and where someone names it."""
    model = ZOO["table-tied-to-the-last-layer"].build()
    for run in (lambda: magr_onnx.inspect(model).skipped, lambda: magr_onnx.optimize(beside(model), effort="fast").report.skipped):
        (skip,) = [skip for skip in run() if skip.name == "head"]
        assert skip.reason == "its float weight would stay in the file for others"
        assert skip.detail.startswith("emb (Gather); --embeddings converts the table too, --include '*'")
    report = magr_onnx.optimize(beside(model), output=tmp_path / "m.onnx").report
    assert [row.name for row in report.layers] == ["other"]
    assert report.bytes_after < report.bytes_before
    both = magr_onnx.optimize(beside(model), embeddings="gather-block-quantized").report
    assert {row.name for row in both.layers} == {"emb", "head", "other"}
    for options in ({"include": ["*"]}, {"pipeline_text": "quantize{bits=4},emit-matmulnbits"}):
        assert {row.name for row in magr_onnx.optimize(beside(model), **options).report.layers} == {"head", "other"}  # type: ignore[arg-type]


def beside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, with a layer that shares nothing behind its first operator."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    width = copy.graph.initializer[0].dims[1]
    copy.graph.initializer.append(onnx.numpy_helper.from_array(random(width, width), "own"))
    copy.graph.node.append(onnx.helper.make_node("MatMul", ["r", "own"], ["z"], name="other"))
    copy.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    return copy


def test_transposes_are_matrices_of_their_own_and_the_floats_go() -> None:
    made, _ = magr_onnx.optimize(ZOO["weight-and-its-transpose"].build(), bits=8, block_size=16)
    assert "w" not in made.graph.initializers
    down, up = read_weights(made).values()
    assert down.shape == up.T.shape == W.shape


def test_a_rewrite_leaves_shared_weights_alone() -> None:
    """Scaled for one reader, a weight would be stored once for each."""
    b = Builder()
    x = b.input("x", ["batch", K])
    gain, shift = b.constant("g", np.exp(random(K, scale=2)).astype(np.float32)), b.constant("s", random(K, seed=3))
    w = b.constant("w", WEIGHT)
    one = b.node("MatMul", [b.node("LayerNormalization", [x, gain, shift], "norm", axis=-1), w], "one")
    model = b.model(b.node("Tanh", [b.node("Add", [one, b.node("MatMul", [x, w], "two")], "sum")], "end"), ["batch", N])
    data = [{"x": correlated(64, K)}]
    made, report = magr_onnx.optimize(model, data, pipeline_text="equalize,quantize{bits=4,block_size=16},emit-matmulnbits")
    assert "equalize changed nothing: no layer meets its conditions and gains by it" in report.notes
    assert sum(str(v.name).endswith("_q4") for v in made.graph.initializers.values()) == 1


def test_readers_stay_together_whatever_the_budget() -> None:
    b = Builder()
    x = b.input("x", ["batch", K])
    w, v = b.constant("w", random(K, K)), b.constant("v", random(K, K, seed=1))
    h = b.node("Tanh", [b.node("MatMul", [x, w], "first")])
    h = b.node("Tanh", [b.node("MatMul", [h, v], "between")])
    layers, _ = find(b.model(b.node("MatMul", [h, w], "last"), ["batch", K]))
    assert sharing(layers) == {"first", "last"}
    assert [[x.name for x in group] for group in moments.grouped(layers, 1)] == [["first", "last"], ["between"]]


def stack() -> ir.Model:
    """A weight at both ends of a layer of its own."""
    b = Builder()
    x = b.input("x", ["batch", K])
    w = b.constant("w", random(K, K))
    h = b.node("Tanh", [b.node("MatMul", [x, w], "first")], "a")
    h = b.node("Tanh", [b.node("MatMul", [h, b.constant("v", random(K, K, seed=1))], "between")], "b")
    return b.model(b.node("MatMul", [h, w], "last"), ["batch", K])


def test_stages_see_what_was_solved_before_them() -> None:
    """Statistics of a layer behind a shared one are those of the model with the shared one quantized."""
    model, work = stack(), stack()
    layers, _ = find(work)
    first = segments.outside_stages(layers)
    assert [layer.name for layer in first] == ["first", "last"]
    changed = segments.outputs_of(work, first)
    assert changed == {"first_out", "y"}
    assert segments.downstream(work, changed) == {"first_out", "a_out", "between_out", "b_out", "y"}
    run_layers(Plan.parse("quantize{bits=2,block_size=16},emit-matmulnbits"), first, lambda _: None, lambda _: None)
    feeds = [{"x": correlated(64, K, seed=s)} for s in range(4)]
    with Session(model) as session:
        data = open_data(feeds, session.inputs)
    ((stage, found),) = staged(model, work, [layers[1]], CalibrationContext(data), Schedule(changed=changed))
    assert [layer.name for layer in stage] == ["between"]
    quantized = next(iter(read_weights(work).values()))
    x = np.concatenate([np.tanh(f["x"] @ quantized) for f in feeds])
    np.testing.assert_allclose(found.stats["a_out"].gram, x.T @ x / len(x), rtol=1e-3, atol=1e-3)
    assert set(found.targets) == {"between"}  # it reads another input than in the float model


@pytest.mark.parametrize("data_free", [True, False], ids=["data-free", "data"])
@pytest.mark.parametrize("kind", ["stack", "side by side"])
def test_codes_of_its_own_are_noted_where_there_are_some(kind: str, data_free: bool, tmp_path: Path) -> None:
    model = stack() if kind == "stack" else readers(2)
    feeds = {f"x{'' if kind == 'stack' else i}": rows_of(i).astype(np.float32) for i in range(1 if kind == "stack" else 2)}
    options: dict[str, Any] = {"bits": 4, "block_size": 16, "output": tmp_path / "out.onnx", "max_memory": 1000}
    made, report = magr_onnx.optimize(model, None if data_free else [feeds] * 4, **options)
    copies = sum(re.fullmatch(r"w_q4(_\d+)?", name) is not None for name in made.graph.initializers)
    notes = " ".join(note for row in report.layers for note in row.notes)
    assert ("codes of its own" in notes) == (copies > 1) == (kind == "stack" and not data_free)
    assert ("codes stored once" in notes) == (copies == 1)


def test_error_feedback_converts_all() -> None:
    feeds = [{"x": correlated(64, K, seed=s)} for s in range(8)]
    report = magr_onnx.optimize(stack(), feeds, bits=4, block_size=16, effort="balanced").report
    assert {row.name: row.feedback is not None for row in report.layers} == {"first": False, "between": True, "last": False}
    assert [row.name for row in report.layers] == ["first", "between", "last"]


def test_nothing_is_said_of_a_weight_read_once() -> None:
    model = readers(1)
    (note,) = remarks(find(model)[0], {"fc0": 12})["fc0"]
    assert f"added 12 bytes: its float weight ({WEIGHT.nbytes} bytes) stays in the file for fc0 (MatMul)" in note
    made, report = magr_onnx.optimize(readers(1), bits=4, block_size=16)
    assert not any("weight" in note for note in report.layers[0].notes)
    assert "w" not in made.graph.initializers
