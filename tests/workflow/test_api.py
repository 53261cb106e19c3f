"""The Python interface on the real bundled model: accuracy, the report, what is in the file."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.special

import magr_onnx
from magr_onnx.cli.commands import demo
from magr_onnx.models import bundled
from magr_onnx.passes import Plan, find
from magr_onnx.passes.emit.readback import digest, read_weights
from magr_onnx.runtime.ort.session import Arithmetic, Session
from magr_onnx.workflow import layer_round, verify_output
from tests import graphs
from tests.graphs import feeds, proto
from tests.helpers import few_samples, next_token_nats

Batches = list[dict[str, np.ndarray]]


SAMPLES = 32  # of the bundled data: four batches, one of which is held out


def in_batches(ids: np.ndarray) -> Batches:
    return [{"input_ids": ids[at : at + 8]} for at in range(0, len(ids), 8)]


@pytest.fixture(scope="module")
def samples() -> Batches:
    return in_batches(np.load(bundled.CALIBRATION)["input_ids"][:SAMPLES])


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    return np.load(bundled.HELD_OUT)["input_ids"][:SAMPLES]


def loss(model: Any, ids: np.ndarray, arithmetic: Arithmetic = Arithmetic.DEFAULT) -> float:
    nats: list[float] = []
    with Session(model, arithmetic=arithmetic) as session:
        for batch in in_batches(ids):
            (logits,) = session.run(batch)
            nats += next_token_nats(logits, batch["input_ids"])
    return float(np.mean(nats))


@pytest.fixture(scope="module")
def float_loss(held_out: np.ndarray) -> float:
    return loss(bundled.MODEL, held_out)


def added(held_out: np.ndarray, float_loss: float, **options: Any) -> float:
    """Cross-entropy (nats a token) that quantization adds on held-out text, on the emitted model."""
    model, _ = magr_onnx.optimize(bundled.MODEL, **options)
    return loss(model, held_out) - float_loss


def divergence(held_out: np.ndarray, **options: Any) -> float:
    """KL divergence (nats a token) of the float model's predictions on held-out text from those of the emitted model.

    Of so little text it says more than the cross-entropy, which is lower or higher by chance.
    """
    model, _ = magr_onnx.optimize(bundled.MODEL, **options)
    nats: list[float] = []
    with Session(bundled.MODEL) as reference, Session(model) as session:
        for batch in in_batches(held_out):
            p, q = (scipy.special.log_softmax(s.run(batch)[0].astype(np.float64), axis=-1) for s in (reference, session))
            nats.append(float((np.exp(p) * (p - q)).sum(axis=-1).mean()))
    return float(np.mean(nats))


PLAIN: dict[str, Any] = {"quantizer": "rtn", "alpha": 0.0, "beta": 1.0, "bias": "none"}
TEXTBOOK: dict[str, Any] = {"quantizer": "gptq", "alpha": 0.0, "beta": 1.0, "bias": "none", "damping": 0.01, "act_order": False}


@pytest.mark.long
@pytest.mark.parametrize(
    ("bits", "block", "bound"),
    [(4, 32, 1.0), pytest.param(2, 32, 0.7, marks=pytest.mark.slow), pytest.param(3, None, 0.6, marks=pytest.mark.slow)],
)
def test_defaults_beat_textbook_gptq_beats_rounding(
    bits: int, block: int | None, bound: float, held_out: np.ndarray, float_loss: float, samples: Batches
) -> None:
    rtn, gptq, fast = (
        added(held_out, float_loss, calibration=samples, bits=bits, block_size=block, **o) for o in (PLAIN, TEXTBOOK, {"effort": "fast"})
    )
    assert fast < bound * gptq  # seen: 0.88, 0.59, 0.47
    assert gptq < 0.9 * rtn
    quick, ours = (divergence(held_out, calibration=samples, bits=bits, block_size=block, effort=effort) for effort in ("fast", "balanced"))
    assert ours < 0.95 * quick


def test_float_model_is_well_trained(float_loss: float) -> None:
    assert math.exp(float_loss) < 33


def test_eight_bits_cost_nothing(held_out: np.ndarray, float_loss: float) -> None:
    assert abs(added(held_out, float_loss, calibration=few_samples(), bits=8, quantizer="rtn")) < 2e-3


@pytest.mark.long
def test_every_layer_s_codes_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.onnx"
    chosen: dict[str, str] = {}
    run_layers = layer_round.run_layers

    def spy(plan: Any, layers: Any, stats: Any, finished: Any, *rest: Any, **more: Any) -> None:
        def keep(solved: Any) -> None:
            chosen[solved.layer.output.name] = digest(solved.solution.quantized.dequantize())
            finished(solved)

        run_layers(plan, layers, stats, keep, *rest, **more)

    monkeypatch.setattr(layer_round, "run_layers", spy)
    _, report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=out, bits=3)
    found = {name: digest(weight) for name, weight in read_weights(ir.load(out)).items()}
    assert found == chosen
    assert len(found) == report.verified == len(report.layers) == 21
    onnx.checker.check_model(str(out))


def test_tampered_codes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = verify_output.iterate_weights

    def tampered(model: ir.Model, outputs: Any) -> Any:
        for name, weight in read(model, outputs):
            if name == "up_out":
                weight[0, 0] += 1e-3
            yield name, weight

    monkeypatch.setattr(verify_output, "iterate_weights", tampered)
    with pytest.raises(magr_onnx.MagrError, match="the emitted weights of up_out"):
        magr_onnx.optimize(graphs.chain())


@pytest.mark.long
@pytest.mark.parametrize(("form", "effort"), [("matmulnbits", "balanced"), ("qdq", "fast")])
def test_report_is_complete(form: Any, effort: Any, tmp_path: Path, samples: Batches, held_out: np.ndarray) -> None:
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(bundled.MODEL, samples, output=out, format=form, effort=effort, validation_data=in_batches(held_out))
    assert (len(report.layers), len(report.skipped), report.verified) == (21, 12, 21)
    assert [s.op for s in report.skipped if "option embeddings" in s.reason] == ["Gather"] * 2
    assert {s.reason for s in report.skipped if s.op != "Gather"} == {"right side is computed at run time"}
    assert all(r.rows == SAMPLES * 128 and r.error is not None and 0 < r.error < 0.4 and r.solver for r in report.layers)
    assert all(r.solver is not None and (r.magr is not None) == bool(r.solver.get("alpha", effort == "fast")) for r in report.layers)
    assert sum(r.feedback is not None for r in report.layers) == (20 if effort == "balanced" else 0)
    assert all(r.bias_compensated for r in report.layers[:-1])
    assert report.layers[-1].bias_compensated == (form == "matmulnbits")  # the head has no bias of its own
    assert report.bytes_after == out.stat().st_size < 0.3 * report.bytes_before
    assert str(Plan.parse(report.pipeline)) == report.pipeline
    assert ir.load(out).metadata_props["onnx_magr.pipeline"] == report.pipeline
    assert report.validation is not None
    for arithmetic in Arithmetic:
        (m,) = report.validation.arithmetics[arithmetic]
        assert m.top1 is not None
        assert m.top1 > 0.85
        assert m.cosine > 0.99
    again = json.loads(report.to_json())
    assert again["layers"][0]["name"] == report.layers[0].name
    assert max(len(line) for line in report.to_text().splitlines()[3:] if not line.startswith("validation")) <= 80


def test_results_are_reproducible() -> None:
    one, two = (magr_onnx.optimize(graphs.chain(), [feeds(graphs.chain())], bits=2).model for _ in range(2))
    assert ir.to_proto(one).SerializeToString(deterministic=True) == ir.to_proto(two).SerializeToString(deterministic=True)


def test_a_small_budget_gives_the_same_result() -> None:
    one, two = (magr_onnx.optimize(graphs.chain(), [feeds(graphs.chain())], gram_budget=b).model for b in (1 << 30, 1))
    assert ir.to_proto(one).SerializeToString(deterministic=True) == ir.to_proto(two).SerializeToString(deterministic=True)


def test_every_source_of_a_model_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(proto(graphs.chain()).SerializeToString())
    batch = [feeds(graphs.chain())]
    weights = [read_weights(magr_onnx.optimize(m, batch).model) for m in (path, str(path), proto(graphs.chain()), graphs.chain())]
    for other in weights[1:]:
        for name, weight in weights[0].items():
            np.testing.assert_array_equal(weight, other[name])


def test_torch_program() -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval()
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(net, (x,), dynamo=True, input_names=["x"], dynamic_shapes=({0: torch.export.Dim("b")},), verbose=False)
    model, report = magr_onnx.optimize(program, [{"x": x.numpy()}], bits=8)
    assert len(report.layers) == 2
    with Session(model) as session, torch.no_grad():
        np.testing.assert_allclose(session.run({"x": x.numpy()})[0], net(x).numpy(), atol=0.02)


def test_magr_alone_feeds_any_other_quantizer() -> None:
    original = ir.load(bundled.MODEL)
    model, report = magr_onnx.optimize(bundled.MODEL, few_samples(), pipeline_text="magr{alpha=0.01}")
    before = {layer.name: layer.read() for layer in find(original)[0]}
    after = {layer.name: layer.read() for layer in find(model)[0]}
    assert before.keys() == after.keys()
    assert all(np.abs(after[n]).max(axis=0).sum() < np.abs(before[n]).max(axis=0).sum() for n in before)
    assert {r.bits for r in report.layers} == {None}
    assert [n.op_type for n in model.graph] == [n.op_type for n in original.graph]


@pytest.mark.parametrize(
    "options", [{"effort": "best"}, {"format": "qdq-int8"}, {"target_size": "60%"}], ids=lambda o: next(iter(o.values()))
)
def test_a_stage_is_reported_before_its_first_step(options: dict[str, Any]) -> None:
    calls: dict[str, list[int]] = {}
    batches = [{"x": graphs.correlated(32, 48, seed=seed)} for seed in range(4)]
    magr_onnx.optimize(
        graphs.chain(),
        batches,
        validation_data=batches[:1],
        progress=lambda stage, done, _: calls.setdefault(stage, []).append(done),
        **options,
    )
    assert {"calibrating", "quantizing", "validating"} <= calls.keys()
    assert {stage: steps[0] for stage, steps in calls.items()} == dict.fromkeys(calls, 0)


def test_progress_is_reported_stage_by_stage() -> None:
    calls: list[tuple[str, int, int]] = []
    batch = feeds(graphs.chain())
    magr_onnx.optimize(graphs.chain(), [batch, batch], validation_data=[batch], progress=lambda *c: calls.append(c))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["calibrating", "quantizing", "validating"]
    assert all(0 <= done <= total for _, done, total in calls)
    assert calls[-1][1] == calls[-1][2]


def test_the_log_hears_of_every_stage(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "magr_onnx"):
        magr_onnx.optimize(bundled.MODEL, few_samples(), effort="fast", include=["*linear_20"])
    said = [record.getMessage() for record in caplog.records if record.name == "magr_onnx"]
    begun, done = ([line.split(":")[0] for line in said if ("done" in line) is end] for end in (False, True))
    assert sorted(name.removesuffix(" ...") for name in begun) == sorted(done) == ["calibrating", "quantizing"]
    assert capfd.readouterr() == ("", "")  # a library says nothing where nobody watches


def test_option_problems_come_all_at_once_and_first() -> None:
    with pytest.raises(magr_onnx.OptionError) as caught:
        magr_onnx.optimize("no such file", bits=9, block_size=20, format="gguf", colour="red")  # type: ignore[call-arg,arg-type]
    for part in ("'colour'", "'gguf'", "bits=9"):
        assert part in str(caught.value)
    with pytest.raises(magr_onnx.OptionError, match="not both"):
        magr_onnx.optimize("no such file", pipeline_text="magr", bits=4)


@pytest.mark.long
@pytest.mark.parametrize("settings", [demo.SETTINGS[2:], pytest.param(demo.SETTINGS, marks=pytest.mark.slow)])
def test_demo(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SETTINGS", settings)
    result = demo.run(tmp_path)
    assert len(result.rows) == len(list(tmp_path.iterdir())) == len(settings)
    for plain, ours in zip(result.rows[::2], result.rows[1::2], strict=True):
        assert result.float_perplexity < ours.perplexity < plain.perplexity
    assert demo.to_text(result).count("MB") == len(settings) + 1
