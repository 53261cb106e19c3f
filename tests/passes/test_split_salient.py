"""Salient inputs in a product of 8 bits: which they are, that the split changes nothing in float, and what it saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import magr_onnx
from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.core.adaptive_hessian import AdaptiveHessian
from magr_onnx.core.types import WeightSpec
from magr_onnx.models import bundled
from magr_onnx.passes import LinearLayer, Plan, SplitSalient, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.rewrites.base import Context, own_bits
from magr_onnx.passes.rewrites.split_salient import count_of, most_salient, saliency
from magr_onnx.runtime.ort.session import Arithmetic, Session
from tests import graphs
from tests.graphs import FORMS, Builder, feeds, proto, random
from tests.helpers import Array, few_samples
from tests.passes.test_emit import relative
from tests.passes.test_split_outliers import outputs

SPEC = WeightSpec(2, 16)


def strong(rows: Sequence[int], model: ir.Model, layers: Sequence[LinearLayer]) -> Mapping[str, Array]:
    """Gradients that are large in some rows of every layer."""
    del model
    return {layer.name: np.where(np.isin(np.arange(layer.k), rows), 100.0, 1.0) for layer in layers}


def test_counts_are_multiples_of_a_block() -> None:
    assert [count_of(k, f) for k, f in ((160, 0.1), (160, 0.04), (160, 0.15), (1024, 0.05), (64, 0.5))] == [16, 0, 32, 48, 32]


def test_saliency_is_the_loss_that_rounding_adds() -> None:
    """Of a loss with this Hessian on its diagonal, each row of the weights rounded by itself."""
    weights, gradients = random(32, 10, scale=1.0), np.exp(np.random.default_rng(1).standard_normal(32))
    weights[5] = 0
    found = saliency(weights, gradients, WeightSpec(3, 16))
    assert found[5] == 0
    model = graphs.matmul(32, 10)
    find(model)[0][0].write(weights, None)
    made, _ = magr_onnx.optimize(model, pipeline_text="quantize{method=rtn,bits=3,block_size=16},emit-matmulnbits")
    rounded = outputs_of_units(made) - outputs_of_units(model)
    np.testing.assert_allclose(found, gradients * np.square(rounded).sum(axis=1), rtol=1e-4)
    assert most_salient(np.array([1.0, 5.0, 3.0, 5.0, 0.0]), 3).tolist() == [1, 2, 3]


def outputs_of_units(model: ir.Model) -> Array:
    """The rows of the weight, as outputs for inputs of one each."""
    with Session(model, arithmetic=Arithmetic.UNOPTIMIZED) as session:
        found: Array = session.run({"x": np.eye(32, dtype=np.float32)[None]})[0][0].astype(np.float64)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_float_outputs_stay_the_same(form: str) -> None:
    model = FORMS[form]()
    before = outputs(model)
    (layer,) = find(model)[0]
    name, weight, w, k = layer.name, layer.weight_name, layer.read(), layer.k
    rows = [1, 2, 3, 5, 7, 8, 11, 12, 13, 17, 20, 21, 22, 30, 31, 33]
    (note,) = SplitSalient(0.5 if k < 64 else 16 / k).rewrite(model, Context(SPEC, gradients=lambda m, ls: strong(rows, m, ls)))
    assert note.startswith("split-salient: 1 of 1 layers have a second product of 8 bits")
    proto(model)
    whole, salient = find(model)[0]
    assert [whole.name, salient.name] == [name, f"{name}_salient"]
    assert [own_bits(whole), own_bits(salient)] == [None, 8]
    kept = np.flatnonzero(~whole.read().any(axis=1))
    assert set(rows) <= set(kept)
    np.testing.assert_array_equal(salient.read(), w[kept])
    assert relative(outputs(model), before) < 1e-6
    for pattern in (weight, name):  # the patterns a user knows find both parts
        assert len(find(model, Selection([pattern]))[0]) == 2


def deep(dtype: Any = np.float32, blocked: bool = False) -> ir.Model:
    """Two layers; some inputs of the second are strong, and so are the gradients by their weights."""
    b = Builder()
    x = b.input("x", ["batch", 40], graphs.FLOAT if dtype == np.float32 else ir.DataType.FLOAT16)
    w1 = random(40, 64, scale=0.3)
    w1[:, 5:64:4] *= 8  # 15 of them
    hidden = b.node("MatMul", [x, b.constant("w1", w1.astype(dtype))], "first")
    if blocked:
        hidden = b.node("CumSum", [hidden, b.constant("axis", np.int64(1))])
    second = b.node("MatMul", [b.node("Relu", [hidden], "relu"), b.constant("w2", random(64, 24, seed=1).astype(dtype))], "second")
    return b.model(second, ["batch", 24])


@pytest.mark.parametrize(
    ("form", "dtype"), [("matmulnbits", np.float32), ("matmulnbits", np.float16), ("qdq", np.float32), ("dynamic-int8", np.float32)]
)
def test_less_is_lost_for_some_bytes(form: Any, dtype: Any) -> None:
    model = deep(dtype)
    data, expected = [feeds(model, rows=200, seed=s) for s in range(4)], outputs(model)
    errors, sizes = {}, {}
    for share in (0.0, 0.25):
        made, report = magr_onnx.optimize(model, data, format=form, bits=4, effort="fast", split_salient=share)
        errors[share], sizes[share] = relative(outputs(made), expected), report.bytes_after
        bits = {row.name: row.bits for row in report.layers}
    assert bits == {"first": 4, "first_salient": 8, "second": 4, "second_salient": 8}
    assert errors[0.25] < 0.8 * errors[0.0]
    assert sizes[0.25] > sizes[0.0]


def test_rows_of_large_gradients_are_chosen() -> None:
    model = deep()
    _, report = magr_onnx.optimize(model, [feeds(model, rows=200)], bits=3, split_salient=0.25, effort="fast")
    made, _ = magr_onnx.optimize(model, [feeds(model, rows=200)], pipeline_text="split-salient{fraction=0.25},quantize{bits=3}")
    inputs = next(node.inputs[1] for node in made.graph if node.op_type == "Gather" and "second" in str(node.name))
    assert inputs is not None
    assert inputs.const_value is not None
    assert set(range(5, 64, 4)) <= set(inputs.const_value.numpy().tolist())
    assert any(note.startswith("split-salient: 2 of 2 layers") and "more bits a weight" in note for note in report.notes)


def test_a_mean_that_a_bias_absorbs_does_not_count() -> None:
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((500, 8)) + np.array([9.0] + 7 * [0.0]), rng.standard_normal((500, 1)) * 2
    ones = np.column_stack([x, np.ones(500)]) * delta
    hessian = AdaptiveHessian(ones.T @ ones, 1.0)
    weights = np.square(delta[:, 0])
    mean = (weights @ x) / weights.sum()
    np.testing.assert_allclose(hessian.diagonal(False), weights @ np.square(x))
    np.testing.assert_allclose(hessian.diagonal(True), weights @ np.square(x - mean))


def test_layers_stay_whole_where_there_are_no_gradients_and_the_report_says_so() -> None:
    blocked = deep(blocked=True)
    _, report = magr_onnx.optimize(blocked, [feeds(blocked, rows=60)], bits=3, split_salient=0.25)
    assert [row.name for row in report.layers] == ["first", "second", "second_salient"]
    assert any("split-salient: no gradients for first, which stay whole" in note for note in report.notes)
    reached = magr_onnx.optimize(deep(), [feeds(deep(), rows=60)], bits=3, split_salient=0.25, effort="best").report
    assert not any("cannot be differentiated" in note for note in reached.notes)  # through the sum of the two products
    assert "coupled" in (reached.layers[0].solver or {})
    _, report = magr_onnx.optimize(deep(), bits=3, split_salient=0.25)
    assert [row.name for row in report.layers] == ["first", "second"]
    assert any("split-salient: no gradients for first, second" in note for note in report.notes)
    _, report = magr_onnx.optimize(deep(), [feeds(deep(), rows=60)], bits=8, split_salient=0.25)
    assert any("split-salient changed nothing: all weights have 8 bits" in note for note in report.notes)


def test_options_of_layers_and_budgets_leave_the_second_product_alone() -> None:
    model = deep()
    data = [feeds(model, rows=60, seed=s) for s in range(4)]
    options: dict[str, Any] = {"effort": "fast", "split_salient": 0.25}
    _, report = magr_onnx.optimize(model, data, bits=3, layers=[LayerOptions(("second",), {"bits": 4})], **options)
    assert {row.name: row.bits for row in report.layers} == {"first": 3, "first_salient": 8, "second": 4, "second_salient": 8}
    _, report = magr_onnx.optimize(model, data, target_size="80%", **options)
    assert {row.bits for row in report.layers if row.name.endswith("_salient")} == {8}


@pytest.mark.parametrize("text", ["split-salient{fraction=0},quantize", "split-salient{fraction=0.6},quantize"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(magr_onnx.OptionError, match=r"must be above 0 and at most 0\.5"):
        Plan.parse(text).check()


@pytest.mark.long
def test_bundled_model(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    _, report = magr_onnx.optimize(bundled.MODEL, few_samples(), output=out, bits=2, split_salient=0.1, effort="fast")
    assert report.verified == len(report.layers) == 42
    assert {row.bits for row in report.layers if row.name.endswith("_salient")} == {8}
