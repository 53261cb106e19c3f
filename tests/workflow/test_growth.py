"""Layers that would make a file larger stay float: what is left in float is what takes fewer bytes so, by files written both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.errors import ModelError
from magr_onnx.model_io.legacy import to_proto
from tests.graphs import Builder, random

FORMATS: dict[str, dict[str, Any]] = {
    "matmulnbits": {"format": "matmulnbits"},
    "matmulnbits-8": {"format": "matmulnbits", "bits": 8},
    "qdq": {"format": "qdq"},
    "qdq-int8": {"format": "qdq-int8"},
    "dynamic-int8": {"format": "dynamic-int8"},
}
NAME = "a_layer_with_a_long_name/of/a/module/MatMul"


def two_layers(k: int, n: int) -> ir.Model:
    """A large layer and one of ``k`` x ``n``."""
    b = Builder()
    x = b.input("x", ["batch", 64])
    h = b.node("MatMul", [x, b.constant("w", random(64, k + 64))], "large")
    bounds = [b.constant(name, np.array([at])) for name, at in (("from", 0), ("to", k), ("axis", 1))]
    part = b.node("Slice", [h, *bounds], "part")
    return b.model(b.node("MatMul", [part, b.constant("v", random(k, n, seed=1))], NAME), ["batch", n])


def size(path: Path, model: ir.Model, calibrated: bool = True, **options: Any) -> tuple[int, list[str]]:
    """The bytes of a result, and the layers that were converted."""
    data = {"x": random(64, 64, seed=2)} if calibrated else None
    report = magr_onnx.optimize(model, data, output=path, effort="fast", **options).report
    return path.stat().st_size, [row.name for row in report.layers]


SHAPES = ((1, 900), (2, 64), (3, 300), (4, 16), (8, 8), (12, 12), (16, 32), (40, 4), (64, 64), (1, 1))
CASES = [(form, *SHAPES[(2 * i + j) % len(SHAPES)]) for i, form in enumerate(FORMATS) for j in range(3)]


FREE = [("matmulnbits", k, n, False) for k, n in ((56, 1), (64, 1), (16, 32))]
FREE += [("qdq", k, n, False) for k, n in ((80, 1), (40, 4), (32, 2))]


@pytest.mark.parametrize(("form", "k", "n", "calibrated"), [*((*case, True) for case in CASES), *FREE])
def test_the_smaller_of_both_is_written(form: str, k: int, n: int, calibrated: bool, tmp_path: Path) -> None:
    model = two_layers(k, n)
    default, converted = size(tmp_path / "default.onnx", model, calibrated, **FORMATS[form])
    without, _ = size(tmp_path / "without.onnx", model, calibrated, exclude=[NAME], **FORMATS[form])
    with_all, both = size(tmp_path / "all.onnx", model, calibrated, include=["*"], **FORMATS[form])
    assert both == ["large", NAME]
    assert default <= min(without, with_all) + 16  # bytes of metadata that differ
    assert converted == (both if with_all < without else ["large"]) or abs(with_all - without) <= 16


def test_a_model_of_one_tiny_layer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    b = Builder()
    model = b.model(b.node("MatMul", [b.input("x", ["batch", 4]), b.constant("w", random(4, 4))], "tiny"), ["batch", 4])
    with pytest.raises(ModelError, match=r"tiny \(MatMul\): quantized it would take more bytes than in float .*--include '\*' converts"):
        magr_onnx.optimize(model, output=tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_layers_with_options_of_their_own_are_converted() -> None:
    report = magr_onnx.optimize(two_layers(4, 4), layers=[{"match": NAME, "bits": 8}]).report
    assert {row.name: row.bits for row in report.layers} == {"large": 4, NAME: 8}


def test_a_reader_of_one_tensor_is_not_left_in_float_for_it() -> None:
    """Two layers of one weight of 24 x 24: its float bytes go only when both are converted."""
    b = Builder()
    x = b.input("x", ["batch", 24])
    w = b.constant("w", random(24, 24))
    h = b.node("MatMul", [x, w], "first")
    report = magr_onnx.optimize(b.model(b.node("MatMul", [h, w], "second"), ["batch", 24]), bits=8).report
    assert [row.name for row in report.layers] == ["first", "second"]


def test_quantized_sources_are_quantized_again() -> None:
    """Their weights are codes already: in float they would be larger."""
    made = magr_onnx.optimize(two_layers(4, 4), format="qdq", bits=8, block_size=16, include=["*"]).model
    report = magr_onnx.optimize(made, format="qdq", bits=8, block_size=16, requantize=True).report
    assert [(row.k, row.n) for row in report.layers] == [(64, 68), (4, 4)]


def test_initializers_are_declared_once(tmp_path: Path) -> None:
    """Their type is that of the tensor; what has metadata keeps its declaration."""
    model = two_layers(16, 32)
    model.graph.initializers["from"].metadata_props["origin"] = "here"
    magr_onnx.optimize(model, output=tmp_path / "q.onnx")
    graph = onnx.load(tmp_path / "q.onnx").graph
    tensors = {tensor.name for tensor in graph.initializer}
    assert tensors & {value.name for value in graph.value_info} == {"from"}
    assert len(tensors) > 4
    values = {value.name for value in to_proto(model).graph.value_info}
    assert values - tensors == {value.name for value in ir.to_proto(model).graph.value_info} - {str(v) for v in model.graph.initializers}
