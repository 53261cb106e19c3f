"""Greedy decoding: the most likely token, one after the other, with a KV cache where the model has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.errors import ModelError, NonFiniteError
from magr_onnx.passes.graph.kv_cache import TOKENS
from magr_onnx.runtime.data.decoders import Decoder, recognise
from magr_onnx.runtime.ort.session import Batch, Session, inputs_of


def decoder_of(model: ir.Model) -> Decoder:
    """Describe the inputs of a language model, which may have no cache.

    Raises:
        ModelError: It has inputs that do not follow from tokens.
        CalibrationError: The same of a model with a cache, or the cache is not known.
    """
    inputs = inputs_of(model)
    if TOKENS not in {i.name for i in inputs}:
        raise ModelError(f"the model has no {TOKENS} to generate from; its inputs are {'; '.join(map(str, inputs))}")
    decoder = recognise(model) or Decoder(inputs, ())
    made = decoder.start(np.zeros((1, 1), np.int64))
    if missing := [str(i) for i in inputs if i.name not in made]:
        raise ModelError(f"the model's inputs {'; '.join(missing)} do not follow from {TOKENS}, so it cannot generate from tokens alone")
    return decoder


def tokens(session: Session, decoder: Decoder, prompt: Sequence[int]) -> Iterator[int]:
    """Yield the most likely next token, and the next after that, without end.

    Args:
        session: The model.
        decoder: Its inputs (`decoder_of`).
        prompt: Tokens, at least one.

    Raises:
        ModelError: It has no logits, or takes a number of tokens at a time that the prompt does not fit into.
        NonFiniteError: The logits are NaN or infinite.
        RuntimeFailure: The model fails, perhaps since its context is full.
    """
    presents = [p.present for p in decoder.pasts]
    logits = next((n for n in session.outputs if "logits" in n), None)
    if logits is None:
        raise ModelError(f"the model has no output called logits; its outputs are {', '.join(session.outputs)}")
    rows, width = decoder.samples or 1, decoder.tokens.shape[1]
    past: Batch = {p.info.name: p.empty(rows) for p in decoder.pasts}
    done, new = 0, list(prompt)
    while True:
        for piece in _pieces(new, width, cached=bool(presents)):
            outputs = session.run(decoder.feed(np.repeat(piece[None], rows, axis=0), past, done), [logits, *presents])
            if presents:
                past = dict(zip(past, outputs[1:], strict=True))
                done += len(piece)
        last = outputs[0][0, -1 if presents or width is None else len(new) - 1]
        if not np.isfinite(last.max()):
            raise NonFiniteError(f"logits after {done or len(new)} tokens hold NaN or infinite values")
        token = int(last.argmax())
        yield token
        new = [token] if presents else [*new, token]


def _pieces(ids: Sequence[int], width: int | None, cached: bool) -> list[Array]:
    """Cut tokens as the model takes them: all at once, one by one with a cache, or padded on the right without one."""
    if width is None:
        return [np.array(ids, np.int64)]
    if cached and width == 1:
        return list(np.array(ids, np.int64)[:, None])
    if cached or len(ids) > width:
        raise ModelError(f"the model takes {width} tokens at a time, and there are {len(ids)}")
    return [np.pad(np.array(ids, np.int64), (0, width - len(ids)))]
