"""Inputs of 16 bits in format qdq-int8: as two products of 8 bits, for the inputs that cost the most."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magr_onnx
from magr_onnx.core.types import ActivationGrid
from magr_onnx.errors import OptionError
from magr_onnx.passes.emit.readback import read_weights
from tests.graphs import Builder, random

K, WIDTH, OUT = 32, 48, 16
Array = np.ndarray[Any, Any]


def network(rank: int = 3, gemm: bool = False, half: bool = False) -> ir.Model:
    """Two layers; between them are a few large values among small ones."""
    b, kind = Builder(), np.float16 if half else np.float32
    x = b.input("x", ["n", 5, K] if rank == 3 else ["n", K], ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
    large = np.arange(WIDTH) % 16 == 0  # which the second layer does not read
    first, second = random(K, WIDTH) * np.where(large, 40.0, 1.0), random(WIDTH, OUT, seed=1) * ~large[:, None]
    bias = b.constant("bias", random(WIDTH, seed=2, dtype=kind))
    hidden = b.node("Add", [b.node("MatMul", [x, b.constant("w", first.astype(kind))], "first"), bias])
    weight = b.constant("v", second.astype(kind))
    if gemm:
        y = b.node("Gemm", [hidden, weight, b.constant("c", random(OUT, seed=3, dtype=kind))], "second")
    else:
        y = b.node("MatMul", [hidden, weight], "second")
    return b.model(y, ["n", 5, OUT] if rank == 3 else ["n", OUT])


def inputs(count: int, rank: int = 3, half: bool = False, seed: int = 5) -> dict[str, Array]:
    x = np.random.default_rng(seed).standard_normal((count, 5, K) if rank == 3 else (count, K))
    return {"x": x.astype(np.float16 if half else np.float32)}


def made(tmp_path: Path, model: ir.Model, data: dict[str, Array], share: float, **options: Any) -> tuple[Path, Any]:
    path = tmp_path / f"{share}.onnx"
    simple: dict[str, Any] = {"quantizer": "rtn", "bias": "none", "progress": False, "format": "qdq-int8"}
    report = magr_onnx.optimize(model, data, output=path, wide_activations=share, include=["*"], **{**simple, **options}).report
    return path, report


def loss(model: ir.Model, path: Path, data: dict[str, Array]) -> float:
    proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    expected, actual = (ort.InferenceSession(m).run(None, data)[0].astype(np.float64) for m in (proto.SerializeToString(), path))
    return float(np.square(expected - actual).mean() / np.square(expected).mean())


def operators(path: Path, tmp_path: Path) -> Counter[str]:
    """Operators that onnxruntime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@given(st.floats(-50, 0), st.floats(0.01, 50), st.booleans(), st.integers(0, 2**32 - 1))
def test_halves_add_up_to_the_grid(low: float, high: float, signed: bool, seed: int) -> None:
    grid = ActivationGrid.of_range(low, high, signed).refined()
    x = np.random.default_rng(seed).uniform(low, high, 1000)

    def rounded(values: Array, grid: ActivationGrid) -> Array:
        steps = np.rint(values / grid.scale) + grid.zero_point
        return (np.clip(steps, *grid.limits) - grid.zero_point) * grid.scale

    coarse, fine = grid.halves()
    assert (coarse.bits, fine.bits) == (8, 8)
    first = rounded(x, coarse)
    assert np.abs(first + rounded(x - first, fine) - x).max() <= 1.01 * grid.scale  # half a step, and one at the end of the fine grid


@pytest.mark.parametrize(("rank", "gemm"), [(3, False), (2, False), (2, True)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_inputs_of_16_bits_are_two_products_in_integers(tmp_path: Path, rank: int, gemm: bool, half: bool, kind: str) -> None:
    model, data = network(rank, gemm, half), inputs(64, rank, half)
    narrow, report = made(tmp_path, model, data, 0.0, activation_type=kind)
    wide, wide_report = made(tmp_path, model, data, 1.0, activation_type=kind)
    assert report.verified == wide_report.verified == 2
    fresh = inputs(64, rank, half, seed=6)
    first, second = (weight for name, weight in read_weights(ir.load(wide)).items() if not name.endswith("_fine_out"))
    biases = [random(WIDTH, seed=2), random(OUT, seed=3) if gemm else 0]
    expected = (fresh["x"].astype(np.float64) @ first + biases[0]) @ second + biases[1]
    error = ort.InferenceSession(wide).run(None, fresh)[0] - expected
    assert np.median(np.square(error)) < (1e-5 if half else 1e-6) * np.square(expected).mean()  # the mean has values beyond the ranges
    assert loss(model, wide, fresh) < 0.1 * loss(model, narrow, fresh)
    assert all(("not fused on x86" in " ".join(row.notes)) == (kind == "int8") for row in wide_report.layers)
    if kind == "uint8" and not half:
        found = operators(wide, tmp_path)
        assert found["MatMul"] + found["Gemm"] == 0
        assert found["MatMulIntegerToFloat"] + found["QGemm"] == 4


def test_the_inputs_that_cost_most_come_first(tmp_path: Path) -> None:
    model, data = network(), inputs(64)
    _, report = made(tmp_path, model, data, 0.4)
    types = {row.name: (row.activation or {})["type"] for row in report.layers}
    assert sorted(types.values()) == ["uint16", "uint8"]
    assert types["first"] == "uint8"
    (note,) = (note for note in report.notes if "16 bits" in note)
    assert note.startswith("1 of 2 inputs of layers have 16 bits, in 33.3% of the work")
    _, report = made(tmp_path, model, data, 0.1)  # the smaller layer has a third of the work
    assert any(note.startswith("none of 2 inputs of layers") for note in report.notes)


def test_types_that_are_not_said(tmp_path: Path) -> None:
    model = network(half=True)
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].type = node.outputs[0].shape = None
    made(tmp_path, model, inputs(64, half=True), 1.0)


def test_solvers_see_the_grid_of_16_bits(tmp_path: Path) -> None:
    model, data = network(), inputs(64)
    for quantizer in ("gptq", "auto"):
        path, report = made(tmp_path, model, data, 1.0, quantizer=quantizer)
        assert loss(model, path, inputs(64, seed=6)) < 2e-4
        assert all(row.activation["error"] < 1e-3 for row in report.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "x86-avx2"}, "whose sum no accumulator constrains"),
        ({"quantize_outputs": True}, "leave out quantize_outputs"),
        ({"format": "dynamic-int8"}, "wide_activations is for format qdq-int8 or qdq-full only"),
        ({"activation_type": "uint16"}, "are for activations of 8 bits"),
    ],
)
def test_what_has_no_16_bits_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        magr_onnx.optimize(network(), inputs(8), **{"format": "qdq-int8", "wide_activations": 0.2, **options})
