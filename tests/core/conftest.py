"""Tests of solvers on every backend: a module asks for it with ``pytestmark = pytest.mark.usefixtures("each_backend")``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from magr_onnx.core import backends, grid, linalg, magr, prox
from magr_onnx.core.backends import Backend
from magr_onnx.core.gram import RowGram
from magr_onnx.core.quantizers import comq, gptq, grid_refinement
from magr_onnx.core.types import LayerStats
from magr_onnx.errors import MagrError

SOLVERS: dict[Any, tuple[str, ...]] = {
    comq: ("refine",),
    gptq: ("prepare", "solve"),
    grid: ("choose", "ladder", "minmax", "search"),
    grid_refinement: ("regrid",),
    linalg: ("cholesky", "column_errors", "damped", "inner", "lambda_max", "layer_error"),
    magr: ("penalty", "reduce"),
    prox: ("levels",),
}
"""Functions on arrays that compute where these are."""
HOST_ONLY = ("budget", "scale")
"""Arguments that are of NumPy in any case."""


def moved(value: Any, move: Callable[[Any], Any]) -> Any:
    """Apply a function to all arrays of floats or codes of a value."""
    if isinstance(value, np.ndarray | RowGram) or type(value).__module__ == "torch":
        return move(value)
    if isinstance(value, tuple):
        parts = [moved(part, move) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if is_dataclass(value) and not isinstance(value, type | LayerStats):
        changed = {f.name: moved(getattr(value, f.name), move) for f in fields(value) if f.init}
        return replace(value, **{name: new for name, new in changed.items() if new is not getattr(value, name)})
    return value


def on(backend: Backend, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a solver that takes arrays of NumPy to a backend, and the result back."""

    def there(array: Any) -> Any:
        if isinstance(array, RowGram):
            return backends.gram_on(array, backend)
        return backend.array(array) if isinstance(array, np.ndarray) and array.dtype.kind in "fu" and array.ndim else array

    def back(array: Any) -> Any:
        return backends.of(array).host(array) if type(array).__module__ == "torch" else array

    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if given.get("budget") is not None:  # that is solved on the CPU
            return function(*args, **kwargs)
        inside = any(type(value).__module__ == "torch" for value in given.values())
        bound.arguments = {name: value if name in HOST_ONLY else moved(value, there) for name, value in given.items()}
        result = function(*bound.args, **bound.kwargs)
        return result if inside else moved(result, back)

    return run


def found(device: str) -> Backend:
    """Return a backend; skip the test where the machine does not have it."""
    try:
        return backends.find(device)
    except MagrError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch-cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def device(request: pytest.FixtureRequest) -> Backend:
    """What computes in torch."""
    return found(request.param)


@pytest.fixture(scope="module", params=["cpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch-cpu", "cuda"))])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have every solver of the module, and every layer whose statistics say nothing else, computed on one backend, then on the other."""
    if request.param == "cpu":
        yield
        return
    backend = found(request.param)
    with pytest.MonkeyPatch.context() as patch:
        defaults = tuple(backend if value is backends.HOST else value for value in LayerStats.__init__.__defaults__ or ())
        patch.setattr(LayerStats.__init__, "__defaults__", defaults)
        for owner, names in SOLVERS.items():
            for name in names:
                original = getattr(owner, name)
                wrapped = on(backend, original)
                for module in (owner, request.module):
                    if getattr(module, name, None) is original:
                        patch.setattr(module, name, wrapped)
        yield
