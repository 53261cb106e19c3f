"""Conversion of legacy constants to dense initializers that are not inputs.

Sparse constants: onnxruntime converts them to dense on loading, and onnx-ir does not support them. Initializers among the inputs: required
before IR version 4, where onnxruntime does not allow overriding them; from version 4 on it means that callers may override them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from magr_onnx.model_io.validate_proto import graphs

CONSTANTS = 4
"""The IR version from which initializers need not be inputs."""


def modernize(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Convert every constant to a dense initializer or Constant; return the same object if nothing changes.

    Args:
        proto: A model that passed `validate_proto.check`, which bounds the size of its sparse tensors.
    """
    sparse = any(_sparse(graph) for graph in graphs(proto))
    if not sparse and proto.ir_version >= CONSTANTS:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if sparse:
        _densify(copy)
    if proto.ir_version < CONSTANTS:
        names = {t.name for t in copy.graph.initializer}
        inputs = [v for v in copy.graph.input if v.name not in names]
        copy.graph.ClearField("input")
        copy.graph.input.extend(inputs)
        copy.ir_version = CONSTANTS
    return copy


def _densify(proto: onnx.ModelProto) -> None:
    for graph in graphs(proto):
        if isinstance(graph, onnx.GraphProto):
            graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
            graph.ClearField("sparse_initializer")
        for attribute in _constants(graph):
            tensor = _dense(attribute.sparse_tensor)
            attribute.Clear()
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _sparse(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    return bool(_constants(graph) or (isinstance(graph, onnx.GraphProto) and graph.sparse_initializer))


def _constants(graph: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.AttributeProto]:
    return [a for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "sparse_value"]


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(math.prod(sparse.dims), values.dtype)
    dense[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))] = values
    return onnx.numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), sparse.values.name)
