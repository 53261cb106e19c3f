"""Merging of two sets of arguments: later values win, and remove the earlier ones they conflict with.

What an option displaces and which one it belongs to stands in the option table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from magr_onnx.config.displacement import displaced_options, replace_displaced
from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.options import OPTIONS, RUN, Options
from magr_onnx.config.presets import PRESETS, find_preset
from magr_onnx.config.schema import none_to_word
from magr_onnx.errors import OptionError

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


def apply_preset(
    arguments: Mapping[str, Any], tables: Sequence[LayerOptions]
) -> tuple[dict[str, Any], tuple[LayerOptions, ...], list[str]]:
    """Merge arguments over those of the preset they name; its tables, without options given for all layers, stand before ``tables``.

    Returns:
        The arguments, the tables, and what was left out of the preset.

    Raises:
        OptionError: There is no such preset, or a pipeline is given, which leaves it nothing to set.
    """
    preset = find_preset(arguments["preset"])
    if arguments.get(RUN["pipeline"].argument) is not None:
        raise OptionError(f"preset {preset.name} and a pipeline: a pipeline replaces all options; give one or the other")
    lower = cast(Mapping[str, Any], preset.options)
    layers = [layer for table in preset.layers for layer in _without(table, arguments, lower)]
    notes = dropped(lower, arguments, f"preset {preset.name}")
    return merge(lower, arguments), (*layers, *tables), notes


def _without(table: LayerOptions, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> list[LayerOptions]:
    """Return a preset's table without options given for all layers, and without what belongs to the values that those replace; none if
    that leaves no options."""
    replaced = {name: arguments[name] for name in table.options if name in arguments}
    displaced = displaced_options(cast(Mapping[str, Any], table.options), replaced, options)
    kept = {name: value for name, value in table.options.items() if name not in replaced and name not in displaced}
    return [replace(table, options=cast(Options, kept))] if kept else []


def _displaced(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, str]:
    """Find the names that ``lower`` may not keep, and the name in ``upper`` that displaces each."""
    names = [name for name, value in upper.items() if value is not None]
    preset = PRESETS.get(lower.get("preset") or "")
    displaced = displaced_options(lower, upper, {} if preset is None else cast(Mapping[str, Any], preset.options))
    if pipeline := next((name for name in names if name in _PIPELINES), None):
        displaced |= dict.fromkeys((*_PLANNED, "layers"), pipeline)
    elif option := next((name for name in names if name in _PLANNED), None):
        displaced |= dict.fromkeys(_PIPELINES, option)
    if upper.get("conv_bits", 0) is None:
        displaced["conv_form"] = "conv_bits"
    elif "conv_form" in names and lower.get("conv_bits", 0) is None:
        displaced["conv_bits"] = "conv_form"
    return displaced
