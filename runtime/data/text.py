"""Lines of text as calibration data, through the tokenizer that lies beside a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from magr_onnx.errors import CalibrationError, raise_all
from magr_onnx.passes.graph.kv_cache import PREFIX
from magr_onnx.runtime.data import fixed_batch
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.ort.session import Batch, InputInfo

TOKENIZER = "tokenizer.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
LONGEST = 512  # tokens; more say little more about a layer's inputs, and attention costs their square


def encode(texts: Path, folder: Path, inputs: Sequence[InputInfo], batch_size: int = 16) -> Batches:
    """Batches of the inputs a model wants, from a text file of one sample a line; empty lines are left out.

    A line feed ends a line, and a carriage return just before it belongs to it; any other is text.

    Samples are sorted by length, so that little is padded, and cut at 512 tokens, at the tokenizer's ``model_max_length`` or at the length
    the model fixes, whichever is the least. A model without an ``attention_mask`` is fed one sample at a time: it could not tell padding
    from text.

    Args:
        texts: The text file, UTF-8.
        folder: Where ``tokenizer.json`` lies (of the package tokenizers), and ``tokenizer_config.json`` if there is one.
        inputs: The model's inputs; ids (batch, length) and what follows from them.
        batch_size: Samples a batch, unless the model fixes it.

    Raises:
        CalibrationError: No text, no tokenizer, the package tokenizers is missing, or the model wants other inputs too.
    """
    declared = {i.name: i for i in inputs if not i.name.startswith(PREFIX)}  # a past follows from tokens
    other = [str(i) for i in declared.values() if i.name not in INPUTS]
    listed = "; ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
    problems = [f"there is no {TOKENIZER} in {folder} to read text with; put the model's there, or give an .npz"] * (
        not (folder / TOKENIZER).is_file()
    )
    problems += [f"text gives {', '.join(INPUTS)}, and the model wants {listed} too; give an .npz with all of them"] * bool(other)
    problems += ["the model has no input_ids to feed text to; give an .npz of its inputs"] * ("input_ids" not in declared)
    raise_all(CalibrationError, [f"{texts}: {p}" for p in problems])
    length, fixed = _fixed(declared["input_ids"])
    samples = _tokens(texts, folder, min(LONGEST, length or LONGEST, _longest(folder)))
    batch = fixed or (batch_size if "attention_mask" in declared or length is not None else 1)
    if not samples:
        raise CalibrationError(f"{texts}: no text in it")
    padding = _pad_id(folder)
    groups = fixed_batch.groups(len(samples), batch, fixed=fixed is not None)
    chunks = [samples[group.start : group.start + group.count] * group.repeats for group in groups]
    made = in_memory([_batch(chunk, length or len(chunk[-1]), padding, declared) for chunk in chunks], str(texts))
    return replace(made, notes=fixed_batch.notes_of(groups), weights=fixed_batch.weights_of(groups))


def _fixed(ids: InputInfo) -> tuple[int | None, int | None]:
    """The length and the batch size that the model fixes."""
    return (ids.shape[1] if len(ids.shape) > 1 else None), (ids.shape[0] if ids.shape else None)


def _tokens(texts: Path, folder: Path, most: int) -> list[list[int]]:
    """The ids of every line, sorted by their number."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CalibrationError("calibration with text needs the package tokenizers: pip install tokenizers") from None
    try:
        lines = [line.removesuffix("\r") for line in texts.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{texts} cannot be read as UTF-8 text: {error}") from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises plain exceptions
        raise CalibrationError(f"{folder / TOKENIZER} is no tokenizer that the package tokenizers can read: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(most)
    samples = [list(encoding.ids) for encoding in tokenizer.encode_batch(lines)]
    return sorted((ids for ids in samples if ids), key=len)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _longest(folder: Path) -> int:
    """The most tokens the model was made for, as far as it matters; transformers writes 1e30, or Infinity, where nobody said."""
    most = _config(folder).get("model_max_length")
    if isinstance(most, bool) or not isinstance(most, int | float) or not most >= 1:  # NaN is no length either
        return LONGEST
    return int(min(most, LONGEST))


def _pad_id(folder: Path) -> int:
    """What to fill up with; any id will do where the mask is zero, so 0 where there is none."""
    from tokenizers import Tokenizer

    token = _config(folder).get("pad_token")
    text = token.get("content") if isinstance(token, dict) else token
    pad_id = None if not isinstance(text, str) else Tokenizer.from_file(str(folder / TOKENIZER)).token_to_id(text)
    return 0 if pad_id is None else int(pad_id)


def _batch(samples: Sequence[Sequence[int]], length: int, padding: int, declared: dict[str, InputInfo]) -> Batch:
    ids = np.full((len(samples), length), padding, np.int64)
    mask = np.zeros_like(ids)
    for i, sample in enumerate(samples):
        ids[i, : len(sample)] = sample
        mask[i, : len(sample)] = 1
    positions = np.broadcast_to(np.arange(length), ids.shape)
    arrays = dict(zip(INPUTS, (ids, mask, np.zeros_like(ids), positions), strict=True))
    return {name: arrays[name].astype(info.dtype) for name, info in declared.items()}
