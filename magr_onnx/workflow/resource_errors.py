"""The edge of the library: what the libraries below run out of comes out as an error that is explained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from magr_onnx.errors import MagrError, ModelError

P = ParamSpec("P")
R = TypeVar("R")


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Turn exhausted memory or stack inside ``function`` into a `MagrError`; an interrupt stays an interrupt."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except MemoryError as error:
            raise MagrError(
                f"out of memory ({error or 'no size is known'}); give smaller batches, a smaller gram budget, or a machine with more"
            ) from error
        except RecursionError as error:
            raise ModelError("the model is nested too deeply: subgraphs in subgraphs, or functions that call functions") from error

    return guarded
