"""Sparse constants made dense: onnxruntime does so when it loads a model, and onnx-ir has no form for them."""

from __future__ import annotations

import math

import numpy as np
import onnx

from magr_onnx.sanity import graphs


def densify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every sparse initializer and sparse Constant dense; the same object where it has none.

    Args:
        proto: A model that `sanity.check` has passed, which bounds what its sparse tensors stand for.
    """
    if not any(_sparse(graph) for graph in graphs(proto)):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in graphs(copy):
        if isinstance(graph, onnx.GraphProto):
            graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
            graph.ClearField("sparse_initializer")
        for attribute in _constants(graph):
            tensor = _dense(attribute.sparse_tensor)
            attribute.Clear()
            attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))
    return copy


def _sparse(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    return bool(_constants(graph) or (isinstance(graph, onnx.GraphProto) and graph.sparse_initializer))


def _constants(graph: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.AttributeProto]:
    return [a for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "sparse_value"]


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(math.prod(sparse.dims), values.dtype)
    dense[indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims))] = values
    return onnx.numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), sparse.values.name)
