"""Shapes that are all known, and what they make constant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from magr_onnx.passes.graph.fixed_shapes import fold_shapes
from magr_onnx.runtime.ort.session import Session
from tests.graphs import Builder, random


def with_shapes_and_a_mask() -> ir.Model:
    """Rows are reshaped by their computed lengths, and a causal mask is made of these."""
    b = Builder(18)
    x = b.input("x", [1, 6, 8])

    def ints(name: str, *values: int) -> ir.Value:
        return b.constant(name, np.array(values))

    def length(axis: int) -> ir.Value:
        shape = b.node("Shape", [x])
        shape.dtype = ir.DataType.INT64
        return b.node("Gather", [shape, ints(f"axis_{axis}", axis)])

    y = b.node("Reshape", [x, b.node("Concat", [length(0), length(1), ints("heads", 2, 4)], axis=0)])
    scores = b.node("MatMul", [y, b.node("Transpose", [b.constant("more", random(6, 4))], "kept", perm=[1, 0])])
    full = b.node("ConstantOfShape", [b.node("Concat", [ints("two", 2), length(1)], axis=0)], value=ir.tensor(np.float32([-1e9])))
    full.dtype = ir.DataType.FLOAT
    return b.model_of([b.node("Add", [scores, b.node("Trilu", [full, ints("k", 1)], upper=1)])])


def test_lengths_and_masks_are_folded_and_matrices_are_not() -> None:
    model = with_shapes_and_a_mask()
    feeds = {"x": random(1, 6, 8)}
    with Session(model) as session:
        expected = session.run(feeds)
    fold_shapes(model)
    assert sorted(node.op_type for node in model.graph) == ["Add", "MatMul", "Reshape", "Transpose"]
    np.testing.assert_array_equal(model.graph.initializers["more"].const_value.numpy(), random(6, 4))
    with Session(model) as session:
        np.testing.assert_array_equal(session.run(feeds)[0], expected[0])


@pytest.mark.parametrize("size", [1 << 8, 1 << 18])
def test_large_constants_are_not_written_out(size: int) -> None:
    b = Builder(18)
    x = b.input("x", [1, 1])
    filled = b.node("ConstantOfShape", [b.constant("size", np.array([1, size]))], value=ir.tensor(np.float32([2])))
    filled.dtype = ir.DataType.FLOAT
    model = b.model_of([b.node("Add", [x, filled])])
    fold_shapes(model)
    assert len(list(model.graph)) == (1 if size == 1 << 8 else 2)
