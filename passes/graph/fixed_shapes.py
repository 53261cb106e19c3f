"""Shapes for runtimes that need all of them to be known: the axis of samples becomes 1."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from magr_onnx.errors import ModelError, raise_all


def fix_batch(model: ir.Model, runtime: str) -> list[str]:
    """Set the symbolic first axis of inputs, and all axes of that name, to 1; return what to say of it.

    Args:
        model: Changed in place.
        runtime: What needs it, for messages.

    Raises:
        ModelError: Other axes of inputs are symbolic (all of them are named).
    """
    inputs = [(value, value.shape) for value in model.graph.inputs if value.shape is not None]
    if all(isinstance(dim, int) for _, shape in inputs for dim in shape):
        return []
    batch = {shape[0].value for _, shape in inputs if shape.rank() and isinstance(shape[0], ir.SymbolicDim)} - {None}
    problems = []
    for value, shape in inputs:
        left = [f"axis {i} ({d})" for i, d in enumerate(_with_one_sample(shape, batch, True)) if isinstance(d, ir.SymbolicDim)]
        if left:
            problems.append(
                f"{runtime} needs fixed shapes, and input {value.name} has {', '.join(left)}; set them first, for example with "
                "python -m onnxruntime.tools.make_dynamic_shape_fixed"
            )
    raise_all(ModelError, problems)
    for value in dict.fromkeys((*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph.all_nodes() for v in node.outputs))):
        if value.shape is not None:
            dims = _with_one_sample(value.shape, batch, value.is_graph_input())
            is_declared = value.is_graph_input() or value.is_graph_output()
            value.shape = ir.Shape(dims) if is_declared or all(isinstance(d, int) for d in dims) else None
    return [f"{runtime} needs fixed shapes: the axis of samples is 1 in the result"]


def _with_one_sample(shape: ir.Shape, batch: Collection[str | None], is_input: bool) -> list[int | ir.SymbolicDim]:
    """Set the axes of samples to 1: those with a name among ``batch``, and the first of an input."""
    return [1 if isinstance(d, ir.SymbolicDim) and (d.value in batch or (is_input and i == 0)) else d for i, d in enumerate(shape)]
