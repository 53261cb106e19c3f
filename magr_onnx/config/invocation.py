"""How a run was asked for, so that it can be done again."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.recipe import Recipe, by_name
from magr_onnx.report.data import Reported

P = ParamSpec("P")
R = TypeVar("R", bound=Reported)


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """Have the reports of what a function of `magr_onnx` returns say the call: as it was made, before recipes and presets filled it up."""
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        given = asked(signature, signature.bind(*args, **kwargs).arguments)
        return result.asked_by(call(f"magr_onnx.{function.__name__}", given), "")

    return called


def asked(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name, without those that are the default: they say nothing, even where a caller spells them out.

    Beside a recipe they do, and stay.
    """
    named, own = by_name(signature, given), signature.parameters
    if named.get("recipe") is not None:
        return named
    return {name: value for name, value in named.items() if name not in own or _text(value) != _text(own[name].default)}


def call(function: str, given: Mapping[str, Any]) -> str:
    """A Python call with the arguments that were given, by name; objects that have no short text are named by their type: ``<Module>``."""
    return f"{function}({', '.join(f'{name}={_text(value)}' for name, value in _flat(given))})"


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain data."""
    return {name: _plain(value) for name, value in _flat(given)}


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name as reports have them; what only watches the run is none."""
    for name, value in given.items():
        if name == "layers":
            yield name, [table.table if isinstance(table, LayerOptions) else dict(table) for table in value or ()]
        elif isinstance(value, Recipe):
            yield name, value.to_dict()
        elif name not in ("progress", "on_layer"):
            yield name, value


def _plain(value: Any) -> Any:
    """Words and numbers as they are, and lists and tables of them; anything else by its type."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # as JSON would have it
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str | os.PathLike) or _is_table(v) for v in value):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) and _exact(part) for key, part in value.items()):
        return {key: _plain(part) for key, part in value.items()}
    return f"<{type(value).__name__}>"


def _is_table(value: Any) -> bool:
    """Options of a layer, as a table of a recipe has them."""
    return isinstance(value, dict) and isinstance(value.get("match"), str | list | tuple)


def _exact(value: Any) -> bool:
    """Whether the plain data of a value is all of it, and not its type."""
    return isinstance(value, str | os.PathLike) or not isinstance(_plain(value), str)


def _text(value: Any) -> str:
    return repr(_plain(value)) if _exact(value) else str(_plain(value))
