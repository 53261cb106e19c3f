"""Models that take a fixed number of samples at a time: every sample is fed, and counts once, wherever sums are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magr_onnx
from magr_onnx.errors import CalibrationError
from magr_onnx.passes.layers import conv
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import activation_ranges, conv_patches, fisher
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.moments import collect
from magr_onnx.runtime.calibration.staged import Schedule, staged
from magr_onnx.runtime.data import fixed_batch
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.runtime.ort.session import InputInfo, inputs_of
from tests.graphs import Array, Builder, random

K, SIZE = 16, 8
SAMPLES = [20, 4, 8, 3, 7, 1, 23]


@given(st.integers(0, 200), st.integers(1, 24), st.booleans())
def test_groups_have_every_sample_once(samples: int, size: int, fixed: bool) -> None:
    found = fixed_batch.groups(samples, size, fixed)
    assert sorted(i for g in found for i in range(g.start, g.start + g.count)) == list(range(samples))
    assert all(g.count * g.repeats == size if fixed else g.repeats == 1 and g.count <= size for g in found)
    if samples >= 4 * size:  # so few are filled that they cost little
        assert len(found) <= samples // size + size
    elif not fixed:
        assert min(samples, 4) <= len(found) < 8  # parts of which are held out
    else:
        assert min(samples, 4) <= len(found)
    numbers = np.arange(samples)
    total = sum(float(g.of(numbers).sum()) * g.weight for g in found)
    assert total == pytest.approx(numbers.sum())


def model(size: int | str, name: str = "logits") -> ir.Model:
    b = Builder()
    x = b.input("x", [size, 6, K])
    hidden = b.node("Tanh", [b.node("MatMul", [x, b.constant("w0", random(K, 24, seed=1))], "first")], "tanh")
    return b.model(b.node("MatMul", [hidden, b.constant("w1", random(24, 8, seed=2))], "second"), [size, 6, 8], name)


def samples_of(count: int, seed: int = 0) -> Array:
    """Samples that differ in size, so that one counted twice, or not at all, shows."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, 6, K)) * rng.uniform(0.2, 3, (count, 1, 1))).astype(np.float32)


def fixed(count: int) -> tuple[ir.Model, Batches]:
    made = model(SIZE)
    return made, open_data({"x": samples_of(count)}, inputs_of(made))


@pytest.mark.parametrize("count", SAMPLES)
def test_statistics_are_those_of_all_samples_once(count: int) -> None:
    made, data = fixed(count)
    assert data.samples == count
    rows = samples_of(count).reshape(-1, K).astype(np.float64)
    expected = rows.T @ rows / len(rows)
    context = CalibrationContext(data)
    stages = [found.stats for _, found in staged(made, made, find(made)[0], context, Schedule(feedback=False))]
    for stats in (collect(made, find(made)[0], context).stats["x"], stages[0]["x"]):
        assert stats.rows == len(rows)
        np.testing.assert_allclose(stats.gram, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(stats.mean, rows.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [20, 23, 70])
def test_targets_and_held_out_rows_count_once(count: int) -> None:
    made, data = fixed(count)
    work = made.clone()
    x = samples_of(count)
    groups = fixed_batch.groups(count, SIZE, True)
    held_out = [3, 2, 1, 0] if count <= 64 else [3]  # of every four batches; of few samples all of them in turn
    folds = [np.concatenate([x[g.start : g.start + g.count] for g in groups[at::4]]) for at in held_out]
    for (layer,), found in staged(made, work, find(work)[0], CalibrationContext(data)):
        weights = layer.read()
        if layer.name == "second":
            inputs, real = (np.tanh(x @ random(K, 24, seed=1) * f).reshape(-1, 24).astype(np.float64) for f in (0.5, 1))
            goal, stats = found.targets["second"], found.stats["tanh_out"]
            assert goal.rows == stats.rows == 6 * count
            assert [fold.rows for fold in stats.folds] == [fold.rows for fold in goal.folds] == [6 * len(fold) for fold in folds]
            for rows, fold in zip(folds, stats.folds, strict=True):
                before = np.tanh(rows @ random(K, 24, seed=1) * 0.5).reshape(-1, 24).astype(np.float64)
                np.testing.assert_allclose(fold.gram, before.T @ before / len(before), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(stats.gram, inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(goal.mean, (real @ weights).mean(axis=0), rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(goal.power, np.square(real @ weights).mean(axis=0), rtol=1e-3, atol=1e-4)
        layer.write(0.5 * weights, None)  # what stands before the second layer is another one then


@pytest.mark.parametrize("count", SAMPLES)
def test_ranges_are_chosen_on_all_samples_once(count: int) -> None:
    made, data = fixed(count)
    free, x = model("batch"), samples_of(count)
    parts = [{"x": x[g.start : g.start + g.count]} for g in fixed_batch.groups(count, SIZE, True)]  # the same are judged together
    whole = open_data(parts, inputs_of(free))
    expected, found = (
        activation_ranges.choose(m, activation_ranges.inputs_of(find(m)[0]), CalibrationContext(d))["x"]
        for m, d in ((free, whole), (made, data))
    )
    assert found.method == expected.method
    assert found.grid == expected.grid
    assert found.errors == pytest.approx(expected.errors, rel=1e-3)


@pytest.mark.parametrize("count", SAMPLES)
def test_convolutions_count_every_sample_once(count: int) -> None:
    b = Builder()
    x = b.input("x", [SIZE, 3, 9, 9])
    made = b.model(b.node("Conv", [x, b.constant("w", random(5, 3, 3, 3))], "conv", kernel_shape=[3, 3]), [SIZE, 5, 7, 7])
    images = np.random.default_rng(0).standard_normal((count, 3, 9, 9)).astype(np.float32) * np.arange(1, count + 1)[:, None, None, None]
    images = images.astype(np.float32)
    found = conv_patches.collect(made, conv.find(made)[0], open_data({"x": images}, inputs_of(made)))["conv"][0]
    patches = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    expected = patches.T.astype(np.float64) @ patches / len(patches)
    assert found.rows == len(patches)
    np.testing.assert_allclose(found.gram, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_gradients_count_every_sample_once() -> None:
    """Of many copies of the samples, so that the noise of random gradients is small beside a sample that counts too often."""
    made = model(SIZE, "y")
    one = samples_of(4)
    one[3] *= 4
    layers = find(made)[0]
    with (
        fisher.collect(made, layers, open_data({"x": np.concatenate([one, one] * 8)}, inputs_of(made))) as full,
        fisher.collect(made, layers, open_data([{"x": one}] * 16, inputs_of(made))) as repeated,
    ):
        a, b = (f.moments(str(layers[0].output.name)) for f in (full, repeated))
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a / a.trace(), b / b.trace(), atol=0.1 * float((a / a.trace()).max()))


@pytest.mark.parametrize("count", SAMPLES)
def test_validation_judges_every_sample_once(count: int) -> None:
    """Metrics of a fixed model are those of the same model that takes any number of samples."""
    data = {"x": samples_of(count, seed=3)}
    pairs = []
    for size in (SIZE, "batch"):
        floats = model(size)
        quantized, _ = magr_onnx.optimize(floats, None, bits=3, quantizer="rtn", progress=None)
        pairs.append(magr_onnx.validate(floats, quantized, data, latency=False, batch_size=1, progress=None))
    fixed, free = pairs
    assert fixed.samples == free.samples == count
    for name, metrics in free.arithmetics.items():
        for a, b in zip(fixed.arithmetics[name], metrics, strict=True):
            assert (a.sqnr_db, a.cosine, a.kl, a.top1) == pytest.approx((b.sqnr_db, b.cosine, b.kl, b.top1), rel=1e-4)
            assert a.max_error == pytest.approx(b.max_error, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"effort": "fast"}, {"format": "qdq-int8"}, {"target_size": "97%"}])
@pytest.mark.parametrize("count", [20, 4])  # both too few for four batches of 8
def test_optimize_uses_all_samples_and_says_so(count: int, options: dict[str, Any]) -> None:
    _, report = magr_onnx.optimize(model(SIZE), {"x": samples_of(count)}, progress=None, include=["*"], **options)
    if "target_size" not in options:  # that holds batches out
        assert [row.rows for row in report.layers] == [6 * count] * 2
    assert f"the model takes 8 samples at a time: {count} of {count} were repeated to fill batches, and count once" in report.notes
    assert f"{count} samples" in report.calibration


@pytest.mark.parametrize("folder", [False, True])
def test_batches_of_the_caller_are_filled_or_cut(folder: bool, tmp_path: Path) -> None:
    """The last batch of a loader, one of a single sample, and one of two batches; in memory, and in files."""
    x = samples_of(29)
    made = model(SIZE)
    batches = [{"x": x[:8]}, {"x": x[8:24]}, {"x": x[24:28]}, {"x": x[28:]}]
    for i, batch in enumerate(batches):
        np.savez(tmp_path / f"{i}.npz", x=batch["x"])
    data = open_data(tmp_path if folder else batches, inputs_of(made))
    assert [data.label(i)[-5:] for i in (1, 2)] == (["1.npz"] * 2 if folder else ["tch 1"] * 2)
    assert [b["x"].shape for b in data] == [(SIZE, 6, K)] * 5
    assert data.weights == (1, 1, 1, 0.5, 0.125)
    assert data.samples == 29
    stats = collect(made, find(made)[0], CalibrationContext(data)).stats["x"]
    assert stats.rows == 29 * 6


def test_batches_that_do_not_fit_otherwise_are_refused_as_given() -> None:
    inputs = (InputInfo("x", np.dtype("float32"), (1, 3, K)),)
    for array in (np.zeros((3, K), np.float32), np.zeros((2, 4, K), np.float32)):
        with pytest.raises(CalibrationError, match=rf"x is float32 \({', '.join(map(str, array.shape))}\)"):
            open_data([{"x": array}], inputs)


def test_a_selection_keeps_the_weights() -> None:
    _, data = fixed(36)
    assert data.select([0, 2]).weights == (0.5, 1)
    assert data.limit(2).weight(0) == 0.5
    assert [index for index in range(9) if index in HoldOut()] == [3, 7]


def test_a_selection_knows_its_samples() -> None:
    """Those of batches of four, three of them, and of batches of a fixed size of which the last is filled."""
    free = open_data([{"x": np.zeros((rows, 6, K), np.float32)} for rows in (4, 4, 3)], inputs_of(model("n")))
    assert [free.select(at).samples for at in ([0, 1, 2], [2], [0, 2], [])] == [11, 3, 7, None]
    made = model(SIZE)
    filled = open_data([{"x": np.zeros((SIZE, 6, K), np.float32)}, {"x": np.zeros((1, 6, K), np.float32)}], inputs_of(made))
    assert [filled.select(at).samples for at in ([0], [1], [0, 1])] == [SIZE, 1, SIZE + 1]


def test_few_samples_stay_few_without_those_that_a_budget_is_measured_on() -> None:
    _, data = fixed(36)
    rest = Split.of(data).rest
    assert rest.samples is not None
    assert rest.samples < 36
    assert HoldOut.of(rest.samples) == HoldOut.of(36)


def test_held_out_batches_are_as_full_as_there_are() -> None:
    for samples in (97, 113, 31, 161):
        groups = fixed_batch.groups(samples, 32, True)
        held_out = [group.count for i, group in enumerate(groups) if i in HoldOut()]
        assert len(held_out) == len(groups) // 4 >= 1
        assert set(held_out) == {max(group.count for group in groups)}


@pytest.mark.parametrize("size", [1, 2, 8, 32])
@pytest.mark.parametrize("samples", [4, 5, 6, 7, 16, 31, 63, 64])
def test_every_fold_of_few_samples_has_some(samples: int, size: int) -> None:
    hold_out = HoldOut.of(samples)
    for fixed in (False, True):
        in_parts = [0] * hold_out.parts
        for i, group in enumerate(fixed_batch.groups(samples, size, fixed)):
            in_parts[hold_out.part(i)] += group.count
        assert sum(in_parts) == samples
        assert min(in_parts) >= 1
        assert max(in_parts) <= samples // 2 + 1  # there is something left to solve with


def test_a_batch_of_no_samples_is_refused() -> None:
    made = model(SIZE)
    with pytest.raises(CalibrationError, match=r"\(0, 6, 16\)"):
        open_data([{"x": samples_of(4)}, {"x": samples_of(0)}], inputs_of(made))


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize("count", [1, 4])
def test_values_without_a_batch_axis_have_rows_in_filled_batches(count: int, effort: str) -> None:
    """A timestep is one row a batch, of which a filled batch counts only a part."""
    b = Builder()
    x, step = b.input("x", [SIZE, 6, K]), b.input("step", [])
    embedded = b.node("Mul", [step, b.constant("frequencies", random(1, K, seed=3))], "embed")
    hidden = b.node("Tanh", [b.node("MatMul", [embedded, b.constant("w0", random(K, K, seed=1))], "time_in")], "tanh")
    scale = b.node("MatMul", [hidden, b.constant("w1", random(K, 8, seed=2))], "time_out")
    made = b.model(b.node("Add", [b.node("MatMul", [x, b.constant("w2", random(K, 8, seed=4))], "body"), scale]), [SIZE, 6, 8])
    data = [{"x": samples_of(1, seed=i), "step": np.float32(0.3 * i + 0.1)} for i in range(count)]
    report = magr_onnx.optimize(made, data, effort=effort).report
    assert {row.name: row.rows for row in report.layers}["time_in"] >= 1
    assert not any("data-free" in note for row in report.layers for note in row.notes)
