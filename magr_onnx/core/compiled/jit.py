"""How loops are compiled: strictly by IEEE rules, kept on disk, and without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function at its first call."""
    return _compile(function, False)


def compiled_sums(function: F) -> F:
    """Do the same for a function whose sums may be added up in any order, so that they use vector instructions."""
    return _compile(function, {"reassoc", "nsz", "contract"})


def _compile(function: F, fastmath: bool | set[str]) -> F:
    make: Callable[..., Any] = partial(numba.njit, nogil=True, error_model="numpy", fastmath=fastmath)
    try:
        result: F = make(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        result = make()(function)
    return result
