"""Libraries of custom operators that every session of a run registers."""

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
    """Register shared libraries in all sessions made inside.

    Raises:
        OptionError: A file is not there.
    """
    found = [Path(p).absolute() for p in paths]
    raise_all(OptionError, [f"custom operators {p}: no such file; give the shared library that has them" for p in found if not p.is_file()])
    before = LIBRARIES.set(tuple(map(str, found)))
    try:
        yield
    finally:
        LIBRARIES.reset(before)
