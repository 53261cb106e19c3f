"""Runs without data: the models are compared on made-up inputs, and what prevents it is a note."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.models.zoo.trap import constant, model
from magr_onnx.report.verdicts import verdicts
from magr_onnx.runtime.data.made_up import feeds_for
from tests import decoders

W = constant("w", 16, 8)
PLAIN = "g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, w) }"


def test_a_run_without_data_compares_the_models_on_one_made_up_sample(tmp_path: Path) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(model(PLAIN, w=W), source)
    report = magr_onnx.optimize(source, output=output, bits=4, block_size=16).report
    check, x = report.check, {"x": np.random.default_rng(0).standard_normal((1, 16)).astype(np.float32)}
    assert check is not None
    assert check.latency is not None
    exact, quantized = (ort.InferenceSession(path).run(None, x)[0] for path in (source, output))
    (metrics,) = check.arithmetics["default"]
    assert check.data == "made-up inputs x (1, 16)"
    assert metrics.sqnr_db == pytest.approx(10 * np.log10(np.square(exact).sum() / np.square(exact - quantized).sum()), abs=1e-3)
    assert "output y on 1 batch of made-up inputs x (1, 16): SQNR" in " ".join(report.to_text().split())


def test_what_is_far_off_on_made_up_inputs_is_in_doubt() -> None:
    outlier = W.copy()
    outlier[0, :] = 1e4 * np.abs(outlier[0]) + 1e4  # takes the whole grid of its column
    text = "g (float[n, 16] x) => (float[n, 8] y) { z = Mul(x, off) y = MatMul(z, w) }"
    off = np.ones(16, np.float32)
    off[0] = 0  # and is multiplied by nothing
    report = magr_onnx.optimize(ir.from_proto(model(text, w=outlier, off=off)), bits=2, block_size=16).report
    assert report.check is not None
    assert any(line.startswith("IN DOUBT: output y") and "made-up inputs x (1, 16)" in line for line in verdicts((), [report.check]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[n, m] x) => (float[3, 8] y) { s = Reshape(x, shape) y = MatMul(s, w) }", "does not run on made-up inputs"),
        ("g (float[100000, 400] x, float[n, 16] z) => (float[n, 8] y, float[100000, 400] a) { a = Relu(x) y = MatMul(z, w) }", "too large"),
    ],
)
def test_inputs_that_cannot_be_made_up_are_a_note(text: str, reason: str) -> None:
    report = magr_onnx.optimize(ir.from_proto(model(text, w=W, shape=np.array([3, 16]))), bits=4, block_size=16).report
    assert report.check is None
    assert len(report.layers) == 1
    assert any("not compared with the float model" in note and reason in note for note in report.notes)


def test_models_too_large_to_be_loaded_twice_are_not_compared(tmp_path: Path) -> None:
    wide = constant("w", 1024, 1024)
    onnx.save(model("g (float[n, 1024] x) => (float[n, 1024] y) { y = MatMul(x, w) }", w=wide), tmp_path / "m.onnx")
    report = magr_onnx.optimize(tmp_path / "m.onnx", output=tmp_path / "q.onnx", max_memory="10MB").report
    assert report.check is None
    assert not any("compared" in note for note in report.notes)


@pytest.mark.parametrize("make", [decoders.genai, decoders.optimum])
def test_a_decoder_is_fed_tokens_behind_an_empty_past(make: Callable[[], ir.Model]) -> None:
    feed = next(feeds_for(make(), None))
    past = [array.shape for name, array in feed.items() if name.startswith("past")]
    assert feed["input_ids"].shape == (1, 8)
    assert set(past) == {(1, decoders.KV_HEADS, 0, decoders.SIZE)}
    assert magr_onnx.optimize(make(), bits=8).report.check is not None


def test_sizes_that_are_not_declared() -> None:
    text = """g (float[n, 3, h, w] image, int64[batch, t] mask, float[2, m, 64] state, float[n, 3, 8, t] other) => (float[n, 3, h, w] y) {
        y = Relu(image)
    }"""
    first = next(feeds_for(ir.from_proto(model(text)), "mask"))
    shapes = {"image": (1, 3, 64, 64), "mask": (1, 8), "state": (2, 1, 64), "other": (1, 3, 8, 8)}
    assert {name: array.shape for name, array in first.items()} == shapes
    assert first["mask"].all()


def test_indices_are_any_rows_of_their_table() -> None:
    text = """g (int32[n, t] ids, int64[n, t] type, int64[n, t] other) => (float[n, t, 16] y) {
        wide = Cast<to = 7>(ids) a = Gather(table, wide) b = Gather(small, type) c = Cast<to = 1>(other) e = Unsqueeze(c, last)
        z = Add(a, b) y = Add(z, e)
    }"""
    proto = model(text, table=constant("table", 50, 16), small=constant("small", 3, 16), last=np.array([2]))
    feeds = list(feeds_for(ir.from_proto(proto), None))
    for feed in feeds[: len(feeds) // 2]:
        assert feed["ids"].max() < 50
    assert feeds[1]["ids"].max() > 30
    assert feeds[1]["ids"].dtype == np.int32
    assert {name: set(feeds[1][name].ravel()) for name in ("type", "other")} == {"type": {0, 1, 2}, "other": {0, 1}}
    assert all(feed["ids"].max() < 2 for feed in feeds[len(feeds) // 2 :])


def test_text_is_of_different_letters() -> None:
    """A table of words that are none of a model's takes all of them for the same, and models would be compared on one input."""
    reader = ir.from_proto(model("g (string[n, t] text) => (string[n, t] y) { y = Identity(text) }"))
    feeds = [next(feeds_for(reader, None, seed)) for seed in (0, 1)]
    assert all(len(set(feed["text"].ravel())) > 4 for feed in feeds)
    assert feeds[0]["text"].tolist() != feeds[1]["text"].tolist()
    assert {type(word) for word in feeds[0]["text"].ravel()} == {str}
