"""How a run was asked for, so that it can be done again."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

from magr_onnx.layerwise import LayerOptions


def asked(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name, without those that are the default: they say nothing, even where a caller spells them out."""
    return {name: value for name, value in given.items() if _text(value) != _text(signature.parameters[name].default)}


def call(function: str, given: Mapping[str, Any]) -> str:
    """A Python call with the arguments that were given, by name; objects that have no short text are named by their type: ``<Module>``."""
    return f"{function}({', '.join(f'{name}={_text(value)}' for name, value in _flat(given))})"


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain data."""
    return {name: _plain(value) for name, value in _flat(given)}


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name; those collected by ``**options`` are arguments like others, and what only watches the run is none."""
    for name, value in given.items():
        if name == "options":
            yield from value.items()
        elif name == "layers":
            yield name, [table.table if isinstance(table, LayerOptions) else dict(table) for table in value]
        elif name not in ("progress", "on_layer"):
            yield name, value


def _plain(value: Any) -> Any:
    """Words and numbers as they are, and lists and tables of them; anything else by its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str | os.PathLike) or _is_table(v) for v in value):
        return [v if isinstance(v, dict) else os.fspath(v) for v in value]
    return f"<{type(value).__name__}>"


def _is_table(value: Any) -> bool:
    """Options of a layer, as a table of a recipe has them."""
    return isinstance(value, dict) and isinstance(value.get("match"), str | list | tuple)


def _text(value: Any) -> str:
    found = _plain(value)
    return found if isinstance(found, str) and not isinstance(value, str | os.PathLike) else repr(found)
