"""Which rows of a value a mask leaves out: the same in statistics gathered in the graph and in stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.passes.instrument.taps import Tap, gram_taps
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import activation_ranges
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import MaskRule, dimensions_of, kept_rows, masked_outputs
from magr_onnx.runtime.calibration.moments import CalibrationResult, collect
from magr_onnx.runtime.calibration.staged import Schedule, staged
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Array, Builder, random

K, QUERIES, MASK = 24, 8, "attention_mask"


def perceiver(length: int | str = "length", rows: int | str = "batch", opset: int = 20) -> ir.Model:
    """A layer on tokens behind a mask, and one on learned queries that attend to them: there are 8 queries, however many tokens."""
    b = Builder(opset)
    x = b.input("x", [rows, length, K])
    mask = b.input(MASK, [rows, length], ir.DataType.INT64)
    keys = b.node("MatMul", [x, b.constant("w_tokens", random(K, K, seed=1))], "on_tokens")
    scores = b.node("MatMul", [b.constant("queries", random(1, QUERIES, K, seed=2)), b.node("Transpose", [keys], perm=[0, 2, 1])])
    real = b.node("Cast", [mask], "real", to=1)
    real.dtype = ir.DataType.FLOAT
    kept = b.node("Unsqueeze", [real, b.constant("axis", np.array([1]))], "kept")
    states = b.node("MatMul", [b.node("Mul", [scores, kept]), x], "states")
    return b.model(b.node("MatMul", [states, b.constant("w_queries", random(K, 8, seed=3))], "on_queries"), [rows, QUERIES, 8])


def batch(length: int, rows: int = 4, seed: int = 0) -> dict[str, Array]:
    """Tokens with padding behind the first half, at least."""
    rng = np.random.default_rng(seed + 100 * length)
    lengths = rng.integers(length // 2, length, rows)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return {"x": rng.standard_normal((rows, length, K)).astype(np.float32), MASK: mask}


def opened(model: ir.Model, batches: list[dict[str, Array]]) -> Batches:
    with Session(model) as session:
        return open_data(batches, session.inputs)


def in_stages(model: ir.Model, context: CalibrationContext) -> CalibrationResult:
    parts = [found for _, found in staged(model, model, find(model)[0], context, Schedule(feedback=False))]
    return CalibrationResult({k: v for p in parts for k, v in p.stats.items()}, tuple(n for p in parts for n in p.unmasked))


def queries_of(model: ir.Model, feeds: dict[str, Array]) -> Array:
    """Rows that the layer on queries reads, computed apart."""
    tapped = model.clone()
    node = next(n for n in tapped.graph if n.name == "on_queries")
    tapped.graph.outputs[:] = [node.inputs[0]]
    node.inputs[0].shape = ir.Shape([None, QUERIES, K])
    with Session(tapped) as session:
        return session.run(feeds)[0].reshape(-1, K)


def check(model: ir.Model, batches: list[dict[str, Array]]) -> None:
    """Tokens count where the mask keeps them, and queries always; in the graph and in stages alike."""
    data = opened(model, batches)
    tokens = np.concatenate([b["x"][b[MASK] != 0] for b in batches]).astype(np.float64)
    queries = np.concatenate([queries_of(model, b) for b in batches]).astype(np.float64)
    context = CalibrationContext(data, MASK)
    for found in (collect(model, find(model)[0], context), in_stages(model, context)):
        assert found.unmasked == ("states_out",)
        for name, rows in (("x", tokens), ("states_out", queries)):
            stats = found.stats[name]
            assert stats.rows == len(rows)
            expected = rows.T @ rows / len(rows)
            np.testing.assert_allclose(stats.gram, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            np.testing.assert_allclose(stats.mean, rows.mean(axis=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lengths", [(8, 12, 16), (12, 8, 16), (8, 8, 8), (12, 12), (8,), (1, 8)])
def test_learned_queries_are_no_tokens(lengths: tuple[int, ...]) -> None:
    check(perceiver(), [batch(t, seed=i) for i, t in enumerate(lengths)])


@pytest.mark.parametrize("rows", [1, 8])
def test_one_batch_size_in_all_batches(rows: int) -> None:
    """As many samples as queries, or a single one."""
    check(perceiver(), [batch(t, rows) for t in (8, 8)])


def test_last_batch_of_another_size() -> None:
    check(perceiver(), [batch(8), batch(8, seed=1), batch(8, rows=3)])


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 20])
@pytest.mark.parametrize("dims", [("batch", "length"), (4, "length"), (4, 8)])
def test_any_opset(opset: int, dims: tuple[int | str, int | str]) -> None:
    b = Builder(opset)
    x = b.input("x", [*dims, K])
    b.input(MASK, [*dims], ir.DataType.INT64)
    model, feeds = b.model(b.node("MatMul", [x, b.constant("w", random(K, 8))], "layer"), [*dims, 8]), batch(8)
    with Session(gram_taps(model, [Tap("x", K, masked=True)], MASK)) as session:
        gram, _, rows, masked = session.run(feeds)
    kept = feeds["x"][feeds[MASK] != 0]
    assert rows[0] == len(kept)
    assert masked
    np.testing.assert_allclose(gram, kept.T @ kept, rtol=1e-4, atol=1e-4)


def test_rows_that_fit_no_more_count_and_are_noted() -> None:
    """A value that follows the mask in the batches that were looked at, and not in a later one: it is padded to four tokens at least."""
    b = Builder()
    x = b.input("x", ["batch", "length", K])
    mask = b.input(MASK, ["batch", "length"], ir.DataType.INT64)
    length = b.node("Gather", [b.node("Shape", [mask], "dims"), b.constant("one", np.array([1]))], "length")
    length.dtype = ir.DataType.INT64
    more = b.node("Max", [b.node("Sub", [b.constant("least", np.array([4])), length], "lack"), b.constant("zero", np.array([0]))], "more")
    pads = b.node("Concat", [b.constant("before", np.zeros(4, np.int64)), more, b.constant("none", np.array([0]))], "pads", axis=0)
    model = b.model(b.node("MatMul", [b.node("Pad", [x, pads], "pad"), b.constant("w", random(K, 8))], "layer"), ["batch", None, 8])  # type: ignore[list-item]
    batches = [batch(6), batch(8, rows=3), batch(2)]
    context = CalibrationContext(opened(model, batches), MASK)
    expected = sum(int(b[MASK].sum()) for b in batches[:2]) + 4 * 4
    for found in (collect(model, find(model)[0], context), in_stages(model, context)):
        assert found.stats["pad_out"].rows == expected
        assert found.unmasked == ("pad_out",)


def encoder_decoder() -> ir.Model:
    """A layer on encoder states and one on decoder states, of lengths of their own."""
    b = Builder()
    source = b.input("source", ["batch", "source_length", K])
    mask = b.input(MASK, ["batch", "source_length"], ir.DataType.INT64)
    target = b.input("target", ["batch", "target_length", K])
    real = b.node("Cast", [mask], "real", to=1)
    real.dtype = ir.DataType.FLOAT
    encoded = b.node("MatMul", [source, b.constant("w_encoder", random(K, K, seed=1))], "encoder")
    pooled = b.node("MatMul", [b.node("Unsqueeze", [real, b.constant("axis", np.array([1]))], "kept"), encoded], "pooled")
    decoded = b.node("MatMul", [b.node("Add", [target, pooled], "mixed"), b.constant("w_decoder", random(K, 8, seed=2))], "decoder")
    return b.model(decoded, ["batch", "target_length", 8])


def pair(source: int, target: int, seed: int = 0) -> dict[str, Array]:
    tokens = batch(source, seed=seed)
    return {"source": tokens["x"], MASK: tokens[MASK], "target": batch(target, seed=seed + 1)["x"]}


@pytest.mark.parametrize("lengths", [[(8, 8), (12, 10)], [(8, 8)] * 3, [(6, 9), (8, 8)]])
def test_the_mask_of_the_source_is_none_of_the_target(lengths: Sequence[tuple[int, int]]) -> None:
    model = encoder_decoder()
    batches = [pair(*both, seed=i) for i, both in enumerate(lengths)]
    context = CalibrationContext(opened(model, batches), MASK)
    for found in (collect(model, find(model)[0], context), in_stages(model, context)):
        assert found.stats["source"].rows == sum(int(b[MASK].sum()) for b in batches)
        assert found.stats["mixed_out"].rows == sum(b["target"].shape[0] * b["target"].shape[1] for b in batches)
        assert found.unmasked == ("mixed_out",)


def test_a_model_that_takes_no_other_shape_is_not_probed() -> None:
    """The declared dimensions are free, and a constant in the graph fixes them: shapes of the data are all there is."""
    b = Builder()
    x = b.input("x", ["batch", "length", K])
    mask = b.input(MASK, ["batch", "length"], ir.DataType.INT64)
    fixed = b.node("Reshape", [x, b.constant("shape", np.array([4, 8, K]))], "fixed")
    real = b.node("Cast", [mask], "real", to=1)
    real.dtype = ir.DataType.FLOAT
    kept = b.node("Mul", [fixed, b.node("Unsqueeze", [real, b.constant("axis", np.array([2]))], "wide")], "kept")
    model = b.model(b.node("MatMul", [kept, b.constant("w", random(K, 8))], "layer"), ["batch", "length", 8])
    feeds = batch(8)
    context = CalibrationContext(opened(model, [feeds]), MASK)
    for found in (collect(model, find(model)[0], context), in_stages(model, context)):
        assert found.stats["kept_out"].rows == feeds[MASK].sum()
        assert found.unmasked == ()


@pytest.mark.parametrize("lengths", [(8, 12, 16), (8, 8, 8, 8)])
@pytest.mark.parametrize("options", [{"effort": "fast"}, {}, {"format": "qdq-int8"}, {"quantizer": "gptq"}])
def test_optimize_with_learned_queries(lengths: tuple[int, ...], options: dict[str, str]) -> None:
    model = perceiver()
    batches = [batch(t, seed=i) for i, t in enumerate(lengths)]
    _, report = magr_onnx.optimize(model, batches, progress=None, include=["*"], **options)  # type: ignore[arg-type]
    rows = {row.name: row.rows for row in report.layers}
    assert (rows["on_tokens"], rows["on_queries"]) == (sum(int(b[MASK].sum()) for b in batches), len(batches) * 4 * QUERIES)
    assert any(note.startswith("on_queries: all input rows count") for note in report.notes)


def test_ranges_count_all_queries() -> None:
    """A range is chosen by the errors of the rows that count: those of queries past the padding too."""
    model = perceiver()
    batches = [batch(8, seed=i) for i in range(3)]
    values = activation_ranges.inputs_of(find(model)[0])
    found = activation_ranges.choose(model, values, CalibrationContext(opened(model, batches), MASK), method="min-max")
    rows = np.concatenate([queries_of(model, b) for b in batches])
    grid = found["states_out"].grid
    assert isinstance(grid, magr_onnx.core.types.ActivationGrid)
    np.testing.assert_allclose(grid.scale, (rows.max() - rows.min()) / 255, rtol=1e-5)


def test_probe_cuts_the_dimension_the_mask_names() -> None:
    model = encoder_decoder()
    rule = MaskRule.of(dimensions_of(model), opened(model, [pair(8, 8)]), MASK)
    assert rule.probe is not None
    assert {name: array.shape[:2] for name, array in rule.probe.items()} == {"source": (3, 7), MASK: (3, 7), "target": (3, 8)}
    fixed = perceiver(8, 4)
    assert MaskRule.of(dimensions_of(fixed), opened(fixed, [batch(8)]), MASK).probe is None


@pytest.mark.parametrize("lengths", [(8, 8), (8, 12)])
def test_validation_judges_every_query(lengths: tuple[int, ...]) -> None:
    """An output of 8 queries, of batches of 8 tokens: no row of it is padding."""
    model = perceiver()
    quantized, _ = magr_onnx.optimize(model, None, bits=2, quantizer="rtn", include=["on_queries"], progress=None)
    batches = [batch(t, seed=i) for i, t in enumerate(lengths)]
    with Session(model) as a, Session(quantized) as b:
        assert masked_outputs(a, a.outputs, opened(model, batches), MASK) == set()
        y, y_hat = (np.concatenate([s.run(feeds)[0].reshape(-1, 8) for feeds in batches]).astype(np.float64) for s in (a, b))
    found = magr_onnx.validate(model, quantized, batches, latency=False, progress=None).arithmetics["default"][0]
    assert found.sqnr_db == pytest.approx(10 * np.log10((y**2).sum() / ((y - y_hat) ** 2).sum()), rel=1e-5)


def test_kept_rows_need_the_shape_of_the_mask() -> None:
    truth = np.array([[True, False], [True, True]])
    np.testing.assert_array_equal(kept_rows(truth, (2, 2, 5)), truth.reshape(-1))  # type: ignore[arg-type]
    assert kept_rows(truth, (4, 5)) is kept_rows(truth, (1, 2, 2, 5)) is kept_rows(None, (2, 2, 5)) is None


@pytest.mark.parametrize("opset", [9, 11, 13, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -3.4e38])
def test_padding_does_not_matter_whatever_it_holds(opset: int, bad: float) -> None:
    """Neither in moments of floats or of a static grid, nor in ranges; the same in the graph and in stages."""
    b = Builder(opset)
    x = b.input("x", ["batch", "length", K])
    b.input(MASK, ["batch", "length"], ir.DataType.INT64)
    model = b.model(b.node("MatMul", [x, b.constant("w", random(K, 8))], "layer"), ["batch", "length", 8])
    clean, dirty = ([batch(t, seed=i) for i, t in enumerate((8, 12, 8))] for _ in range(2))
    for feeds in dirty:
        feeds["x"][feeds[MASK] == 0] = bad
    batches = opened(model, clean)
    contexts = [CalibrationContext(replace(batches, read=lambda feeds=feeds: iter(feeds)), MASK) for feeds in (clean, dirty)]
    (value,) = activation_ranges.inputs_of(find(model)[0])
    choices = [activation_ranges.choose(model, [value], context)["x"] for context in contexts]
    assert choices[0].grid == choices[1].grid
    assert choices[0].errors == choices[1].errors
    for grids in ({}, {"x": choices[0]}):
        for driver in (lambda context: collect(model, find(model)[0], context), lambda context: in_stages(model, context)):
            stats, others = (driver(replace(context, grids=grids)).stats["x"] for context in contexts)
            assert stats.rows == others.rows == sum(int(feeds[MASK].sum()) for feeds in clean)
            np.testing.assert_array_equal(stats.gram, others.gram)
            np.testing.assert_array_equal(stats.target_mean, others.target_mean)
