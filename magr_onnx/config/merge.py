"""What wins over what: options that are said later win, and those they stand in the place of go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.options import Options
from magr_onnx.config.presets import PRESETS, find_preset
from magr_onnx.config.schema import OPTIONS, worded
from magr_onnx.errors import OptionError
from magr_onnx.passes.emit import FORMATS

_YIELDS: dict[str, Sequence[str]] = {
    "quantizer": ("effort",),
    "effort": ("quantizer",),
    "bits": ("target_size", "max_loss"),
    "target_size": ("bits", "max_loss"),
    "max_loss": ("bits", "target_size"),
    "target": ("accumulator_bits", "accumulator_tile"),
    "accumulator_bits": ("target",),
}
"""What is given up for an option that stands in its place, where that was said later."""
_BELONGS: dict[str, Sequence[str]] = {
    "format": (
        "accuracy_level",
        "activation_type",
        "activation_range",
        "quantize_outputs",
        "target",
        "accumulator_bits",
        "accumulator_tile",
        "twin_ranges",
    ),
    "embeddings": ("embedding_bits",),
}
"""What is given up for another value of an option that it was said for."""
_PIPELINES = ("pipeline", "pipeline_text")
_MADE_OF = (*OPTIONS, "preset")


def over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments said first and arguments said later: the later ones win, and what they stand in the place of goes."""
    gone = _gone(lower, upper)
    return {**{name: value for name, value in lower.items() if name not in gone}, **upper}


def left_out(lower: Mapping[str, Any], upper: Mapping[str, Any], where: str) -> list[str]:
    """For the report: what of ``lower``, which ``where`` said, has no part in `over` although ``upper`` says nothing of it."""
    some: dict[str, list[str]] = {}
    gone = _gone(lower, upper)
    for name, value in worded(lower).items():
        if name in gone and name not in upper:
            some.setdefault(gone[name], []).append(f"layers {'; '.join(map(str, value))}" if name == "layers" else f"{name}={value}")
    said = {name: "a pipeline" if name in _PIPELINES else name for name in some}
    return [f"{', '.join(texts)} of {where} left out: {said[name]} was given over it" for name, texts in some.items()]


def below(given: Mapping[str, Any], tables: Sequence[LayerOptions]) -> tuple[dict[str, Any], tuple[LayerOptions, ...], list[str]]:
    """Arguments over those of the preset they name; its tables, without options that are given for the whole run, and then ``tables``.

    Returns:
        The arguments, the tables, and what was left out of the preset.

    Raises:
        OptionError: There is no such preset, or a pipeline is given, which leaves it nothing to set.
    """
    preset = find_preset(given["preset"])
    if given.get("pipeline_text") is not None:
        raise OptionError(f"preset {preset.name} and a pipeline: a pipeline replaces all options; give one or the other")
    own = [replace(t, options=cast(Options, {n: v for n, v in t.options.items() if n not in given})) for t in preset.layers]
    lower = cast(Mapping[str, Any], preset.options)
    notes = left_out(lower, given, f"preset {preset.name}")
    return over(lower, given), (*(table for table in own if table.options), *tables), notes


def _gone(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, str]:
    """Names that give way in ``lower``, if they are in it, and what each gives way to."""
    given = [name for name, value in upper.items() if value is not None]
    gone = {other: name for name in given for other in _YIELDS.get(name, ())}
    gone |= {other: name for name in given if name in _BELONGS and _changed(name, lower, upper) for other in _BELONGS[name]}
    if pipeline := next((name for name in given if name in _PIPELINES), None):
        gone |= dict.fromkeys((*_MADE_OF, "layers"), pipeline)
    elif option := next((name for name in given if name in _MADE_OF), None):
        gone |= dict.fromkeys(_PIPELINES, option)
    if upper.get("conv_bits", 0) is None:
        gone["conv_form"] = "conv_bits"
    elif "conv_form" in given and lower.get("conv_bits", 0) is None:
        gone["conv_bits"] = "conv_form"
    return gone


def _changed(name: str, lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    """Whether an option has another value in ``upper`` than it had in ``lower`` with its preset."""
    preset = PRESETS.get(lower.get("preset") or "")
    usual = next(iter(FORMATS)) if name == "format" else upper[name]
    before: Mapping[str, Any] = {name: usual, **(preset.options if preset is not None else {}), **lower}
    return bool(upper[name] != before[name])
