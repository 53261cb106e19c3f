"""Validation: the metrics are what their definitions say, on models whose difference is known."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import scipy.stats

import magr_onnx
from magr_onnx.errors import CalibrationError, ModelError, RuntimeFailure
from magr_onnx.report.validation import Latency, OutputMetrics
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.measure import recording
from magr_onnx.runtime.measure.validate import MIN_RUNS, log_softmax, median_interval, validate
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests import graphs
from tests.graphs import Builder, K, N, feeds, random
from tests.helpers import next_token_nats


def scaled(factor: float) -> ir.Model:
    """``x W`` times a factor, with the logits of a tiny language model beside it."""
    b = Builder()
    ids = b.input("input_ids", ["batch", "time"], ir.DataType.INT64)
    table = b.constant("table", random(N, K, seed=4, scale=1))
    x = b.node("Gather", [table, ids], "embed")
    x.dtype = ir.DataType.FLOAT
    out = b.node("MatMul", [x, b.constant("w", random(K, N) * np.float32(factor))], "head")
    out.name, out.shape = "logits", ir.Shape(["batch", "time", N])
    plain = b.node("Identity", [out], "copy")
    plain.name, plain.shape, plain.dtype = "plain", ir.Shape(["batch", "time", N]), ir.DataType.FLOAT
    return b.model_of([out, plain])


def ids(rows: int = 6, time: int = 5) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(0).integers(0, N, (rows, time))}


@pytest.fixture(autouse=True, params=["both open", pytest.param("one open", marks=pytest.mark.slow)])
def sessions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare models as large ones are, too: with one loaded at a time, what the first puts out in files."""
    if request.param == "one open":
        monkeypatch.setattr(recording, "LARGE", 0)
        monkeypatch.setattr(recording, "IN_MEMORY", 0)


def test_metrics_of_a_known_difference() -> None:
    one, two = scaled(1.0), scaled(1.25)
    with Session(one) as session:
        data = open_data([ids(), ids(3, 9)], session.inputs)
        logits = np.concatenate([session.run(b)[0].reshape(-1, N) for b in data]).astype(np.float64)
    result = validate(one, two, data, arithmetics=(Arithmetic.DEFAULT,), details=("layers",))
    by_name = {m.output: m for m in result.arithmetics["default"]}
    assert set(by_name) == {"logits", "plain"}
    m = by_name["logits"]
    assert m.sqnr_db == pytest.approx(20 * np.log10(4), abs=1e-3)  # the error is a quarter of the signal
    assert m.cosine == pytest.approx(1, abs=1e-6)
    assert m.max_error == pytest.approx(np.abs(logits).max() / 4, rel=1e-4)
    assert m.top1 == 1
    p, q = log_softmax(logits), log_softmax(1.25 * logits)
    assert m.kl == pytest.approx(float((np.exp(p) * (p - q)).sum(axis=1).mean()), rel=1e-4)
    assert m.cross_entropy is not None
    nats = [v for y, b in _logits(one, data) for v in next_token_nats(y, b["input_ids"])]
    assert len(nats) == 6 * 4 + 3 * 8
    assert m.cross_entropy[0] == pytest.approx(np.mean(nats), rel=1e-6)
    assert by_name["plain"].top1 is by_name["plain"].kl is None
    assert (result.layers, result.batches) == ((), 2)


def _logits(model: ir.Model, data: object) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    with Session(model) as session:
        return [(session.run(b)[0], b) for b in data]  # type: ignore[attr-defined]


def test_a_single_output_that_is_not_called_logits_is_said_to_be_none() -> None:
    model = graphs.chain()
    with Session(model) as session:
        data = open_data([feeds(model)], session.inputs)
    (name,) = (str(v.name) for v in model.graph.outputs)
    said = f"top-1 and KL are of outputs called logits, and this one is called {name}"
    assert said in validate(model, model, data, details=()).notes
    two = scaled(1.0)
    with Session(two) as session:
        data = open_data([ids()], session.inputs)
    assert validate(two, two, data, details=()).notes == ()


def test_cross_entropy_of_uniform_logits_is_log_vocabulary() -> None:
    model = scaled(0.0)
    with Session(model) as session:
        data = open_data([ids()], session.inputs)
    (logits, _) = validate(model, model, data, arithmetics=(Arithmetic.DEFAULT,), details=()).arithmetics["default"]
    assert logits.cross_entropy == pytest.approx((np.log(N), np.log(N)))


REAL = {
    "padded behind": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "padded before": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]],
    "with holes": [[1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]],
    "without padding": [[1] * 6] * 4,
}
KINDS = {
    "decoder": ("input_ids", "attention_mask", 0),
    "decoder with a past": ("input_ids", "attention_mask", 3),
    "encoder-decoder": ("decoder_input_ids", "decoder_attention_mask", 0),
}


def language_model(factor: float, tokens: str, mask: str, past: int) -> tuple[ir.Model, np.ndarray]:
    """Logits that depend on the token alone, and those of every token ``(N, N)``; the mask, a source and the past change nothing."""
    table, weight = random(N, K, seed=4, scale=1), random(K, N) * np.float32(factor)
    b = Builder()
    ids = b.input(tokens, ["batch", "time"], ir.DataType.INT64)
    b.input(mask, ["batch", "total"], ir.DataType.INT64)
    if tokens != "input_ids":
        b.input("input_ids", ["batch", "time"], ir.DataType.INT64)
    x = b.node("Gather", [b.constant("table", table), ids], "embed")
    x.dtype = ir.DataType.FLOAT
    out = b.node("MatMul", [x, b.constant("w", weight)], "head")
    out.name, out.shape = "logits", ir.Shape(["batch", "time", N])
    outputs = [out]
    if past:
        cache = b.input("past_key_values.0.key", ["batch", "before", 4])
        present = b.node("Identity", [cache], "keep")
        present.name, present.shape = "present.0.key", ir.Shape(["batch", "before", 4])
        outputs.append(present)
    return b.model_of(outputs), table.astype(np.float64) @ weight.astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", REAL)
def test_perplexity_is_of_predictions_of_real_tokens_from_real_ones(padding: str, kind: str) -> None:
    tokens, mask, past = KINDS[kind]
    real = np.array(REAL[padding])
    models = [language_model(factor, tokens, mask, past) for factor in (1.0, 1.5)]
    drawn = np.random.default_rng(1).integers(0, N, real.shape)
    figures = []
    for pad in (0, 7, N - 1):
        feed = {tokens: np.where(real, drawn, pad), mask: np.hstack([np.ones((4, past), np.int64), real])}
        if kind == "encoder-decoder":
            feed["input_ids"] = np.full_like(drawn, pad)
        if past:
            feed["past_key_values.0.key"] = np.zeros((4, past, 4), np.float32)
        with Session(models[0][0]) as session:
            data = open_data([feed], session.inputs)
        result = validate(models[0][0], models[1][0], data, mask=mask, details=())
        (metrics,) = (m for m in result.arithmetics["default"] if m.output == "logits")
        assert metrics.cross_entropy is not None
        expected = [np.mean(next_token_nats(by_token[drawn], drawn, real)) for _, by_token in models]
        assert metrics.cross_entropy == pytest.approx(expected, rel=1e-5)
        figures.append(metrics)
    assert figures[0] == figures[1] == figures[2]


def test_tokens_that_are_all_alone_have_no_perplexity() -> None:
    model, _ = language_model(1.0, *KINDS["decoder"])
    feed = {"input_ids": ids(2, 4)["input_ids"], "attention_mask": np.array([[1, 0, 1, 0], [0, 0, 0, 1]])}
    with Session(model) as session:
        data = open_data([feed], session.inputs)
    result = validate(model, model, data, mask="attention_mask", details=())
    assert result.arithmetics["default"][0].cross_entropy is None


def test_a_model_against_itself_is_perfect() -> None:
    model = graphs.chain()
    with Session(model) as session:
        data = open_data([feeds(model)], session.inputs)
    result = validate(model, model, data)
    assert set(result.arithmetics) == {"default", "unoptimized", "float-qdq"}
    m = result.arithmetics["default"][0]
    assert (m.sqnr_db, m.cosine, m.max_error) == (float("inf"), 1, 0)
    assert result.latency is not None
    assert result.latency.float_ms > 0


def test_models_without_a_common_output_are_refused() -> None:
    model, other = graphs.chain(), graphs.chain()
    other.graph.outputs[0].name = "elsewhere"
    with Session(model) as session:
        data = open_data([feeds(model)], session.inputs)
    with pytest.raises(ModelError, match=r"no output in common: \w+, and elsewhere"):
        validate(model, other, data)


def masked(bad: float) -> ir.Model:
    """Outputs that are minus infinity where x is below 0, and elsewhere x, but for the first column: there they are ``bad`` times that."""
    b = Builder()
    x = b.input("x", ["batch", K])
    factor = np.ones(K, np.float32)
    factor[0] = bad
    below = b.node("Less", [x, b.constant("zero", np.zeros((), np.float32))])
    below.dtype = ir.DataType.BOOL
    other = b.node("Mul", [x, b.constant("factor", factor)])
    chosen = b.node("Where", [below, b.constant("low", np.full((), -np.inf, np.float32)), other])
    chosen.dtype = ir.DataType.FLOAT
    return b.model(chosen, ["batch", K])


@pytest.mark.parametrize(("bad", "sqnr", "worst"), [(1, np.inf, 0), (np.nan, np.nan, np.nan), (np.inf, -np.inf, np.inf)])
def test_what_is_not_finite_is_counted_unless_it_is_so_in_both(bad: float, sqnr: float, worst: float) -> None:
    x = np.abs(random(5, K)) + 1
    x[0] *= -1
    with Session(masked(1)) as session:
        data = open_data([{"x": x}], session.inputs)
    found = validate(masked(1), masked(bad), data, details=())
    m = found.arithmetics["default"][0]
    np.testing.assert_equal([m.sqnr_db, m.max_error], [sqnr, worst])
    assert m.nonfinite == (0, 0 if bad == 1 else 4)
    assert [f": {m.nonfinite[1]} (" in said for said in found.broken()] == ([] if bad == 1 else [True])
    m = validate(masked(bad), masked(1), data, details=()).arithmetics["default"][0]
    assert m.nonfinite == (0 if bad == 1 else 4, 0)
    assert np.isnan(m.cosine) == (bad != 1)


def test_outputs_that_are_no_floats_are_named() -> None:
    b = Builder()
    product = b.node("MatMul", [b.input("x", ["batch", K]), b.constant("w", random(K, N))], "layer")
    best = b.node("ArgMax", [product], "best", axis=-1)
    best.dtype = ir.DataType.INT64
    model = b.model(best, ["batch", 1])
    report = magr_onnx.optimize(model, [feeds(model)], validation_data=[feeds(model, seed=1)]).report
    assert report.validation is not None
    assert not any(report.validation.arithmetics.values())
    assert report.validation.notes == (f"outputs that are not floats, and not compared: {best.name}",)
    assert "no output is of floats" in report.to_html()


def test_perplexity_of_a_loss_beyond_floats_is_infinite() -> None:
    m = OutputMetrics("logits", 0, 0, 0, cross_entropy=(0.0, 800.0))
    assert m.perplexity == (1, np.inf)
    assert OutputMetrics("logits", 0, 0, 0, cross_entropy=(708.0, np.nan)).perplexity == (
        pytest.approx(np.exp(708)),
        pytest.approx(np.nan, nan_ok=True),
    )


def test_three_arithmetics_differ_where_onnxruntime_s_do() -> None:
    """Fused QDQ runs with int8 activations by default; asked for float, it agrees with the nodes as written."""
    model = graphs.matmul_bias(96, 32)
    x = feeds(model)
    quantized, _ = magr_onnx.optimize(model, [x], format="qdq")
    with Session(model) as session:
        data = open_data([x], session.inputs)
    result = validate(model, quantized, data, details=("layers",))
    sqnr = {a: outputs[0].sqnr_db for a, outputs in result.arithmetics.items()}
    assert sqnr["float-qdq"] == pytest.approx(sqnr["unoptimized"], abs=1e-3)
    assert abs(sqnr["default"] - sqnr["unoptimized"]) > 1e-3


def test_layer_errors_are_measured_in_the_running_model() -> None:
    model = graphs.chain()
    x = feeds(model)
    quantized, _ = magr_onnx.optimize(model, [x], bits=2)
    with Session(model) as session:
        data = open_data([x], session.inputs)
    layers = {m.layer: m.relative_error for m in validate(model, quantized, data, details=("layers",)).layers}
    assert list(layers) == ["up_out", "down_bias_out"]
    assert all(0.001 < e < 1 for e in layers.values())


def test_padded_rows_do_not_count() -> None:
    b = Builder()
    x = b.input("x", ["batch", "time", K])
    b.input("attention_mask", ["batch", "time"], ir.DataType.INT64)
    model = b.model(b.node("MatMul", [x, b.constant("w", random(K, N))], "layer"), ["batch", "time", N])
    batch = feeds(model)
    quantized, _ = magr_onnx.optimize(model, [batch], bits=2)
    with Session(model) as session:
        kept = {k: v[batch["attention_mask"] != 0][None] for k, v in batch.items()}
        data, expected = open_data([batch], session.inputs), open_data([kept], session.inputs)
    a = validate(model, quantized, data, mask="attention_mask", details=())
    e = validate(model, quantized, expected, details=())
    assert a.arithmetics["unoptimized"][0].sqnr_db == pytest.approx(e.arithmetics["unoptimized"][0].sqnr_db, abs=1e-4)


def test_errors_name_both_sides() -> None:
    model = graphs.chain()
    with pytest.raises(CalibrationError, match="x: float32"):
        magr_onnx.validate(model, model, [{"z": np.zeros((2, 48), np.float32)}])
    b = Builder()
    odd = b.model(b.node("NoSuchOperator", [b.input("x", ["batch", 4])], "odd"), ["batch", 4])
    b.nodes[0].domain = "com.example"
    odd.opset_imports["com.example"] = 1
    with pytest.raises(RuntimeFailure, match="cannot load"):
        Session(odd)


def test_a_model_timed_against_itself_is_not_slower() -> None:
    model = graphs.chain()
    with Session(model) as session:
        data = open_data([feeds(model)], session.inputs)
    t = validate(model, model, data, details=("latency",)).latency
    assert t is not None
    assert t.runs >= MIN_RUNS
    for median, (low, high) in zip((t.float_ms, t.quantized_ms), t.spread, strict=True):
        assert 0 < low <= median <= high
    assert not t.slower


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ((1.2, 1.3, 1.4), True),
        ((0.9, 1.3, 1.6), False),  # chance
        ((1.01, 1.02, 1.03), False),  # certain, and of no matter
        ((0.5, 0.6, 0.7), False),
        (None, True),  # an older report, of 13 ms against 10
    ],
)
def test_slower_is_what_chance_does_not_explain(ratios: tuple[float, float, float] | None, slower: bool) -> None:
    times = Latency(10, 13, 9, ratios=ratios)
    assert times.slower is slower
    assert times.ratio == (ratios[1] if ratios else 1.3)


@pytest.mark.parametrize("n", [5, 6, 9, 50])
def test_the_interval_of_a_median_is_that_of_the_binomial_distribution(n: int) -> None:
    values = np.random.default_rng(n).permutation(n).astype(float)
    low, median, high = median_interval(values)
    below = int(low)  # values of the sample below the lower end
    assert (median, high) == (np.median(values), n - 1 - below)

    def outside(k: int) -> float:
        return 2 * float(scipy.stats.binom.cdf(k, n, 0.5))

    assert outside(below + 1) > 0.05  # the next would leave out too much
    assert outside(below) <= 0.05 or below == 0


def test_arithmetics_that_agree_are_one_row() -> None:
    model = graphs.matmul_bias(96, 32)
    x = feeds(model)
    with Session(model) as session:
        data = open_data([x], session.inputs)
    rows = {}
    for form in ("matmulnbits", "qdq"):
        quantized, _ = magr_onnx.optimize(model, [x], format=form)
        rows[form] = validate(model, quantized, data, details=()).shown()
    assert [name for name, _ in rows["matmulnbits"]] == ["all"]
    assert [name for name, _ in rows["qdq"]] == ["default", "unoptimized", "float-qdq"]


@pytest.mark.parametrize("large", [False, True])
def test_of_large_models_one_is_loaded_at_a_time(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.chain()
    quantized, _ = magr_onnx.optimize(model, [feeds(model)], bits=2)
    with Session(model) as session:
        data = open_data([feeds(model, seed=s) for s in range(5)], session.inputs)
    monkeypatch.setattr(recording, "LARGE", 0 if large else 1 << 40)
    alive = most = 0

    def counted(name: str, change: int) -> None:
        original = getattr(Session, name)

        def call(self: Session, *arguments: object, **options: object) -> object:
            nonlocal alive, most
            if change > 0 or "_session" in self.__dict__:  # a session may be closed twice
                alive += change
                most = max(most, alive)
            return original(self, *arguments, **options)

        monkeypatch.setattr(Session, name, call)

    counted("_load", 1)
    counted("close", -1)
    result = validate(model, quantized, data, details=("layers", "latency"))
    assert alive == 0
    assert most == (1 if large else 1 + len(Arithmetic))
    assert result.latency is not None
    assert result.latency.runs >= MIN_RUNS
    assert all(len(outputs) == 1 for outputs in result.arithmetics.values())
