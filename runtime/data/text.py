"""Lines of text as calibration data, encoded by the tokenizer in the model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magr_onnx.errors import CalibrationError, listed, raise_all
from magr_onnx.passes.graph.kv_cache import PREFIX
from magr_onnx.runtime.data import fixed_batch
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.ort.session import Batch, InputInfo

TOKENIZER = "tokenizer.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
MAX_TOKENS = 512  # more add little information about a layer's inputs, and attention costs their square


def encode(texts: Path, folder: Path, inputs: Sequence[InputInfo], batch_size: int = 16) -> Batches:
    """Encode a text file, one sample per line, as batches of a model's inputs; empty lines are skipped.

    Lines end with LF or CR LF; any other CR is text. Samples are sorted by length, to limit padding, and truncated to `MAX_TOKENS`, the
    tokenizer's ``model_max_length`` or the length the model fixes, whichever is least. A model without an ``attention_mask`` is fed one
    sample at a time: it could not tell padding from text.

    Args:
        texts: The text file, UTF-8.
        folder: Folder of ``tokenizer.json`` (of the package tokenizers) and, optionally, ``tokenizer_config.json``.
        inputs: The model's inputs: ids (batch, length) and what follows from them.
        batch_size: Samples per batch, unless the model fixes it.

    Raises:
        CalibrationError: There is no text or tokenizer, the package tokenizers is missing, or the model has other inputs too.
    """
    declared = {i.name: i for i in inputs if not i.name.startswith(PREFIX)}  # a past follows from tokens
    unsupported = [str(i) for i in declared.values() if i.name not in INPUTS]
    problems = [f"there is no {TOKENIZER} in {folder} to read text with; put the model's there, or give an .npz"] * (
        not (folder / TOKENIZER).is_file()
    )
    needed = listed(unsupported, "; ")
    problems += [f"text gives {', '.join(INPUTS)}, and the model needs {needed} too; give an .npz with all of them"] * bool(unsupported)
    problems += ["the model has no input_ids to feed text to; give an .npz of its inputs"] * ("input_ids" not in declared)
    raise_all(CalibrationError, [f"{texts}: {p}" for p in problems])
    shape, config = declared["input_ids"].shape, _config(folder)
    fixed, length = shape[0] if shape else None, shape[1] if len(shape) > 1 else None
    tokenizer = _tokenizer(folder)
    samples = _tokens(texts, tokenizer, min(MAX_TOKENS, length or MAX_TOKENS, _max_length(config)))
    batch = fixed or (batch_size if "attention_mask" in declared or length is not None else 1)
    if not samples:
        raise CalibrationError(f"{texts}: no text in it")
    padding = _pad_id(config, tokenizer)
    groups = fixed_batch.groups(len(samples), batch, fixed=fixed is not None)
    chunks = [samples[group.start : group.start + group.count] * group.repeats for group in groups]
    return in_memory([_batch(chunk, length or len(chunk[-1]), padding, declared) for chunk in chunks], str(texts), groups)


def _tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CalibrationError("calibration with text needs the package tokenizers: pip install tokenizers") from None
    try:
        return Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises plain exceptions
        raise CalibrationError(f"{folder / TOKENIZER} is not a tokenizer that the package tokenizers can read: {error}") from error


def _tokens(texts: Path, tokenizer: Any, limit: int) -> list[list[int]]:
    """Encode every line, truncated to ``limit`` tokens, and sort by length."""
    try:
        lines = [line.removesuffix("\r") for line in texts.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{texts} cannot be read as UTF-8 text: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return sorted((list(encoding.ids) for encoding in tokenizer.encode_batch(lines) if encoding.ids), key=len)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _max_length(config: Mapping[str, Any]) -> int:
    """Return ``model_max_length``, up to `MAX_TOKENS`; transformers writes 1e30 or Infinity where it is unknown."""
    length = config.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:  # NaN too
        return MAX_TOKENS
    return int(min(length, MAX_TOKENS))


def _pad_id(config: Mapping[str, Any], tokenizer: Any) -> int:
    """Return the id of the padding token; 0 where there is none, as any id will do where the mask is zero."""
    token = config.get("pad_token")
    text = token.get("content") if isinstance(token, dict) else token
    return (tokenizer.token_to_id(text) if isinstance(text, str) else None) or 0


def _batch(samples: Sequence[Sequence[int]], length: int, padding: int, declared: dict[str, InputInfo]) -> Batch:
    ids = np.full((len(samples), length), padding, np.int64)
    mask = np.zeros_like(ids)
    for i, sample in enumerate(samples):
        ids[i, : len(sample)] = sample
        mask[i, : len(sample)] = 1
    positions = np.broadcast_to(np.arange(length), ids.shape)
    arrays = dict(zip(INPUTS, (ids, mask, np.zeros_like(ids), positions), strict=True))
    return {name: arrays[name].astype(info.dtype) for name, info in declared.items()}
