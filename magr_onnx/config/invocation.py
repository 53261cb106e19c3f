"""How a run was asked for, so that it can be done again."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Invocation:
    """How a run was asked for, for its report.

    Attributes:
        command: The command or the Python call that does the same again; paths are as they were given.
        options: The arguments that say something, as plain data; None for those that the call comes to over its recipe and its preset.
        recipe: The same as the text of a recipe, where the command line was used.
        source: What to call the model; empty for its path.
    """

    command: str
    options: Mapping[str, Any] | None = None
    recipe: str = ""
    source: str = ""


def python_call(function: str, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Write the Python call with the arguments that were given, by name.

    Those that equal their default are left out, even where a caller spells them out: they say nothing. Beside a recipe they do, and stay.
    Objects that have no short text are named by their type: ``<Module>``.
    """
    shown = arguments if arguments.get("recipe") is not None else without_defaults(arguments, defaults)
    return f"{function}({', '.join(f'{name}={_text(value)}' for name, value in _flat(shown))})"


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn arguments into plain data."""
    return {name: _plain(value)[0] for name, value in _flat(arguments)}


def without_defaults(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out arguments that equal their default."""
    return {name: value for name, value in arguments.items() if name not in defaults or _text(value) != _text(defaults[name])}


def with_keywords(arguments: Mapping[str, Any], keywords: str) -> dict[str, Any]:
    """The local variables of a function that has just begun, with those collected under ``**keywords`` among the others."""
    return {**{name: value for name, value in arguments.items() if name != keywords}, **arguments[keywords]}


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of a function's parameters, by name; what it takes as ``**`` has none."""
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}


def _flat(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name as reports have them; what only watches the run is none."""
    for name, value in arguments.items():
        if name == "layers" and isinstance(value, list | tuple):
            yield name, [table.table if isinstance(table, LayerOptions) else table for table in value]
        elif isinstance(value, Recipe):
            yield name, value.to_dict()
        elif name not in ("progress", "on_layer"):
            yield name, value


def _plain(value: Any) -> tuple[Any, bool]:
    """Words and numbers as they are, and lists and tables of them; anything else by its type. Also whether it is all of the value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value), False  # as JSON would have it
    if value is None or isinstance(value, bool | int | float | str):
        return value, True
    if isinstance(value, os.PathLike):
        return os.fspath(value), True
    if isinstance(value, list | tuple) and all(isinstance(v, str | os.PathLike) or _is_table(v) for v in value):
        return [_plain(v)[0] for v in value], True
    if isinstance(value, Mapping):
        parts = {key: _plain(part) for key, part in value.items()}
        if all(isinstance(key, str) and exact for key, (_, exact) in parts.items()):
            return {key: data for key, (data, _) in parts.items()}, True
    return f"<{type(value).__name__}>", False


def _is_table(value: Any) -> bool:
    """Options of a layer, as a table of a recipe has them."""
    return isinstance(value, Mapping) and isinstance(value.get("match"), str | list | tuple)


def _text(value: Any) -> str:
    data, exact = _plain(value)
    return repr(data) if exact else str(data)
