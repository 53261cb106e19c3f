"""Cache of values: in memory up to a limit, the rest in a temporary folder."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from magr_onnx.errors import OutputError
from magr_onnx.model_io.writing import os_error_hint

Tensor = npt.NDArray[Any]


class Cache:
    """Values of all batches, by name and position of the batch; a context manager, whose files go at its end or that of the object.

    Attributes:
        spilled: Bytes written to files so far.
    """

    def __init__(self, limit: int, contents: str = "values between stages", remedy: str = "give a larger --cache, or set TMPDIR") -> None:
        """Start empty, with ``limit`` bytes of memory; ``contents`` and ``remedy`` are for the message about a full disk."""
        self._limit, self._contents, self._remedy = limit, contents, remedy
        self._used = 0
        self._values: dict[tuple[str, int], Tensor | Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0  # files ever written, which names the next one; their current number would repeat
        self.spilled = 0

    def put(self, name: str, batch: int, array: Tensor) -> None:
        """Store a value.

        Raises:
            OutputError: The temporary folder cannot be written to.
        """
        if self._used + array.nbytes <= self._limit:
            self._values[name, batch] = array
            self._used += array.nbytes
            return
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="onnx-magr-")
                weakref.finalize(self, self._folder.cleanup)
            self._values[name, batch] = _write(array, Path(self._folder.name, str(self._written)))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OutputError(f"cannot write {self._contents} to {folder}: {os_error_hint(error)}; or {self._remedy}") from error
        self._written += 1
        self.spilled += array.nbytes

    def get(self, name: str, batch: int) -> Tensor:
        stored = self._values[name, batch]
        return _read(stored) if isinstance(stored, Path) else stored

    def keep(self, names: Sequence[str]) -> None:
        """Drop everything but these values."""
        for key in [key for key in self._values if key[0] not in names]:
            stored = self._values.pop(key)
            if isinstance(stored, Path):
                stored.unlink()
            else:
                self._used -= stored.nbytes

    def names(self, batch: int) -> list[str]:
        return [n for n, b in self._values if b == batch]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._values.clear()
        if self._folder is not None:
            self._folder.cleanup()


def _write(array: Tensor, path: Path) -> Path:
    """Write an array for `_read`; strings, which NumPy would pickle, as JSON."""
    if array.dtype == object:
        path = path.with_suffix(".json")
        texts = [item.decode() if isinstance(item, bytes) else str(item) for item in array.reshape(-1)]  # as onnxruntime does
        path.write_text(json.dumps([array.shape, texts]), encoding="ascii")
    else:
        path = path.with_suffix(".npy")
        array = np.asarray(array, order="C")
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)  # not np.save, which ignores a full disk
    return path


def _read(path: Path) -> Tensor:
    if path.suffix == ".npy":
        return np.asarray(np.load(path, allow_pickle=False))
    shape, items = json.loads(path.read_text(encoding="ascii"))
    strings = np.empty(len(items), object)
    strings[:] = items
    return strings.reshape(shape)
