"""Taps: a copy of a model whose outputs are second moments of chosen values instead of its results.

For a value ``x (..., K)``, seen as rows ``X (n, K)``, the tapped model yields ``X^T X (K, K)``, ``sum(X) (K,)`` and, where a mask
counts rows, the number counted. Activations never leave onnxruntime, and its optimizer drops what no tap needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Tap:
    """What to tap: the value's name, its width K, and whether rows are weighted by the mask."""

    value: str
    width: int
    masked: bool = False


def shape_taps(model: ir.Model, values: Sequence[str]) -> ir.Model:
    """A copy of the model that outputs the run-time shape of each value, in order."""
    copy = model.clone()
    by_name = _values(copy)
    outputs = []
    for i, name in enumerate(values):
        out = ir.val(f"__shape_{i}", ir.DataType.INT64, [None])
        copy.graph.append(ir.node("Shape", [by_name[name]], outputs=[out], name=f"__shape_{i}"))
        outputs.append(out)
    _set_outputs(copy, outputs)
    return copy


def gram_taps(model: ir.Model, taps: Sequence[Tap], mask: str | None = None) -> ir.Model:
    """A copy of the model with outputs ``gram_i``, ``sum_i`` and ``rows_i`` for every tap, in order.

    ``mask`` names an input of any numeric or boolean type whose nonzero elements mark the rows to count, one element a row.
    """
    copy = model.clone()
    graph = copy.graph
    by_name = _values(copy)
    opset = copy.opset_imports.get("", 13)
    outputs: list[ir.Value] = []

    def add(op: str, inputs: list[ir.Value | None], name: str, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=name)
        node.outputs[0].name = name
        graph.append(node)
        return node.outputs[0]

    def constant(name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def total(value: ir.Value, name: str) -> ir.Value:
        if opset >= 13:
            return add("ReduceSum", [value, constant(f"{name}_axes", np.array([0]))], name, keepdims=0)
        return add("ReduceSum", [value], name, axes=[0], keepdims=0)

    weights: ir.Value | None = None
    if mask is not None and any(t.masked for t in taps):
        truth = add("Cast", [by_name[mask]], "__mask_bool", to=ir.DataType.BOOL)
        real = add("Cast", [truth], "__mask_float", to=ir.DataType.FLOAT)
        weights = add("Reshape", [real, constant("__mask_shape", np.array([-1, 1]))], "__mask_rows")
    for i, tap in enumerate(taps):
        real = add("Cast", [by_name[tap.value]], f"__tap_{i}_float", to=ir.DataType.FLOAT)
        rows = add("Reshape", [real, constant(f"__tap_{i}_shape", np.array([-1, tap.width]))], f"__tap_{i}_rows")
        if tap.masked and weights is not None:
            rows = add("Mul", [rows, weights], f"__tap_{i}_counted")
            count = total(weights, f"__rows_{i}")
        else:
            count = add("Cast", [add("Shape", [rows], f"__tap_{i}_size")], f"__rows_{i}", to=ir.DataType.FLOAT)
        gram = add("Gemm", [rows, rows], f"__gram_{i}", transA=1)
        mean = total(rows, f"__sum_{i}")
        for value, shape in ((gram, [tap.width] * 2), (mean, [tap.width]), (count, [None])):
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(shape)
        outputs += [gram, mean, count]
    _set_outputs(copy, outputs)
    return copy


def _set_outputs(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    found = {v.name: v for v in model.graph.inputs if v.name is not None}
    for node in model.graph:
        found.update({v.name: v for v in node.outputs if v.name is not None})
    found.update(model.graph.initializers)
    return found
