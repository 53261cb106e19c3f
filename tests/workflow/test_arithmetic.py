"""Int8 inputs of MatMulNBits: which layers get them when nothing is said of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.models.bundled import FOLDER
from magr_onnx.runtime.data.sources import in_memory
from magr_onnx.runtime.measure.int8_inputs import is_causal
from magr_onnx.workflow import arithmetic
from tests import decoders, graphs

WIDE = 2048


def levels(model: ir.Model) -> list[int | None]:
    """The accuracy levels of the MatMulNBits nodes of a model; None where there is none."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    return [node.attributes["accuracy_level"].as_int() if "accuracy_level" in node.attributes else None for node in nodes]


def wide(bits: int, data: bool, **options: Any) -> Any:
    """One layer of four million weights, calibrated on a few samples of one row, or without data."""
    batches = [{"x": graphs.random(8, 1, WIDE)}] if data else None
    return magr_onnx.optimize(graphs.matmul_bias(WIDE, WIDE), batches, bits=bits, quantizer="rtn", progress=False, **options)


def test_layers_that_are_faster_so_and_lose_little_round_their_inputs() -> None:
    done = wide(2, data=True)  # onnxruntime dequantizes 2-bit weights anew in every run, but for int8 inputs
    assert levels(done.model) == [4]
    assert "emit-matmulnbits{accuracy_level=4}" in done.report.pipeline
    note = next(note for note in done.report.notes if "accuracy level 4" in note)
    assert note.startswith("1 of 1 layers round their inputs to int8")
    assert "dB" in note


def test_layers_that_lose_much_do_not() -> None:
    done = wide(8, data=True)  # int8 inputs have errors as large as those of 8-bit weights
    assert levels(done.model) == [None]
    assert not any("accuracy level" in note for note in done.report.notes)


@pytest.mark.parametrize("level", [0, 1, 4])
def test_a_given_level_stays(level: int) -> None:
    assert levels(wide(2, data=True, accuracy_level=level).model) == [level]


def test_small_models_and_other_models_without_data_stay_as_they_are() -> None:
    x = {"x": graphs.random(8, 1, 96)}
    assert levels(magr_onnx.optimize(graphs.matmul_bias(96, 32), [x], bits=2, quantizer="rtn", progress=False).model) == [None]
    assert levels(wide(2, data=False).model) == [None]


def test_a_decoder_without_data_is_timed_on_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(arithmetic, "FASTER", np.inf)  # so small layers are as fast either way
    for bits, level in ((4, 4), (8, None)):
        done = magr_onnx.optimize(decoders.optimum(), bits=bits, quantizer="rtn", progress=False)
        assert set(levels(done.model)) == {level}


def test_one_layer_of_many_bits_does_not_keep_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(arithmetic, "FASTER", np.inf)
    done = magr_onnx.optimize(
        decoders.optimum(), bits=4, quantizer="rtn", layers=[magr_onnx.LayerOptions("*lm_head*", {"bits": 8})], progress=False
    )
    chosen = levels(done.model)
    assert chosen.count(None) == 1
    assert set(chosen) == {None, 4}


def test_causal_models_are_told_from_others() -> None:
    ids = np.random.default_rng(0).integers(1, 90, (2, 12))
    data = in_memory([{"input_ids": ids}], "tokens")
    assert is_causal(FOLDER / "model.onnx", data, "cpu")
    assert not is_causal(embedded(mixed=False), data, "cpu")  # no token sees another
    assert not is_causal(embedded(mixed=True), data, "cpu")  # all see all
    assert not is_causal(graphs.matmul_bias(96, 32), in_memory([{"x": graphs.random(2, 4, 96)}], "rows"), "cpu")


def embedded(mixed: bool) -> ir.Model:
    """Embeddings of tokens, and if ``mixed`` their mean over the sequence added to each."""
    b = graphs.Builder()
    y = b.node("Gather", [b.constant("table", graphs.random(96, 16)), b.input("input_ids", ["batch", "seq"], ir.DataType.INT64)])
    if mixed:
        y = b.node("Add", [y, b.node("ReduceMean", [y, b.constant("axis", np.array([1]))], keepdims=1)])
    return b.model(y, ["batch", "seq", 16])
