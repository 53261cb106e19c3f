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
from magr_onnx.runtime.data.fixed_batch import Group, fixed_size, groups
from magr_onnx.runtime.data.hold_out import HELD_OUT
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
    """Convert the batches of a DataLoader, or of any iterable, to feeds of a model.

    0. A tensor or a dict in place of batches contains all samples, stacked along the first axis.
    1. A tensor is the only input.
    2. A dict has inputs by name; other entries (labels) are dropped.
    3. A tuple or list has inputs in order, and further items (labels) are dropped. If its first item is a dict, tuple or list, that has the
       inputs. A list of single samples in one of these forms (``collate_fn=list``) is stacked.
    4. ``to_inputs`` converts any other batch to one of these first.

    Numbers are cast to the type of the input if both are floats or both integers. Batches are split to ``batch_size``, so that some can be
    held out.

    Args:
        batches: Read once, and only as far as needed. Stacked samples beyond ``samples`` are left out.
        inputs: The model's inputs.
        to_inputs: See above.
        samples: Most samples to read; None for all.
        batch_size: Most samples per feed.

    Returns:
        The feeds, with notes on what was dropped.

    Raises:
        CalibrationError: A batch does not have the inputs.
        OptionError: ``samples`` or ``batch_size`` is invalid.
    """
    schema.check(samples=samples, batch_size=batch_size)
    parts: list[tuple[Batch, Group]] = []
    starts: list[int] = []
    notes: dict[str, None] = {}
    count, name = 0, f"the given {type(batches).__name__}"
    fewest = 1  # parts of a batch: batches of a loader are held out as they are
    if isinstance(batches, torch.Tensor | np.ndarray | Mapping):
        fewest = HELD_OUT if fixed_size(inputs) else 2 * HELD_OUT
        batches, total = _stacked(batches, samples)
        if samples is not None and total > samples:
            notes[f"the first {samples} of {total} samples were used (samples={samples})"] = None
    for index, batch in enumerate(batches):
        arrays, dropped = _arrays(batch if to_inputs is None else to_inputs(batch), inputs, f"batch {index}")
        if dropped:
            notes[f"not used of each batch, since the model has no such input: {dropped}"] = None
        _check_batch_axis(arrays, inputs, f"batch {index}")
        split = list(_split(arrays, inputs, batch_size, fewest))
        starts += [count + group.start for _, group in split]
        parts += split
        count += max((len(a) for a in arrays.values() if a.ndim), default=1)
        if samples is not None and count >= samples:
            if _may_have_more(batches, index + 1):
                notes[f"calibration stopped after {count} samples (samples={samples})"] = None
            break
    result = in_memory([batch for batch, _ in parts], name, [group for _, group in parts])
    return replace(result, notes=(*notes, *result.notes), starts=tuple(starts))


def _may_have_more(batches: Any, count: int) -> bool:
    """Whether there may be more than ``count`` batches, judged without reading another."""
    try:
        return len(batches) > count
    except TypeError:
        return True


def _arrays(batch: Any, inputs: Sequence[InputInfo], where: str) -> tuple[dict[str, npt.NDArray[Any]], str]:
    """Convert a batch to arrays by input name, stacking single samples, and describe what was dropped."""
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
    """Whether a batch is a list of single samples: each has all inputs, without the batch axis."""
    if not isinstance(batch, list) or not batch or not all(hasattr(i, "keys") or isinstance(i, tuple | list) for i in batch):
        return False
    try:
        named, _ = _named(batch[0], inputs, "")
        return all(_array(named[i.name], i, "").ndim == len(i.shape) - 1 for i in inputs)
    except CalibrationError:
        return False


def _named(batch: Any, inputs: Sequence[InputInfo], where: str) -> tuple[dict[str, Any], str]:
    """Select the inputs of a batch by name, and describe what was dropped."""
    names = [i.name for i in inputs]
    if isinstance(batch, torch.Tensor | np.ndarray):
        batch = [batch]
    if isinstance(batch, tuple | list) and batch and (hasattr(batch[0], "keys") or isinstance(batch[0], tuple | list)):
        named, dropped = _named(batch[0], inputs, where)
        return named, ", ".join(filter(None, (dropped, _extra_items(1, len(batch)))))
    remedy = f"the model's inputs are {'; '.join(map(str, inputs))}; to_inputs can pick them out of a batch"
    if hasattr(batch, "keys"):
        keys = list(batch.keys())
        if missing := [n for n in names if n not in keys]:
            raise CalibrationError(f"{where} has {', '.join(map(str, keys)) or 'nothing'} and lacks {', '.join(missing)}; {remedy}")
        return {n: batch[n] for n in names}, ", ".join(str(k) for k in keys if k not in names)
    if isinstance(batch, tuple | list):
        if len(batch) < len(names):
            raise CalibrationError(f"{where} has {len(batch)} items; {remedy}")
        return dict(zip(names, batch, strict=False)), _extra_items(len(names), len(batch))
    raise CalibrationError(f"{where} is a {type(batch).__name__}; expected a tensor, a tuple, a list or a dict; {remedy}")


def _extra_items(count: int, size: int) -> str:
    """Describe the items of a batch after the first ``count``."""
    if size == count:
        return ""
    ordinals = ("first", "second", "third", "fourth")
    first = ordinals[count] if count < len(ordinals) else f"{count + 1}th"
    return f"the {first} item (labels?)" if size == count + 1 else f"the {size - count} items from the {first} on (labels?)"


def _stacked(values: Any, samples: int | None) -> tuple[list[Any], int]:
    """Return at most ``samples`` stacked samples as one batch, and their total number."""
    if not isinstance(values, Mapping):
        return ([values[:samples]], len(values)) if values.ndim else ([values], 1)
    batch = {name: value[:samples] if getattr(value, "ndim", 0) else value for name, value in values.items()}
    return [batch], max((len(value) for value in values.values() if getattr(value, "ndim", 0)), default=1)


def _check_batch_axis(arrays: Mapping[str, npt.NDArray[Any]], inputs: Sequence[InputInfo], where: str) -> None:
    """Check that arrays have a batch axis, which single samples lack."""
    for info in inputs:
        shape = arrays[info.name].shape
        if info.fits((1, *shape), 1):
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
        raise CalibrationError(f"{where}: {info.name} is not an array: {error}") from error
    kinds = {array.dtype.kind, info.dtype.kind}
    return array.astype(info.dtype) if kinds == {"f"} or kinds <= {"i", "u"} else array


def _split(arrays: Mapping[str, npt.NDArray[Any]], inputs: Sequence[InputInfo], size: int, fewest: int) -> Iterator[tuple[Batch, Group]]:
    """Split a batch along the first axis, if all arrays share it, into the batch size that the model fixes, or ``size``.

    There are ``fewest`` parts at least, as far as there are samples.
    """
    counts = {len(a) if a.ndim else 0 for a in arrays.values()}
    fixed = fixed_size(inputs)
    conflicting = fixed is None and any(i.shape and i.shape[0] for i in inputs)
    if conflicting or len(counts) != 1 or counts == {0}:
        yield dict(arrays), Group(0, max(counts, default=1))
        return
    for group in groups(max(counts), fixed or size, fixed is not None, fewest):
        yield group.part(arrays), group
