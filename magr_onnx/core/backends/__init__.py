"""Where the arrays of a solver live: in NumPy, or in torch on a GPU (extra ``gpu``).

Solvers are written once, with the functions of the array API that NumPy and `array_api_compat` agree on (``xp``) and the few operations of
a `Backend` that differ. What a backend does differently is in its own file. NumPy is the reference, and needs neither package.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from magr_onnx.core.backends.base import Array, Backend
from magr_onnx.core.backends.host import HOST
from magr_onnx.core.gram import Gram, RowGram
from magr_onnx.errors import DependencyError, OptionError, install

TORCH_CPU = "torch-cpu"
DEVICES = f"cpu, cuda, cuda:N (a GPU by its number), {TORCH_CPU} (what a GPU does, computed by torch on the CPU)"
_KNOWN = re.compile(rf"cpu|cuda(:\d+)?|{TORCH_CPU}")


def of(array: Any) -> Backend:
    """Return the backend that an array, or a matrix of few rows, belongs to."""
    if isinstance(array, np.ndarray | RowGram):
        return HOST
    return _torch("cpu" if array.device.type == "cpu" else str(array.device))


def problem_of(device: str) -> str | None:
    """Return what is wrong with the name of a device, in words; None if it is one."""
    return None if _KNOWN.fullmatch(device) else f"device {device!r} is not known; choose one of {DEVICES}"


def find(device: str) -> Backend:
    """Return the backend of a device: ``cpu``, ``cuda``, ``cuda:1`` or ``torch-cpu``.

    Raises:
        OptionError: There is no device of this name, or none on this machine.
        DependencyError: torch or array-api-compat is not installed.
    """
    if problem := problem_of(device):
        raise OptionError(problem)
    if device == HOST.name:
        return HOST
    try:
        import array_api_compat  # noqa: F401
        import torch
    except ImportError as error:
        raise DependencyError(f"device {device} needs {error.name}, which is not installed; {install('gpu')}") from error
    if device == TORCH_CPU:
        return _torch("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise OptionError(
            f"device {device}: torch {torch.__version__} finds no GPU on this machine; install a torch that is built for it, or leave "
            "the device out: the CPU is the default"
        )
    index = int(device.partition(":")[2] or torch.cuda.current_device())
    if index >= count:
        raise OptionError(f"device {device}: torch finds {count} GPU{'s' * (count > 1)} here, numbered from 0 to {count - 1}")
    return _torch(f"cuda:{index}")


def gram_on(gram: Gram, backend: Backend) -> Gram:
    """Return a Gram matrix of NumPy on a backend. On a device it has all its entries: there, products with them cost little."""
    if backend is HOST:
        return gram
    if not isinstance(gram, RowGram):
        return backend.array(gram)
    factor = backend.array(gram.factor)
    result: Array = factor @ factor.T
    diagonal = backend.diagonal(result)
    diagonal += backend.array(gram.added, "float32")
    return result


@functools.cache
def _torch(device: str) -> Backend:
    from magr_onnx.core.backends.torch import TorchBackend

    return TorchBackend(device)


__all__ = ["DEVICES", "HOST", "TORCH_CPU", "Backend", "find", "gram_on", "of", "problem_of"]
