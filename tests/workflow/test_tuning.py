"""Tuning of scales in whole runs: the bundled language model, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import OptionError
from magr_onnx.models import bundled
from magr_onnx.passes.emit.readback import read_weights
from magr_onnx.runtime.calibration import scale_tuning
from magr_onnx.runtime.measure.validate import log_softmax
from magr_onnx.runtime.ort.session import Session
from magr_onnx.workflow import tuning
from tests import graphs
from tests.graphs import Array, Builder, random


def ids(path: Path, count: int) -> Array:
    return np.asarray(np.load(path)["input_ids"][:count])


def divergence(model: ir.Model, tokens: Array) -> float:
    """Mean Kullback-Leibler divergence from the float model."""
    with Session(bundled.MODEL) as reference, Session(model) as session:
        p, q = (log_softmax(np.asarray(s.run({"input_ids": tokens})[0], np.float64)) for s in (reference, session))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"bits": 2}, 0.95),
        pytest.param({"bits": 3, "block_size": "channel"}, 0.97, marks=pytest.mark.slow),
        pytest.param({"bits": 4, "format": "qdq", "symmetric": True}, 0.99, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tuned_scales_lower_the_divergence_on_new_text(options: dict[str, object], most: float) -> None:
    calibration, new = {"input_ids": ids(bundled.CALIBRATION, 32)}, ids(bundled.HELD_OUT, 8)
    plain = magr_onnx.optimize(bundled.MODEL, calibration, quantizer="comq", **options)  # type: ignore[arg-type]
    tuned = magr_onnx.optimize(bundled.MODEL, calibration, quantizer="comq", tune_scales=True, **options)  # type: ignore[arg-type]
    assert divergence(tuned.model, new) < most * divergence(plain.model, new)
    assert tuned.report.verified == plain.report.verified
    assert [row.name for row in tuned.report.layers] == [row.name for row in plain.report.layers]
    assert any(note.startswith("scales of ") for note in tuned.report.notes)
    before, after = read_weights(plain.model), read_weights(tuned.model)
    for name, weight in before.items():  # the same codes: a factor a group and channel
        nonzero = np.abs(weight) > 1e-6
        ratios = np.where(nonzero, after[name] / np.where(nonzero, weight, 1), np.nan)
        assert np.nanmax(np.abs(ratios - 1)) < 0.5
        assert ((after[name] == 0) == (weight == 0)).all()


def test_files_are_read_back_with_the_tuned_scales(tmp_path: Path) -> None:
    data = [{"x": random(4, 3, graphs.K, seed=i, scale=1.0)} for i in range(8)]
    out = tmp_path / "out.onnx"
    model, report = magr_onnx.optimize(graphs.matmul_bias(), data, output=out, bits=2, tune_scales=True, include=["*"])
    assert report.verified == 1
    (in_memory,), (in_file,) = (read_weights(m).values() for m in (model, ir.load(out)))
    np.testing.assert_array_equal(in_memory, in_file)
    assert "tune-scales" in ir.load(out).metadata_props["onnx_magr.pipeline"]


@pytest.mark.parametrize(
    ("source", "data", "said"),
    [
        (graphs.matmul, None, "there are no calibration data"),
        (graphs.matmul, [{"x": random(1, 3, graphs.K)}] * 2, "that takes 4 samples or batches at least"),
        (lambda: graphs.matmul(dtype=np.float16), [{"x": random(4, 3, graphs.K, dtype=np.float16)}] * 4, "no layer has float32 scales"),
    ],
    ids=["no data", "few", "float16"],
)
def test_why_nothing_was_tuned(source: object, data: object, said: str) -> None:
    assert callable(source)
    _, report = magr_onnx.optimize(source(), data, bits=2, tune_scales=True, include=["*"])  # type: ignore[arg-type]
    (note,) = [note for note in report.notes if "tuned" in note]
    assert note.startswith("scales were not tuned: ")
    assert said in note


def test_a_limit_of_memory_is_kept_and_what_tuning_takes_is_said() -> None:
    data, most = [{"x": random(4, 3, graphs.K, seed=i)} for i in range(8)], 5_000
    _, report = magr_onnx.optimize(graphs.matmul(), data, quantizer="rtn", bits=2, tune_scales=True, include=["*"], max_memory=most)
    assert any(note.startswith("scales were not tuned: the run would take about 0.0 GB; a higher max_memory") for note in report.notes)


def test_what_an_effort_tunes_is_within_the_usual_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A given limit holds for all; the usual one, which running a model as a whole may exceed, for what was not asked for."""
    data = [{"x": random(4, 3, graphs.K, seed=i)} for i in range(8)]

    def said(each: float, **options: object) -> bool:
        monkeypatch.setattr(scale_tuning, "OUTPUTS", each)
        _, report = magr_onnx.optimize(graphs.matmul(), data, bits=2, include=["*"], **options)  # type: ignore[arg-type]
        return any("a higher max_memory allows it" in note for note in report.notes)

    gigabyte = 1e9
    assert [said(20), said(gigabyte), said(gigabyte, tune_scales=True), said(gigabyte, effort="best")] == [False, True, False, False]
    assert said(gigabyte, tune_scales=True, max_memory="5GB")
    monkeypatch.setattr(tuning, "BESIDE", 10_000_000)  # a given limit is that of the whole run
    assert [said(20), said(20, max_memory="5GB")] == [False, True]


def test_without_data_nothing_is_said_of_tuning_that_was_not_asked_for() -> None:
    _, report = magr_onnx.optimize(graphs.matmul(), bits=2, include=["*"])
    assert not any("tuned" in note for note in report.notes)


def test_operators_without_a_derivative_are_named() -> None:
    b = Builder()
    first = b.node("MatMul", [b.input("x", ["batch", 32]), b.constant("w1", random(32, 32))], "first")
    cut = b.node("CumSum", [first, b.constant("axis", np.array(1))])
    model = b.model(b.node("MatMul", [cut, b.constant("w2", random(32, 32, seed=1))], "second"), ["batch", 32])
    data = {"x": random(64, 32, scale=1.0)}
    _, report = magr_onnx.optimize(model, data, bits=2, quantizer="rtn", tune_scales=True, include=["*"])
    (note,) = [note for note in report.notes if "tuned" in note]
    assert note.endswith("not before CumSum, which cannot be differentiated")


def test_models_of_labels_alone_have_no_loss() -> None:
    b = Builder()
    product = b.node("MatMul", [b.input("x", ["batch", 32]), b.constant("w", random(32, 8))], "layer")
    labels = b.node("ArgMax", [product], axis=1, keepdims=0)
    labels.dtype = ir.DataType.INT64
    model = b.model(labels, ["batch"])
    _, report = magr_onnx.optimize(model, {"x": random(64, 32)}, bits=2, quantizer="rtn", tune_scales=True, include=["*"])
    assert "scales were not tuned: no output has floats" in report.notes


def test_layers_with_8_bit_inputs_are_refused() -> None:
    with pytest.raises(OptionError, match="tune-scales is for layers with float inputs"):
        magr_onnx.optimize(graphs.matmul(), tune_scales=True, format="dynamic-int8")


def test_efforts_tune_few_bits() -> None:
    def tunes(**options: object) -> bool:
        return magr_onnx.build_pipeline(**options).tuning is not None  # type: ignore[arg-type]

    assert tunes(effort="best")
    assert tunes(effort="best", bits=4, format="qdq")
    assert tunes(tune_scales=True, bits=8)
    assert tunes(bits=3)
    assert tunes(bits=2)
    assert not tunes()
    assert not tunes(bits=2, quantizer="gptq")
    assert not tunes(bits=2, effort="fast")
    assert not tunes(bits=2, tune_scales=False)
    assert not tunes(bits=2, format="dynamic-int8")
    assert not tunes(effort="best", bits=8)
    assert not tunes(effort="best", tune_scales=False)
    assert not tunes(effort="best", format="qdq-int8")
