"""NumPy: the reference, and what runs without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core import threads
from magr_onnx.core.backends.base import Array, Backend, Kind


class _NumPy(Backend):
    name = "cpu"
    described = "NumPy on the CPU"
    xp = np
    singular = np.linalg.LinAlgError
    compiles = True
    cached = True
    column_bytes = None

    def array(self, x: Array, kind: Kind = None) -> Array:
        return x if kind is None else x.astype(kind, copy=False)

    def host(self, x: Array) -> Array:
        return x

    def index(self, rows: npt.NDArray[np.intp]) -> Array:
        return rows

    def empty(self, shape: tuple[int, ...], kind: Kind = "float32") -> Array:
        return np.empty(shape, kind)

    def zeros(self, shape: tuple[int, ...], kind: Kind = "float32") -> Array:
        return np.zeros(shape, kind)

    def copy(self, x: Array) -> Array:
        return x.copy()

    def cast(self, x: Any, kind: Kind) -> Array:
        result: Array = x.astype(kind, copy=False)
        return result

    def single(self, gram: Any) -> Any:
        return gram.astype(np.float32, order="C", copy=False)

    def contiguous(self, x: Array, kind: Kind = None) -> Array:
        return np.ascontiguousarray(x, kind)

    def diagonal(self, x: Array) -> Array:
        view: Array = np.einsum("...kk->...k", x)
        return view

    rint = staticmethod(np.rint)  # without a call in between
    add_up = staticmethod(np.matmul)

    def put(self, kept: Array, value: Array, where: Array) -> None:
        np.copyto(kept, value, where=where)

    product = staticmethod(threads.product)

    def wait(self) -> None:
        pass

    def contract(self, subscripts: str, a: Array, b: Array) -> Array:
        result: Array = np.einsum(subscripts, a, b, dtype=np.float64)
        return result

    def inner(self, a: Array, b: Array) -> float:
        return float(np.vdot(a, b))


HOST = _NumPy()
