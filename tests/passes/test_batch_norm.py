"""BatchNormalization folded into convolutions: outputs as onnxruntime computes them from the model as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from magr_onnx.passes.canonical import canonicalize
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.runtime.ort.session import Session

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)


def normalized(
    op: str = "Conv", group: int = 1, bias: bool = False, norm: dict[str, Any] | None = None, readers: int = 1, outer: bool = False
) -> onnx.ModelProto:
    """A convolution, twice as often where it has two readers, and a BatchNormalization behind it."""
    arrays = {"w": RNG.standard_normal((4, 4 // group, 3, 3)), "b": RNG.standard_normal(4)}
    arrays |= {name: np.abs(RNG.standard_normal(4)) + 0.1 for name in ("gamma", "beta", "mean", "variance")}
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [onnx.helper.make_node(op, inputs, [f"c{i}"], name=f"conv{i}", group=group) for i in range(readers)]
    parameters = ["c0", "gamma", "beta", "mean", "variance"]
    nodes.append(onnx.helper.make_node("BatchNormalization", parameters, ["y"], name="norm", **(norm or {})))
    outputs = ["y", *(f"c{i}" for i in range(1, readers)), *(["c0"] if outer else [])]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 4, 6, 6])],
        [onnx.helper.make_tensor_value_info(name, 1, ["n", 4, None, None]) for name in outputs],
        [onnx.numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items() if bias or name != "b"],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def outputs(model: ir.Model) -> list[Any]:
    with Session(model) as session:
        return session.run({"x": X})


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_is_folded(op: str, group: int, bias: bool) -> None:
    model = ir.from_proto(normalized(op, group, bias, {"epsilon": 0.01}))
    expected = outputs(model)
    notes = canonicalize(model)
    assert notes == ["BatchNormalization folded into the convolution before it: conv0"]
    assert [node.op_type for node in model.graph] == [op]
    assert set(model.graph.initializers) == {"w", "b"} if bias else {"w", "w_bias"}
    np.testing.assert_allclose(outputs(model)[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"readers": 2}, {"outer": True}])
def test_stays_where_something_else_depends_on_it(change: dict[str, Any]) -> None:
    """A weight that another convolution reads, the value between the two as an output."""
    model = ir.from_proto(normalized(**change))
    expected = outputs(model)
    assert canonicalize(model) == []
    assert "BatchNormalization" in [node.op_type for node in model.graph]
    np.testing.assert_array_equal(outputs(model)[0], expected[0])


def test_convolutions_that_are_left_out_keep_theirs() -> None:
    model = ir.from_proto(normalized())
    assert canonicalize(model, Selection(exclude=["conv0"])) == []
    assert len(list(model.graph)) == 2
