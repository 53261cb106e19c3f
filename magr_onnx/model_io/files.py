"""Loading of models in every form a caller may have, with checks of inputs and output paths before any work."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from magr_onnx.core.lazy import Lazy
from magr_onnx.errors import ModelError, listed, raise_all
from magr_onnx.model_io import atomic, contrib_schemas, validate_proto
from magr_onnx.model_io.external_data import model_values, weightless
from magr_onnx.model_io.legacy import find_data, modernize
from magr_onnx.model_io.writing import data_name, is_data_file_of

_WEIGHTS = "weights without their graph; load them into their torch module, and give that to magr_onnx.torch.optimize"
_KINDS = {
    ".pt": f"a file of torch. It has {_WEIGHTS}",
    ".pth": f"a file of torch. It has {_WEIGHTS}",
    ".ckpt": f"a file of torch. It has {_WEIGHTS}",
    ".safetensors": f"it has {_WEIGHTS}",
    ".npz": "arrays of NumPy, as --calibration takes",
    ".npy": "an array of NumPy",
}
"""Files that users mistake for models, by suffix."""
_OTHERS = {*_KINDS, ".txt", ".json", ".toml", ".html", ".csv", ".bin", ".zip", ".py", ".data"}
"""Suffixes that are not for models."""


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A loaded model and its source.

    Attributes:
        model: The model; a copy if the caller passed it in memory.
        path: Its file, if it has one.
        external: The files its tensors are read from.
        bytes: Size on disk with external data; for a model in memory the size it would have.
        notes: Notes for the report, such as parts of the model that are dropped.
    """

    model: ir.Model
    path: Path | None
    external: frozenset[Path]
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "the given model" if self.path is None else str(self.path)


def load(source: Any, keep_overridable: bool = False) -> Loaded:
    """Load a model from a path, an ``onnx.ModelProto``, an ``onnx_ir.Model``, a ``torch.onnx.ONNXProgram``, or `Lazy` of one.

    A model in memory is copied (with shared tensors), so that the caller's object does not change.

    Args:
        source: The model.
        keep_overridable: Leave initializers that are inputs of the graph as they are; else they are no inputs, and a note says so.

    Raises:
        ModelError: Not a model, or not a valid one.
    """
    loaded = _load(source)
    graph = loaded.model.graph
    names = [str(value.name) for value in graph.inputs if value.is_initializer()]
    if keep_overridable or not names:
        return loaded
    graph.inputs[:] = [value for value in graph.inputs if not value.is_initializer()]
    note = f"{len(names)} initializers were inputs too ({listed(names)}), and are constants now; --keep-overridable leaves them as they are"
    return replace(loaded, notes=(*loaded.notes, note))


def _load(source: Any) -> Loaded:
    if isinstance(source, Lazy):
        source = source.make()
    if isinstance(source, str | os.PathLike):
        return _load_path(Path(source))
    if isinstance(source, onnx.ModelProto):
        name = "the given ModelProto"
        _check_parts(source, name)
        validate_proto.check(source, name, None)
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        converted = _convert(copy, name)
        return Loaded(converted, None, frozenset(), model_bytes(converted), _dropped(source))
    inner = getattr(source, "model", None)
    model = source if isinstance(source, ir.Model) else inner if isinstance(inner, ir.Model) else None
    if model is None and hasattr(source, "state_dict") and hasattr(source, "forward"):
        raise ModelError(f"{type(source).__name__} is a torch module; magr_onnx.torch.optimize(module, example_inputs, ...) takes those")
    if model is None:
        raise ModelError(
            f"cannot read a model from {type(source).__name__}; give a path, an onnx.ModelProto, an onnx_ir.Model or a "
            "torch.onnx.ONNXProgram"
        )
    return Loaded(model.clone(), None, _data_of(model), model_bytes(model), tuple(getattr(source, "notes", ())))


def _data_of(model: ir.Model) -> frozenset[Path]:
    """Return the files that tensors of a model in memory are read from."""
    paths = {Path(v.const_value.path) for v in model_values(model) if isinstance(v.const_value, ir.ExternalTensor)}
    missing = [f"the given model reads {p}, and there is no such file from {Path.cwd()}" for p in sorted(paths) if not p.is_file()]
    raise_all(ModelError, missing)
    return frozenset(paths)


def check_name(path: Path) -> list[str]:
    """Return a problem for a path that is not UTF-8, which onnx and onnxruntime require."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return [f"{str(path)!r} is not UTF-8, which onnx and onnxruntime need of a path; rename the file, or the folder it is in"]
    return []


def check_length(output: Path) -> list[str]:
    """Return a problem if the names of an output's data files may be too long."""
    return atomic.too_long(f"output {output}, data files", output.with_name(data_name(output, count=2, tag=12 * "0")))


def _load_path(path: Path) -> Loaded:
    raise_all(ModelError, check_name(path))
    if not path.is_file():
        raise ModelError(f"{path}: no such file" if not path.exists() else f"{path} is {_not_a_file(path)}")
    if (kind := _KINDS.get(path.suffix.lower())) is not None:
        raise ModelError(f"{path} is no ONNX model, by its name: {kind}")
    size = path.stat().st_size
    if size > validate_proto.LARGEST_FILE:
        raise ModelError(f"{path} has {size} bytes; an ONNX file is at most 2 GiB, with its tensors in files beside it")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except Exception as error:
        raise ModelError(f"{path} ({size} bytes) is not an ONNX model, or is truncated: {error}") from error
    _check_parts(proto, f"{path} ({size} bytes)")
    external = validate_proto.check(proto, str(path), path)
    model = _convert(proto, str(path))
    find_data(model, path.parent)
    return Loaded(model, path, external, size + sum(p.stat().st_size for p in external), _dropped(proto))


def model_of(path: Path) -> Path:
    """Return the model of a folder: the one that ``genai_config.json`` names, or the only one; a path that is no folder as it is.

    Raises:
        ModelError: There is none, or there are several.
    """
    if not path.is_dir():
        return path
    try:
        models: list[Path] = [path / json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]["filename"]]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it names none
        models = sorted(path.glob("*.onnx"))
    if len(models) != 1:
        raise ModelError(f"{path} has {len(models)} models ({', '.join(m.name for m in models) or 'no .onnx'}); give the file of one")
    return models[0]


def _not_a_file(path: Path) -> str:
    """Describe a path that is not a file, with a remedy."""
    if not path.is_dir():
        return "not a file"
    models = sorted(map(str, (*path.glob("*.onnx"), *path.glob("*/*.onnx"))))
    return f"a folder; give {' or '.join(models[:3])}" if models else "a folder; give an .onnx file"


def _check_parts(proto: onnx.ModelProto, name: str) -> None:
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(f"{name} is not an ONNX model: it has no graph or no IR version")


def _convert(proto: onnx.ModelProto, name: str) -> ir.Model:
    """Check a message, which may be changed, and convert it."""
    _check(modernize(proto), name)
    try:
        return ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{name} cannot be read: {error}") from error


def _dropped(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Return notes on parts of the model that are dropped."""
    text = f"the model's training info ({len(proto.training_info)}) is left out: it trains weights that become codes"
    return (text,) if proto.training_info else ()


def _check(proto: onnx.ModelProto, name: str) -> None:
    """Check a message with onnx's checker, which wants more than onnxruntime does: types and shapes of inputs and outputs, and names.

    The bytes of tensors are left to `validate_proto.check`.
    """
    strict = onnx.ModelProto(**_fields(proto, "graph", "metadata_props"))
    strict.graph.CopyFrom(onnx.GraphProto(**_fields(proto.graph, "initializer")))
    for tensor in proto.graph.initializer:
        is_bytes = _fields(tensor).keys() <= {"name", "data_type", "dims", "raw_data", "doc_string"}
        strict.graph.initializer.append(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]) if is_bytes else tensor)
    for graph in validate_proto.graphs(strict):
        if not isinstance(graph, onnx.GraphProto):
            continue
        graph.name = graph.name or "graph"
        for value in (*graph.input, *graph.output):
            if value.type.WhichOneof("value") is None:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.shape.SetInParent()
    for tensor in onnx.external_data_helper._get_all_tensors(strict):
        if onnx.external_data_helper.uses_external_data(tensor):
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    contrib_schemas.register()
    try:
        onnx.checker.check_model(strict)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{name} is not a valid ONNX model: {str(error).strip()}") from error
    except Exception as error:
        raise ModelError(f"{name} cannot be checked: {error}") from error


def _fields(message: Any, *without: str) -> dict[str, Any]:
    """Return the fields of a message that are set, by name."""
    return {field.name: value for field, value in message.ListFields() if field.name not in without}


def model_bytes(model: ir.Model) -> int:
    """Return the size of a model in memory as a file, without copying or reading tensors."""
    return sum(v.const_value.nbytes for v in model_values(model) if v.const_value is not None) + int(weightless(model).ByteSize())


def check_output(output: Path, loaded_path: Path | None, external: frozenset[Path]) -> list[str]:
    """Return the problems of writing ``output``, without changing anything."""
    problems = check_name(output.absolute())
    folder = output.parent
    if output.suffix.lower() in _OTHERS or output.name == "-":
        problems.append(f"output {output}: the result is an ONNX model; give a name that ends in .onnx")
    if os.path.isdir(output):  # pathlib would raise for a name that is too long
        problems.append(f"output {output} is a folder; give a file name")
    elif not os.path.isdir(folder):
        problems.append(f"output folder {folder} does not exist; create it first")
    elif reasons := atomic.why_not_writable(f"output {output}", output) or check_length(output):
        problems += reasons
    sources = {p.resolve() for p in external} | ({loaded_path.resolve()} if loaded_path else set())
    if output.resolve() in sources or any(is_data_file_of(p, output) and p.parent == folder.resolve() for p in sources):
        problems.append(f"output {output} would overwrite the input model or its data; choose another name")
    return problems
