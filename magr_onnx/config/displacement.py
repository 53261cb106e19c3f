"""Which options of one set give way to those of a later one, by what stands in the option table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from magr_onnx.config.options import OPTIONS

_DEPENDENTS = {
    owner: [name for name, option in OPTIONS.items() if option.belongs_to == owner]
    for owner in dict.fromkeys(option.belongs_to for option in OPTIONS.values())
    if owner is not None
}
"""Options by the option they belong to: another value of that one drops them."""


def displaced_options(lower: Mapping[str, Any], upper: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str]:
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


def merge_options(lower: Mapping[str, Any], upper: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two sets of options: those of ``upper`` win, and remove those of ``lower`` they conflict with."""
    return replace_displaced(lower, upper, displaced_options(lower, upper, base))


def replace_displaced(lower: Mapping[str, Any], upper: Mapping[str, Any], displaced: Collection[str]) -> dict[str, Any]:
    """Put ``upper`` over ``lower``, without the names of ``lower`` that are ``displaced``."""
    return {**{name: value for name, value in lower.items() if name not in displaced}, **upper}


def _changes(name: str, upper: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether an option has another value in ``upper`` than it had before."""
    default = OPTIONS[name].default
    usual = upper[name] if default == "none" else default  # what was given beside none of them was meant for any of them
    return bool(upper[name] != before.get(name, usual))
