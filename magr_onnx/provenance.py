"""How a run was asked for, so that it can be done again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any


def call(function: str, given: Mapping[str, Any]) -> str:
    """A Python call with the arguments that were given, by name; objects that have no short text are named by their type: ``<Module>``."""
    return f"{function}({', '.join(f'{name}={_text(value)}' for name, value in _flat(given))})"


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain data."""
    return {name: value if value is None or isinstance(value, bool | int | float) else _plain(value) for name, value in _flat(given)}


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name; those collected by ``**options`` are arguments like others, and what only watches the run is none."""
    for name, value in given.items():
        if name == "options":
            yield from value.items()
        elif name != "progress":
            yield name, value


def _plain(value: Any) -> Any:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str | os.PathLike) for v in value):
        return [os.fspath(v) for v in value]
    return f"<{type(value).__name__}>"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    found = _plain(value)
    return found if isinstance(found, str) and found.startswith("<") and not isinstance(value, str | os.PathLike) else repr(found)
