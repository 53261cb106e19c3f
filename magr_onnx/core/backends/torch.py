"""torch, on a GPU or on the CPU (extra ``gpu``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt
import torch

from magr_onnx.core.backends.base import Array, Backend, Kind
from magr_onnx.errors import MagrError

_TYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "uint8": torch.uint8}


class TorchBackend(Backend):
    """torch on one device.

    Rows of a panel are rounded in a loop of Python, in calls that take all output channels: what a GPU has to do in each makes up for the
    call from some thousand channels on.
    """

    singular = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # it is documented
    compiles = False
    cached = False
    column_bytes = 1 << 29

    def __init__(self, device: str) -> None:
        """Use a device by its name in torch."""
        self.device: Any = torch.device(device)
        self.name = "torch-cpu" if device == "cpu" else device
        self.described = f"{torch.cuda.get_device_name(self.device)} by torch" if self.device.type == "cuda" else "torch on the CPU"
        self.xp = array_api_compat.array_namespace(torch.empty(0))

    def __reduce__(self) -> Any:
        from magr_onnx.core import backends

        return backends.find, (self.name,)

    def array(self, x: Array, kind: Kind = None) -> Any:
        at_home = np.ascontiguousarray(x)
        if not at_home.flags.writeable:  # torch would warn: what it shares with NumPy could be changed
            at_home = at_home.copy()
        moved = torch.from_numpy(at_home).to(self.device)
        return moved if kind is None else self.cast(moved, kind)

    def host(self, x: Any) -> Array:
        result: Array = x.cpu().numpy()
        return result

    def index(self, rows: npt.NDArray[np.intp]) -> Any:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)

    def empty(self, shape: tuple[int, ...], kind: Kind = "float32") -> Any:
        return torch.empty(shape, dtype=_type(kind), device=self.device)

    def zeros(self, shape: tuple[int, ...], kind: Kind = "float32") -> Any:
        return torch.zeros(shape, dtype=_type(kind), device=self.device)

    def copy(self, x: Any) -> Any:
        return x.clone()

    def cast(self, x: Any, kind: Kind) -> Any:
        return x.to(_type(kind))

    def single(self, gram: Any) -> Any:
        return gram.to(torch.float32).contiguous()

    def contiguous(self, x: Any, kind: Kind = None) -> Any:
        return (x if kind is None else self.cast(x, kind)).contiguous()

    def diagonal(self, x: Any) -> Any:
        return x.diagonal(dim1=-2, dim2=-1)

    rint = staticmethod(torch.round)
    product = staticmethod(torch.matmul)

    @staticmethod
    def add_up(weights: Any, rows: Any, out: Any) -> None:
        torch.mv(rows.T, weights, out=out)  # matmul warns that it changes the shape of what it writes to

    def put(self, kept: Any, value: Any, where: Any) -> None:
        kept.copy_(torch.where(where, value, kept))

    def contract(self, subscripts: str, a: Any, b: Any) -> Any:
        return torch.einsum(subscripts, a.double(), b.double())

    def inner(self, a: Any, b: Any) -> float:
        return float(torch.sum(a.double() * b.double()))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def exact(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MagrError(
                f"device {self.name} ({self.described}) is out of memory; end other programs there, give a smaller gram_budget, or leave "
                f"the device out, which solves layers on the CPU ({str(error).splitlines()[0]})"
            ) from error
        finally:
            torch.set_float32_matmul_precision(before)


def _type(kind: Kind) -> Any:
    return _TYPES.get(kind, kind) if isinstance(kind, str) else kind
