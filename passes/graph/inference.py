"""ONNX's inference of types and shapes of values, where a file has none."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from magr_onnx.model_io.external_data import weightless
from magr_onnx.model_io.legacy import modernize
from magr_onnx.model_io.validate_proto import graphs
from magr_onnx.passes.graph.opset import ASIDE

SMALL = 1024
"""Bytes up to which a constant may be a shape."""

CRASHING = ("DictVectorizer", "LabelEncoder", "RegexFullMatch", "TreeEnsemble")
"""Operators whose inference in onnx 1.23 reads the type of an input that may have none, as after custom operators, and ends the process."""


def inferred_values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield what all nodes of a copy of a model put out, with inferred types and shapes; nothing where inference fails."""
    try:
        proto = weightless(model, SMALL)
        proto.opset_import.add(domain=ASIDE, version=1)
        for node in (node for graph in graphs(proto) for node in graph.node if node.op_type in CRASHING):
            node.domain = ASIDE
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # fewer types and shapes, which callers do without
        return
    for node in ir.from_proto(modernize(proto)).graph.all_nodes():
        yield from node.outputs


def inferred_types(model: ir.Model) -> dict[str, ir.DataType]:
    """Return the element types of the values of the main graph, by name."""
    known = {str(value.name): value.dtype for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    if None in known.values():
        inferred = {str(value.name): value.dtype for value in inferred_values(model)}
        known = {name: dtype or inferred.get(name) for name, dtype in known.items()}
    return {name: dtype for name, dtype in known.items() if dtype is not None}
