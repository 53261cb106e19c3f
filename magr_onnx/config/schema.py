"""Values by the name of their option: checks, words for None, lists and sizes, and which of them give way to later ones.

`magr_onnx.config.options` declares the options. The values come from recipes, options of layers, the command line and calls.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from magr_onnx.config.options import ARGUMENTS, KEYS, OPTIONS
from magr_onnx.core.option_spec import bytes_of
from magr_onnx.errors import OptionError, closest, raise_all

_DEPENDENTS = {
    owner: [name for name, option in OPTIONS.items() if option.belongs_to == owner]
    for owner in dict.fromkeys(option.belongs_to for option in OPTIONS.values())
    if owner is not None
}
"""Options by the option they belong to: another value of that one drops them."""


def check(**values: Any) -> None:
    """Refuse values that their options cannot have.

    Raises:
        OptionError: With all that are not.
    """
    raise_all(OptionError, (ARGUMENTS[name].problem(value) for name, value in values.items()))


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


def displaced_options(lower: Mapping[str, object], upper: Mapping[str, object], base: Mapping[str, object]) -> dict[str, str]:
    """Find the options that ``lower`` may not keep beside ``upper``, and the option in ``upper`` that displaces each.

    Args:
        lower: Earlier options.
        upper: Later options.
        base: Options below both, from a preset or of the whole run: values that ``lower`` leaves as they are.
    """
    before = {**base, **lower}
    displaced = {other: name for name, value in upper.items() if value is not None and name in OPTIONS for other in OPTIONS[name].displaces}
    displaced |= {other: name for name in upper if name in _DEPENDENTS and _changes(name, upper, before) for other in _DEPENDENTS[name]}
    owners = [name for name in displaced if name not in upper]
    for owner in owners:  # which grows: what belongs to a displaced value goes with it
        if owner in _DEPENDENTS and before.get(owner, OPTIONS[owner].default) != OPTIONS[owner].default:
            new = [name for name in _DEPENDENTS[owner] if name not in displaced]
            displaced |= dict.fromkeys(new, displaced[owner])
            owners += new
    return displaced


def merge_options(lower: Mapping[str, object], upper: Mapping[str, object], base: Mapping[str, object]) -> dict[str, Any]:
    """Merge two sets of options: those of ``upper`` win, and remove those of ``lower`` they conflict with."""
    return replace_displaced(lower, upper, displaced_options(lower, upper, base))


def replace_displaced(lower: Mapping[str, object], upper: Mapping[str, object], displaced: Collection[str]) -> dict[str, Any]:
    """Put ``upper`` over ``lower``, without the names of ``lower`` that are ``displaced``."""
    return {**{name: value for name, value in lower.items() if name not in displaced}, **upper}


def _changes(name: str, upper: Mapping[str, object], before: Mapping[str, object]) -> bool:
    """Whether an option has another value in ``upper`` than it had before."""
    default = OPTIONS[name].default
    usual = upper[name] if default == "none" else default  # what was given beside none of them was meant for any of them
    return bool(upper[name] != before.get(name, usual))
