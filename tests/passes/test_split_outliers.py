"""Coarse and fine: the split itself, that it changes nothing in float, and what it saves in emitted models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import WeightSpec
from magr_onnx.models import bundled
from magr_onnx.passes import Plan, SplitOutliers, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.rewrites.base import Context
from magr_onnx.passes.rewrites.split_outliers import gain, split, thresholds
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests import graphs
from tests.graphs import FORMS, Builder, feeds, proto, random
from tests.helpers import Array, few_samples
from tests.passes.test_emit import fused, relative

INT8 = WeightSpec(8, None, True)
INT8_TEXT = "quantize-activations,quantize{method=rtn,bits=8,block_size=none,symmetric=true},compensate-bias,emit-qdq-int8"


def spoiled(k: int = 96, n: int = 24, seed: int = 0) -> Array:
    """Normal weights with two outliers a column."""
    rng = np.random.default_rng(seed)
    weights = 0.1 * rng.standard_normal((k, n))
    rows = np.stack([rng.choice(k, 2, replace=False) for _ in range(n)], axis=1)
    np.put_along_axis(weights, rows, rng.choice([-1, 1], (2, n)) * rng.uniform(4, 8, (2, n)), axis=0)
    result: Array = weights.astype(np.float32)
    return result


def squared(a: Array, spec: WeightSpec) -> float:
    rounded = rtn.quantize(a, np.ones(len(a)), spec).dequantize()
    return float(np.square(a.astype(np.float64) - rounded).sum())


@pytest.mark.parametrize("spec", [INT8, WeightSpec(4, 32), WeightSpec(2, 20)], ids=str)
def test_parts_add_up_and_the_coarse_one_is_mostly_zeros(spec: WeightSpec) -> None:
    weights = spoiled()
    t = thresholds(weights, spec)
    fine, coarse = split(weights, t, spec)
    np.testing.assert_allclose(fine + coarse, weights, rtol=1e-6)
    assert (np.abs(fine) <= t[spec.group_of_row(len(weights))]).all()
    assert (coarse[np.abs(weights) < t[spec.group_of_row(len(weights))]] == 0).all()
    left = squared(fine, spec) + squared(coarse, spec)
    assert gain(weights, fine, coarse, spec) == pytest.approx(squared(weights, spec) / left, rel=1e-3)


def test_outliers_gain_and_other_weights_hardly() -> None:
    rng = np.random.default_rng(0)
    for weights, low, high in ((spoiled(), 50, np.inf), (0.1 * rng.standard_normal((96, 24)), 3, 8), (rng.uniform(-1, 1, (96, 24)), 3, 8)):
        w = weights.astype(np.float32)
        assert low < gain(w, *split(w, thresholds(w, INT8), INT8), INT8) < high
    zeros = np.zeros((8, 3), np.float32)
    assert gain(zeros, *split(zeros, thresholds(zeros, INT8), INT8), INT8) == 1.0


def with_weight(form: str) -> ir.Model:
    """A form of linear layer whose weight has outliers."""
    model = FORMS[form]()
    layer = find(model)[0][0]
    layer.write(spoiled(layer.k, layer.n), None)
    return model


def outputs(model: ir.Model, arithmetic: Arithmetic = Arithmetic.UNOPTIMIZED) -> Array:
    with Session(model, arithmetic=arithmetic) as session:
        found: Array = session.run(feeds(model, rows=64))[0].astype(np.float64)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_float_outputs_stay_the_same(form: str) -> None:
    model = with_weight(form)
    before = outputs(model)
    ((name, weight),) = ((layer.name, layer.weight_name) for layer in find(model)[0])
    (note,) = SplitOutliers().rewrite(model, Context(spec=INT8))
    assert note.startswith(f"split-outliers: 1 of 1 layers became two ({name})")
    proto(model)
    assert model.graph.outputs[0].name == "y"
    assert [layer.name for layer in find(model)[0]] == [name, f"{name}_coarse"]
    assert relative(outputs(model), before) < 1e-6
    for pattern in (weight, name):  # the patterns a user knows find both parts
        assert len(find(model, Selection([pattern]))[0]) == 2
        assert find(model, Selection(exclude=[pattern]))[0] == []


@pytest.mark.parametrize("form", FORMS)
def test_emitted_models_lose_less(form: str) -> None:
    model = with_weight(form)
    expected = outputs(model)
    errors = []
    for parts, rewrite in ((1, ""), (2, "split-outliers,")):
        text = f"{rewrite}quantize{{method=rtn,bits=8,block_size=none,symmetric=true}},emit-matmulnbits"
        made, report = magr_onnx.optimize(model, pipeline_text=text)
        assert report.verified == len(report.layers) == parts
        errors.append(relative(outputs(made), expected))
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("form", ["matmul", "matmul_bias", "gemm", "gemm_no_bias"])
@pytest.mark.parametrize(("text", "kernels"), [(INT8_TEXT, {"MatMulIntegerToFloat", "QGemm"}), ("quantize,emit-qdq", {"MatMulNBits"})])
def test_both_products_run_on_their_kernels(form: str, text: str, kernels: set[str], tmp_path: Path) -> None:
    model = with_weight(form)
    made, _ = magr_onnx.optimize(model, [feeds(model)], pipeline_text=f"split-outliers{{factor=1.5}},{text}")
    operators = fused(made, tmp_path)
    assert sum(o in kernels for o in operators) == 2
    assert not {"MatMul", "Gemm", "FusedGemm", "FusedMatMul"} & set(operators)


def test_layers_without_outliers_stay_whole_and_the_report_says_so() -> None:
    model = graphs.chain()
    made, report = magr_onnx.optimize(model, split_outliers=True)
    assert [r.name for r in report.layers] == ["up", "down"]
    assert any("split-outliers changed nothing" in n for n in report.notes)
    assert len(list(made.graph)) == len(list(magr_onnx.optimize(model).model.graph))


def test_half_precision() -> None:
    b = Builder()
    x = b.input("x", ["batch", 64], ir.DataType.FLOAT16)
    model = b.model(b.node("MatMul", [x, b.constant("w", spoiled(64).astype(np.float16))], "layer"), ["batch", 24])
    before = outputs(model)
    made, report = magr_onnx.optimize(model, [feeds(model)], split_outliers=True, bits=8, bias="none")
    assert len(report.layers) == 2
    assert made.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert relative(outputs(made), before) < 1e-2


@pytest.mark.long
@pytest.mark.parametrize("form", ["matmulnbits", "qdq-int8"])
def test_bundled_model(form: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    options: dict[str, Any] = {"format": form, "bits": 8, "block_size": None, "symmetric": True, "quantizer": "rtn", "alpha": 0.0}
    _, report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=out, split_outliers=True, **options)
    names = [r.name for r in report.layers]
    assert report.verified == len(names) > 21
    assert all(n.removesuffix("_coarse") in names for n in names)
    assert report.pipeline.startswith("split-outliers,")
    checked = magr_onnx.validate(
        bundled.MODEL, out, few_samples(bundled.HELD_OUT), arithmetics=(Arithmetic.DEFAULT,), layers=False, latency=False
    )
    for (metrics,) in checked.arithmetics.values():
        assert metrics.cosine > 0.999


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split-outliers{factor=1},quantize", "factor=1 must be above 1"),
        ("split-outliers", "needs a quantize pass after it"),
        ("quantize,split-outliers", "split-outliers must come before quantize"),
        ("split-outliers,split-outliers,quantize", "appears twice"),
    ],
)
def test_bad_pipelines(text: str, message: str) -> None:
    with pytest.raises(magr_onnx.OptionError, match=message):
        Plan.parse(text).check()


def test_a_factor_of_the_user() -> None:
    model = graphs.matmul(64, 24)
    assert np.abs(random(64, 24)).max() < 1
    _, report = magr_onnx.optimize(model, pipeline_text="split-outliers{factor=1.2},quantize{method=rtn},emit-matmulnbits")
    assert [r.name for r in report.layers] == ["layer", "layer_coarse"]
