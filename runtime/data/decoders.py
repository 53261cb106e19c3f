"""Tokens in, whole feeds out, for decoders with a cache of keys and values.

Such a model (onnxruntime-genai's builder, optimum) has dozens of inputs, and all but the tokens follow from those. Samples are fed twice:

1. prefill: all tokens at once, with a past of no length;
2. decode: the last few again, one by one, each with the past that the model itself put out in the step before.

Padding is cut off first and samples of one length go together, so that every mask is one of ones, whichever side a model wants padded.
The decode steps follow all prefills, so that held-out batches have some of either.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import CalibrationError, OptionError, OutputError, raise_all
from magr_onnx.model_io.writing import os_error_hint
from magr_onnx.passes.graph.kv_cache import DEFAULT_MASK, PREFIX, TOKENS, pairs_of
from magr_onnx.runtime.data import fixed_batch, text
from magr_onnx.runtime.data.hold_out import HELD_OUT
from magr_onnx.runtime.data.sources import Batches, Source, checked, in_memory, load_npz, open_data, open_source
from magr_onnx.runtime.ort.session import Batch, InputInfo, Session, inputs_of

STEPS = 4
MOST_BYTES = 1 << 30  # of past values, in a temporary folder
FUSED = "GroupQueryAttention"
GUIDE = "docs/guides/decoders.md"
_MASK = InputInfo(DEFAULT_MASK, np.dtype(np.int64), (None, None))  # marks padding in text; a decoder with a cache is fed none

Array = npt.NDArray[Any]
Maker = Callable[[Array, int], Array]

# What follows from the tokens fed now (B, T) and the length of the past, by the name of the input.
MAKERS: dict[str, Maker] = {
    TOKENS: lambda ids, past: ids,
    DEFAULT_MASK: lambda ids, past: np.ones((len(ids), past + ids.shape[1])),
    "position_ids": lambda ids, past: np.broadcast_to(past + np.arange(ids.shape[1]), ids.shape),
    "cache_position": lambda ids, past: past + np.arange(ids.shape[1]),
    "use_cache_branch": lambda ids, past: np.array([past > 0]),
}


@dataclass(frozen=True, slots=True)
class Past:
    """One input of a cache.

    Attributes:
        info: The input.
        present: The output with its next value.
        batch: The axis of samples; None where there is none.
        length: The axis that grows with the tokens; None for a buffer of a fixed size.
        shape: That of the input, with what the graph tells of dimensions that it only names.
    """

    info: InputInfo
    present: str
    batch: int | None
    length: int | None
    shape: tuple[int | None, ...]

    @property
    def unknown(self) -> list[int]:
        """Axes whose size nothing tells."""
        return [i for i, d in enumerate(self.shape) if d is None and i not in (self.batch, self.length)]

    def empty(self, samples: int) -> Array:
        """The past before the first token: of no length, or zeros where the size is fixed."""
        dims = [d if d is not None else 1 for d in self.shape]
        if self.batch is not None:
            dims[self.batch] = samples
        if self.length is not None:
            dims[self.length] = 0
        return np.zeros(dims, self.info.dtype)


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a decoder with a cache is fed.

    Attributes:
        inputs: All of its inputs.
        pasts: Those that hold the past.
    """

    inputs: tuple[InputInfo, ...]
    pasts: tuple[Past, ...]

    @property
    def tokens(self) -> InputInfo:
        return next(i for i in self.inputs if i.name == TOKENS)

    @property
    def samples(self) -> int | None:
        """How many samples a feed has: what the tokens or the past fix; None for any number."""
        fixed = (self.tokens.shape[0], *(p.shape[p.batch] for p in self.pasts if p.batch is not None))
        return next((size for size in fixed if size is not None), None)

    def feed(self, ids: Array, past: Mapping[str, Array], length: int) -> Batch:
        """A whole feed for tokens ``ids (B, T)`` behind ``length`` others."""
        made = {i.name: MAKERS[i.name](ids, length).astype(i.dtype) for i in self.inputs if i.name in MAKERS}
        return {**made, **past}

    def start(self, ids: Array) -> Batch:
        """A whole feed for the first tokens ``(B, T)``."""
        return self.feed(ids, {p.info.name: p.empty(len(ids)) for p in self.pasts}, 0)

    def steps(self, session: Session, ids: Array, count: int) -> Iterator[Batch]:
        """Feeds for the last ``count`` tokens of ``ids (B, T)``, one at a time, behind the others."""
        names = [p.present for p in self.pasts]
        feed = self.start(ids[:, : ids.shape[1] - count])
        for at in range(ids.shape[1] - count, ids.shape[1]):
            present = session.run(feed, names)
            feed = self.feed(ids[:, at : at + 1], {p.info.name: a for p, a in zip(self.pasts, present, strict=True)}, at)
            yield feed


def recognise(model: ir.Model) -> Decoder | None:
    """The decoder that a model is, or None: one with ``input_ids`` and inputs that its outputs give the next value of.

    Raises:
        CalibrationError: It has inputs that do not follow from tokens, or a cache of a fixed size that its own operators do not manage.
    """
    twins = pairs_of(model)
    inputs = inputs_of(model)
    if not twins or TOKENS not in {i.name for i in inputs}:
        return None
    problems = []
    other = [i for i in inputs if i.name not in MAKERS and i.name not in twins]
    if other:
        problems.append(f"the model's inputs {'; '.join(map(str, other))} do not follow from {TOKENS}")
    values = {str(v.name): v for v in model.graph.inputs}
    pasts = tuple(_past(i, values[i.name], twins[i.name], model) for i in inputs if i.name in twins)
    problems += [f"the size of axis {p.unknown[0]} of the past input {p.info} is not known" for p in pasts if p.unknown][:1]
    fixed = [p.info for p in pasts if p.length is None and len(p.info.shape) == 4]
    if fixed and not any(node.op_type == FUSED for node in model.graph.all_nodes()):
        problems.append(
            f"{len(fixed)} past inputs have a fixed length ({fixed[0]}), and there is no {FUSED} that knows how much of it counts"
        )
    remedy = f"; give whole feeds, every input of the model in each batch (see {GUIDE})"
    raise_all(CalibrationError, [p + remedy for p in problems])
    return Decoder(inputs, pasts)


def _past(info: InputInfo, value: ir.Value, present: str, model: ir.Model) -> Past:
    """What there is to know of an input that holds the past."""
    batch, length = _axes(value, model)
    size = next((found for use in value.uses() if use.node.op_type == FUSED and (found := _head_size(use.node)) is not None), None)
    last = len(info.shape) - 1
    shape = tuple(size if i == last and d is None and i not in (batch, length) else d for i, d in enumerate(info.shape))
    return Past(info, present, batch, length, shape)


def _head_size(node: ir.Node) -> int | None:
    """The size of a head of a GroupQueryAttention, which newer builders only name: the width of its queries by their number."""
    query, key = node.inputs[:2]
    heads, shared = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    width = _width(query)
    packed = key is None or not key.name
    return None if width is None or not heads else width // (heads + 2 * shared if packed else heads)


def _width(value: ir.Value | None) -> int | None:
    """The last dimension of a value, from its shape or the product that makes it."""
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
    return _width(node.inputs[0]) if node.op_type in ("Cast", "Identity") else None


def _axes(value: ir.Value, model: ir.Model) -> tuple[int | None, int | None]:
    """The axes of samples and of tokens of an input that holds the past: the one named as that of the tokens, and the other one."""
    tokens = next(v for v in model.graph.inputs if v.name == TOKENS)
    samples = None if tokens.shape is None else tokens.shape[0]
    free = [] if value.shape is None else [i for i, d in enumerate(value.shape) if not isinstance(d, int)]
    if isinstance(samples, int):
        return next((i for i, d in enumerate(value.shape or ()) if d == samples), None), next(iter(free), None)
    same = [i for i in free if value.shape is not None and value.shape[i] == samples]
    if not same and len(free) == 1 and free[0] > 0:  # the number of samples is a size here
        return 0 if len(value.shape or ()) == 4 else None, free[0]
    batch = next(iter([*same, *free]), None)
    return batch, next((i for i in free if i != batch), None)


def open_for(
    model: ir.Model,
    source: Source,
    batch_size: int = 16,
    *,
    steps: int = STEPS,
    provider: str = "cpu",
    runs: ir.Model | str | os.PathLike[str] | None = None,
    folders: Sequence[Path] = (),
) -> Batches:
    """`magr_onnx.runtime.data.sources.open_data` for a model; a decoder with a cache needs no more than its tokens.

    Where data lacks the past, whole feeds are made of its ``input_ids (B, T)`` (and ``attention_mask``, which marks padding).

    Args:
        model: What will be fed.
        source: See `magr_onnx.runtime.data.sources`.
        batch_size: Most samples of a batch.
        steps: Tokens at the end of each sample that are fed once more, one by one; 0 for prefill only.
        provider: Where to run the model for their past.
        runs: The model to run for it; None where it is too large to be run as a whole, so that there are no decode steps.
        folders: Where the tokenizer of a ``.txt`` file is looked for; none where text is no source.

    Raises:
        CalibrationError: The data does not fit, or is not enough to make feeds of.
        OptionError: A negative number of steps.
    """
    if steps < 0:
        raise OptionError(f"decode_steps={steps} must be 0 or more")
    inputs = inputs_of(model)
    if folders and isinstance(source, str | os.PathLike) and Path(source).suffix == ".txt":
        source = of_text(model, Path(source), folders, batch_size)
    twins = pairs_of(model)
    if not twins or TOKENS not in {i.name for i in inputs}:
        return open_data(source, inputs, batch_size)
    opened = open_source(source, [i for i in inputs if i.name == TOKENS], batch_size)
    first = next(iter(opened), None)
    if first is None or TOKENS not in first or any(name.startswith(PREFIX) for name in first):
        return checked(opened, inputs)
    decoder = recognise(model)
    assert decoder is not None
    return checked(_fed(decoder, opened, batch_size, steps, provider, runs), inputs)


def of_text(model: ir.Model, path: Path, folders: Sequence[Path], batch_size: int) -> Batches:
    """Tokens of a text file, by the first tokenizer in ``folders``: feeds of a model, or what `open_for` makes a decoder's of.

    Raises:
        CalibrationError: See `magr_onnx.runtime.data.text.encode`.
    """
    folder = next((f for f in folders if (f / text.TOKENIZER).is_file()), folders[0])
    decoder = recognise(model)
    inputs = inputs_of(model) if decoder is None else (decoder.tokens, _MASK)
    return text.encode(path, folder, inputs, batch_size)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Tokens ``(B, T)`` of one batch, and which samples of one length they are."""

    ids: Array
    group: fixed_batch.Group


def _fed(
    decoder: Decoder, data: Batches, batch_size: int, steps: int, provider: str, runs: ir.Model | str | os.PathLike[str] | None
) -> Batches:
    """Feeds made of tokens, with notes on what they are."""
    notes: list[str] = []
    parts = _parts(_samples(data, notes), batch_size, decoder.samples)
    groups = [part.group for part in parts]
    feeds = replace(in_memory([decoder.start(part.ids) for part in parts], data.describe), weights=fixed_batch.weights_of(groups))
    samples, tokens = sum(group.count for group in groups), sum(part.group.count * part.ids.shape[1] for part in parts)
    notes += fixed_batch.notes_of(groups)
    notes.insert(0, f"decoder with a cache: prefill of {tokens} tokens ({samples} samples, {len(parts)} batches) with an empty past")
    if steps and (why := _no_steps(decoder, parts, runs)):
        notes.append(f"no decode steps were fed: {why}")
    elif steps and runs is not None:
        with Session(runs, provider) as session:
            spool = _Spool(decoder, parts, steps, session)
        notes.append(
            f"decode: the last tokens of {spool.samples} samples again, one by one, with the model's own past ({len(spool)} batches)"
        )
        feeds = _joined(feeds, spool)
    return replace(feeds, notes=tuple(notes), samples=samples)


def _no_steps(decoder: Decoder, parts: Sequence[_Part], runs: object) -> str | None:
    """Why tokens cannot, or should not, be fed one by one."""
    if runs is None:
        return "the model is too large for max_memory to be run as a whole"
    if decoder.tokens.shape[1] is not None:
        return f"the model takes {decoder.tokens.shape[1]} tokens at a time"
    if len(parts) < HELD_OUT:
        return f"{len(parts)} batches of tokens: with fewer than {HELD_OUT} nothing but decode steps would be held out for choosing"
    return None if any(part.ids.shape[1] > 1 for part in parts) else "the samples have one token each"


def _samples(data: Batches, notes: list[str]) -> list[Array]:
    """The tokens of every sample ``(T,)``, without padding."""
    samples: list[Array] = []
    problems: list[str] = []
    for index, batch in enumerate(data):
        where, ids = data.label(index), batch.get(TOKENS)
        if extra := sorted(batch.keys() - MAKERS.keys()):
            problems.append(f"{where}: has arrays {', '.join(extra)} beside {TOKENS}, and no past; leave them out, or give every input")
        if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
            actual = "no array" if ids is None else f"{ids.dtype} {ids.shape}"
            problems.append(f"{where}: {TOKENS} is {actual}; expected integers (samples, tokens)")
            continue
        mask = np.asarray(batch.get(DEFAULT_MASK, np.ones(ids.shape))) != 0
        if mask.shape != ids.shape:
            problems.append(f"{where}: {DEFAULT_MASK} has shape {mask.shape}; expected that of {TOKENS}, {ids.shape}")
            continue
        count = round(len(ids) * data.weight(index))  # the others are the same again
        for row, keep in zip(ids[:count], mask[:count], strict=True):
            positions = np.flatnonzero(keep)
            if not len(positions) or positions[-1] - positions[0] + 1 != len(positions):
                problems.append(
                    f"{where}: {DEFAULT_MASK} marks {len(positions)} tokens of a sample; expected one run of them, with padding on one side"
                )
                break
            samples.append(row[positions])
        if made := [n for n in ("position_ids", "cache_position") if n in batch]:
            notes[:] = [f"{', '.join(made)} of the data were not used: they follow from the tokens"]
    raise_all(CalibrationError, problems[:10])
    return samples


def _parts(samples: Sequence[Array], batch_size: int, fixed: int | None) -> list[_Part]:
    """Samples of one length together: ``fixed`` of them, or batches so small that some can be held out."""
    by_length: dict[int, list[Array]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(sample)
    size = fixed or min(batch_size, max(1, len(samples) // HELD_OUT))
    parts = []
    for same in by_length.values():
        stacked = np.stack(same)
        parts += [_Part(group.of(stacked), group) for group in fixed_batch.groups(len(same), size, fixed=fixed is not None)]
    return parts


class _Spool:
    """Feeds of decode steps in files of a temporary folder, which goes when the object does: a past is as long as what came before.

    Attributes:
        samples: Whose tokens they are.
        weights: Of the feeds; see `magr_onnx.runtime.data.sources.Batches`.
    """

    def __init__(self, decoder: Decoder, parts: Sequence[_Part], steps: int, session: Session) -> None:
        self.samples = 0
        self.weights: list[float] = []
        token = sum(p.info.dtype.itemsize * math.prod(d or 1 for d in p.shape) for p in decoder.pasts)
        budget = MOST_BYTES
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="onnx-magr-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            for index, part in enumerate(parts):
                ids = part.ids
                count = min(steps, ids.shape[1] - 1)
                each = max(1, token * ids.shape[1] * count)
                samples = len(ids) if decoder.samples else min(len(ids), max(1, budget // (len(parts) - index) // each))
                if not count or samples * each > budget:
                    continue
                budget -= samples * each
                self.samples += part.group.count if decoder.samples else samples
                for feed in decoder.steps(session, ids[:samples], count):
                    arrays: dict[str, Any] = dict(feed)
                    np.savez(self._folder / f"{len(self)}.npz", **arrays)
                    self.weights.append(part.group.weight)
        except OSError as error:
            raise OutputError(f"cannot write decode steps to {tempfile.gettempdir()}: {os_error_hint(error)}; or set TMPDIR") from error

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[Batch]:
        return (load_npz(self._folder / f"{i}.npz") for i in range(len(self)))


def _joined(prefill: Batches, decode: _Spool) -> Batches:
    """Prefill first: batches are held out at equal distances, and should be of both kinds."""
    prefilled = len(prefill)
    return Batches(
        prefilled + len(decode),
        prefill.describe,
        lambda: itertools.chain(prefill, decode),
        lambda i: prefill.label(i) if i < prefilled else f"{prefill.describe}, decode step {i - prefilled}",
        weights=(*prefill.weights, *decode.weights) if prefill.weights else (),
    )
