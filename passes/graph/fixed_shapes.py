"""Shapes for runtimes that need all of them to be known: the axis of samples becomes 1."""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants

from magr_onnx.errors import ModelError, raise_all
from magr_onnx.passes.graph.constants import fixed_array
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import operand

MOST_VALUES = 1 << 16
"""Of a constant that is filled with one value."""


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


def fold_shapes(model: ir.Model) -> None:
    """Fold what known shapes make constant, in place: lengths, positions, masks of their order. Matrices of the model stay as they are."""
    matrices = {value for value in model.graph.initializers.values() if value.shape is None or len(value.shape) > 1}

    def should_fold(node: ir.Node) -> bool | None:
        if not matrices.isdisjoint(value for value in node.inputs if value is not None):
            return False
        sizes = fixed_array(operand(node, 0)) if node.op_type == "ConstantOfShape" else None  # the folder leaves it alone
        return True if sizes is not None and math.prod(map(int, sizes.reshape(-1))) <= MOST_VALUES else None

    fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    RemoveUnusedNodesPass()(model)
    Names.rescan(model.graph)
