"""Shapes for runtimes that need all of them to be known: the axis of samples becomes 1."""

from __future__ import annotations

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
    batch = {shape[0].value for _, shape in inputs if shape.rank() and isinstance(shape[0], ir.SymbolicDim)}
    if not any(not isinstance(dim, int) for _, shape in inputs for dim in shape):
        return []
    problems = []
    for value, shape in inputs:
        left = [
            f"axis {i} ({d})"
            for i, d in enumerate(shape)
            if i and isinstance(d, ir.SymbolicDim) and (d.value is None or d.value not in batch)
        ]
        if left:
            problems.append(
                f"{runtime} needs fixed shapes, and input {value.name} has {', '.join(left)}; set them first, for example with "
                "python -m onnxruntime.tools.make_dynamic_shape_fixed"
            )
    raise_all(ModelError, problems)
    values = (*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph.all_nodes() for v in node.outputs))
    for value in dict.fromkeys(values):
        if value.shape is None:
            continue
        is_input = value.is_graph_input()
        dims = [
            1 if isinstance(d, ir.SymbolicDim) and ((is_input and i == 0) or (d.value is not None and d.value in batch)) else d
            for i, d in enumerate(value.shape)
        ]
        value.shape = ir.Shape(dims) if is_input or all(isinstance(d, int) for d in dims) or value.is_graph_output() else None
    return [f"{runtime} needs fixed shapes: the axis of samples is 1 in the result"]
