"""Rows of short batches, collected until there are enough for large products: adding to a matrix of K x K costs as much as 256 rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array

ROWS = 1024  # from which they are handed on

Key = TypeVar("Key")


class RowPool(Generic[Key]):
    """Rows by what they are added to; a context manager that hands on what is left at its end."""

    def __init__(self, add: Callable[[Key, list[Array]], None]) -> None:
        """Call ``add`` with a key and with arrays of as many rows, in order."""
        self._add = add
        self._waiting: dict[Key, list[Sequence[Array]]] = {}

    def put(self, key: Key, arrays: Sequence[Array]) -> None:
        """Collect arrays of as many rows; those of one key have the same columns."""
        waiting = self._waiting.setdefault(key, [])
        waiting.append(arrays)
        if sum(len(first) for first, *_ in waiting) >= ROWS:
            self._hand_on(key)

    def _hand_on(self, key: Key) -> None:
        parts = zip(*self._waiting.pop(key), strict=True)
        self._add(key, [_joined(part) for part in parts])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for key in list(self._waiting) if kind is None else ():
            self._hand_on(key)


def _joined(parts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Concatenate rows; those of a single part are not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
