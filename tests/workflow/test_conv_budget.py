"""Budgets over convolutions: their bits by sensitivity, together with those of linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import magr_onnx
from magr_onnx.config.plans import build_pipeline
from magr_onnx.passes import Plan
from magr_onnx.passes.layers import conv
from magr_onnx.report.reasons import Reason
from magr_onnx.runtime.data.sources import open_data
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.runtime.ort.session import inputs_of
from magr_onnx.workflow import conv_sensitivity
from tests.graphs import Builder, random
from tests.helpers import run_context
from tests.workflow.test_conv import net
from tests.workflow.test_conv import samples as images

Array = np.ndarray[Any, Any]


def two_branches(dtype: type = np.float32, shared: bool = False) -> ir.Model:
    """A convolution that makes the output, one whose share in it is small, and a transposed one in groups."""
    b, kind = Builder(), ir.DataType.FLOAT16 if dtype is np.float16 else ir.DataType.FLOAT
    x = b.input("x", ["n", 8, 10, 10], kind)
    weight = b.constant("w", random(8, 8, 3, 3, dtype=dtype))
    strong = b.node("Conv", [x, weight, b.constant("bias", random(8, dtype=dtype))], "strong", pads=[1, 1, 1, 1])
    other = weight if shared else b.constant("v", random(8, 8, 3, 3, seed=1, dtype=dtype))
    faint = b.node("Conv", [b.node("Relu", [x]), other], "faint", pads=[1, 1, 1, 1])
    faint = b.node("Mul", [faint, b.constant("less", np.asarray(0.01, dtype))])
    grouped = b.node(
        "ConvTranspose", [b.node("Add", [strong, faint]), b.constant("u", random(8, 2, 1, 1, seed=2, dtype=dtype))], "grouped", group=4
    )
    return b.model(grouped, ["n", 8, 10, 10])


def samples(count: int, seed: int = 0, dtype: type = np.float32) -> dict[str, Array]:
    return {"x": random(count, 8, 10, 10, seed=seed, scale=1.0, dtype=dtype)}


def run(model: ir.Model | Path, data: dict[str, Array]) -> Array:
    source = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return np.asarray(ort.InferenceSession(source).run(None, data)[0], np.float64)


def cosine_loss(expected: Array, actual: Array) -> float:
    a, b = (y.reshape(-1, y.shape[-1]) for y in (expected, actual))
    return float(1 - ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


def bits_of(report: magr_onnx.Report) -> dict[str, int | None]:
    return {row.name: row.bits for row in report.layers}


@pytest.mark.parametrize("options", [{}, {"format": "qdq"}, {"format": "dynamic-int8"}, {"conv_form": "dequantize"}], ids=str)
@pytest.mark.parametrize("size", ["45%", "55%", "70%"])
def test_a_size_is_kept_to_the_byte(size: str, options: dict[str, Any], tmp_path: Path) -> None:
    """What was foreseen is what is written, with convolutions and linear layers at bits of their own."""
    proto, path = net(), tmp_path / "q.onnx"
    report = magr_onnx.optimize(proto, images(8), output=path, target_size=size, effort="fast", progress=None, **options).report
    assert path.stat().st_size <= float(size[:-1]) / 100 * len(proto.SerializeToString())
    assert report.assignment is not None
    assert 0 <= report.assignment.attempts[-1].bytes - path.stat().st_size <= 1024  # of metadata, at most
    names = {name for row in report.assignment.rows for name in row.layers}
    assert names == {"stem", "depthwise", "point", "up", "fc"}
    chosen = {name: row.bits for row in report.assignment.rows for name in row.layers if row.bits is not None}
    assert bits_of(report) == chosen
    onnx.checker.check_model(onnx.load(path))


def test_the_one_that_matters_keeps_its_bits() -> None:
    bits = bits_of(magr_onnx.optimize(two_branches(), samples(32), max_loss="0.05%", progress=None).report)
    assert bits["strong"] == 8
    assert bits["faint"] == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_loss_is_kept_by_convolutions_alone(dtype: type, tmp_path: Path) -> None:
    """Between the losses at 4 and at 8 bits; on inputs that nothing was fitted to."""
    model, data, unseen = two_branches(dtype), samples(64, dtype=dtype), samples(64, 9, dtype)
    expected, sizes = run(model, unseen), list[int]()
    for i, loss in enumerate(("0.0001%", "0.05%", "20%")):
        path = tmp_path / f"{i}.onnx"
        report = magr_onnx.optimize(model, data, output=path, max_loss=loss, progress=None).report
        assert report.assignment is not None
        assert report.assignment.met
        assert cosine_loss(expected, run(path, unseen)) <= 1.2 * float(loss[:-1]) / 100
        sizes.append(path.stat().st_size)
        if i == 0:
            kept = [row for row in report.skipped if row.reason == Reason.BUDGET]
            assert kept or set(bits_of(report).values()) == {8}
    assert sizes[0] > sizes[1] > sizes[2]
    assert set(bits_of(report).values()) == {4}


def test_convolutions_of_one_weight_have_the_same_bits() -> None:
    report = magr_onnx.optimize(two_branches(shared=True), samples(32), max_loss="0.05%", progress=None).report
    assert report.assignment is not None
    assert ("strong", "faint") in [row.layers for row in report.assignment.rows]
    bits = bits_of(report)
    assert bits["strong"] == bits["faint"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_losses_are_those_of_models_with_one_convolution_written(dtype: type, shared: bool) -> None:
    """Weights and biases replaced in a running session give what the emitted model gives."""
    model, data = two_branches(dtype, shared), samples(16, dtype=dtype)
    model.opset_imports[""] = 21
    batches = open_data(data, inputs_of(model))
    plan: Plan = build_pipeline(bits=8, conv_bits=8)
    layers, split = conv.find(model)[0], Split.of(batches)
    found = conv_sensitivity.measure(model, layers, plan, split, run_context())
    assert len(found.items) == (2 if shared else 3)
    shown = list(split.effects)
    for (name, bits), loss in found.losses.items():
        copy = model.clone()
        assert len(found.write(copy, {name: bits}).rows) == (2 if shared and name == "strong" else 1)
        direct = np.mean([cosine_loss(run(model, dict(batch)), run(copy, dict(batch))) for batch in shown])
        assert loss == pytest.approx(direct, rel=0.05, abs=1e-6)
    assert found.losses["strong", 4] > 4 * found.losses["strong", 8]


def test_bits_that_were_asked_for_are_not_chosen() -> None:
    report = magr_onnx.optimize(net(), images(8), target_size="60%", conv_bits=8, progress=None).report
    assert report.assignment is not None
    assert {name for row in report.assignment.rows for name in row.layers} == {"fc"}


def test_only_8_bits_where_the_opset_has_no_others() -> None:
    """int4 is of opset 21, and a model with an operator that the converter cannot take there keeps its own."""
    model = two_branches()
    plan, data = build_pipeline(bits=8, conv_bits=8), open_data(samples(16), inputs_of(model))
    layers = conv.find(model)[0]
    assert model.opset_imports[""] == 20
    assert conv_sensitivity.measure(model, layers, plan, Split.of(data), run_context()).bits == [8]
    conv_sensitivity.raise_opset(model, plan)
    assert model.opset_imports[""] == 21
    assert conv_sensitivity.measure(model, layers, plan, Split.of(data), run_context()).bits == [4, 8]
