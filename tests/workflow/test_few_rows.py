"""Layers with far fewer calibration rows than inputs: their results are those of the whole Gram matrix, in little memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core import gram
from magr_onnx.core.gram import RowGram, dense
from magr_onnx.core.types import LayerStats
from magr_onnx.passes.layers.conv import find as find_convolutions
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import conv_patches
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.moments import collect
from magr_onnx.runtime.calibration.staged import Schedule, staged
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Builder, random

WIDE, SAMPLES = 1024, 60


def features() -> ir.Model:
    """A convolution, and a layer on all it gives, as in small models of keywords; then a sum with what went in, and another layer."""
    b = Builder()
    x = b.input("x", ["batch", 4, 16])
    conv = b.node("Conv", [x, b.constant("kernel", random(64, 4, 3)), b.constant("kernel_bias", random(64, seed=1))], "conv", pads=[1, 1])
    flat = b.node("Flatten", [b.node("Relu", [conv], "relu")], "flat")
    wide = b.node("Gemm", [flat, b.constant("w1", random(WIDE, 64, seed=2, scale=0.05)), b.constant("b1", random(64, seed=3))], "wide")
    summed = b.node("Add", [wide, b.node("Flatten", [x], "flat_x")], "sum")
    return b.model(b.node("MatMul", [b.node("Relu", [summed], "top"), b.constant("w2", random(64, 8, seed=4))], "head"), ["batch", 8])


def samples(count: int = SAMPLES, seed: int = 0) -> np.ndarray:
    return random(count, 4, 16, seed=seed, scale=1.0)


def data_of(model: ir.Model, feeds: list[dict[str, Any]]) -> Batches:
    with Session(model) as session:
        return open_data(feeds, session.inputs)


def close(found: LayerStats, rows: np.ndarray) -> None:
    assert found.rows == len(rows)
    expected = rows.astype(np.float64).T @ rows / len(rows)
    np.testing.assert_allclose(dense(found.gram), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_rows_are_gathered_instead_of_their_matrix() -> None:
    model = graphs.matmul(WIDE, 8)
    feeds = [{"x": random(2, 3, WIDE, seed=s, scale=1.0)} for s in range(8)]
    rows = [f["x"].reshape(-1, WIDE) for f in feeds]
    found = collect(model, find(model)[0], CalibrationContext(data_of(model, feeds), hold_out=HoldOut())).stats["x"]
    assert isinstance(found.gram, RowGram)
    close(found, np.concatenate(rows))
    assert isinstance(found.folds[0].gram, RowGram)
    close(found.folds[0], np.concatenate([rows[3], rows[7]]))
    close(found.without(0), np.concatenate([rows[i] for i in range(8) if i % 4 != 3]))


def test_rows_that_a_mask_leaves_out_do_not_count() -> None:
    model = graphs.masked(WIDE)
    masks = [np.tile(np.arange(5) < 3 + s % 2, (2, 1)).astype(np.int64) for s in range(6)]
    feeds = [{"x": random(2, 5, WIDE, seed=s), "attention_mask": mask} for s, mask in enumerate(masks)]
    found = collect(model, find(model)[0], CalibrationContext(data_of(model, feeds), "attention_mask")).stats["x"]
    assert isinstance(found.gram, RowGram)
    close(found, np.concatenate([f["x"][f["attention_mask"] != 0] for f in feeds]))


def test_more_rows_than_the_first_batch_promised_make_a_matrix() -> None:
    model = graphs.matmul(WIDE, 8)
    feeds = [{"x": random(1, 1 if s == 0 else 150, WIDE, seed=s)} for s in range(4)]
    found = collect(model, find(model)[0], CalibrationContext(data_of(model, feeds))).stats["x"]
    assert isinstance(found.gram, np.ndarray)
    close(found, np.concatenate([f["x"].reshape(-1, WIDE) for f in feeds]))


def test_stages_keep_rows_and_targets_of_both_models() -> None:
    model = features()
    quantized = model.clone()
    weight = quantized.graph.initializers["kernel"]
    weight.const_value = ir.tensor(np.round(weight.const_value.numpy() * 8) / 8, name="kernel")  # type: ignore[union-attr]
    data = data_of(model, [{"x": part} for part in np.split(samples(), 6)])
    layers = {layer.name: layer for layer in find(quantized)[0]}
    context = CalibrationContext(data, hold_out=HoldOut.of(SAMPLES))
    (_, result), *_ = staged(model, quantized, [layers["wide"]], context, Schedule(changed=["conv_out"]))
    found, target = result.stats["flat_out"], result.targets["wide"]
    assert isinstance(found.gram, RowGram)
    values = []
    for each in (model, quantized):
        copy = each.clone()
        copy.graph.outputs.append(next(n.outputs[0] for n in copy.graph if n.name == "flat"))
        with Session(copy) as session:
            values.append(np.concatenate([session.run(batch)[1] for batch in data]))
    real, seen = values
    close(found, seen)
    y = real @ model.graph.initializers["w1"].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(target.cross[:, :], seen.T @ y / len(y), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(target.mean, y.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(target.power, np.square(y).mean(axis=0), rtol=1e-3)
    assert len(target.folds) == len(found.folds) > 0


def covering(op: str, group: int) -> ir.Model:
    """A convolution of 1280 inputs a group whose kernel covers the whole image, or a transposed one from a single pixel."""
    b = Builder()
    shape, kernel = ((64 * group, 4, 5), (8 * group, 64, 4, 5)) if op == "Conv" else ((320 * group, 1, 1), (320 * group, 8, 2, 2))
    x = b.input("x", ["batch", *shape])
    y = b.node(op, [x, b.constant("w", random(*kernel, scale=0.05)), b.constant("b", random(8 * group, seed=1))], "cover", group=group)
    return b.model(b.node("Flatten", [y], "flat"), ["batch", 8 * group * (1 if op == "Conv" else 4)])


def images(model: ir.Model, count: int) -> np.ndarray:
    shape = model.graph.inputs[0].shape
    assert shape is not None
    return random(count, *(int(d) for d in list(shape)[1:]), scale=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [1, 2])
def test_few_patches_of_convolutions_are_kept(group: int) -> None:
    model = covering("Conv", group)
    x = images(model, 40)
    data = data_of(model, [{"x": part} for part in np.split(x, 8)])
    found = conv_patches.collect(model, find_convolutions(model)[0], data)["cover"]
    assert len(found) == group
    for stats, rows in zip(found, x.reshape(40, group, -1).swapaxes(0, 1), strict=True):
        assert isinstance(stats.gram, RowGram)
        close(stats, rows)
        assert sum(fold.rows for fold in stats.folds) == 10  # two batches: of so many inputs one part is held out
        assert all(isinstance(fold.gram, RowGram) for fold in stats.folds)


@pytest.mark.parametrize(("op", "group"), [("Conv", 1), ("Conv", 2), ("ConvTranspose", 1), ("ConvTranspose", 2)])
def test_patches_of_convolutions_are_those_of_the_matrix(op: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = covering(op, group)
    x = images(model, 40)
    data = data_of(model, [{"x": part} for part in np.split(x, 8)])
    found = conv_patches.collect(model, find_convolutions(model)[0], data)["cover"]
    monkeypatch.setattr(gram, "LEAST_WIDTH", 10**6)
    expected = conv_patches.collect(model, find_convolutions(model)[0], data)["cover"]
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a.gram, RowGram)
        assert isinstance(b.gram, np.ndarray)
        np.testing.assert_allclose(dense(a.gram), b.gram, rtol=1e-4, atol=1e-5 * np.abs(b.gram).max())
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-4, atol=1e-5)
        assert (a.rows, [fold.rows for fold in a.folds]) == (b.rows, [fold.rows for fold in b.folds])


@pytest.mark.parametrize("options", [{}, pytest.param({"format": "qdq-int8"}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("op", ["Conv", pytest.param("ConvTranspose", marks=pytest.mark.slow)])
def test_convolutions_of_few_patches_are_solved_as_under_the_matrix(
    op: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, errors = covering(op, 1), []
    for least in (WIDE, 10**6):
        monkeypatch.setattr(gram, "LEAST_WIDTH", least)
        report = magr_onnx.optimize(model.clone(), {"x": images(model, 60)}, progress=False, **options).report
        errors += [row.error for row in report.layers]
    assert len(errors) == 2
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": {"effort": "balanced"},
    "fast": {"effort": "fast"},
    "per channel": {"effort": "balanced", "block_size": "channel", "bits": 3, "bias": "any"},
    "gradients": {"effort": "best"},
    "low rank": {"effort": "fast", "low_rank": 4},
    "size": {"target_size": "40%"},
    "equalize": {"pipeline_text": "equalize,magr{method=authors,relative=false},quantize{method=gptq},compensate-bias,emit-qdq"},
    "outputs": {"pipeline_text": "split-outliers,output-hessian,quantize{method=auto,bits=3},emit-matmulnbits"},
    "qdq-int8": {"format": "qdq-int8"},
    "dynamic-int8": {"format": "dynamic-int8"},
    "accumulator": {"format": "dynamic-int8", "target": "x86-avx2"},
}


USUAL = ("balanced", "outputs", "qdq-int8", "accumulator")


@pytest.mark.parametrize("name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS])
def test_results_are_those_of_the_whole_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, outputs, errors = samples(400, 1), [], []
    with Session(features()) as session:
        expected = session.run({"x": fresh})[0]
    for least in (WIDE, 2 * WIDE):
        monkeypatch.setattr(gram, "LEAST_WIDTH", least)
        model, report = magr_onnx.optimize(features(), {"x": samples()}, progress=False, **OPTIONS[name])
        with Session(ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model) as session:
            outputs.append(session.run({"x": fresh})[0])
        errors.append({row.name: row.error for row in report.layers})
    assert errors[0].keys() == errors[1].keys()
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    losses = [float(np.square(output - expected).sum()) for output in outputs]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_matrix_of_few_rows_makes_no_model_large() -> None:
    """Its convolution would go without data where the memory for the matrix made it so: 24 bytes an entry."""
    report = magr_onnx.optimize(features(), {"x": samples()}, format="dynamic-int8", max_memory="10MB", progress=False).report
    assert not any("data-free" in note for note in report.notes), report.notes
    assert report.check is not None
