"""Values by the name of their option: checks, words for None, lists and sizes.

`magr_onnx.config.options` declares the options. The values come from recipes, options of layers, the command line and calls.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from magr_onnx.config.options import ARGUMENTS, KEYS
from magr_onnx.core.option_spec import bytes_of
from magr_onnx.errors import OptionError, closest, raise_all


def check(**values: Any) -> None:
    """Refuse values that their options cannot have.

    Raises:
        OptionError: With all that are not.
    """
    problems = [ARGUMENTS[name].problem(value) for name, value in values.items()]
    raise_all(OptionError, [problem for problem in problems if problem is not None])


def none_to_word(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace None by the word for it, and leave out options that have no such word."""
    words = {name: _none_word(name) if value is None else value for name, value in values.items()}
    return {name: value for name, value in words.items() if value is not None}


def word_to_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace words that stand for None."""
    return {name: None if isinstance(value, str) and value == _none_word(name) else value for name, value in values.items()}


def as_list(name: str, value: Any) -> Any:
    """Make a tuple of the value of an option that takes several; return any other as it is."""
    several = name in KEYS and KEYS[name].kind in ("paths", "patterns")
    return tuple([value] if isinstance(value, str | os.PathLike) else value) if several else value


def size(name: str, value: float | str | None) -> int | None:
    """Convert a size to bytes; None stays None where the option may be that.

    Raises:
        OptionError: It is none, or too small.
    """
    check(**{name: value})
    return None if value is None else bytes_of(value)


def unknown(name: str, names: Mapping[str, Any] | Collection[str]) -> str:
    """Say that a name is none of ``names``."""
    choices = ", ".join(names) if len(names) < 20 else "the long options of onnx-magr optimize, with underscores (--help shows them)"
    return f"unknown key {name!r}" + (closest(name, names) or f"; there are {choices}")


def _none_word(name: str) -> str | None:
    return ARGUMENTS[name].none_word if name in ARGUMENTS else None
