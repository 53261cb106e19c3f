"""What a run costs beside the solving: copies of the model, and reads of its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.data import sources
from magr_onnx.runtime.measure.loss import Reference
from magr_onnx.runtime.ort.session import Session, inputs_of
from tests import graphs

K = 64


def four_layers() -> ir.Model:
    """Four layers in a row, one with a residual around it."""
    b = graphs.Builder()
    x = b.input("x", ["batch", K])
    for i in range(4):
        y = b.node("Relu", [b.node("MatMul", [x, b.constant(f"w{i}", graphs.random(K, K, seed=i))], f"layer{i}")], f"relu{i}")
        x = b.node("Add", [x, y], "residual") if i == 1 else y
    return b.model(x, ["batch", K])


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 6),
        ({"format": "qdq"}, 6),
        ({"bits": 3, "block_size": None, "tune_scales": False}, 6),
        ({"bits": 3, "block_size": None}, 10),  # to be differentiated, and to be written again
    ],
)
def test_a_run_copies_the_model_and_reads_its_weights_a_few_times(
    options: dict[str, Any], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, reads = Counter[str](), Counter[str]()
    clone, read = ir.Model.clone, LinearLayer.read

    def counted_clone(model: ir.Model, *arguments: Any, **keywords: Any) -> ir.Model:
        copies["model"] += 1
        return clone(model, *arguments, **keywords)

    def counted_read(layer: LinearLayer) -> Any:
        reads[layer.name] += 1
        return read(layer)

    ir.save(four_layers(), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((16, K)).astype(np.float32)} for _ in range(8)]
    monkeypatch.setattr(ir.Model, "clone", counted_clone)
    monkeypatch.setattr(LinearLayer, "read", counted_read)
    report = magr_onnx.optimize(tmp_path / "model.onnx", batches, output=tmp_path / "out.onnx", progress=False, **options).report
    assert report.verified == len(reads) == 4
    assert copies["model"] <= most  # three of them to measure errors of layers
    assert max(reads.values()) <= 3


def masked_layers() -> ir.Model:
    """Three layers in a row behind a mask of tokens."""
    b = graphs.Builder()
    x = b.input("x", ["batch", "time", K])
    b.input("attention_mask", ["batch", "time"], ir.DataType.INT64)
    for i in range(3):
        x = b.node("MatMul", [x, b.constant(f"w{i}", graphs.random(K, K, seed=i))], f"layer{i}")
    return b.model(x, ["batch", "time", K])


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each file of data is read."""
    reads, load = Counter[str](), sources.load_npz

    def counted_load(path: Path) -> dict[str, Any]:
        reads[path.name] += 1
        return load(path)

    monkeypatch.setattr(sources, "load_npz", counted_load)
    return reads


# Passes over the data (one to check it, and one for every measurement), and sessions at most: one of them for the mask, two that compare
# outputs, and four that compare layers, by their shapes and by values. Ranges from few samples are judged part by part.
COSTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "one group": ({"effort": "fast"}, 4, 10),
    "a group for every layer": ({"effort": "fast", "gram_budget": 1}, 6, 12),
    "stages": ({}, 4, 16),
    "ranges": ({"effort": "fast", "format": "qdq-int8"}, 6, 15),
}


@pytest.mark.parametrize("case", COSTS)
def test_data_is_read_once_per_pass_and_the_mask_is_matched_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All batches have one shape, so that the model is probed at another: which values follow the mask is found once for all groups."""
    options, passes, most_sessions = COSTS[case]
    sessions, start = Counter[str](), Session.__init__

    def counted_start(session: Session, *arguments: Any, **keywords: Any) -> None:
        sessions["all"] += 1
        start(session, *arguments, **keywords)

    rng = np.random.default_rng(0)
    for i in range(8):
        mask = np.arange(8) < rng.integers(1, 8, (4, 1))
        np.savez(tmp_path / f"{i}.npz", x=rng.standard_normal((4, 8, K)).astype(np.float32), attention_mask=mask.astype(np.int64))
    reads = counted_reads(monkeypatch)
    monkeypatch.setattr(Session, "__init__", counted_start)
    magr_onnx.optimize(masked_layers(), tmp_path, progress=False, **options)
    assert reads["7.npz"] == passes
    assert sessions["all"] <= most_sessions


@pytest.mark.parametrize("batch", ["batch", 4])
def test_data_is_checked_in_one_pass(batch: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model fixes the batch size, so that batches of other sizes are split or filled."""
    for i, samples in enumerate((4, 6, 1)):
        np.savez(tmp_path / f"{i}.npz", x=np.ones((samples, K), np.float32))
    reads = counted_reads(monkeypatch)
    b = graphs.Builder()
    model = b.model(b.node("MatMul", [b.input("x", [batch, K]), b.constant("w", graphs.random(K, 8))], "layer"), [batch, 8])
    data = sources.open_data(tmp_path, inputs_of(model))
    assert set(reads.values()) == {1}
    assert [known["x"] for known in data.shapes] == [part["x"].shape for part in data]
    assert data.select([1]).shapes == data.shapes[1:2]


def test_losses_run_the_float_model_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more on a batch of another shape, which tells what follows the mask."""
    shapes: list[tuple[int, ...]] = []
    run = Session.run

    def counted_run(session: Session, feeds: Any, *arguments: Any) -> Any:
        shapes.append(feeds["x"].shape)
        return run(session, feeds, *arguments)

    model = masked_layers()
    data = sources.open_data([{"x": np.ones((4, 8, K), np.float32), "attention_mask": np.ones((4, 8), np.int64)}] * 3, inputs_of(model))
    monkeypatch.setattr(Session, "run", counted_run)
    with Session(model) as session:
        Reference(session, data, "attention_mask")
    assert shapes == [(4, 8, K)] * 3 + [(3, 7, K)]
