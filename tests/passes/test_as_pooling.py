"""Means over space that become a GlobalAveragePool."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from magr_onnx.passes.canonical import as_pooling
from tests.graphs import Builder, random


def mean(axes: list[int], opset: int, **attributes: Any) -> ir.Model:
    b = Builder(opset)
    x = b.input("x", ["n", 3, 4, 5])
    more = [b.constant("axes", np.array(axes))] if opset >= 18 else []
    attributes = attributes if opset >= 18 else {**attributes, "axes": axes}
    return b.model_of([b.node("ReduceMean", [x, *more], "mean", **attributes)])


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(
    ("axes", "attributes", "pooled"), [([2, 3], {}, True), ([-1, -2], {}, True), ([1, 2], {}, False), ([2, 3], {"keepdims": 0}, False)]
)
def test_means_over_all_of_space_alone(axes: list[int], attributes: dict[str, Any], pooled: bool, opset: int) -> None:
    model, x = mean(axes, opset, **attributes), random(2, 3, 4, 5)
    expected = x.mean(axis=tuple(axes), keepdims=bool(attributes.get("keepdims", 1)))
    as_pooling.rewrite(model)
    assert [node.op_type for node in model.graph] == (["GlobalAveragePool"] if pooled else ["ReduceMean"])
    assert [str(value.name) for value in model.graph.outputs] == ["mean_out"]
    assert not pooled or not model.graph.initializers
    actual = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
