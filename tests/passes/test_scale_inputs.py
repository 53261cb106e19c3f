"""Copies of models with scales as inputs: what they compute, against weights multiplied by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.instrument.scale_inputs import with_scale_inputs
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.runtime.ort.session import Session
from tests.graphs import FORMS, Array, K, N, random


def rounded(layer: LinearLayer, spec: WeightSpec, bias: Array | None = None) -> LayerSolution:
    weight = layer.read()
    quantized = rtn.quantize(weight, np.ones(len(weight)), spec, beta=1.0)
    return LayerSolution(quantized.dequantize(), bias, weight, (), quantized, changed=True)


@pytest.mark.parametrize("block", [None, 16, 40])
@pytest.mark.parametrize("form", ["matmul", "matmul_bias", "gemm", "matmul_transpose"])
def test_factors_multiply_the_scales_of_their_groups(form: str, block: int | None) -> None:
    """K is 40, so that blocks of 16 end with a short one."""
    model = FORMS[form]()
    (layer,) = find(model)[0]
    bias = layer.read_bias()
    spec = WeightSpec(3, block)
    copy, inputs = with_scale_inputs(model, lambda layer: rounded(layer, spec, bias), {layer.name})
    shape = (2, 5, K) if form != "gemm" else (5, K)
    x, each = random(*shape, seed=3, scale=1.0), inputs[layer.name]
    factors = np.random.default_rng(1).uniform(0.5, 1.5, (spec.groups(K), N)).astype(np.float32)
    solution = rounded(layer, spec)
    rows = np.arange(K) // (block or K)
    with Session(copy) as session:
        (before,) = session.run({"x": x})
        (after,) = session.run({"x": x, each: factors})
    np.testing.assert_allclose(before, x @ solution.weight + (0 if bias is None else bias), atol=1e-4)
    np.testing.assert_allclose(after, x @ (solution.weight * factors[rows]) + (0 if bias is None else bias), atol=1e-4)


def test_other_layers_have_the_weights_of_their_solutions_and_the_source_is_as_it_was() -> None:
    model = FORMS["matmul"]()
    before = ir.to_proto(model).SerializeToString()
    (layer,) = find(model)[0]
    copy, inputs = with_scale_inputs(model, lambda layer: rounded(layer, WeightSpec(2, None)), ())
    x = random(1, 3, K, scale=1.0)
    with Session(copy) as session:
        np.testing.assert_allclose(session.run({"x": x})[0], x @ rounded(layer, WeightSpec(2, None)).weight, atol=1e-4)
    untouched, _ = with_scale_inputs(model, lambda layer: None, ())
    with Session(untouched) as session:
        np.testing.assert_allclose(session.run({"x": x})[0], x @ layer.read(), atol=1e-4)
    assert not inputs
    assert ir.to_proto(model).SerializeToString() == before
