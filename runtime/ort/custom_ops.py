"""Shared libraries of custom operators, registered in every session of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from magr_onnx.errors import OptionError, raise_all

LIBRARIES: ContextVar[tuple[str, ...]] = ContextVar("custom operators", default=())


@contextlib.contextmanager
def using(paths: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Register shared libraries in every session created inside the context.

    Raises:
        OptionError: A file does not exist.
    """
    libraries = [Path(p).absolute() for p in paths]
    missing = [p for p in libraries if not p.is_file()]
    raise_all(OptionError, [f"custom operators {p}: no such file; give the shared library that has them" for p in missing])
    token = LIBRARIES.set(tuple(map(str, libraries)))
    try:
        yield
    finally:
        LIBRARIES.reset(token)
