"""Greedy generation from one prompt with a model and with its quantized form, side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magr_onnx.config import schema
from magr_onnx.errors import CalibrationError, OptionError, RuntimeFailure, raise_all, translate_resource_errors
from magr_onnx.model_io import files
from magr_onnx.runtime.data.text import Reading
from magr_onnx.runtime.data.tokenizer import Tokenizer
from magr_onnx.runtime.measure import greedy
from magr_onnx.runtime.ort import session
from magr_onnx.runtime.ort.session import Session, available_provider

MOST = 128
OnToken = Callable[[str, int, str], None]
"""Called with a model, a token it generated, and the text that the token completes."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What one model generated.

    Attributes:
        model: Its file.
        tokens: Ids after the prompt.
        text: The same as text; None without a tokenizer.
        first_seconds: Time of the first token, in which the model reads the prompt.
        tokens_per_second: Of the others; None where there are none.
        end: Why it ended: ``length``, ``end token``, ``context`` (it is full), or ``failure`` (the model fails on more tokens).
    """

    model: str
    tokens: tuple[int, ...]
    text: str | None
    first_seconds: float
    tokens_per_second: float | None
    end: str


@dataclass(frozen=True, slots=True)
class Generation:
    """What one or two models generated from a prompt.

    Attributes:
        prompt: Its tokens.
        results: The model, and the quantized one.
        differs: Index of the first token that differs; None where all are the same, or for one model.
    """

    prompt: tuple[int, ...]
    results: tuple[Generated, ...]
    differs: int | None


@translate_resource_errors()
def generate(
    model: str | os.PathLike[str],
    quantized: str | os.PathLike[str] | None = None,
    *,
    prompt: str | Sequence[int],
    max_tokens: int = MOST,
    tokenizer: str | os.PathLike[str] | None = None,
    chat: bool = False,
    provider: str = "cpu",
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    on_token: OnToken | None = None,
) -> Generation:
    """Generate from a prompt greedily, with a model and its quantized form.

    Args:
        model: A file, or the folder of a model: a decoder with a KV cache, or a language model of ``input_ids`` alone, which runs on all
            tokens for every new one.
        quantized: Another one to compare with.
        prompt: Text; tokens, or their text (``"2 1041 77"``) where there is no tokenizer.
        max_tokens: Most tokens to generate; fewer where one ends the text or the context is full.
        tokenizer: A ``tokenizer.json`` or its folder; None for the one beside either model.
        chat: Whether the prompt is what a user says to a chat model, which the model's chat template frames.
        provider: Where to run.
        custom_ops: Shared libraries with custom operators.
        on_token: Called with every token as it comes.

    Returns:
        The tokens, and how fast they came.

    Raises:
        OptionError: A value is invalid, or the prompt is empty.
        MagrError: A model, the tokenizer or the prompt is not usable.
    """
    schema.check(provider=provider, custom_ops=custom_ops)
    if max_tokens < 1:
        raise OptionError(f"max_tokens = {max_tokens}: expected 1 or more")
    available_provider(provider)
    paths = [files.model_of(Path(path)) for path in (model, quantized) if path is not None]
    reading = Reading(tokenizer=None if tokenizer is None else Path(tokenizer), folders=[path.parent for path in paths])
    tool = None if reading.place is None or not (isinstance(prompt, str) or tokenizer) else Tokenizer.open(reading.place)
    ids = _prompt(prompt, tool, chat, paths[0].parent)
    longest = None if tool is None else tool.longest
    if longest is not None and len(ids) >= longest:
        raise CalibrationError(f"the prompt has {len(ids)} tokens, and the model's context is {longest}; give a shorter one")
    decoders = [greedy.decoder_of(files.load(path).model) for path in paths]
    results = []
    for path, decoder in zip(paths, decoders, strict=True):
        with session.custom_ops(schema.as_list("custom_ops", custom_ops)), Session(path, provider, spinning=True) as loaded:
            most = max_tokens if longest is None else min(max_tokens, longest - len(ids))
            stream = greedy.tokens(loaded, decoder, ids)
            results.append(_collect(str(path), stream, tool, most, "length" if most == max_tokens else "context", on_token))
    pairs = zip(*(result.tokens for result in results), strict=False)
    first = next((i for i, pair in enumerate(pairs) if len(set(pair)) > 1), None)
    lengths = [len(result.tokens) for result in results]
    return Generation(tuple(ids), tuple(results), min(lengths) if first is None and len(set(lengths)) > 1 else first)


def _prompt(prompt: str | Sequence[int], tool: Tokenizer | None, chat: bool, folder: Path) -> list[int]:
    """Return the tokens of a prompt."""
    if not isinstance(prompt, str):
        ids = [int(token) for token in prompt]
    elif tool is not None:
        text = tool.chat([{"role": "user", "content": prompt}], answer=True) if chat else prompt
        ids = [*tool.prefix, *tool.bare(tool.encode([text])[0])]
    else:
        words = prompt.replace(",", " ").split()
        wrong = [word for word in words if not (word.isascii() and word.isdecimal())]
        remedy = f"there is no tokenizer.json in {folder} for text (--tokenizer), so a prompt is token ids"
        raise_all(CalibrationError, [f"{remedy}; {word!r} is none" for word in wrong[:1]])
        ids = list(map(int, words))
    if not ids:
        raise OptionError("the prompt is empty; give text, or token ids where there is no tokenizer")
    return ids


def _collect(model: str, stream: Iterator[int], tool: Tokenizer | None, most: int, full: str, on_token: OnToken | None) -> Generated:
    """Take tokens until one ends the text, or there are ``most``, or the model has no room for more; time them."""
    ends: Any = () if tool is None else tool.ends
    ids: list[int] = []
    shown, end = "", full
    start = first = last = time.perf_counter()
    while len(ids) < most:
        try:
            token = next(stream)
        except RuntimeFailure:
            if not ids:
                raise
            end = "failure"
            break
        last = time.perf_counter()
        first = first if ids else last
        if token in ends:
            end = "end token"
            break
        ids.append(token)
        if on_token is not None:
            text = str(token) if tool is None else tool.decode(ids)
            piece = f"{text} " if tool is None else "" if text.endswith("\ufffd") else text[len(shown) :]
            shown = shown if tool is None or text.endswith("\ufffd") else text
            on_token(model, token, piece)
    speed = (len(ids) - 1) / (last - first) if len(ids) > 1 and last > first else None
    return Generated(model, tuple(ids), None if tool is None else tool.decode(ids), first - start, speed, end)
