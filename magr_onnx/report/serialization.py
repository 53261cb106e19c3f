"""Dataclasses as plain data, as JSON has it, and back. JSON knows no NaN and no infinity: they are the texts of `WORDS`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin

from magr_onnx.errors import ReportError, shortened

T = TypeVar("T")

WORDS: Mapping[str, float] = MappingProxyType({"nan": math.nan, "inf": math.inf, "-inf": -math.inf})
AS_IS: Mapping[str, bool] = MappingProxyType({"as_is": True})
"""Metadata of a field whose texts are texts, whatever they say."""

_PLAIN: Mapping[Any, tuple[type, ...]] = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}  # as Python's own rules


def plain(value: Any) -> Any:
    """Nested data with tuples as lists, NumPy scalars as Python ones, and NaN and infinities as `WORDS`."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: type[T], value: Any, where: str) -> T:
    """The inverse of `plain` of ``dataclasses.asdict``: lists become tuples, nested dictionaries their dataclasses.

    A field that is missing takes its default and one that is not known is left out, so that versions can differ. None where there must be a
    float is infinity, as older versions wrote it.

    Args:
        kind: A dataclass of numbers, text, tuples, dictionaries and other such dataclasses.
        value: The data.
        where: What to call it in errors.

    Raises:
        ReportError: A field without a default is missing, a value is of another type, or they are nested without end.
    """
    try:
        found: T = _decode(kind, value, where)
    except RecursionError as error:
        raise ReportError(f"{where}: nested too deeply for a report") from error
    return found


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return _numbers(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _fields(kind, value, where)
    if origin is types.UnionType or origin is typing.Union:
        inner = [p for p in parts if p is not type(None)]
        return None if value is None and len(inner) < len(parts) else _decode(inner[0], value, where)
    if origin is tuple and isinstance(value, list):
        kinds = [parts[0]] * len(value) if parts[-1] is ... else list(parts)
        if len(kinds) == len(value):
            return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(parts[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is float and (value is None or (isinstance(value, str) and value in WORDS)):
        return WORDS["inf" if value is None else value]
    if isinstance(value, _PLAIN.get(kind, ())):
        return value
    raise ReportError(f"{where}: found {shortened(value)}, expected {_name(kind)}")


def _numbers(value: Any) -> Any:
    """Figures of any shape, with the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def _fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ReportError(f"{where}: found {shortened(value)}, expected {kind.__name__}")
    hints = typing.get_type_hints(kind)
    given = {}
    missing = []
    for f in dataclasses.fields(kind):
        if f.name in value:
            found = _decode(hints[f.name], value[f.name], f"{where}.{f.name}")
            given[f.name] = value[f.name] if f.metadata.get("as_is") else found
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            missing.append(f.name)
    if missing:
        raise ReportError(f"{where}: {', '.join(missing)} missing; give a file that 'optimize --report FILE.json' wrote")
    return kind(**given)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def json_text(value: Any) -> str:
    """JSON of `plain` data for people too: indented, with an array of numbers a line."""
    text = json.dumps(value, indent=2, allow_nan=False)
    return _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)


_NUMBERS = re.compile(r"\[\n([-+.\deEnul,\s]*)\n\s*\]")  # strings in JSON hold no line breaks, so this is no part of one
