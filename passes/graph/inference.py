"""Types and shapes of values, inferred where a file has none."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from magr_onnx.model_io.external_data import weightless

SMALL = 1 << 12
"""Bytes of constants whose values shape inference may need."""


def inferred_types(model: ir.Model) -> dict[str, ir.DataType]:
    """Return the element types of the values of the main graph, by name."""
    known = {str(value.name): value.dtype for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    if None in known.values():
        try:
            proto = onnx.shape_inference.infer_shapes(weightless(model, SMALL))
        except Exception:  # what has no type stays float
            proto = onnx.ModelProto()
        for value in proto.graph.value_info:
            if known.get(value.name, ...) is None:
                known[value.name] = ir.DataType(value.type.tensor_type.elem_type)
    return {name: dtype for name, dtype in known.items() if dtype is not None}
