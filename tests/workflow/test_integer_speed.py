"""Convolutions that stay float among integer ones, since they are faster so; which ones, and how they are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.errors import OptionError
from magr_onnx.passes.layers import conv
from magr_onnx.passes.tensors.ort_cpu import RULES
from magr_onnx.passes.tensors.region import region_of
from magr_onnx.workflow import integer_speed
from tests.graphs import Builder, random
from tests.workflow.test_integer_convolutions import images, sqnr

QUICK: dict[str, Any] = {"format": "qdq-int8", "quantizer": "rtn", "bias": "none", "batch_size": 4, "progress": None}


def network() -> ir.Model:
    """Three convolutions in a row, Softplus, two more in parallel with their sum, Erf, and a last one."""
    b = Builder()
    y = b.input("x", ["n", 3, 12, 12])

    def convolution(name: str, x: Any, channels: int, seed: int) -> Any:
        weight = b.constant(f"{name}_w", random(8, channels, 3, 3, seed=seed) / np.float32(math.sqrt(channels)))
        return b.node("Conv", [x, weight, b.constant(f"{name}_b", random(8, seed=seed))], name, pads=[1, 1, 1, 1])

    y = convolution("a", y, 3, 0)
    y = convolution("c", b.node("Relu", [convolution("b", y, 8, 1)]), 8, 2)
    y = b.node("Softplus", [y])
    y = b.node("Add", [convolution("d", y, 8, 3), convolution("e", y, 8, 4)])
    return b.model(convolution("f", b.node("Erf", [y]), 8, 5), ["n", 8, 12, 12])


PIECES = [{"a", "b", "c"}, {"d", "e"}, {"f"}]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every piece found slower in integers, and all together faster in float, whatever they take."""
    monkeypatch.setattr(integer_speed, "LEAST_WORK", 0)
    monkeypatch.setattr(integer_speed, "SLOWER", 0.0)
    monkeypatch.setattr(integer_speed, "CANDIDATES", ((0.0, True),))
    monkeypatch.setattr(integer_speed, "GAIN", math.inf)


def optimized(path: Path) -> list[str]:
    """The operators that onnxruntime runs."""
    settings = ort.SessionOptions()
    settings.optimized_model_filepath, settings.log_severity_level = str(path.with_suffix(".o.onnx")), 3
    ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node]


def convolutions(operators: list[str]) -> tuple[int, int]:
    """How many are in integers, and how many in float."""
    return operators.count("QLinearConv"), sum(op in ("Conv", "FusedConv") for op in operators)


def outputs(model: ir.Model | Path) -> Any:
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": images(16, 2)})[0]


def test_pieces_share_no_value() -> None:
    model = network()
    region = region_of(model.graph, [layer.node for layer in conv.find(model)[0]], RULES)
    pieces = integer_speed._pieces(region)
    assert [set(piece.convolutions) for piece in pieces] == PIECES
    around = [{*piece.inputs, *piece.outputs} for piece in pieces]
    assert all(not a & b for i, a in enumerate(around) for b in around[:i])
    assert [(len(piece.inputs), len(piece.outputs)) for piece in pieces] == [(1, 1), (1, 2), (1, 1)]  # the sum is no integer: Erf reads it


def test_small_models_are_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    report = magr_onnx.optimize(network(), {"x": images(16, 1)}, output=path, **QUICK).report
    assert convolutions(optimized(path)) == (6, 0)
    assert not any("in float" in note for row in report.layers for note in row.notes)


@pytest.mark.usefixtures("always")
def test_those_that_are_faster_in_float_have_8_bit_weights_and_compute_in_float(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "q.onnx"
    report = magr_onnx.optimize(model, {"x": images(16, 1)}, output=path, **QUICK).report
    assert convolutions(optimized(path)) == (0, 6)
    assert report.verified == 6
    assert all(any("computed in float" in note for note in row.notes) for row in report.layers)
    assert any(note.startswith("6 of 6 convolutions that could be computed in integers") for note in report.notes)
    stored = {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 4 and t.dims[1] > 1}
    assert stored == {onnx.TensorProto.INT8}
    assert sqnr(outputs(path), outputs(model)) > 40


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", [{"prefer": "size"}, {"target": "x86-avx2"}, {"accumulator_bits": 24}])
def test_nothing_is_timed_where_size_is_preferred_or_another_machine_is_the_target(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    magr_onnx.optimize(network(), {"x": images(16, 1)}, output=path, **{**QUICK, "quantizer": "comq"}, **options)
    assert convolutions(optimized(path)) == (6, 0)


@pytest.mark.usefixtures("always")
def test_a_result_that_is_resumed_does_not_depend_on_times(tmp_path: Path) -> None:
    model, path = tmp_path / "model.onnx", tmp_path / "q.onnx"
    ir.save(network(), model)
    magr_onnx.optimize(model, {"x": images(16, 1)}, output=path, resume=tmp_path / "job", **QUICK)
    assert convolutions(optimized(path)) == (6, 0)


def test_one_piece_in_float_among_others_in_integers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its weights are stored, and rounding ends, where the others begin."""
    floats = integer_speed.Floats(dict.fromkeys(("d", "e"), "computed in float"))
    monkeypatch.setattr(integer_speed, "slower", lambda *_: floats)
    model, path = network(), tmp_path / "q.onnx"
    report = magr_onnx.optimize(model, {"x": images(16, 1)}, output=path, **QUICK).report
    operators = optimized(path)
    assert convolutions(operators) == (4, 2)
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == 2
    assert {row.name for row in report.layers if "computed in float" in row.notes} == {"d", "e"}
    assert sqnr(outputs(path), outputs(model)) > 30


def test_the_integer_form_that_is_timed_is_that_of_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same operators with the same operands' shapes, though codes are rounded anyhow."""
    made: list[ir.Model] = []
    times = integer_speed._Trial.times

    def kept(trial: Any, first: ir.Model, *others: Any) -> Any:
        made.append(first)
        return times(trial, first, *others)

    monkeypatch.setattr(integer_speed._Trial, "times", kept)
    monkeypatch.setattr(integer_speed, "LEAST_WORK", 0)
    monkeypatch.setattr(integer_speed, "SLOWER", 0.0)
    path = tmp_path / "q.onnx"
    magr_onnx.optimize(network(), {"x": images(16, 1)}, output=path, **QUICK, prefer="speed")
    whole = next(m for m in made if {"Erf", "QuantizeLinear"} <= {node.op_type for node in m.graph})
    ir.save(whole, tmp_path / "timed.onnx")
    monkeypatch.undo()
    magr_onnx.optimize(network(), {"x": images(16, 1)}, output=path, **QUICK, prefer="size")
    assert optimized(tmp_path / "timed.onnx") == optimized(path)


def test_other_formats_have_nothing_to_prefer() -> None:
    with pytest.raises(OptionError, match="prefer is for format qdq-int8 only"):
        magr_onnx.optimize(network(), prefer="size")
    with pytest.raises(OptionError, match="prefer"):
        magr_onnx.optimize(network(), {"x": images(16, 1)}, prefer="both", **QUICK)  # type: ignore[arg-type]


def test_models_are_valid() -> None:
    onnx.checker.check_model(ir.to_proto(network()))
