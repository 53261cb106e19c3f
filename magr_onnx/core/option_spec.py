"""How an option is declared: once, for the command line, recipes, layers, pipelines and the documentation."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from magr_onnx.errors import choose_one, short_repr

Kind = Literal["value", "path", "paths", "patterns", "size"]

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
_UNITS = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>B|kB|MB|GB)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """Declaration of one option: its type, help, default, and conflicts with other options.

    Attributes:
        name: Name in Python, recipes and pipelines; with - for _ on the command line. Empty where the declaration has it elsewhere.
        argument: Its parameter of `magr_onnx.optimize`, where that has another name.
        help: A sentence or two.
        types: Python types of the value, with NoneType where None is allowed. Empty where the declaration has a type elsewhere.
        default: Default value.
        default_text: Description of a default that depends on other options.
        choices: Accepted values, where they can be listed.
        kind: ``path`` and ``paths`` are relative to the recipe; ``patterns`` and ``paths`` are a text or a list of them; ``size`` is a
            number of bytes, or a text such as ``2GB``.
        expected: Description of a valid value, where the types are not enough.
        least: Smallest number accepted, if any; 1 by default for sizes.
        none_word: Word for None in recipes and on the command line.
        panel: Its heading in ``--help``.
        metavar: Placeholder of its value in ``--help``.
        flags: Command-line flags, where they are not just ``--name``.
        whole_run: Reason why it cannot differ by layer; None where it can.
        displaces: Options that a later value of this one removes.
        belongs_to: Option whose other values remove this one, such as ``format`` or ``embeddings``.
    """

    name: str = ""
    argument: str = ""
    help: str
    types: tuple[type, ...] = ()
    default: Any = None
    default_text: str = ""
    choices: Collection[Any] = ()
    kind: Kind = "value"
    expected: str = ""
    least: int | None = None
    none_word: str | None = None
    panel: str = ""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    whole_run: str | None = None
    displaces: tuple[str, ...] = ()
    belongs_to: str | None = None

    @property
    def text(self) -> str:
        """Return the help, with the default where that depends on other options."""
        return f"{self.help} (default: {self.default_text})" if self.default_text else self.help

    def problem(self, value: Any) -> str | None:
        """Explain why a value is invalid; None if it is valid."""
        choices, fault = self.choices, self.mistyped(value)
        if fault is None and choices and value not in (None, self.none_word, *choices):
            return f"{self.name} = {short_repr(value)}: {choose_one(value, choices)}"
        return fault

    def mistyped(self, value: Any) -> str | None:
        """Explain why a value has a wrong type or is too small; None if neither."""
        if (value is None and NoneType in self.types) or self.is_none_word(value):
            return None
        if self.kind in ("patterns", "paths"):
            kinds = str | os.PathLike if self.kind == "paths" else str
            texts = [value] if isinstance(value, kinds) else value
            good = isinstance(texts, list | tuple) and all(isinstance(text, kinds) for text in texts)
            return None if good else f"{self.name} = {short_repr(value)}: expected a text or a list of texts, found {_type_name(value)}"
        if self.kind == "size":
            size = bytes_of(value) if isinstance(value, str) or _is(value, float) else None
            good = size is not None and size >= (1 if self.least is None else self.least)
            return None if good else f"{self.name} = {short_repr(value)}: give a size such as 512MB or 2GB"
        if self.kind == "path" and isinstance(value, os.PathLike):
            return None
        if not any(_is(value, kind) for kind in self.types):
            return f"{self.name} = {short_repr(value)}: expected {self._expected()}, found {_type_name(value)}"
        if self.least is not None and value < self.least:
            return f"{self.name} = {short_repr(value)}: expected {self.least} or more"
        return None

    def is_none_word(self, value: Any) -> bool:
        """Return whether a value is the word for None."""
        return isinstance(value, str) and value == self.none_word

    def _expected(self) -> str:
        names = [self.expected] if self.expected else [_NAMES[kind] for kind in self.types if kind in _NAMES]
        return " or ".join(names + ([] if self.none_word is None else [repr(self.none_word)]))


def bytes_of(size: str | float) -> int | None:
    """Convert a size such as ``30 MB``, or a number, to bytes; None where it is not a finite size."""
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        size = math.nan if match is None else float(match["number"]) * _UNITS[match["unit"].lower()]
    return round(size) if isinstance(size, numbers.Integral) or math.isfinite(size) else None


def _is(value: Any, kind: type) -> bool:
    """Return whether a value is of a type; integers count as floats, NumPy scalars as numbers, and bool as neither."""
    abstract = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    return isinstance(value, abstract) and (kind is bool or not isinstance(value, bool))


def _type_name(value: Any) -> str:
    return _NAMES.get(type(value), f"a {type(value).__name__}")
