"""Batches of a DataLoader as feeds of an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from magr_onnx.config import schema
from magr_onnx.errors import CalibrationError
from magr_onnx.runtime.data.fixed_batch import Group, fixed_size, groups, notes_of, weights_of
from magr_onnx.runtime.data.sources import Batches, in_memory
from magr_onnx.runtime.ort.session import Batch, InputInfo

SAMPLES = 512
ToInputs = Callable[[Any], Any]


def feeds(
    batches: Iterable[Any],
    inputs: Sequence[InputInfo],
    *,
    to_inputs: ToInputs | None = None,
    samples: int | None = SAMPLES,
    batch_size: int = 16,
) -> Batches:
    """What the batches of a DataLoader, or of anything that yields batches, feed to a model.

    0. A tensor or a dict in place of batches is all samples, stacked along the first axis.
    1. A tensor is the only input.
    2. A dict gives inputs by name; what is no input (labels) is dropped.
    3. A tuple or list gives inputs in order, and what is left behind the last input (labels) is dropped. If its first item is a dict, tuple
       or list, that is the inputs; a list of single samples in one of these forms (``collate_fn=list``) is stacked.
    4. ``to_inputs`` turns a batch into one of these first, for everything else.

    Numbers are brought to the type of the input where both are floats or both integers. Batches are cut to ``batch_size``, so that some can
    be held out for choices.

    Args:
        batches: Read once, and no batch further than needed. Stacked samples beyond ``samples`` are left out.
        inputs: The model's inputs.
        to_inputs: See above.
        samples: How many are enough; None for all there are.
        batch_size: Most samples of a feed.

    Returns:
        The feeds, with notes on what was dropped.

    Raises:
        CalibrationError: A batch that does not give the inputs.
        OptionError: Numbers of samples that are none.
    """
    schema.check(samples=samples, batch_size=batch_size)
    parts: list[tuple[Batch, Group]] = []
    notes: dict[str, None] = {}
    seen, name = 0, f"the given {type(batches).__name__}"
    if isinstance(batches, torch.Tensor | np.ndarray | Mapping):
        batches, total = _stacked(batches, samples)
        if samples is not None and total > samples:
            notes[f"the first {samples} of {total} samples were used (samples={samples})"] = None
    for index, batch in enumerate(batches):
        arrays, dropped = _arrays(batch if to_inputs is None else to_inputs(batch), inputs, f"batch {index}")
        if dropped:
            notes[f"not used of each batch, since the model has no such input: {dropped}"] = None
        _check_batch_axis(arrays, inputs, f"batch {index}")
        seen += max((len(a) for a in arrays.values() if a.ndim), default=1)
        parts += _cut(arrays, inputs, batch_size)
        if samples is not None and seen >= samples:
            if _may_have(batches, index + 1):
                notes[f"calibration stopped after {seen} samples (samples={samples})"] = None
            break
    cut = [group for _, group in parts]
    made = in_memory([batch for batch, _ in parts], name)
    return replace(made, notes=(*notes, *notes_of(cut)), weights=weights_of(cut))


def _may_have(batches: Any, count: int) -> bool:
    """Whether there are more than ``count`` batches, as far as that is known without reading another."""
    try:
        return len(batches) > count
    except TypeError:
        return True


def _arrays(batch: Any, inputs: Sequence[InputInfo], where: str) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """Inputs by name as arrays, those of single samples stacked; and a word on what was dropped."""
    if not _is_samples(batch, inputs):
        named, dropped = _named(batch, inputs, where)
        return {i.name: _array(named[i.name], i, where) for i in inputs}, dropped
    samples = [_named(sample, inputs, f"{where}, sample {number}") for number, sample in enumerate(batch)]
    stacked = {}
    for info in inputs:
        arrays = [_array(named[info.name], info, where) for named, _ in samples]
        if shapes := {a.shape for a in arrays[1:]} - {arrays[0].shape}:
            raise CalibrationError(
                f"{where} is a list of samples, and those of {info.name} have shapes {list(arrays[0].shape)} and {list(min(shapes))}; "
                "pad them to one length in to_inputs or in the loader's collate_fn"
            )
        stacked[info.name] = np.stack(arrays)
    return stacked, samples[0][1]


def _is_samples(batch: Any, inputs: Sequence[InputInfo]) -> bool:
    """Whether a batch is a list of samples, each with all inputs: their arrays lack the first axis."""
    if not isinstance(batch, list) or not batch or not all(hasattr(i, "keys") or isinstance(i, tuple | list) for i in batch):
        return False
    try:
        named, _ = _named(batch[0], inputs, "")
        return all(_array(named[i.name], i, "").ndim == len(i.shape) - 1 for i in inputs)
    except CalibrationError:
        return False


def _named(batch: Any, inputs: Sequence[InputInfo], where: str) -> tuple[dict[str, Any], str]:
    """Inputs by name, and a word on what was dropped."""
    names = [i.name for i in inputs]
    if isinstance(batch, torch.Tensor | np.ndarray):
        batch = [batch]
    if isinstance(batch, tuple | list) and batch and (hasattr(batch[0], "keys") or isinstance(batch[0], tuple | list)):
        named, dropped = _named(batch[0], inputs, where)
        rest = _behind(1, len(batch))
        return named, ", ".join(filter(None, (dropped, rest)))
    remedy = f"the model's inputs are {'; '.join(map(str, inputs))}; to_inputs can pick them out of a batch"
    if hasattr(batch, "keys"):
        schema = list(batch.keys())
        if missing := [n for n in names if n not in schema]:
            raise CalibrationError(f"{where} has {', '.join(map(str, schema)) or 'nothing'} and lacks {', '.join(missing)}; {remedy}")
        return {n: batch[n] for n in names}, ", ".join(str(k) for k in schema if k not in names)
    if isinstance(batch, tuple | list):
        if len(batch) < len(names):
            raise CalibrationError(f"{where} has {len(batch)} items; {remedy}")
        return dict(zip(names, batch, strict=False)), _behind(len(names), len(batch))
    raise CalibrationError(f"{where} is a {type(batch).__name__}; expected a tensor, a tuple, a list or a dict; {remedy}")


def _behind(count: int, size: int) -> str:
    """Words for the items of a batch behind the first ``count``."""
    if size == count:
        return ""
    ordinals = ("first", "second", "third", "fourth")
    first = ordinals[count] if count < len(ordinals) else f"{count + 1}th"
    return f"the {first} item (labels?)" if size == count + 1 else f"the {size - count} items from the {first} on (labels?)"


def _stacked(values: Any, samples: int | None) -> tuple[list[Any], int]:
    """All samples as one batch, no more than asked for, and how many there are."""
    if not isinstance(values, Mapping):
        return ([values[:samples]], len(values)) if values.ndim else ([values], 1)
    cut = {name: value[:samples] if getattr(value, "ndim", 0) else value for name, value in values.items()}
    return [cut], max((len(value) for value in values.values() if getattr(value, "ndim", 0)), default=1)


def _check_batch_axis(arrays: Mapping[str, npt.NDArray[Any]], inputs: Sequence[InputInfo], where: str) -> None:
    """Refuse single samples, which lack the batch axis."""
    for info in inputs:
        shape = arrays[info.name].shape
        if len(shape) == len(info.shape) - 1 and all(e is None or e == d for e, d in zip(info.shape[1:], shape, strict=True)):
            raise CalibrationError(
                f"{where}: {info.name} has the shape {list(shape)} of a single sample, and the model takes batches ({info}); stack samples "
                "(torch.stack), give a DataLoader, or add the axis to each: to_inputs=lambda sample: sample[None]"
            )


def _array(value: Any, info: InputInfo, where: str) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise CalibrationError(f"{where}: {info.name} is no array: {error}") from error
    kinds = {array.dtype.kind, info.dtype.kind}
    return array.astype(info.dtype) if kinds == {"f"} or kinds <= {"i", "u"} else array


def _cut(arrays: Mapping[str, npt.NDArray[Any]], inputs: Sequence[InputInfo], size: int) -> Iterator[tuple[Batch, Group]]:
    """Parts of a batch along the first axis, where all arrays have it in common: as many samples as the model fixes, or ``size``."""
    counts = {len(a) if a.ndim else 0 for a in arrays.values()}
    fixed = fixed_size(inputs)
    several = fixed is None and any(i.shape and i.shape[0] for i in inputs)
    if len(counts) != 1 or several or max(counts) == (fixed or 0) or (fixed is None and max(counts) <= size):
        yield dict(arrays), Group(0, max(counts, default=1))
        return
    for group in groups(max(counts), fixed or size, fixed=fixed is not None):
        yield {n: group.of(a) for n, a in arrays.items()}, group
