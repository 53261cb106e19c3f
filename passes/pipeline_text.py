"""Parser of pipeline texts such as ``"magr{alpha=1e-3},quantize{method=gptq,bits=4},emit-matmulnbits"``."""

from __future__ import annotations

import re
import typing
from typing import Any

from magr_onnx.errors import PipelineError
from magr_onnx.passes.base import Stage
from magr_onnx.passes.registry import stages

_STAGE = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*")
_WORDS = {"true": True, "false": False, "none": None, "channel": None}


def parse(text: str) -> list[Stage]:
    """Parse a pipeline text into its stages, in order.

    Raises:
        PipelineError: The text does not parse, or names an unknown pass or option, or a value has the wrong type.
    """
    parsed: list[Stage] = []
    position = 0
    while True:
        match = _STAGE.match(text, position)
        if match is None:
            raise PipelineError(f"pipeline: expected a pass name at character {position} of {text!r}")
        parsed.append(_make(match["name"], match["options"] or ""))
        position = match.end()
        if position == len(text):
            return parsed
        if text[position] == "{":  # not closed, or it would have matched
            end = re.compile(r"[^{}]*").match(text, position + 1)
            assert end is not None
            raise PipelineError(f"pipeline: expected '}}' at character {end.end()} of {text!r}, for the '{{' at {position}")
        if text[position] != ",":
            raise PipelineError(f"pipeline: expected ',' at character {position} of {text!r}, found {text[position:]!r}")
        position += 1


def _make(name: str, text: str) -> Stage:
    stages_by_name = stages()
    if name not in stages_by_name:
        raise PipelineError(f"pipeline: no pass is called {name!r}; there are {', '.join(stages_by_name)}")
    options = stages_by_name[name].options()
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in options:
            raise PipelineError(f"pipeline: {name} has no option {item!r}; it takes {', '.join(options) or 'none'}")
        values[key] = _value(f"{name}{{{key}}}", value, options[key][0])
    return stages_by_name[name].of(values)


def _value(where: str, text: str, kind: Any) -> Any:
    kinds = (kind,) if typing.get_origin(kind) is typing.Literal else typing.get_args(kind) or (kind,)
    choices = [c for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)]
    if choices:
        if text == "none" and text not in choices and type(None) in kinds:
            return None
        if text not in choices:
            raise PipelineError(f"pipeline: {where}={text}: choose one of {', '.join(choices)}")
        return text
    allowed = set(kinds)
    if text.lower() in _WORDS and type(_WORDS[text.lower()]) in allowed:
        return _WORDS[text.lower()]
    for convert in (int, float, str):
        if convert in allowed:
            try:
                return convert(text)
            except ValueError:
                continue
    names = " or ".join(sorted("none" if t is type(None) else t.__name__ for t in allowed))
    raise PipelineError(f"pipeline: {where}={text}: expected {names}")
