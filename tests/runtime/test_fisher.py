"""Second moments of gradients at layers' outputs, gathered over batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.passes.instrument.gradients import fisher_taps
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import fisher
from magr_onnx.runtime.data.sources import Batches, open_data
from magr_onnx.runtime.ort.session import Session
from tests import graphs
from tests.graphs import Array, Builder, random


def tower(kind: str = "Tanh", outputs: int = 12) -> ir.Model:
    """Three layers, something between the first two, and logits."""
    b = Builder()
    hidden = b.node("MatMul", [b.input("x", ["batch", 20]), b.constant("w1", random(20, 16))], "first")
    between = [b.constant("axis", np.int64(1))] if kind == "CumSum" else []
    hidden = b.node(kind, [hidden, *between], "between")
    hidden = b.node("MatMul", [hidden, b.constant("w2", random(16, 24, seed=1, scale=1.0))], "second")
    hidden = b.node("Gelu", [hidden], "gelu")
    return b.model(
        b.node("MatMul", [hidden, b.constant("w3", random(24, outputs, seed=2, scale=1.0))], "head"), ["batch", outputs], "logits"
    )


def data_of(model: ir.Model, batches: int = 4, rows: int = 30) -> Batches:
    with Session(model) as session:
        return open_data([graphs.feeds(model, rows, seed=s) for s in range(batches)], session.inputs)


def collected(model: ir.Model, data: Batches, **options: Any) -> tuple[dict[str, Array], set[str]]:
    layers, _ = find(model)
    with fisher.collect(model, layers, data, **options) as found:
        names = [str(layer.output.name) for layer in layers]
        return {n: m for n in names if (m := found.moments(n)) is not None}, found.blocked


def test_moments_are_the_mean_of_the_taps_over_batches() -> None:
    """Of batch after batch through one session: the noise goes on, it does not begin again."""
    model = tower()
    data = data_of(model)
    found, blocked = collected(model, data)
    assert not blocked
    assert found.keys() == {"first_out", "second_out"}  # the head's output is the model's
    shapes = {
        "x": (30, 20),
        "first_out": (30, 16),
        "between_out": (30, 16),
        "second_out": (30, 24),
        "gelu_out": (30, 24),
        "logits": (30, 12),
    }
    tapped, names, _ = fisher_taps(model, {n: len(m) for n, m in found.items()}, shapes, lambda name, rank: True)
    with Session(tapped) as session:
        sums = [session.run(batch) for batch in data]
    for i, name in enumerate(names):
        expected = sum(batch[i].astype(np.float64) for batch in sums) / len(sums)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))
    assert not np.allclose(sums[0][0], sums[1][0], rtol=1e-2)


def test_moments_are_positive_semidefinite_and_reproducible() -> None:
    model = tower()
    data = data_of(model)
    once, again = (collected(model, data)[0] for _ in range(2))
    for name, moments in once.items():
        np.testing.assert_array_equal(moments, again[name])
        np.testing.assert_allclose(moments, moments.T, rtol=1e-5, atol=1e-6 * float(np.abs(moments).max()))
        values = np.linalg.eigvalsh(moments)
        assert values[0] > -1e-5 * values[-1]
        assert moments.trace() > 0


def adaptive(model: ir.Model, data: Batches, **options: Any) -> dict[str, Array]:
    layers, _ = find(model)
    with fisher.collect_adaptive(model, layers, data, 0.5, **options) as found:
        assert not found.blocked
        return {n: m for layer in layers if (m := found.moments(n := str(layer.output.name))) is not None}


def test_adaptive_hessians_of_rows_weigh_them_by_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every row is a sample; the head's are known, since its gradients are those of the logits."""
    monkeypatch.setattr(fisher, "MAX_BATCHES", 200)
    model = tower(outputs=3)
    found = adaptive(model, data_of(model, 200, 300))
    assert {name: m.shape for name, m in found.items()} == {"first_out": (21, 21), "second_out": (17, 17), "logits": (25, 25)}
    copy = model.clone()
    copy.graph.outputs.append(next(node.outputs[0] for node in copy.graph if node.op_type == "Gelu"))
    copy.graph.outputs[-1].shape = ir.Shape(["batch", 24])
    expected = np.zeros((25, 25))
    with Session(copy) as session:
        for batch in data_of(model, 200, 300):
            logits, hidden = (a.astype(np.float64) for a in session.run(batch))
            p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            x = np.column_stack([hidden, np.ones(len(hidden))])
            expected += (x * (1 - np.square(p).sum(axis=1))[:, None]).T @ x  # the trace of diag(p) - p p^T
    scale = np.vdot(found["logits"], expected) / np.vdot(expected, expected)
    np.testing.assert_allclose(found["logits"], scale * expected, atol=0.05 * scale * float(np.abs(expected).max()))
    for moments in found.values():
        np.testing.assert_allclose(moments, moments.T, atol=1e-5 * float(np.abs(moments).max()))
        assert np.linalg.eigvalsh(moments)[0] > -1e-5 * moments.trace()


def test_adaptive_hessians_in_groups_and_of_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    data = data_of(model)
    whole, parted = adaptive(model, data), adaptive(model, data, budget=1)
    assert whole.keys() == parted.keys()
    for name, moments in whole.items():
        np.testing.assert_allclose(parted[name], moments, rtol=1e-4, atol=1e-5 * float(np.abs(moments).max()))
    monkeypatch.setattr(fisher, "MAX_WIDTH", 20)
    assert adaptive(model, data).keys() == {"first_out"}  # 24 outputs, and 24 inputs, are too many


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_layers_are_solved_by_adaptive_hessians_as_far_as_gradients_reach(effort: Any) -> None:
    model = tower("CumSum")
    data = [graphs.feeds(model, 60, seed=s) for s in range(4)]
    _, report = magr_onnx.optimize(model, data, effort=effort, output_hessian="adaptive", bits=3)
    assert [row.solver is not None and "adaptive" in row.solver for row in report.layers] == [False, True, True]
    assert not any("coupled" in (row.solver or {}) for row in report.layers)
    notes = [note for note in report.notes if note.startswith("no gradients for 1 layers: ")]
    assert len(notes) == 1
    assert "CumSum cannot be differentiated; the Gram matrix alone counts" in notes[0]
    plain = magr_onnx.optimize(model, data, effort="best", output_hessian="none", bits=3).report
    assert not any({"adaptive", "coupled"} & (row.solver or {}).keys() for row in plain.layers)


@pytest.mark.parametrize("budget", [1, 16 * 16 * 16 + 1])
def test_groups_give_the_same_moments(budget: int) -> None:
    """One layer at a time, or all at once: the gradients are of the same noise."""
    model = tower()
    data = data_of(model)
    calls: list[tuple[int, int]] = []
    whole, _ = collected(model, data)
    parted, _ = collected(model, data, budget=budget, progress=lambda *c: calls.append(c))
    assert list(dict.fromkeys(calls)) == [(i, 8) for i in range(9)]
    for name, moments in whole.items():
        np.testing.assert_allclose(parted[name], moments, rtol=1e-4, atol=1e-5 * float(np.abs(moments).max()))


def test_wide_layers_and_later_batches_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    monkeypatch.setattr(fisher, "MAX_WIDTH", 16)
    monkeypatch.setattr(fisher, "MAX_BATCHES", 2)
    found, _ = collected(model, data_of(model))
    assert found.keys() == {"first_out"}
    few, _ = collected(model, data_of(model).limit(2))
    np.testing.assert_array_equal(found["first_out"], few["first_out"])
    monkeypatch.setattr(fisher, "MAX_WIDTH", 1)
    assert collected(model, data_of(model)) == ({}, set())


def test_operators_in_the_way_are_named_in_the_report() -> None:
    model = tower("CumSum")
    found, blocked = collected(model, data_of(model))
    assert (found.keys(), blocked) == ({"second_out"}, {"CumSum"})
    _, report = magr_onnx.optimize(model, [graphs.feeds(model, 60, seed=s) for s in range(4)], effort="best", bits=3)
    assert any(note.startswith("no gradients for 1 layers: ") and "CumSum cannot be differentiated" in note for note in report.notes)
    coupled = [row.solver is not None and "coupled" in row.solver for row in report.layers]
    assert coupled == [False, True, False]
    clear = magr_onnx.optimize(tower(), [graphs.feeds(model, 60, seed=s) for s in range(4)], effort="best", bits=3).report
    assert not any("gradients" in note for note in clear.notes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_outputs_that_say_nothing(dtype: Any) -> None:
    """Of integers there is no gradient; an output that is zero on all data leaves no moments, and nothing that is not finite."""
    b = Builder()
    kind = graphs.FLOAT if dtype == np.float32 else ir.DataType.FLOAT16
    x = b.input("x", ["batch", 20], kind)
    hidden = b.node("MatMul", [x, b.constant("w1", random(20, 16, dtype=dtype))], "first")
    nothing = b.node("Mul", [hidden, b.constant("zero", dtype(0))], "nothing")
    nothing.shape = ir.Shape(["batch", 16])
    most = b.node("ArgMax", [hidden], "most", axis=-1, keepdims=0)
    most.dtype, most.shape = ir.DataType.INT64, ir.Shape(["batch"])
    model = b.model_of([nothing, most])
    assert collected(model, data_of(model)) == ({}, set())


def test_values_that_are_no_tensors_are_passed_over() -> None:
    b = Builder()
    x = b.input("x", ["batch", 20])
    hidden = b.node("MatMul", [x, b.constant("w1", random(20, 16))], "first")
    pair = b.node("SequenceConstruct", [hidden, b.node("Neg", [hidden])], "pair")
    pair.type = ir.SequenceType(ir.TensorType(graphs.FLOAT))
    back = b.node("SequenceAt", [pair, b.constant("at", np.int64(0))], "back")
    back.type = ir.TensorType(graphs.FLOAT)
    second = b.node("MatMul", [back, b.constant("w2", random(16, 16, seed=1))], "second")
    model = b.model(b.node("Tanh", [second]), ["batch", 16])
    found, blocked = collected(model, data_of(model))
    assert found.keys() == {"second_out"}
    assert blocked == {"SequenceAt"}


@pytest.mark.parametrize("kind", ["two-sided", "adaptive"])
@pytest.mark.parametrize("case", ["data-free", "budget", "shared", "wide"])
def test_gradients_that_are_not_used_are_noted(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    monkeypatch.setattr(fisher, "MAX_WIDTH", 1 if case == "wide" else 8192)
    if case == "shared":
        b = Builder()
        w, hidden = b.constant("w", random(20, 20)), b.input("x", ["batch", 20])
        for name in ("first", "second"):
            hidden = b.node("Tanh", [b.node("MatMul", [hidden, w], name)], f"{name}_tanh")
        model = b.model(hidden, ["batch", 20])
    data = [graphs.feeds(model, 60, seed=s) for s in range(4)]
    options: dict[str, Any] = {"format": "qdq-int8", "target": "x86-avx2"} if case == "budget" else {"feedback": False, "bits": 3}
    if case == "data-free":
        options |= {"effort": "best"}
    else:
        options |= {"output_hessian": kind, "effort": "best"}
    report = magr_onnx.optimize(model, None if case == "data-free" else data, **options).report
    assert sum(note.startswith("no gradients") for note in report.notes) == 1
    assert not any({"coupled", "adaptive"} & (row.solver or {}).keys() for row in report.layers)
