"""What wins over what: options that are said later win, and those they stand in the place of go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magr_onnx.keys import OPTIONS
from magr_onnx.options import FORMATS

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
_MADE_OF = {*OPTIONS, "preset"}


def over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments said first and arguments said later: the later ones win, and what they stand in the place of goes."""
    given = {name for name, value in upper.items() if value is not None}
    gone = {name for some, names in _YIELDS.items() if some in given for name in names}
    gone |= {name for some, names in _BELONGS.items() if some in given and _changed(some, lower, upper) for name in names}
    gone |= _MADE_OF if given & set(_PIPELINES) else set(_PIPELINES) if given & _MADE_OF else set()
    if upper.get("conv_bits", 0) is None:
        gone.add("conv_form")
    elif "conv_form" in given and lower.get("conv_bits", 0) is None:
        gone.add("conv_bits")
    return {**{name: value for name, value in lower.items() if name not in gone}, **upper}


def _changed(name: str, lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    usual = next(iter(FORMATS)) if name == "format" else upper[name]
    return bool(upper[name] != lower.get(name, usual))
