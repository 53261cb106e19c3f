"""Names and types of everything that may be said of a run in words: in a recipe, for a layer, or by an option of the command line.

One dictionary, made from `magr_onnx.config.options.Options` and from what a run has beside those, so that an option is declared once.
"""

from __future__ import annotations

import numbers
import os
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, cast

from magr_onnx.config.options import BIAS, Options, bytes_of
from magr_onnx.core.activation_ranges import METHODS
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.core.quantizers import QUANTIZERS
from magr_onnx.core.types import BITS
from magr_onnx.errors import OptionError, closest, raise_all
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.layers import conv, embedding

WORDS = {"block_size": "channel", "conv_bits": "none", "mask": "none"}
"""What None is called where there is no None, by option."""

_CHOICES: dict[str, Collection[Any]] = {
    "bits": BITS,
    "quantizer": QUANTIZERS,
    "format": FORMATS,
    "bias": BIAS,
    "activation_range": METHODS,
    "conv_bits": conv.BITS,
    "embeddings": ("none", *embedding.FORMS),
    "embedding_bits": embedding.BITS,
    "target": TARGETS,
}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}

Kind = Literal["value", "path", "paths", "patterns", "size"]


@dataclass(frozen=True, slots=True)
class Key:
    """What may be said under one name.

    Attributes:
        types: Python types of the value; None among them where a call may say None.
        choices: All accepted values, where they can be listed.
        kind: ``path`` and ``paths`` are relative to the recipe; ``patterns`` and ``paths`` are a text or a list of them; ``size`` is a
            number of bytes, or a text such as ``2GB``.
        least: The smallest number accepted, where there is one; of sizes 1 where nothing is said.
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
    "output": Key((str, NoneType), kind="path"),
    "calibration": Key(kind="path"),
    "validation": Key(kind="path"),
    "models": Key(kind="patterns"),
    "overwrite": Key((bool,)),
    "preset": Key((str, NoneType)),
    "pipeline": Key(),
    "include": Key(kind="patterns"),
    "exclude": Key(kind="patterns"),
    "requantize": Key((bool,)),
    "custom_ops": Key(kind="paths"),
    "mask": Key((str, NoneType)),
    "batch_size": Key((int,), least=1),
    "decode_steps": Key((int,), least=0),
    "provider": Key(),
    "cache": Key(kind="size", least=0),
    "max_memory": Key((str, NoneType), kind="size"),
    "resume": Key((str, NoneType), kind="path"),
    "external_data": Key((bool,)),
    "shard_size": Key((str, NoneType), kind="size"),
}
"""What a run is told beside them."""

KEYS = {**RUN, **OPTIONS}
ARGUMENTS = {**KEYS, "gram_budget": Key(kind="size"), "samples": Key((int, NoneType), least=1)}
"""With what only calls in Python have."""


def problem(name: str, value: Any) -> str | None:
    """What is wrong with a value, if anything is; ``name`` is among `ARGUMENTS`."""
    choices, wrong = ARGUMENTS[name].choices, mistyped(name, value)
    if wrong is None and choices and value not in (None, WORDS.get(name), *choices):
        return f"{name} = {_shown(value)}: choose one of {', '.join(map(str, choices))}{closest(str(value), map(str, choices))}"
    return wrong


def mistyped(name: str, value: Any) -> str | None:
    """What is wrong with a value but for being none of the choices: its type, or that it is too small."""
    key = ARGUMENTS[name]
    if value is None and NoneType in key.types:
        return None
    if key.kind in ("patterns", "paths"):
        kinds = str | os.PathLike if key.kind == "paths" else str
        texts = [value] if isinstance(value, kinds) else value
        good = isinstance(texts, list | tuple) and all(isinstance(text, kinds) for text in texts)
        return None if good else f"{name} = {_shown(value)}: expected a text or a list of texts, found {_found(value)}"
    if key.kind == "size":
        found = bytes_of(value) if isinstance(value, str) or _is(value, float) else None
        good = found is not None and found >= (1 if key.least is None else key.least)
        return None if good else f"{name} = {_shown(value)}: give a size such as 512MB or 2GB"
    if (key.kind == "path" and isinstance(value, os.PathLike)) or _is_word(name, value):
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
    return {name: None if _is_word(name, value) else value for name, value in values.items()}


def listed(name: str, value: Any) -> Any:
    """A value whose kind is a list of texts as one; any other as it is."""
    several = name in KEYS and KEYS[name].kind in ("paths", "patterns")
    return tuple([value] if isinstance(value, str | os.PathLike) else value) if several else value


def size(name: str, value: float | str) -> int:
    """The bytes of a size.

    Raises:
        OptionError: It is none, or too small.
    """
    check(**{name: value})
    return cast(int, bytes_of(value))


def unknown(name: str, names: Mapping[str, Any] | Collection[str]) -> str:
    """What to say of a name that is none of ``names``."""
    listed = ", ".join(names) if len(names) < 20 else "the long options of onnx-magr optimize, with underscores (--help shows them)"
    return f"unknown key {name!r}" + (closest(name, names) or f"; there are {listed}")


def _is_word(name: str, value: Any) -> bool:
    """Whether a value is the word for None of its option."""
    return name in WORDS and isinstance(value, str) and value == WORDS[name]


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
