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


@pytest.mark.parametrize("options", [{}, {"format": "qdq"}, {"bits": 3, "block_size": None}])
def test_a_run_copies_the_model_and_reads_its_weights_at_most_three_times(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert copies["model"] <= 3
    assert max(reads.values()) <= 3
