"""Merging of two sets of arguments: later values win, and remove the earlier ones they conflict with.

What an option displaces and which one it belongs to stands in the option table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magr_onnx.config.options import OPTIONS, RUN
from magr_onnx.config.presets import PRESETS
from magr_onnx.config.schema import displaced_options, none_to_word, replace_displaced

_PIPELINES = ("pipeline", RUN["pipeline"].argument)
_PLANNED = (*OPTIONS, "preset")
"""Names that a pipeline replaces."""


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two sets of arguments: those of ``upper`` win, and remove those of ``lower`` they conflict with."""
    return replace_displaced(lower, upper, _displaced(lower, upper))


def dropped(lower: Mapping[str, Any], upper: Mapping[str, Any], where: str) -> list[str]:
    """Describe, for the report, what `merge` removes of ``lower``, the arguments of ``where``, although ``upper`` has no value for it."""
    texts: dict[str, list[str]] = {}
    displaced = _displaced(lower, upper)
    for name, value in none_to_word(lower).items():
        if name in displaced and name not in upper:
            text = f"layers {'; '.join(map(str, value))}" if name == "layers" else f"{name}={value}"
            texts.setdefault("a pipeline" if displaced[name] in _PIPELINES else displaced[name], []).append(text)
    return [f"{', '.join(options)} of {where} left out: {upper_name} was given over it" for upper_name, options in texts.items()]


def _displaced(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, str]:
    """Find the names that ``lower`` may not keep, and the name in ``upper`` that displaces each."""
    names = [name for name, value in upper.items() if value is not None]
    preset = PRESETS.get(lower.get("preset") or "")
    displaced = displaced_options(lower, upper, {} if preset is None else preset.options)
    if pipeline := next((name for name in names if name in _PIPELINES), None):
        displaced |= dict.fromkeys((*_PLANNED, "layers"), pipeline)
    elif option := next((name for name in names if name in _PLANNED), None):
        displaced |= dict.fromkeys(_PIPELINES, option)
    if upper.get("conv_bits", 0) is None:
        displaced["conv_form"] = "conv_bits"
    elif "conv_form" in names and lower.get("conv_bits", 0) is None:
        displaced["conv_bits"] = "conv_form"
    return displaced
