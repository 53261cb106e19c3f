"""Atomic saving of models of any size, tensor by tensor, in one file or in shards.

A model and its data files are a set. They are written to a staging directory next to the output, verified there, and renamed: data first,
the model last, so that the output is a complete model at any moment, the old or the new one. New data files must not replace files that an
old model reads: in that case their names include a prefix of their SHA-256, and the old files are removed once unused. Names depend only on
existing files and contents, so a repeated run repeats them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from magr_onnx.errors import MagrError, OutputError
from magr_onnx.model_io.atomic import mode_of, replace, staging_directory, sync
from magr_onnx.model_io.external_data import external_tensor, model_values, most_inline
from magr_onnx.model_io.legacy import to_proto

INLINE_LIMIT = 512_000_000  # bytes of tensors in a protobuf, which onnxruntime loads with twice as much memory; it holds 2 GiB at most
PROTOBUF_LIMIT = (1 << 31) - 1
SMALL = 256  # bytes up to which a tensor stays in the protobuf, as onnx and onnx-ir have it
_LARGE_PROTOBUF = 1 << 28  # a larger file is not parsed only for the names of its data files


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a model in files.

    Attributes:
        external: Whether tensors always go to data files; else only if the model exceeds ``inline_limit`` bytes.
        shard_size: Largest size of a data file in bytes; a larger tensor has its own file. None for at most one file.
        inline_limit: See ``external``.
    """

    external: bool = False
    shard_size: int | None = None
    inline_limit: int = INLINE_LIMIT


def tensor_bytes(model: ir.Model) -> int:
    """Return the bytes of all tensors of the model, including attributes and subgraphs."""
    total = sum(v.const_value.nbytes for v in model_values(model) if v.const_value is not None)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                total += attribute.as_tensor().nbytes
    return total


def save(model: ir.Model, output: Path, verify: Callable[[Path], None] | None = None, layout: Layout | None = None) -> int:
    """Save a model under a temporary name, verify it, then rename it; return the bytes written.

    The permissions of a replaced output are kept, also for the new data files.

    On any error, including an interrupt, the old output is intact and nothing is left behind. After a kill or power cut the old or the new
    output is intact, and the next run on the same output removes what was left.

    Args:
        model: The model. Its tensors refer to the new data files afterwards, if any.
        output: Final path.
        verify: Called with the temporary file; an exception prevents the rename.
        layout: Layout in files.

    Raises:
        OutputError: The disk is full, or the folder is not writable.
        MagrError: The model without its tensors exceeds the size of a protobuf.
    """
    try:
        with output_errors(f"cannot write {output}"), staging_directory(output) as folder:
            return _save(model, output, folder, verify, layout or Layout())
    except ValueError as error:
        raise MagrError(f"the result cannot be serialized to {output}: {error}") from error


@contextlib.contextmanager
def output_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Raise errors of the file system as `OutputError`: what failed, why, and a remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what}: {os_error_hint(error)}{remedy}") from error


def os_error_hint(error: OSError) -> str:
    """Describe a file system error with a remedy."""
    advice = {
        errno.ENOSPC: "the disk is full; free space there, or write to another disk",
        errno.EDQUOT: "the disk quota is used up; free space there, or write to another disk",
        errno.EFBIG: "files may not grow that large here; give a shard size below the limit (--shard-size), or raise it (ulimit -f)",
        errno.EROFS: "the file system is read-only; write to another folder",
        errno.EACCES: "no permission; write to another folder, or change its permissions",
        errno.EBUSY: "it is in use, perhaps as a mount point; write to another folder, or to one in it",
        errno.EPERM: "no permission; write to another folder, or change its permissions",
    }.get(error.errno or 0)
    return f"{error}" if advice is None else f"{error.strerror} ({advice})"


def _save(model: ir.Model, output: Path, folder: Path, verify: Callable[[Path], None] | None, layout: Layout) -> int:
    limit = min(layout.inline_limit, INLINE_LIMIT)
    external = layout.external or layout.shard_size is not None or tensor_bytes(model) > limit
    previous_files = data_files(output)
    temporary = folder / output.name
    if external:
        LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=SMALL // 4)(model)
    values = _large(model) if external else []
    before = [v.const_value for v in model_values(model)]
    tensors = [v.const_value for v in values if v.const_value is not None]
    files = _write_data(tensors, folder, layout.shard_size)
    names = _names(output, [f.digest for f in files])
    done = False
    try:
        for file, name in zip(files, names, strict=True):
            os.replace(file.path, folder / name)
            for index, offset in file.tensors:
                values[index].const_value = external_tensor(tensors[index], str(values[index].name), name, offset, folder)
        for value in model_values(model):
            if value.const_value is not None and isinstance(value.const_value, ir.ExternalTensor) and value.const_value.base_dir != folder:
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.const_value.name, dtype=value.const_value.dtype)
        _write_protobuf(model, temporary)
        if verify is not None:
            verify(temporary)
        data_paths = [folder / name for name in names]
        size = sum(p.stat().st_size for p in (*data_paths, temporary))
        mode = mode_of(output)
        for path in (*data_paths, temporary):
            path.chmod(mode)
            sync(path)
        for path in data_paths:
            replace(path, output.parent / path.name)
        replace(temporary, output)
        done = True
    finally:
        for value, tensor in zip(model_values(model), before, strict=True):
            current = value.const_value
            if done and isinstance(current, ir.ExternalTensor):
                release_mmap(current)
                current.base_dir = output.parent
            else:
                value.const_value = tensor
                if tensor is not None:
                    release_mmap(tensor)
    outdated = {path for path in previous_files - {output.parent / name for name in names} if is_data_file_of(path, output)}
    if outdated:
        read = {path for model_path in output.parent.glob("*.onnx") if model_path != output for path in data_files(model_path)}
        for path in outdated - read:  # a copy of the old output may still read them
            path.unlink(missing_ok=True)
    return size


def release_mmap(tensor: ir.TensorProtocol) -> None:
    """Unmap a tensor's file, if any, so that it does not count as memory in use. Reading maps it again."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # an array still refers to it
            tensor.release()


def oversized(model: ir.Model, layout: Layout) -> list[str]:
    """Return the names of tensors larger than a shard, each of which gets its own file."""
    if layout.shard_size is None:
        return []
    return [str(v.name) for v in model_values(model) if v.const_value is not None and v.const_value.nbytes > layout.shard_size]


def _large(model: ir.Model) -> list[ir.Value]:
    """Return the initializers that go to data files: all of them if the small ones alone are too large for a protobuf."""
    tensors = [(v, v.const_value) for v in model_values(model) if v.const_value is not None and v.const_value.dtype != ir.DataType.STRING]
    small = sum(tensor.nbytes for _, tensor in tensors if tensor.nbytes <= most_inline(tensor, SMALL))
    return [value for value, tensor in tensors if tensor.nbytes > (most_inline(tensor, SMALL) if small <= INLINE_LIMIT // 4 else 0)]


@dataclass(slots=True)
class _DataFile:
    """A data file being written: path, hash, and the index and offset of every tensor."""

    path: Path
    digest: str
    tensors: list[tuple[int, int]]


def _write_data(tensors: Sequence[ir.TensorProtocol], folder: Path, shard_size: int | None) -> list[_DataFile]:
    """Write tensors in order, starting a new file where the next one would exceed the shard size."""
    groups: list[list[int]] = []
    size = 0
    for index, tensor in enumerate(tensors):
        size = _aligned(size, tensor.nbytes)
        if not groups or (shard_size is not None and size + tensor.nbytes > shard_size):
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += tensor.nbytes
    files = []
    for number, group in enumerate(groups):
        path = folder / f"{number}.part"
        offsets = []
        with path.open("wb") as file:
            for index in group:
                tensor = tensors[index]
                file.write(bytes(_aligned(file.tell(), tensor.nbytes) - file.tell()))
                offsets.append((index, file.tell()))
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.tofile(file)
                    release_mmap(tensor)
                else:
                    file.write(tensor.tobytes())  # not tofile, in which NumPy ignores a full disk
                if (written := file.tell() - offsets[-1][1]) != tensor.nbytes:
                    raise ValueError(f"tensor {tensor.name} wrote {written} bytes and should have {tensor.nbytes}")
        files.append(_DataFile(path, file_digest(path), offsets))
    return files


def _aligned(offset: int, size: int) -> int:
    """Return the next aligned offset for a tensor of ``size`` bytes; large tensors are aligned to pages, for memory mapping."""
    step = 4096 if size >= 1 << 20 else 64 if size > SMALL else 8
    return -(-offset // step) * step


def _write_protobuf(model: ir.Model, path: Path) -> None:
    try:
        proto = to_proto(model)
    except Exception as error:  # from onnx-ir, whose message has the whole model; the cause is specific
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{type(cause).__name__}: {str(cause)[:300]}") from error
    if proto.ByteSize() > PROTOBUF_LIMIT:
        raise ValueError(f"without its large initializers it still has {proto.ByteSize()} bytes, and a protobuf has 2 GiB at most")
    path.write_bytes(proto.SerializeToString(deterministic=True))


def data_files(model: Path) -> set[Path]:
    """Return the data files of a model on disk, if it exists; for a very large one all that it may read."""
    if not model.is_file():
        return set()
    if model.stat().st_size > _LARGE_PROTOBUF:
        return {path for path in model.parent.iterdir() if is_data_file_of(path, model)}
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except Exception:  # not a model
        return set()
    files = set()
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if onnx.external_data_helper.uses_external_data(tensor):
            files.add(model.parent / onnx.external_data_helper.ExternalDataInfo(tensor).location)
    return files


def data_name(output: Path, number: int = 0, count: int = 1, tag: str = "") -> str:
    """Return the name of a data file: ``m.onnx.data``, or ``m.onnx-00001-of-00003.data``, after a tag if given."""
    stem = f"{output.name}{f'.{tag}' if tag else ''}"
    return f"{stem}.data" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.data"


def _names(output: Path, digests: Sequence[str]) -> list[str]:
    """Choose names for data files so that no existing file is overwritten with other contents: a model may read it."""
    count = len(digests)
    tag = hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
    plain = [data_name(output, i, count) for i in range(count)]
    tagged = [data_name(output, i, count, tag) for i in range(count)]

    def stored(name: str, digest: str) -> bool:
        path = output.parent / name
        return path.is_file() and file_digest(path) == digest

    def free(name: str, digest: str) -> bool:
        return not (output.parent / name).exists() or stored(name, digest)

    tagged_exist = count > 0 and all(map(stored, tagged, digests))
    return tagged if tagged_exist or not all(map(free, plain, digests)) else plain


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_data_file_of(path: Path, output: Path) -> bool:
    """Return whether a file is named as a data file of ``output``."""
    return re.fullmatch(rf"{re.escape(output.name)}(\.[0-9a-f]{{12}})?(-\d{{5}}-of-\d{{5}})?\.data", path.name) is not None
