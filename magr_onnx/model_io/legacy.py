"""Between the forms that onnxruntime reads and the one that onnx-ir and onnx's checker do.

1. Sparse constants become dense: onnxruntime converts them on loading, and onnx-ir does not support them.
2. Initializers among the inputs are no inputs before IR version 4, where they had to be listed and onnxruntime does not allow overriding
   them; from version 4 on it means that callers may override them.
3. Types that onnx-ir does not know, such as sklearn-onnx's maps, are kept as text in the value's metadata, and written back as they were.
4. An output that is an input has the input's type, whatever the file declares.
5. Nodes are put in order, the standard domain has its short name, and onnxruntime's own is imported where it is used.
"""

from __future__ import annotations

import base64
import contextlib
import graphlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from magr_onnx.model_io.validate_proto import graphs

CONSTANTS = 4
"""The IR version from which initializers need not be inputs."""

TYPE = "onnx_magr.type"
"""Key of the metadata of a value with its type, where onnx-ir does not know it."""

CONTRIB = "com.microsoft"


def read(path: Path) -> ir.Model:
    """Read a file that was checked before, or written here; external data stays in its files."""
    model = ir.from_proto(modernize(onnx.load(str(path), format="protobuf", load_external_data=False)))
    find_data(model, path.parent)
    return model


def find_data(model: ir.Model, folder: Path) -> None:
    """Say where external data lies, and read that of attributes into memory: only that of initializers is written again.

    Data is looked for in ``folder``, and read from the real files: onnx-ir takes none that are links out of it or have several names.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _in_real_file(value.const_value, folder)
    for nodes in (model.graph.all_nodes(), *(f.all_nodes() for f in model.functions.values())):
        for node in nodes:
            for name, attribute in node.attributes.items():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    tensor = _in_real_file(attribute.value, folder)
                    node.attributes[name] = ir.AttrTensor(name, ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name))


def _in_real_file(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    real = (folder / tensor.location).resolve()
    return ir.ExternalTensor(
        real,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        base_dir="",  # of the location, which is absolute
    )


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Convert a model to a message, with the types that `modernize` has set aside, and without types of initializers beside the tensors.

    onnx-ir declares every initializer again in ``value_info``, which is a tenth of a file with many small ones.
    """
    proto = ir.to_proto(model)
    for graph in graphs(proto):
        _declare_no_tensors(graph)
        for value in _declared(graph):
            for entry in [entry for entry in value.metadata_props if entry.key == TYPE]:
                value.type.ParseFromString(base64.b64decode(entry.value))
                value.metadata_props.remove(entry)
    return proto


def modernize(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model, in place, to the form that onnx-ir reads, and return it.

    Args:
        proto: A model that passed `validate_proto.check`, which bounds the size of its sparse tensors.
    """
    _densify(proto)
    if proto.ir_version < CONSTANTS:
        names = {t.name for t in proto.graph.initializer}
        inputs = [v for v in proto.graph.input if v.name not in names]
        proto.graph.ClearField("input")
        proto.graph.input.extend(inputs)
        proto.ir_version = CONSTANTS
    _name_domains(proto)
    for graph in graphs(proto):
        _sort(graph)
        _declare_once(graph)
        for value in _declared(graph):
            if _has_map(value.type):
                value.metadata_props.add(key=TYPE, value=base64.b64encode(value.type.SerializeToString()).decode())
                value.ClearField("type")
    return proto


def _declared(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.ValueInfoProto]:
    """Yield the declarations of values of a graph."""
    if isinstance(graph, onnx.GraphProto):
        yield from (*graph.input, *graph.output)
    yield from graph.value_info


def _declare_once(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Let an output that is an input have the input's type, which onnx-ir would replace by the output's, or by none."""
    types = {value.name: value.type for value in graph.input} if isinstance(graph, onnx.GraphProto) else {}
    for value in _declared(graph):
        if value.name in types and types[value.name].WhichOneof("value") is not None:
            value.type.CopyFrom(types[value.name])


def _declare_no_tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Drop declarations of initializers, whose tensors have type and shape; those with metadata stay."""
    if not isinstance(graph, onnx.GraphProto):
        return
    tensors = {tensor.name for tensor in graph.initializer}
    others = [value for value in graph.value_info if value.name not in tensors or value.metadata_props or value.doc_string]
    if len(others) < len(graph.value_info):
        graph.ClearField("value_info")
        graph.value_info.extend(others)


def _has_map(kind: onnx.TypeProto) -> bool:
    """Whether a type is one that onnx-ir does not know, or is made of one."""
    name = kind.WhichOneof("value")
    if name in ("sequence_type", "optional_type"):
        return _has_map(getattr(kind, name).elem_type)
    return name not in (None, "tensor_type", "sparse_tensor_type")


def _name_domains(proto: onnx.ModelProto) -> None:
    """Give the standard domain its short name, and import onnxruntime's own where only nodes name it."""
    entries = [entry for owner in (proto, *proto.functions) for entry in owner.opset_import]
    nodes = [node for graph in graphs(proto) for node in graph.node]
    for named in (*entries, *nodes):
        if named.domain == "ai.onnx":
            named.domain = ""
    if CONTRIB in {node.domain for node in nodes} - {entry.domain for entry in proto.opset_import}:
        proto.opset_import.add(domain=CONTRIB, version=1)


def _sort(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Put nodes behind those they read, if they are not; nodes of a cycle are left to the checker."""
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    before = {i: {makers[name] for name in _reads(node) if name in makers} for i, node in enumerate(graph.node)}
    if all(max(others, default=-1) < i for i, others in before.items()):
        return
    with contextlib.suppress(graphlib.CycleError):
        nodes = [graph.node[i] for i in graphlib.TopologicalSorter(before).static_order()]
        ordered = type(graph)(node=nodes)
        graph.ClearField("node")
        graph.node.extend(ordered.node)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names a node reads, in its bodies too."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            yield from (name for inner in body.node for name in _reads(inner))
            yield from (value.name for value in body.output)


def _densify(proto: onnx.ModelProto) -> None:
    for graph in filter(_sparse, graphs(proto)):
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
