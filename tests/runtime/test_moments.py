"""Statistics gathered inside the graph, and the sources of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from magr_onnx.errors import CalibrationError, NonFiniteError
from magr_onnx.passes import find
from magr_onnx.passes.instrument.taps import Tap, gram_taps
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import resolve_mask
from magr_onnx.runtime.calibration.moments import collect, grouped, split_by_budget
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.ort.session import InputInfo, Session
from tests import graphs
from tests.graphs import K, correlated, feeds

INPUTS = (InputInfo("x", np.dtype("float32"), (None, None, K)),)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return rows.T @ rows / len(rows), rows.mean(axis=0)


@pytest.mark.parametrize("opset", [11, 13, 18, 20, 21])
def test_gram_and_mean_equal_numpy(opset: int) -> None:
    model = graphs.matmul(opset=opset)
    batches = [feeds(model, rows=r, time=t, seed=r) for r, t in ((4, 3), (2, 7), (1, 1))]
    layers, _ = find(model)
    stats = collect(model, layers, CalibrationContext(open_data(batches, INPUTS))).stats["x"]
    rows = np.concatenate([b["x"].reshape(-1, K) for b in batches])
    gram, mean = moments(rows)
    assert stats.rows == len(rows)
    np.testing.assert_allclose(stats.gram, gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-4, atol=1e-5)
    assert stats.gram.dtype == np.float64


def test_half_precision_inputs_are_summed_in_float32() -> None:
    model = graphs.matmul(dtype=np.float16)
    x = feeds(model)
    layers, _ = find(model)
    inputs = (InputInfo("x", np.dtype("float16"), (None, None, K)),)
    stats = collect(model, layers, CalibrationContext(open_data([x], inputs))).stats["x"]
    gram, _ = moments(x["x"])
    np.testing.assert_allclose(stats.gram, gram, rtol=1e-4, atol=1e-5 * np.abs(gram).max())


def test_padded_rows_do_not_count() -> None:
    model = graphs.masked()
    x = feeds(model, rows=5, time=4)
    with Session(model) as session:
        data = open_data([x], session.inputs)
    layers, _ = find(model)
    result = collect(model, layers, CalibrationContext(data, "attention_mask"))
    kept = x["x"][x["attention_mask"] != 0]
    gram, mean = moments(kept)
    assert list(result.stats) == ["x", "pool_out"] or len(result.stats) == 2  # two layers share x
    assert result.stats["x"].rows == len(kept)
    np.testing.assert_allclose(result.stats["x"].gram, gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())
    np.testing.assert_allclose(result.stats["x"].mean, mean, rtol=1e-4, atol=1e-5)
    (pooled,) = result.unmasked  # (batch, K) rows are not (batch, time) rows
    assert result.stats[pooled].rows == 5


def test_mask_that_leaves_nothing_is_an_error() -> None:
    model = graphs.masked()
    x = feeds(model)
    x["attention_mask"][:] = 0
    with Session(model) as session:
        data = open_data([x], session.inputs)
    with pytest.raises(CalibrationError, match="leaves no rows"):
        collect(model, find(model)[0], CalibrationContext(data, "attention_mask"))


def test_mask_names() -> None:
    model = graphs.masked()
    assert resolve_mask(model, "auto") == "attention_mask"
    assert resolve_mask(model, "none") is resolve_mask(model, None) is None
    assert resolve_mask(graphs.matmul(), "auto") is None
    with pytest.raises(CalibrationError, match="its inputs are x, attention_mask"):
        resolve_mask(model, "mask")


def test_layers_share_what_they_read_and_activations_stay_inside() -> None:
    model = graphs.masked()
    layers, _ = find(model)
    assert [layer.reads for layer in layers][:2] == ["x", "x"]
    tapped = gram_taps(model, [Tap("x", K)])
    assert [list(o.shape.numpy()) if o.shape is not None and o.shape.is_static() else None for o in tapped.graph.outputs] != [[K]]
    with Session(tapped) as session:
        gram, total, rows = session.run(feeds(model))
    assert (gram.shape, total.shape, rows.shape) == ((K, K), (K,), (2,))
    assert [v.name for v in model.graph.outputs] == ["y", "mask_out"]  # the model itself is untouched


def test_plan_bounds_memory_and_keeps_sharing() -> None:
    model = graphs.masked()
    layers, _ = find(model)
    assert [[layer.name for layer in g] for g in grouped(layers)] == [["first", "second", "head"]]
    assert [[layer.name for layer in g] for g in grouped(layers, budget=16 * K * K)] == [["first", "second"], ["head"]]
    assert [len(g) for g in grouped(layers, budget=1)] == [2, 1]


def test_non_finite_activations_name_the_layers() -> None:
    model = graphs.masked()
    x = feeds(model)
    x["x"][0, 0, 0] = 1e30  # finite, but its square is not
    x["attention_mask"][:] = 1
    with Session(model) as session:
        data = open_data([x], session.inputs)
    with pytest.raises(NonFiniteError, match="input of first, second"):
        collect(model, find(model)[0], CalibrationContext(data))


class Reader:
    """A CalibrationDataReader by shape."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def test_sources_give_the_same_statistics(tmp_path: Path) -> None:
    model = graphs.matmul()
    x = correlated(24, K).reshape(8, 3, K)
    np.savez(tmp_path / "stacked.npz", x=x)
    folder = tmp_path / "batches"
    folder.mkdir()
    np.savez(folder / "0.npz", x=x[:5])
    np.savez(folder / "1.npz", x=x[5:].reshape(1, 9, K))
    for i, part in enumerate((x[:2], x[2:])):
        sample = tmp_path / "model" / f"test_data_set_{i}"
        sample.mkdir(parents=True)
        (sample / "input_0.pb").write_bytes(numpy_helper.from_array(part).SerializeToString())
    sources: list[Any] = [
        tmp_path / "stacked.npz",
        str(folder),
        tmp_path / "model",
        Reader([{"x": x[:1]}, {"x": x[1:]}]),
        [{"x": x}],
        {"x": x},
        ({"x": x[i : i + 1]} for i in range(8)),
    ]
    gram, mean = moments(x)
    for source in sources:
        stats = collect(model, find(model)[0], CalibrationContext(open_data(source, INPUTS, batch_size=3))).stats["x"]
        assert stats.rows == 24
        np.testing.assert_allclose(stats.gram, gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-4, atol=1e-5)


def test_stacked_inputs_follow_a_fixed_batch_dimension(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((7, 3, K), np.float32))
    data = open_data(tmp_path / "x.npz", (InputInfo("x", np.dtype("float32"), (2, 3, K)),), batch_size=16)
    assert [b["x"].shape for b in data] == [(2, 3, K)] * 7  # three batches and a half would be too few to hold some out
    assert data.weights == (0.5,) * 7
    assert data.samples == 7
    np.savez(tmp_path / "more.npz", x=np.zeros((11, 3, K), np.float32))
    data = open_data(tmp_path / "more.npz", (InputInfo("x", np.dtype("float32"), (2, 3, K)),), batch_size=16)
    assert [b["x"].shape for b in data] == [(2, 3, K)] * 6
    assert data.weights == (0.5, 1, 1, 1, 1, 1)
    assert data.samples == 11


def test_every_misfit_is_listed_with_both_sides() -> None:
    inputs = (
        InputInfo("ids", np.dtype("int64"), (None, 4)),
        InputInfo("mask", np.dtype("int64"), (None, 4)),
    )
    batches = [
        {"ids": np.zeros((2, 4), np.float32), "mask": np.zeros((2, 5), np.int64)},
        {"ids": np.zeros((2, 4), np.int64), "labels": np.zeros(2)},
    ]
    with pytest.raises(CalibrationError) as caught:
        open_data(batches, inputs)
    message = str(caught.value)
    for part in ("ids is float32 (2, 4)", "ids: int64 (?, 4)", "mask is int64 (2, 5)", "has arrays ids, labels", "mask: int64 (?, 4)"):
        assert part in message


def test_what_is_wrong_with_every_batch_is_said_once() -> None:
    with pytest.raises(CalibrationError) as caught:
        open_data([{"input": np.zeros((2, 3, K), np.float32)}] * 40, INPUTS)
    message = str(caught.value)
    assert "the given batches, batch 0 and 39 more: has arrays input; the model's inputs are x: float32" in message
    assert message.endswith("; rename input to x")
    assert len(message.splitlines()) == 1


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_unusable_sources(tmp_path: Path) -> None:
    good = np.zeros((2, 3, K), np.float32)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "garbage.npz").write_bytes(b"hello, this is text")
    np.save(tmp_path / "single.npy", good)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    bad = tmp_path / "set" / "test_data_set_0"
    bad.mkdir(parents=True)
    (bad / "input_0.pb").write_bytes(b"\xff\xff\xff")
    cases: list[tuple[Any, str]] = [
        (tmp_path / "nothing.npz", "does not exist"),
        (tmp_path / "empty", "no .npz files and no test_data_set"),
        (tmp_path / "broken.npz", "not a readable .npz"),
        (tmp_path / "single.npz", "holds a single array"),
        (npz(tmp_path / "none.npz"), "no data"),
        (npz(tmp_path / "zero.npz", x=good[:0]), "no data"),
        (npz(tmp_path / "pickled.npz", x=np.array([{}], dtype=object)), "not a readable .npz file: it holds Python objects"),
        (
            tmp_path / "garbage.npz",
            r"garbage.npz is not an .npz file by its first bytes; numpy.savez\('inputs.npz', input_ids=ids, ...\)",
        ),
        (npz(tmp_path / "labels.npz", x=good, labels=good[:, 0, 0]), "; leave out labels: save, or give, the arrays of the inputs alone"),
        ({"x": good, "labels": good}, "the given arrays, samples from 0 and 1 more: .*; leave out labels"),
        ({"x": [[1.0], [2.0, 3.0]]}, "the given dict has an entry that is not an array"),
        (npz(tmp_path / "uneven.npz", x=good, y=good[:1]), "different numbers of samples"),
        (npz(tmp_path / "nan.npz", x=np.full_like(good, np.nan)), "NaN or infinite"),
        (__file__, "expected a .npz or .npy file"),
        (tmp_path / "set", "not a serialized ONNX tensor"),
        ([], "no data"),
        (["x"], "expected a dict"),
        (Reader([]), "no data"),
    ]
    for source, message in cases:
        with pytest.raises(CalibrationError, match=message):
            open_data(source, INPUTS)


def test_inputs_are_taken_by_name_from_test_data_sets(tmp_path: Path) -> None:
    model = graphs.masked()
    x = feeds(model)
    for i, name in enumerate(("attention_mask", "x")):  # not the model's order: the names decide
        (tmp_path / f"input_{i}.pb").write_bytes(numpy_helper.from_array(x[name], name).SerializeToString())
    with Session(model) as session:
        (batch,) = open_data(tmp_path, session.inputs)
    assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in x.items()}


def test_taps_are_a_valid_model() -> None:
    model = graphs.masked()
    tapped = gram_taps(model, [Tap("x", K, masked=True)], "attention_mask")
    onnx.checker.check_model(ir.to_proto(tapped))


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcde"), st.just(3)), min_size=1, max_size=3), max_size=12), st.integers(0, 12))
def test_groups_fit_the_budget_and_keep_units_together(units: list[list[tuple[str, int]]], budget: int) -> None:
    groups = split_by_budget(units, lambda element: element, budget)
    assert [e for group in groups for e in group] == [e for unit in units for e in unit]
    position = 0
    for group in groups:
        members = []
        while sum(map(len, members)) < len(group):
            members.append(units[position])
            position += 1
        assert [e for unit in members for e in unit] == group  # no unit is cut
        assert sum(dict(group).values()) <= budget or len({k for k, _ in group} - {k for k, _ in members[0]}) == 0
