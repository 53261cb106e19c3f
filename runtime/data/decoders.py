"""Complete feeds for decoders with a KV cache, from tokens alone.

Such a model (onnxruntime-genai's builder, optimum) has dozens of inputs, all of which follow from the tokens. Samples are fed twice:

1. prefill: all tokens at once, with an empty past;
2. decode: the last few tokens again, one by one, each with the past that the model returned in the previous step.

Padding is removed and samples of equal length are batched, so that every mask is all ones, whichever side the model expects padding on.
Decode steps follow all prefills, so that the held-out batches, which are evenly spaced, include both.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import CalibrationError, OptionError, RuntimeFailure, raise_all
from magr_onnx.passes.graph.kv_cache import DEFAULT_MASK, PREFIX, TOKENS, pairs_of
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data import text
from magr_onnx.runtime.data.fixed_batch import Group, groups
from magr_onnx.runtime.data.hold_out import HELD_OUT
from magr_onnx.runtime.data.sources import Batches, Source, check_batches, in_memory, open_source
from magr_onnx.runtime.data.text import Reading
from magr_onnx.runtime.data.tokenizer import Tokenizer
from magr_onnx.runtime.ort.session import Batch, InputInfo, Model, Session, inputs_of

STEPS = 4
MAX_PAST_BYTES = 1 << 30  # of past values, in a temporary folder
FUSED = "GroupQueryAttention"
VOCABULARY = 0.9  # of a tokenizer's, which may have tokens that no model was trained with, from which logits are those of tokens
_MASK = InputInfo(DEFAULT_MASK, np.dtype(np.int64), (None, None))  # marks padding of tokenized text; decoders are fed none

Array = npt.NDArray[Any]
_Part = tuple[Array, Group]  # tokens (B, T) of one batch, and the group of equally long samples they are

# Inputs that follow from the current tokens (B, T) and the length of the past, by input name.
MAKERS: dict[str, Callable[[Array, int], Array]] = {
    TOKENS: lambda ids, past: ids,
    DEFAULT_MASK: lambda ids, past: np.ones((len(ids), past + ids.shape[1])),
    "position_ids": lambda ids, past: np.broadcast_to(past + np.arange(ids.shape[1]), ids.shape),
    "cache_position": lambda ids, past: past + np.arange(ids.shape[1]),
    "use_cache_branch": lambda ids, past: np.array([past > 0]),
}


@dataclass(frozen=True, slots=True)
class Past:
    """One input of a KV cache.

    Attributes:
        info: The input.
        present: Output with its next value.
        batch: Axis of samples, or None.
        length: Axis that grows with the tokens; None for a buffer of fixed size.
        shape: Shape of the input, with symbolic dimensions inferred from the graph where possible.
    """

    info: InputInfo
    present: str
    batch: int | None
    length: int | None
    shape: tuple[int | None, ...]

    def empty(self, samples: int) -> Array:
        """Return the past before the first token: of length 0, or zeros where the size is fixed."""
        return np.zeros(self._extent(samples, 0), self.info.dtype)

    def bytes(self, tokens: int) -> int:
        """Return the size of one sample's past of so many tokens; a buffer of fixed size has as much for any number."""
        return self.info.dtype.itemsize * math.prod(self._extent(1, tokens))

    def _extent(self, samples: int, tokens: int) -> list[int]:
        known = {self.batch: samples, self.length: tokens}
        return [known.get(i, 1 if d is None else d) for i, d in enumerate(self.shape)]


@dataclass(frozen=True, slots=True)
class Decoder:
    """Interface of a decoder with a KV cache: all its inputs, and those of the cache."""

    inputs: tuple[InputInfo, ...]
    pasts: tuple[Past, ...]

    @property
    def tokens(self) -> InputInfo:
        return next(i for i in self.inputs if i.name == TOKENS)

    @property
    def samples(self) -> int | None:
        """Batch size that the tokens or the past fix; None for any."""
        fixed = (self.tokens.shape[0], *(p.shape[p.batch] for p in self.pasts if p.batch is not None))
        return next((size for size in fixed if size is not None), None)

    def feed(self, ids: Array, past: Mapping[str, Array], length: int) -> Batch:
        """Return the complete feed for tokens ``ids (B, T)`` that follow ``length`` others."""
        arrays = {i.name: MAKERS[i.name](ids, length).astype(i.dtype) for i in self.inputs if i.name in MAKERS}
        return {**arrays, **past}

    def start(self, ids: Array) -> Batch:
        """Return the complete feed for the first tokens ``(B, T)``."""
        return self.feed(ids, {p.info.name: p.empty(len(ids)) for p in self.pasts}, 0)

    def steps(self, session: Session, ids: Array, count: int) -> Iterator[Batch]:
        """Yield feeds for the last ``count`` tokens of ``ids (B, T)``, one token at a time."""
        names = [p.present for p in self.pasts]
        feed = self.start(ids[:, : ids.shape[1] - count])
        for position in range(ids.shape[1] - count, ids.shape[1]):
            past = dict(zip((p.info.name for p in self.pasts), session.run(feed, names), strict=True))
            feed = self.feed(ids[:, position : position + 1], past, position)
            yield feed


def recognise(model: ir.Model) -> Decoder | None:
    """Recognise a decoder with a KV cache: ``input_ids``, and inputs whose next values are outputs. None for any other model.

    Raises:
        CalibrationError: Some inputs do not follow from tokens, or a cache of fixed size is not managed by the model's own operators.
    """
    presents = pairs_of(model)
    inputs = inputs_of(model)
    if not presents or TOKENS not in {i.name for i in inputs}:
        return None
    unknown = [i for i in inputs if i.name not in MAKERS and i.name not in presents]
    problems = [f"the model's inputs {'; '.join(map(str, unknown))} do not follow from {TOKENS}"] * bool(unknown)
    values = {str(v.name): v for v in model.graph.inputs}
    pasts = tuple(_past(i, values[i.name], presents[i.name], model) for i in inputs if i.name in presents)
    unsized = [(p, i) for p in pasts for i, d in enumerate(p.shape) if d is None and i not in (p.batch, p.length)]
    problems += [f"the size of axis {i} of the past input {p.info} is not known" for p, i in unsized[:1]]
    fixed = [p.info for p in pasts if p.length is None and len(p.info.shape) == 4]
    if fixed and not any(node.op_type == FUSED for node in model.graph.all_nodes()):
        problems.append(
            f"{len(fixed)} past inputs have a fixed length ({fixed[0]}), and there is no {FUSED} that knows how much of it counts"
        )
    remedy = "; give complete feeds, every input of the model in each batch (see docs/guides/decoders.md)"
    raise_all(CalibrationError, [p + remedy for p in problems])
    return Decoder(inputs, pasts)


def _past(info: InputInfo, value: ir.Value, present: str, model: ir.Model) -> Past:
    """Describe an input of the cache."""
    batch, length = _axes(value, model)
    last = len(info.shape) - 1
    head_sizes = [_head_size(use.node) for use in value.uses() if use.node.op_type == FUSED]
    for use in value.uses():
        if use.node.op_type == "Concat" and use.node.attributes.get_int("axis", 0) not in (-1, last):  # its new part is of that size
            head_sizes += [_width(other) for other in use.node.inputs if other is not value]
    size = next((s for s in head_sizes if s is not None), None)
    shape = tuple(size if i == last and d is None and i not in (batch, length) else d for i, d in enumerate(info.shape))
    if window := next((w for use in value.uses() if (w := _window(use.node))), 0):
        return Past(info, present, batch, None, tuple(window if i == length else d for i, d in enumerate(shape)))
    return Past(info, present, batch, length, shape)


def _window(node: ir.Node) -> int:
    """Return the tokens that the cache of a sliding window has room for, which it is made for; 0 for any other cache."""
    windowed = node.op_type == FUSED and node.attributes.get_int("sliding_window_cache", 0) == 1
    return node.attributes.get_int("local_window_size", 0) if windowed else 0


def _head_size(node: ir.Node) -> int | None:
    """Infer the head size of a GroupQueryAttention, symbolic in newer exports: the width of the queries over the number of heads."""
    query, key = node.inputs[:2]
    heads, shared = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    width = _width(query)
    packed = key is None or not key.name
    return None if width is None or not heads else width // (heads + 2 * shared if packed else heads)


def _width(value: ir.Value | None) -> int | None:
    """Infer the last dimension of a value, from its shape or its producer."""
    if value is None:
        return None
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return int(value.shape[-1])
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("N", 0) or None
    if node.op_type in ("MatMul", "Add"):
        return _width(node.inputs[1]) or (_width(node.inputs[0]) if node.op_type == "Add" else None)
    if node.op_type == "Reshape":
        return _reshaped(node)
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", [])
        return _width(node.inputs[0]) if order and order[-1] == len(order) - 1 else None
    return _width(node.inputs[0]) if node.op_type in ("Cast", "Identity", "RotaryEmbedding") else None


def _reshaped(node: ir.Node) -> int | None:
    """Infer the last dimension of a Reshape to a constant shape, which may split the last one (``[0, 0, heads, -1]``)."""
    shape = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if shape is None:
        return None
    *before, last = (int(d) for d in shape.numpy().ravel())
    if last > 0:
        return last
    width = _width(node.inputs[0])
    split = before[:2] == [0, 0] and all(d > 0 for d in before[2:])
    return width // math.prod(before[2:]) if last == -1 and split and width is not None else None


def _axes(value: ir.Value, model: ir.Model) -> tuple[int | None, int | None]:
    """Find the axes of samples and of tokens of a cache input: the dynamic axis named like that of the token input, and the other one."""
    tokens = next(v for v in model.graph.inputs if v.name == TOKENS)
    samples = None if tokens.shape is None else tokens.shape[0]
    dynamic = [] if value.shape is None else [i for i, d in enumerate(value.shape) if not isinstance(d, int)]
    if isinstance(samples, int):
        return next((i for i, d in enumerate(value.shape or ()) if d == samples), None), next(iter(dynamic), None)
    batch_axes = [i for i in dynamic if value.shape is not None and value.shape[i] == samples]
    if not batch_axes and len(dynamic) == 1 and dynamic[0] > 0:  # the batch size is fixed
        return 0 if len(value.shape or ()) == 4 else None, dynamic[0]
    batch = next(iter([*batch_axes, *dynamic]), None)
    return batch, next((i for i in dynamic if i != batch), None)


def open_for(
    model: ir.Model,
    source: Source,
    batch_size: int = 16,
    *,
    steps: int = STEPS,
    provider: str = "cpu",
    runnable: Model | None = None,
    reading: Reading | None = None,
) -> Batches:
    """Open data for a model, as `magr_onnx.runtime.data.sources.open_data` does; decoders with a KV cache need only tokens.

    Where the data lacks the past, complete feeds are made from its ``input_ids (B, T)`` (and ``attention_mask``, which marks padding).

    Args:
        model: The model that the data is for.
        source: See `magr_onnx.runtime.data.sources`.
        batch_size: Most samples per batch.
        steps: Tokens at the end of each sample that are fed again, one by one; 0 for prefill only.
        provider: Where to run the model for the past of decode steps.
        runnable: The model to run for it; None if it is too large to run as a whole, which leaves out decode steps.
        reading: How a file of text is read; None where text is not supported.

    Raises:
        CalibrationError: The data does not fit, or does not suffice to make feeds.
        OptionError: ``steps`` is negative.
    """
    if steps < 0:
        raise OptionError(f"decode_steps={steps} must be 0 or more")
    inputs = inputs_of(model)
    if reading is not None and text.is_text(source):
        source = encode_text(model, Path(source), batch_size, reading)  # type: ignore[arg-type]
        if runnable is not None:
            _try(runnable, provider, inputs, source)
    tokens = [i for i in inputs if i.name == TOKENS] if pairs_of(model) else []
    opened = open_source(source, tokens or inputs, batch_size)
    first = next(iter(opened), {})
    if (fitting := _fitting(model, first, batch_size)) < batch_size and isinstance(source, str | os.PathLike | Mapping):
        batch_size, opened = fitting, open_source(source, tokens or inputs, fitting)
    if tokens and TOKENS in first and not any(name.startswith(PREFIX) for name in first) and (decoder := recognise(model)) is not None:
        if isinstance(source, Batches):  # of text, in batches that memory has room for
            batch_size = max(len(batch[TOKENS]) for batch in source)
        read = opened.notes
        opened = _feeds(decoder, opened, batch_size, steps, provider, runnable)
        opened = replace(opened, notes=tuple(dict.fromkeys([*read, *opened.notes])))
    return check_batches(opened, inputs)


def encode_text(model: ir.Model, path: Path, batch_size: int, reading: Reading) -> Batches:
    """Encode a file of text, as feeds of a model or, for a decoder with a cache, as tokens.

    Sequences are packed for a language model: one whose logits cover the tokenizer's vocabulary at every position.

    Raises:
        CalibrationError: See `magr_onnx.runtime.data.text`.
        DependencyError: A package that reads text is not installed.
    """
    decoder = recognise(model)
    inputs = inputs_of(model) if decoder is None else (decoder.tokens, _MASK)
    raise_all(CalibrationError, [*reading.problems(path), *text.problems_of(path, inputs)])
    assert reading.place is not None
    tokenizer = Tokenizer.open(reading.place)
    shape = _logits(model)
    if decoder is None and (shape is None or (shape[2] is not None and shape[2] < VOCABULARY * tokenizer.tool.get_vocab_size())):
        return text.encode(path, tokenizer, inputs, batch_size, reading)
    return text.packed(path, tokenizer, inputs, batch_size, reading, None if shape is None else shape[2])


def _logits(model: ir.Model) -> tuple[int | None, ...] | None:
    """Return the shape of the logits of every token, with None for its dynamic dimensions; None where the model has none."""
    shapes = (v.shape for v in model.graph.outputs if "logits" in str(v.name) and v.shape is not None and len(v.shape) == 3)
    return next((tuple(d if isinstance(d, int) else None for d in shape) for shape in shapes), None)


def _fitting(model: ir.Model, batch: Batch, batch_size: int) -> int:
    """Return the most samples of a batch, up to ``batch_size``, whose logits memory has room for."""
    shape, ids = _logits(model), batch.get(TOKENS)
    width = None if shape is None else shape[2]
    return batch_size if width is None or ids is None or ids.ndim != 2 else text.fitting(ids.shape[1], width, batch_size)


def _try(model: Model, provider: str, inputs: Sequence[InputInfo], data: Batches) -> None:
    """Run a model on one sequence, before long work on many.

    Raises:
        CalibrationError: It fails, perhaps since the sequence is longer than its context.
    """
    batch = next(iter(data))
    if {i.name for i in inputs} != batch.keys():  # a decoder, which runs for its past in any case
        return
    shape = batch[TOKENS].shape
    with Session(model, provider) as session:
        try:
            session.run(batch)
        except RuntimeFailure as error:
            remedy = f"give sequences that it has room for (--sequence-length, now {shape[1]}), and the model's own tokenizer"
            raise CalibrationError(f"{data.description}: the model fails on tokens of shape {shape}; {remedy}: {error}") from error


def _feeds(decoder: Decoder, data: Batches, batch_size: int, steps: int, provider: str, runnable: Model | None) -> Batches:
    """Make prefill and decode feeds of tokens, with notes that describe them."""
    notes: list[str] = []
    parts = _parts(_samples(data, notes), batch_size, decoder.samples)
    feeds = in_memory([decoder.start(ids) for ids, _ in parts], data.description, [group for _, group in parts])
    samples, tokens = sum(group.count for _, group in parts), sum(group.count * ids.shape[1] for ids, group in parts)
    notes += feeds.notes
    notes.insert(0, f"decoder with a cache: prefill of {tokens} tokens ({samples} samples, {len(parts)} batches) with an empty past")
    if steps and (reason := _no_steps(decoder, parts, runnable)):
        notes.append(f"no decode steps were fed: {reason}")
    elif steps and runnable is not None:
        with Session(runnable, provider) as session:
            feeds, decoded = _with_decode_steps(feeds, decoder, parts, steps, session)
        batches = len(feeds) - len(parts)
        if decoded:
            notes.append(f"decode: the last tokens of {decoded} samples again, one by one, with the model's own past ({batches} batches)")
        else:
            notes.append(f"no decode steps were fed: the pasts of one sample take more than {MAX_PAST_BYTES / 1e9:.1f} GB")
    return replace(feeds, notes=tuple(notes), samples=samples)


def _no_steps(decoder: Decoder, parts: Sequence[_Part], runnable: object) -> str | None:
    """Tell why tokens cannot, or should not, be fed one by one; None if they should."""
    if runnable is None:
        return "the model is too large for max_memory to be run as a whole"
    if decoder.tokens.shape[1] is not None:
        return f"the model takes {decoder.tokens.shape[1]} tokens at a time"
    if len(parts) < HELD_OUT:
        return f"{len(parts)} batches of tokens: with fewer than {HELD_OUT} nothing but decode steps would be held out for choosing"
    return None if any(ids.shape[1] > 1 for ids, _ in parts) else "the samples have one token each"


def _samples(data: Batches, notes: list[str]) -> list[Array]:
    """Return the tokens of every sample ``(T,)``, without padding."""
    samples: list[Array] = []
    problems: list[str] = []
    for index, batch in enumerate(data):
        label, ids = data.label(index), batch.get(TOKENS)
        if extra := sorted(batch.keys() - MAKERS.keys()):
            problems.append(f"{label}: has arrays {', '.join(extra)} beside {TOKENS}, and no past; leave them out, or give every input")
        if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
            actual = "no array" if ids is None else f"{ids.dtype} {ids.shape}"
            problems.append(f"{label}: {TOKENS} is {actual}; expected integers (samples, tokens)")
            continue
        mask = np.asarray(batch.get(DEFAULT_MASK, np.ones(ids.shape))) != 0
        if mask.shape != ids.shape:
            problems.append(f"{label}: {DEFAULT_MASK} has shape {mask.shape}; expected that of {TOKENS}, {ids.shape}")
            continue
        count = round(len(ids) * data.weight(index))  # the others repeat these
        for row, keep in zip(ids[:count], mask[:count], strict=True):
            positions = np.flatnonzero(keep)
            if not len(positions) or positions[-1] - positions[0] + 1 != len(positions):
                marked = f"{DEFAULT_MASK} marks {len(positions)} tokens of a sample"
                problems.append(f"{label}: {marked}; expected consecutive ones, padded on one side")
                break
            samples.append(row[positions])
        if derived := [n for n in ("position_ids", "cache_position") if n in batch]:
            notes[:] = [f"{', '.join(derived)} of the data were not used: they follow from the tokens"]
    raise_all(CalibrationError, problems[:10])
    return samples


def _parts(samples: Sequence[Array], batch_size: int, fixed: int | None) -> list[_Part]:
    """Batch samples of equal length, ``fixed`` at a time or in batches small enough that some can be held out."""
    by_length: dict[int, list[Array]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(sample)
    size = fixed or min(batch_size, max(1, len(samples) // HELD_OUT))
    parts = []
    for sequences in by_length.values():
        stacked = np.stack(sequences)
        parts += [(group.of(stacked), group) for group in groups(len(sequences), size, fixed=fixed is not None, fewest=1)]
    return parts


def _with_decode_steps(prefill: Batches, decoder: Decoder, parts: Sequence[_Part], steps: int, session: Session) -> tuple[Batches, int]:
    """Append the feeds of decode steps, kept in a temporary folder as long as they are in use; return the number of their samples too."""
    cache, weights, samples = Cache(0, "decode steps", "set TMPDIR"), list[float](), 0
    names, prefilled = [i.name for i in decoder.inputs], len(prefill)
    budget = MAX_PAST_BYTES
    for index, (ids, group) in enumerate(parts):
        count = min(steps, ids.shape[1] - 1)
        sample_bytes = max(1, count * sum(past.bytes(ids.shape[1]) for past in decoder.pasts))
        rows = len(ids) if decoder.samples else min(len(ids), max(1, budget // (len(parts) - index) // sample_bytes))
        if not count or rows * sample_bytes > budget:
            continue
        budget -= rows * sample_bytes
        samples += group.count if decoder.samples else rows
        for feed in decoder.steps(session, ids[:rows], count):
            for name in names:
                cache.put(name, len(weights), feed[name])
            weights.append(group.weight)
    feeds = replace(
        prefill,
        count=prefilled + len(weights),
        read=lambda: itertools.chain(prefill, ({name: cache.get(name, i) for name in names} for i in range(len(weights)))),
        label=lambda i: prefill.label(i) if i < prefilled else f"{prefill.description}, decode step {i - prefilled}",
        weights=(*prefill.weights, *weights) if prefill.weights else (),
    )
    return feeds, samples
