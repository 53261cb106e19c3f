"""Models in and out: every form a caller may have, checked before work; outputs written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from magr_onnx.errors import MagrError, ModelError, OutputError, raise_all

INLINE_LIMIT = 1_900_000_000  # protobuf holds at most 2 GiB


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model and where it came from."""

    model: ir.Model
    path: Path | None
    external: frozenset[Path]

    @property
    def name(self) -> str:
        return "the given model" if self.path is None else str(self.path)

    @property
    def bytes(self) -> int:
        """Size on disk, external data included; the size of the initializers for a model in memory."""
        if self.path is None:
            return initializer_bytes(self.model)
        return self.path.stat().st_size + sum(p.stat().st_size for p in self.external)


def load(source: Any) -> Loaded:
    """A model from a path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a ``torch.onnx.ONNXProgram``.

    A model in memory is copied (its tensors are shared), so that the caller's object stays as it is.

    Raises:
        ModelError: Not a model, or not a valid one; the message says what was found.
    """
    if isinstance(source, str | os.PathLike):
        return _load_path(Path(source))
    if isinstance(source, onnx.ModelProto):
        _check(source, "the given ModelProto")
        return Loaded(ir.from_proto(source), None, frozenset())
    inner = getattr(source, "model", None)
    model = source if isinstance(source, ir.Model) else inner if isinstance(inner, ir.Model) else None
    if model is None:
        raise ModelError(
            f"cannot read a model from {type(source).__name__}; give a path, an onnx.ModelProto, an onnx_ir.Model or a "
            "torch.onnx.ONNXProgram"
        )
    return Loaded(model.clone(), None, frozenset())


def _load_path(path: Path) -> Loaded:
    if not path.is_file():
        raise ModelError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    size = path.stat().st_size
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path} ({size} bytes) is not an ONNX model, or is truncated: {error}") from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(f"{path} ({size} bytes) is not an ONNX model: it has no graph or no IR version")
    external = _external_files(proto, path)
    _check(str(path), str(path))
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    return Loaded(model, path, external)


def _check(model: str | onnx.ModelProto, name: str) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{name} is not a valid ONNX model: {str(error).strip()}") from error
    except Exception as error:
        raise ModelError(f"{name} cannot be checked: {error}") from error


def _external_files(proto: onnx.ModelProto, path: Path) -> frozenset[Path]:
    """Files that hold the model's tensors, after checking that each is there and long enough."""
    problems: list[str] = []
    files: set[Path] = set()
    folder = path.parent.resolve()
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if not uses_external_data(tensor):
            continue
        info = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if not file.resolve().is_relative_to(folder):
            problems.append(f"tensor {tensor.name}: external data {info.location!r} lies outside {folder}")
        elif not file.is_file():
            problems.append(f"tensor {tensor.name}: external data file {file} is missing; keep it beside the model")
        else:
            end = (info.offset or 0) + (info.length or 0)
            if end > file.stat().st_size:
                problems.append(f"tensor {tensor.name}: {file} has {file.stat().st_size} bytes, but the tensor ends at {end}")
            files.add(file)
    if problems:
        raise_all(ModelError, [f"{path}: {p}" for p in problems[:20]])
    return frozenset(files)


def initializer_bytes(model: ir.Model) -> int:
    """Bytes of all initializers and of the tensors in Constant nodes, those of bodies included, bits packed."""
    held = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    held += [n.attributes["value"].as_tensor() for n in model.graph.all_nodes() if n.op_type == "Constant" and "value" in n.attributes]
    return sum(t.nbytes for t in held if t is not None)


def check_output(output: Path, loaded_path: Path | None, external: frozenset[Path]) -> list[str]:
    """What stands against writing ``output``, without touching anything."""
    found = []
    folder = output.parent
    if output.is_dir():
        found.append(f"output {output} is a folder; give a file name")
    elif not folder.is_dir():
        found.append(f"output folder {folder} does not exist; create it first")
    elif not os.access(folder, os.W_OK):
        found.append(f"output folder {folder} is not writable")
    elif output.exists() and not os.access(output, os.W_OK):
        found.append(f"output {output} exists and is not writable")
    sources = {p.resolve() for p in external} | ({loaded_path.resolve()} if loaded_path else set())
    if output.resolve() in sources or _data_name(output).resolve() in sources:
        found.append(f"output {output} would overwrite the input model or its data; choose another name")
    return found


def _data_name(output: Path) -> Path:
    return output.with_name(output.name + ".data")


def save(model: ir.Model, output: Path, verify: Callable[[Path], None] | None = None) -> int:
    """Write a model under a temporary name, verify it, then rename; returns the bytes written.

    Tensors go to ``<output>.data`` when the file would pass protobuf's 2 GiB. On any error, an interrupt included, the old
    output stays and nothing is left behind.

    Args:
        model: What to write.
        output: Final path.
        verify: Called with the temporary file; an exception it raises stops the rename.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error}") from error
    try:
        part = folder / output.name
        data = _data_name(part).name if initializer_bytes(model) > INLINE_LIMIT else None
        try:
            ir.save(_inline(model) if data is None else model, part, external_data=data)
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error}") from error
        if verify is not None:
            verify(part)
        size = sum(p.stat().st_size for p in folder.iterdir())
        mode = 0o666 & ~_umask()
        for file in folder.iterdir():
            file.chmod(mode)
        if data is not None:
            os.replace(folder / data, output.parent / data)
        os.replace(part, output)
        return size
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error}") from error
    except ValueError as error:
        raise MagrError(f"the result cannot be serialized to {output}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _inline(model: ir.Model) -> ir.Model:
    """A model whose tensors are in memory, so that it is written as one file."""
    ir.external_data.load_to_model(model)
    return model
