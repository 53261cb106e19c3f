"""Names and types of everything that may be said of a run in words: in a recipe, for a layer, or by an option of the command line.

One dictionary, made from `magr_onnx.options.Options` and from what a run has beside those, so that an option is declared once.
"""

from __future__ import annotations

import numbers
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from magr_onnx.errors import OptionError, closest, raise_all
from magr_onnx.options import BIAS, FORMATS, Options, bytes_of
from magr_onnx.passes import conv, gather
from magr_onnx.quantizers import QUANTIZERS
from magr_onnx.ranges import METHODS
from magr_onnx.targets import TARGETS
from magr_onnx.types import BITS

WORDS = {"block_size": "channel", "conv_bits": "none", "mask": "none"}
"""What None is called where there is no None, by option."""

_CHOICES: dict[str, Collection[Any]] = {
    "bits": BITS,
    "quantizer": QUANTIZERS,
    "format": FORMATS,
    "bias": BIAS,
    "activation_range": METHODS,
    "conv_bits": conv.BITS,
    "embeddings": ("none", *gather.FORMS),
    "embedding_bits": gather.BITS,
    "target": TARGETS,
}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}

Kind = Literal["value", "path", "paths", "patterns", "size"]


@dataclass(frozen=True, slots=True)
class Key:
    """What may be said under one name.

    Attributes:
        types: Python types of the value; None among them where there is a word for it.
        choices: All accepted values, where they can be listed.
        kind: ``path`` and ``paths`` are relative to the recipe; ``patterns`` and ``paths`` are a text or a list of them; ``size`` is a
            number of bytes, or a text such as ``2GB``.
        least: The smallest number accepted, where there is one.
    """

    types: tuple[type, ...] = (str,)
    choices: tuple[Any, ...] = ()
    kind: Kind = "value"
    least: int | None = None


def _key(name: str, hint: Any) -> Key:
    parts = [hint] if typing.get_origin(hint) is Literal else list(typing.get_args(hint)) or [hint]
    literals = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    choices = tuple(literals or _CHOICES.get(name, ()))
    types = tuple(str if typing.get_origin(part) is Literal else part for part in parts)
    return Key(types, choices)


OPTIONS = {name: _key(name, hint) for name, hint in typing.get_type_hints(Options).items()}
"""What a pipeline is made of."""

RUN = {
    "model": Key(kind="path"),
    "output": Key(kind="path"),
    "calibration": Key(kind="path"),
    "validation": Key(kind="path"),
    "models": Key(kind="patterns"),
    "overwrite": Key((bool,)),
    "preset": Key(),
    "pipeline": Key(),
    "include": Key(kind="patterns"),
    "exclude": Key(kind="patterns"),
    "requantize": Key((bool,)),
    "custom_ops": Key(kind="paths"),
    "mask": Key((str, NoneType)),
    "batch_size": Key((int,), least=1),
    "decode_steps": Key((int,), least=0),
    "provider": Key(),
    "cache": Key(kind="size"),
    "max_memory": Key(kind="size"),
    "resume": Key(kind="path"),
    "external_data": Key((bool,)),
    "shard_size": Key(kind="size"),
}
"""What a run is told beside them."""

KEYS = {**RUN, **OPTIONS}


def problem(name: str, value: Any) -> str | None:
    """What is wrong with a value, if anything is; ``name`` is among `KEYS`."""
    choices, wrong = KEYS[name].choices, mistyped(name, value)
    if wrong is None and choices and value not in (None, WORDS.get(name), *choices):
        return f"{name} = {_shown(value)}: choose one of {', '.join(map(str, choices))}{closest(str(value), map(str, choices))}"
    return wrong


def mistyped(name: str, value: Any) -> str | None:
    """What is wrong with a value but for being none of the choices: its type, or that it is too small."""
    key = KEYS[name]
    if key.kind in ("patterns", "paths"):
        texts = [value] if isinstance(value, str | os.PathLike) else value
        good = isinstance(texts, list | tuple) and all(isinstance(text, str | os.PathLike) for text in texts)
        return None if good else f"{name} = {_shown(value)}: expected a text or a list of texts, found {_found(value)}"
    if key.kind == "size":
        good = bytes_of(value) is not None if isinstance(value, str) else _is(value, float)
        return None if good else f"{name} = {_shown(value)}: give a size such as 512MB or 2GB"
    if (
        (key.kind == "path" and isinstance(value, os.PathLike))
        or (value is None and NoneType in key.types)
        or (name in WORDS and value == WORDS[name])
    ):
        return None
    if not any(_is(value, kind) for kind in key.types):
        return f"{name} = {_shown(value)}: expected {_expected(name, key)}, found {_found(value)}"
    if key.least is not None and value < key.least:
        return f"{name} = {_shown(value)}: expected {key.least} or more"
    return None


def check(**values: Any) -> None:
    """See that values under the names of keys are possible.

    Raises:
        OptionError: With all that are not.
    """
    found = [problem(name, value) for name, value in values.items()]
    raise_all(OptionError, [text for text in found if text is not None])


def worded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with None in words, or left out where there is none for it."""
    found = {name: WORDS.get(name) if value is None else value for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def unworded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with None for the words that stand for it."""
    return {name: None if value == WORDS.get(name) else value for name, value in values.items()}


def unknown(name: str, names: Mapping[str, Any] | Collection[str]) -> str:
    """What to say of a name that is none of ``names``."""
    listed = ", ".join(names) if len(names) < 20 else "the long options of onnx-magr optimize, with underscores (--help shows them)"
    return f"unknown key {name!r}" + (closest(name, names) or f"; there are {listed}")


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; whole numbers are numbers too, and those of numpy are numbers, but truth is none."""
    abstract = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    return isinstance(value, abstract) and (kind is bool or not isinstance(value, bool))


def _expected(name: str, key: Key) -> str:
    names = [_NAMES[kind] for kind in key.types if kind in _NAMES]
    if name == "block_size":
        names = ["a multiple of 16"]
    words = [repr(WORDS[name])] if name in WORDS else []
    return " or ".join(names + words)


def _found(value: Any) -> str:
    return _NAMES.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
