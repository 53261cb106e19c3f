"""Serialization of dataclasses to JSON and back. NaN and infinities, which JSON lacks, are the texts of `WORDS`."""

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

from magr_onnx.errors import ReportError, short_repr

T = TypeVar("T")

WORDS: Mapping[str, float] = MappingProxyType({"nan": math.nan, "inf": math.inf, "-inf": -math.inf})
AS_IS: Mapping[str, bool] = MappingProxyType({"as_is": True})
"""Metadata of a field whose texts are never decoded as numbers."""

_PLAIN: Mapping[Any, tuple[type, ...]] = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}  # an int is a float, as in Python


def plain(value: Any) -> Any:
    """Convert nested data: tuples to lists, NumPy scalars to Python, and NaN and infinities to `WORDS`."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: type[T], value: Any, where: str) -> T:
    """Invert `plain` of ``dataclasses.asdict``: lists become tuples, nested dictionaries their dataclasses.

    Missing fields take their defaults and unknown ones are ignored, so that versions can differ. None for a float is infinity, as older
    versions wrote it.

    Args:
        kind: A dataclass of numbers, text, tuples, dictionaries and other such dataclasses.
        value: The data.
        where: Name of the data in errors.

    Raises:
        ReportError: A field without a default is missing, a value is of another type, or nesting is too deep.
    """
    try:
        decoded: T = _decode(kind, value, where)
    except RecursionError as error:
        raise ReportError(f"{where}: nested too deeply for a report") from error
    return decoded


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _numbers(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _fields(kind, value, where)
    if origin is types.UnionType or origin is typing.Union:
        inner = [p for p in arguments if p is not type(None)]
        return None if value is None and len(inner) < len(arguments) else _decode(inner[0], value, where)
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        if len(kinds) == len(value):
            return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is float and (value is None or (isinstance(value, str) and value in WORDS)):
        return WORDS["inf" if value is None else value]
    if isinstance(value, _PLAIN.get(kind, ())):
        return value
    raise ReportError(f"{where}: found {short_repr(value)}, expected {_name(kind)}")


def _numbers(value: Any) -> Any:
    """Decode the numbers that JSON lacks in nested data."""
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def _fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ReportError(f"{where}: found {short_repr(value)}, expected {kind.__name__}")
    hints = typing.get_type_hints(kind)
    kwargs = {}
    missing = []
    for f in dataclasses.fields(kind):
        if f.name in value:
            decoded = _decode(hints[f.name], value[f.name], f"{where}.{f.name}")
            kwargs[f.name] = value[f.name] if f.metadata.get("as_is") else decoded
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            missing.append(f.name)
    if missing:
        raise ReportError(f"{where}: {', '.join(missing)} missing; give a file that 'optimize --report FILE.json' wrote")
    return kind(**kwargs)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def json_text(value: Any) -> str:
    """Format `plain` data as indented JSON, with arrays of numbers on one line."""
    text = json.dumps(value, indent=2, allow_nan=False)
    return _NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)


_NUMBERS = re.compile(r"\[\n([-+.\deEnul,\s]*)\n\s*\]")  # JSON strings have no line breaks, so this never matches inside one
