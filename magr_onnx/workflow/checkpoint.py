"""The job directory: finished layers on disk, so that a run that was killed goes on where it was, to the same bytes.

    DIR/lock             held (flock) while a run works in it
    DIR/manifest.json    what the layers depend on: hashes of the model and the data, pipeline, options, versions, threads
    DIR/layers/KEY.npz   the solution of a layer (`magr_onnx.core.solution_arrays`); KEY is a hash of its name, shape and passes

Every file is written under another name, synced and renamed, so there are whole files only. A file that is damaged all the same counts as
not there. Arrays are read without pickle and everything else is JSON: a directory of somebody else can give wrong codes, as a model of
theirs can, but runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from magr_onnx.core import threads
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.solution_arrays import Arrays, from_arrays, most_bytes, to_arrays
from magr_onnx.errors import OptionError, OutputError, listed
from magr_onnx.model_io.atomic import lock, replace
from magr_onnx.model_io.files import Loaded
from magr_onnx.model_io.writing import file_digest, output_errors
from magr_onnx.passes import LinearLayer, Plan
from magr_onnx.report.data import versions
from magr_onnx.runtime.data.sources import Batches

MANIFEST, LAYERS, LOCK = "manifest.json", "layers", "lock"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def manifest_of(loaded: Loaded, data: Batches | None, plan: Plan, options: Mapping[str, Any]) -> dict[str, str]:
    """Everything that the result depends on, as text by what to call it.

    Raises:
        OptionError: The model is not in a file.
    """
    if loaded.path is None:
        raise OptionError("resume needs a model in a file: a model in memory is gone with the process; save it first")
    manifest = {"model": file_digest(loaded.path)}
    manifest |= {f"data file {p.name}": file_digest(p) for p in sorted(loaded.external)}
    manifest["calibration"] = "none" if data is None else data_digest(data)
    manifest["pipeline"] = str(plan)
    manifest |= {f"option {name}": str(value) for name, value in options.items()}
    manifest |= {f"version of {name}": value for name, value in versions().items()}
    manifest["processors"] = f"{platform.machine()}, {threads.cores()}"
    manifest |= {name: os.environ.get(name, "not set") for name in _THREADS}
    return manifest


def data_digest(data: Batches) -> str:
    """SHA-256 of all batches: names, types, shapes and values."""
    digest = hashlib.sha256()
    for batch in data:
        for name in sorted(batch):
            array = np.asarray(batch[name])
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes())
        digest.update(b"\n")
    return digest.hexdigest()


@contextlib.contextmanager
def job_directory(path: Path, manifest: Mapping[str, str]) -> Iterator[JobDirectory]:
    """The job directory at ``path``, made if there is none, and locked.

    Raises:
        OptionError: It holds a run of something else; the message says what differs.
        OutputError: It is a file, another process works in it, or it cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"job directory {path} is a file; give the name of a directory")
    with output_errors(f"job directory {path}"):
        path.mkdir(parents=True, exist_ok=True)
        _check_ours(path)
        locked = lock(path / LOCK)
    if locked is None:
        raise OutputError(f"job directory {path}: another run is working in it; wait until it ends, or give another directory")
    with locked:
        _check(path, manifest)
        yield JobDirectory(path)


def _check_ours(path: Path) -> None:
    """Refuse a folder of something else, before anything is done to it."""
    known = (LOCK, LAYERS, MANIFEST, f"{MANIFEST}{_PART}")
    others = [p.name for p in path.iterdir() if p.name not in known]
    if others and not (path / MANIFEST).exists():
        raise OptionError(f"job directory {path} is not one: it holds {listed(sorted(others))}; give a new directory")


def _check(path: Path, manifest: Mapping[str, str]) -> None:
    """Compare the directory with this run, or begin it."""
    try:
        with output_errors(f"job directory {path}"):
            for part in (path / f"{MANIFEST}{_PART}", *(path / LAYERS).glob(f"*.npz{_PART}")):  # the lock is ours: who wrote them is dead
                part.unlink(missing_ok=True)
            (path / LAYERS).mkdir(exist_ok=True)
            if not (path / MANIFEST).exists():
                _write(path / MANIFEST, json.dumps(dict(manifest), indent=1).encode())
                return
            before = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"job directory {path}: {MANIFEST} is damaged ({error}); delete the directory, or give another one") from error
    if not isinstance(before, dict):
        raise OptionError(f"job directory {path}: {MANIFEST} is damaged; delete the directory, or give another one")
    names = [name for name in (*manifest, *before) if before.get(name) != manifest.get(name)]
    if names:
        changes = "\n".join(f"  - {n}: was {_short(before.get(n))}, is {_short(manifest.get(n))}" for n in dict.fromkeys(names))
        raise OptionError(
            f"job directory {path} belongs to another run; what differs:\n{changes}\n"
            "Give another directory, or delete this one to begin again; nothing was changed"
        )


class JobDirectory:
    """Solutions of layers on disk: a store for `magr_onnx.passes.layerwise.run_layers`."""

    def __init__(self, path: Path) -> None:
        self._layers = path / LAYERS
        self._path = path
        self._plan = ""
        self._whole: set[Path] = set()
        self.notes: list[str] = []
        self.restored = 0

    def set_plan(self, plan: Plan, assigned: Mapping[str, Plan]) -> None:
        """Say what is done to all layers: under error feedback the others decide what a layer sees."""
        text = [str(plan), *(f"{name}={of_layer}" for name, of_layer in assigned.items())]
        self._plan = hashlib.sha256("\n".join(text).encode()).hexdigest()

    def has(self, layer: LinearLayer) -> bool:
        """Whether the layer is finished and its file whole."""
        path = self._file(layer)
        if path in self._whole:
            return True
        if not path.exists():
            return False
        try:
            self._read(path, layer)
        except _DAMAGED as error:
            self.notes.append(f"{layer.name}: its result in {self._path} was damaged ({error}) and has been computed again")
            path.unlink(missing_ok=True)
            return False
        self._whole.add(path)
        return True

    def restore(self, layer: LinearLayer) -> LayerSolution | None:
        """See `magr_onnx.passes.layerwise.Store`."""
        if not self.has(layer):
            return None
        path = self._file(layer)
        try:
            solution = self._read(path, layer)
        except _DAMAGED as error:  # it was whole when the statistics were gathered, without those of this layer
            raise OutputError(
                f"job directory {self._path}: {path.name} was damaged while the run went on ({error}); start again"
            ) from error
        self.restored += 1
        return solution

    def keep(self, layer: LinearLayer, solution: LayerSolution) -> None:
        """See `magr_onnx.passes.layerwise.Store`."""
        remedy = ". The layers finished so far are kept; the same command goes on from there"
        with output_errors(f"job directory {self._path}", remedy):
            _write(self._file(layer), to_arrays(solution))

    def _file(self, layer: LinearLayer) -> Path:
        key = json.dumps([layer.name, layer.weight_name, layer.k, layer.n, self._plan])
        return self._layers / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"

    def _read(self, path: Path, layer: LinearLayer) -> LayerSolution:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > most_bytes(layer.k, layer.n):
            raise ValueError(f"{size} bytes are no solution of a {layer.k} x {layer.n} layer")
        with np.load(path, allow_pickle=False) as arrays:
            return from_arrays({name: arrays[name] for name in arrays.files}, layer.k, layer.n)


_PART = ".tmp"  # behind the name of a file that is being written
_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile, OptionError)


def _write(path: Path, content: bytes | Arrays) -> None:
    """A whole file or none."""
    part = path.with_name(path.name + _PART)
    try:
        with part.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.savez(file, allow_pickle=False, **content)
        replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _short(text: Any) -> str:
    shown = "nothing" if text is None else str(text)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
