"""Text as calibration data: files of text and of chats, encoded by a model's tokenizer.

Language models get sequences of one length, cut from the documents joined (`packed`), as they are trained and as perplexity is measured.
Other models get a sample for every line of a text file or of a JSONL file (`encode`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.errors import CalibrationError, listed, raise_all
from magr_onnx.passes.graph.kv_cache import PREFIX
from magr_onnx.runtime.data import fixed_batch
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.data.tokenizer import TOKENIZER, Tokenizer
from magr_onnx.runtime.ort.session import Batch, InputInfo

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
LINES = ".jsonl"
MAX_TOKENS = 512  # more add little information about a layer's inputs, and attention costs their square
SAMPLES = 128  # sequences of a packed text, as GPTQ uses
FEWEST, SHORTEST = 16, 8  # sequences of a short text, which are shorter for it, and their least length
LOGITS_BYTES = 1 << 28  # of the logits of a batch
PIECE = 1 << 16  # characters of a text that are encoded at a time, up to the end of a line
_FORMS = '{"messages": [{"role": ..., "content": ...}, ...]}, {"text": ...} or {"input_ids": [...]}'

Document = str | list[int]
"""Text to encode, or tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How text is read.

    Attributes:
        tokenizer: A ``tokenizer.json`` or its folder; None for the first one in ``folders``.
        folders: Folders of the model.
        samples: Most samples; None for `SAMPLES` of a packed text, and every line otherwise.
        length: Tokens of a packed sequence, and most tokens of any other sample; None for `MAX_TOKENS`, or less for a short text.
        seed: Of the choice of samples.
    """

    tokenizer: Path | None = None
    folders: Sequence[Path] = ()
    samples: int | None = None
    length: int | None = None
    seed: int = 0

    @property
    def place(self) -> Path | None:
        """The tokenizer, or its folder; None where there is none."""
        return self.tokenizer or next((folder for folder in self.folders if (folder / TOKENIZER).is_file()), None)

    def problems(self, texts: Path) -> list[str]:
        """Describe that there is no tokenizer for a file of text."""
        if self.place is not None:
            return []
        at = f"in {self.folders[0]}" if self.folders else "beside the model, which is in no file,"
        remedy = "put the model's there, name it (--tokenizer), or give an .npz of tokens"
        return [f"{texts}: there is no {TOKENIZER} {at} to read text with; {remedy}"]


def is_text(source: object) -> bool:
    """Whether a source is a file of text, by its suffix or by its first bytes."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = Path(source)
    if path.suffix in (".txt", LINES):
        return True
    if path.suffix in (".npz", ".npy", ".pb", ".onnx") or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4096)
    return b"\0" not in start and not start.decode("utf-8", "replace").rstrip("\ufffd").count("\ufffd")


def problems_of(texts: Path, inputs: Sequence[InputInfo]) -> list[str]:
    """Describe why a model cannot be fed text."""
    declared = {i.name: i for i in inputs if not i.name.startswith(PREFIX)}  # a past follows from tokens
    needed = listed([str(i) for i in declared.values() if i.name not in INPUTS], "; ")
    problems = [f"text gives {', '.join(INPUTS)}, and the model needs {needed} too; give an .npz with all of them"] * bool(needed)
    problems += ["the model has no input_ids to feed text to; give an .npz of its inputs"] * ("input_ids" not in declared)
    return [f"{texts}: {problem}" for problem in problems]


def encode(texts: Path, tokenizer: Tokenizer, inputs: Sequence[InputInfo], batch_size: int, reading: Reading) -> Batches:
    """Encode a file, a sample for every line, as batches of a model's inputs; empty lines are skipped.

    Samples are sorted by length, to limit padding, and truncated to `Reading.length`, `Tokenizer.longest` or the length the model fixes,
    whichever is least. A model without an ``attention_mask`` is fed one sample at a time: it could not tell padding from text.

    Args:
        texts: A ``.jsonl`` file (`documents`), or text in UTF-8.
        tokenizer: That of the model.
        inputs: The model's inputs: ids (batch, length) and what follows from them.
        batch_size: Samples per batch, unless the model fixes it.
        reading: How it is read.

    Raises:
        CalibrationError: There is no text, or the model has other inputs too.
    """
    raise_all(CalibrationError, problems_of(texts, inputs))
    declared = _declared(inputs)
    shape = declared["input_ids"].shape
    fixed, length = shape[0] if shape else None, shape[1] if len(shape) > 1 else None
    most = min(filter(None, (reading.length or MAX_TOKENS, length, tokenizer.longest)))
    inner = max(1, most - len(tokenizer.prefix) - len(tokenizer.suffix))
    every = documents(texts, tokenizer)
    drawn = _draw(len(every), reading.samples, reading.seed)
    encoded = _encoded([every[i] for i in drawn], tokenizer)
    samples = sorted(([*tokenizer.prefix, *ids[:inner], *tokenizer.suffix] for ids in encoded if ids), key=len)
    if not samples:
        raise CalibrationError(f"{texts}: no text in it")
    batch = fixed or (batch_size if "attention_mask" in declared or length is not None else 1)
    groups = fixed_batch.groups(len(samples), batch, fixed=fixed is not None)
    chunks = [samples[group.start : group.start + group.count] * group.repeats for group in groups]
    return in_memory([_batch(chunk, length or len(chunk[-1]), tokenizer.padding, declared) for chunk in chunks], str(texts), groups)


def packed(
    texts: Path, tokenizer: Tokenizer, inputs: Sequence[InputInfo], batch_size: int, reading: Reading, vocabulary: int | None = None
) -> Batches:
    """Encode a file as sequences of one length, cut from its documents joined, as batches of a language model's inputs.

    Documents are separated by the tokenizer's end-of-sequence token (chats by what their template writes), and every sequence begins as
    the tokenizer begins one. Sequences do not overlap; of more than `Reading.samples`, as many are drawn by `Reading.seed`. Batches are
    smaller than ``batch_size`` where their logits would take more than `LOGITS_BYTES`.

    Args:
        texts: A ``.jsonl`` file (`documents`), or text in UTF-8, which is one document.
        tokenizer: That of the model.
        inputs: The model's inputs: ids (batch, length) and what follows from them.
        batch_size: Most samples per batch, unless the model fixes it.
        reading: How it is read.
        vocabulary: Width of the logits; None for the size of the tokenizer's vocabulary.

    Raises:
        CalibrationError: The text is shorter than one sequence, or the model has other inputs too.
    """
    raise_all(CalibrationError, problems_of(texts, inputs))
    declared = _declared(inputs)
    shape = declared["input_ids"].shape
    stream = _stream(texts, tokenizer)
    around = len(tokenizer.prefix) + len(tokenizer.suffix)
    length = _length(texts, len(stream), around, (shape[1] if len(shape) > 1 else None) or reading.length, tokenizer.longest)
    count = len(stream) // (length - around)
    drawn = _draw(count, reading.samples or SAMPLES, reading.seed)
    rows = stream[: count * (length - around)].reshape(count, -1)[drawn].tolist()
    samples = [[*tokenizer.prefix, *row, *tokenizer.suffix] for row in rows]
    size = shape[0] or fitting(length, vocabulary or tokenizer.tool.get_vocab_size(), batch_size)
    groups = fixed_batch.groups(len(samples), size, fixed=shape[0] is not None)
    chunks = [samples[group.start : group.start + group.count] * group.repeats for group in groups]
    batches = in_memory([_batch(chunk, length, tokenizer.padding, declared) for chunk in chunks], str(texts), groups)
    part = f"{len(drawn)} of {count} sequences of {length} tokens, drawn with seed {reading.seed}"
    taken = part if len(drawn) < count else f"{count} sequences of {length} tokens"
    return replace(batches, notes=(f"{texts}: {len(stream)} tokens; {taken}", *batches.notes))


def fitting(length: int, vocabulary: int, batch_size: int) -> int:
    """Return the most sequences of a batch, up to ``batch_size``, whose logits take at most `LOGITS_BYTES`; at least one."""
    return max(1, min(batch_size, LOGITS_BYTES // (4 * length * vocabulary)))


def documents(texts: Path, tokenizer: Tokenizer) -> list[Document]:
    """Read the documents of a file: the lines of a text, or of each line of a ``.jsonl`` its text, its tokens, or its chat as text.

    Lines end with LF or CR LF; any other CR is text. Empty lines are skipped.

    Raises:
        CalibrationError: It cannot be read, or with the lines of a JSONL file that are of no known form.
    """
    lines = [line.removesuffix("\r") for line in _read(texts).split("\n")]
    if texts.suffix != LINES:
        return [line for line in lines if line.strip()]
    made: list[Document] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and len(problems) < 10:
            try:
                made.append(_document(json.loads(line), tokenizer))
            except ValueError as error:
                problems.append(f"{texts}:{number}: not JSON: {error}")
            except CalibrationError as error:
                problems.append(f"{texts}:{number}: {error}")
    raise_all(CalibrationError, problems)
    return made


def _document(entry: Any, tokenizer: Tokenizer) -> Document:
    """Make a document of one line of a JSONL file."""
    fields = {"messages": entry} if isinstance(entry, list) else entry if isinstance(entry, dict) else {}
    text, ids, messages = (fields.get(name) for name in ("text", "input_ids", "messages"))
    if isinstance(text, str):
        return text
    if isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        return tokenizer.bare(ids)
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        return tokenizer.bare(tokenizer.encode([tokenizer.chat(messages)])[0])
    actual = f"an object with {', '.join(map(str, entry)) or 'nothing'}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
    raise CalibrationError(f"expected {_FORMS}; found {actual}")


def _stream(texts: Path, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Encode a file as one sequence of tokens, with the end-of-sequence token behind each of several texts."""
    if texts.suffix != LINES:
        pieces: list[str] = [""]
        for line in _read(texts).splitlines(keepends=True):
            if len(pieces[-1]) >= PIECE:
                pieces.append("")
            pieces[-1] += line
        return np.array([token for ids in tokenizer.encode(pieces) for token in ids], np.int64)
    every = documents(texts, tokenizer)
    end = [] if tokenizer.end is None or len(every) < 2 else [tokenizer.end]
    encoded = zip(every, _encoded(every, tokenizer), strict=True)
    return np.array([token for document, ids in encoded for token in [*ids, *(end if isinstance(document, str) else ())]], np.int64)


def _encoded(every: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """Encode the documents that are text."""
    ids = iter(tokenizer.encode([document for document in every if isinstance(document, str)]))
    return [next(ids) if isinstance(document, str) else document for document in every]


def _length(texts: Path, tokens: int, around: int, stated: int | None, longest: int | None) -> int:
    """Choose the length of packed sequences, with ``around`` tokens that are not of the text; see `Reading.length`."""
    length = stated or min(MAX_TOKENS, longest or MAX_TOKENS, tokens // FEWEST + around)
    needed = length - around if stated else FEWEST * SHORTEST
    if length <= around and stated:
        raise CalibrationError(f"{texts}: sequences of {length} tokens have no room beside {around} special ones; give longer ones")
    if tokens < needed:
        remedy = "a longer text" + (f", or sequences of at most {tokens + around} tokens (--sequence-length)" if tokens > 1 else "")
        raise CalibrationError(f"{texts}: {tokens} tokens, and at least {needed} are needed; give {remedy}")
    return length


def _draw(count: int, samples: int | None, seed: int) -> npt.NDArray[np.intp]:
    """Choose at most ``samples`` of ``count``, in rising order."""
    if samples is None or samples >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))


def _read(texts: Path) -> str:
    if not texts.exists():
        raise CalibrationError(f"{texts} does not exist")
    if texts.suffix == ".json":
        raise CalibrationError(f"{texts}: give a {LINES} file, with a document a line: {_FORMS}")
    try:
        return texts.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{texts} cannot be read as UTF-8 text: {error}") from error


def _declared(inputs: Sequence[InputInfo]) -> dict[str, InputInfo]:
    """Inputs that are made from tokens, by name; a past follows later."""
    return {i.name: i for i in inputs if not i.name.startswith(PREFIX)}


def _batch(samples: Sequence[Sequence[int]], length: int, padding: int, declared: Mapping[str, InputInfo]) -> Batch:
    ids = np.full((len(samples), length), padding, np.int64)
    mask = np.zeros_like(ids)
    for i, sample in enumerate(samples):
        ids[i, : len(sample)] = sample
        mask[i, : len(sample)] = 1
    positions = np.broadcast_to(np.arange(length), ids.shape)
    arrays = dict(zip(INPUTS, (ids, mask, np.zeros_like(ids), positions), strict=True))
    return {name: arrays[name].astype(info.dtype) for name, info in declared.items()}
