"""Serialization of a model for onnxruntime without copying external data: only tensors in memory are written.

onnxruntime reads external data only from below one folder. With the root of the file system as that folder, it memory-maps the files of
any source in place, so nothing is copied however large the model is.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from magr_onnx.model_io.legacy import to_proto
from magr_onnx.model_io.validate_proto import graphs

THRESHOLD = 1024  # bytes from which a tensor in memory goes to the data file; the rest stays in the protobuf
SIZES = 1 << 16
FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def most_inline(tensor: ir.TensorProtocol, usual: int) -> int:
    """Return the size up to which a tensor stays in the protobuf: larger for int64, from which onnxruntime may infer shapes.

    It does not read data files for shape inference, and would reject the model.
    """
    return max(usual, SIZES) if tensor.dtype == ir.DataType.INT64 else usual


def serialized(model: ir.Model, folder: Path) -> tuple[bytes, dict[str, str]]:
    """Serialize the model; return the bytes and the session options with which onnxruntime finds its tensors.

    Tensors in memory of more than `THRESHOLD` bytes are written to ``folder / "model.data"``, one at a time. The model is restored
    afterwards.

    Raises:
        OSError: The folder cannot be written to.
        ValueError: The protobuf exceeds 2 GiB without its large tensors.
    """
    root = Path(folder.resolve().anchor)
    values = [v for v in model_values(model) if v.const_value is not None]
    before = [v.const_value for v in values]
    data = folder.resolve() / "model.data"
    try:
        with data.open("wb") as file:
            for value in values:
                tensor = value.const_value
                assert tensor is not None
                if isinstance(tensor, ir.ExternalTensor):
                    path = Path(os.path.abspath(tensor.path))
                    path = path.parent.resolve() / path.name  # a link to a folder, followed; a link to a file is checked by its reader
                if isinstance(tensor, ir.ExternalTensor) and Path(path.anchor) == root:
                    offset = tensor.offset or 0
                elif tensor.nbytes > most_inline(tensor, THRESHOLD):
                    path, offset = data, file.tell()
                    file.write(tensor.tobytes())
                else:
                    continue
                value.const_value = external_tensor(tensor, str(tensor.name), path.relative_to(root).as_posix(), offset, root)
        return to_proto(model).SerializeToString(), {FOLDER_KEY: str(root)}
    finally:
        for value, original in zip(values, before, strict=True):
            value.const_value = original


def external_tensor(tensor: ir.TensorProtocol, name: str, location: str, offset: int, folder: Path) -> ir.ExternalTensor:
    """Return ``tensor`` as one that is read from ``location``, a file relative to ``folder``."""
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=folder)  # type: ignore[arg-type]


def model_values(model: ir.Model) -> list[ir.Value]:
    """Return the initializers of the model and its subgraphs."""
    return [v for graph in model.graphs() for v in graph.initializers.values()]


def weightless(model: ir.Model, most: int = 0) -> onnx.ModelProto:
    """Serialize a model without the data of initializers of more than ``most`` bytes, which are not read."""
    values = [v for v in model_values(model) if v.const_value is not None and v.const_value.nbytes > most]
    before = [v.const_value for v in values]
    try:
        for value, tensor in zip(values, before, strict=True):
            assert tensor is not None
            value.const_value = external_tensor(tensor, str(value.name), "", 0, Path())
        proto = to_proto(model)
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor
    for graph in graphs(proto):
        for stored in graph.initializer if isinstance(graph, onnx.GraphProto) else ():
            stored.ClearField("external_data")
            stored.ClearField("data_location")
    return proto
