"""Copies of a model with the grids of marked values as inputs: one session for any grids.

Every mark (`magr_onnx.passes.emit.tensors.mark`) becomes ``Mul(Clip(Round(Div(x, s)), l, h), s)``, which is what QuantizeLinear and
DequantizeLinear compute, with initializers ``s``, ``l``, ``h`` that are graph inputs too. Their own values, with ``s = 2^-60``, change
nothing that is larger than that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.graph.names import Names, add_initializer

OFF = (2.0**-60, -3e38, 3e38)


def with_grid_inputs(model: ir.Model, marks: Collection[str]) -> tuple[ir.Model, dict[str, tuple[str, str, str]]]:
    """Copy a model; return the copy, and the inputs for step, least and greatest multiple of it, by the names behind the marks."""
    copy = model.clone()
    graph, inputs = copy.graph, {}
    Names.rescan(graph)
    for mark in [node for node in graph if node.op_type == "Identity" and node.outputs[0].name in marks]:
        x, rounded = mark.inputs[0], mark.outputs[0]
        name = str(rounded.name)
        step, low, high = values = [add_initializer(graph, f"{name}_{i}", np.float32(OFF[i])) for i in range(3)]
        graph.inputs.extend(values)
        inputs[name] = (str(step.name), str(low.name), str(high.name))
        nodes = list(_rounding(x, step, low, high))
        Names.of(graph).adopt(nodes, [mark], rounded)
        ir.convenience.replace_nodes_and_values(graph, mark, [mark], nodes, [rounded], [nodes[-1].outputs[0]])
    return copy, inputs


def _rounding(x: ir.Value | None, step: ir.Value, low: ir.Value, high: ir.Value) -> Iterator[ir.Node]:
    shape, kind = (None, None) if x is None else (x.shape, x.dtype)
    operations: list[tuple[str, list[ir.Value]]] = [("Div", [step]), ("Round", []), ("Clip", [low, high]), ("Mul", [step])]
    if kind == ir.DataType.FLOAT16:
        operations = [("Cast", []), *operations, ("Cast", [])]
    for index, (op, others) in enumerate(operations):
        to = ir.DataType.FLOAT16 if op == "Cast" and index else ir.DataType.FLOAT
        result = ir.val(None, to, shape)
        yield ir.node(op, [x, *others], {"to": to} if op == "Cast" else {}, outputs=[result])
        x = result


def feeds(grids: Mapping[str, ActivationGrid], inputs: Mapping[str, tuple[str, str, str]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return what to feed for grids of some values, by the names behind their marks; the others are not rounded."""
    result: dict[str, npt.NDArray[np.float32]] = {}
    for name, grid in grids.items():
        values = (grid.scale, *grid.multiples)
        result |= {key: np.array(value, np.float32) for key, value in zip(inputs[name], values, strict=True)}
    return result
