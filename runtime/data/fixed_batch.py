"""Samples in batches, also for models that take a fixed number of samples at a time: each sample is fed, and counts once.

Samples that do not fill a batch are fed in groups whose size divides that of the batch, each repeated until the batch is full. What
calibration and validation gather are sums over samples, so the sums over such a batch are multiplied by a weight (`Group.weight`), and
the result is that of every sample once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.runtime.ort.session import Batch, InputInfo


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive samples of one batch: the first, how many, and how often they are repeated to fill it."""

    start: int
    count: int
    repeats: int = 1

    @property
    def weight(self) -> float:
        """By what to multiply sums over the batch."""
        return 1 / self.repeats

    def of(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The batch, from an array of all samples along the first axis; one of rank 0 is the same for all."""
        if not array.ndim:
            return array
        part = array[self.start : self.start + self.count]
        return part if self.repeats == 1 else np.concatenate([part] * self.repeats)


def groups(samples: int, size: int, fixed: bool) -> list[Group]:
    """All samples in batches of ``size``; the last batch is smaller, or, where the size is ``fixed``, made of repeated samples."""
    start = samples - samples % size
    batches = [Group(at, size) for at in range(0, start, size)]
    if not fixed:
        return [*batches, *([Group(start, samples - start)] if start < samples else [])]
    while start < samples:
        count = max(d for d in range(1, samples - start + 1) if size % d == 0)
        batches.append(Group(start, count, size // count))
        start += count
    return batches


def weights_of(batches: Sequence[Group]) -> tuple[float, ...]:
    """The weights of batches, as `magr_onnx.runtime.data.sources.Batches` has them: none where all are 1."""
    return tuple(group.weight for group in batches) if any(group.repeats > 1 for group in batches) else ()


def notes_of(batches: Sequence[Group]) -> tuple[str, ...]:
    """What the report says of samples that were repeated."""
    repeated = [group for group in batches if group.repeats > 1]
    if not repeated:
        return ()
    size, count, total = (
        repeated[0].count * repeated[0].repeats,
        sum(group.count for group in repeated),
        sum(group.count for group in batches),
    )
    return (f"the model takes {size} samples at a time, and {count} of {total} fill no batch: they were repeated, and count once",)


def fixed_size(inputs: Sequence[InputInfo]) -> int | None:
    """How many samples the model takes at a time, by its inputs' first axes; None for any number, or where these differ."""
    sizes = {i.shape[0] for i in inputs if i.shape and i.shape[0]}
    return sizes.pop() if len(sizes) == 1 else None


def groups_of(batch: Batch, inputs: Sequence[InputInfo], size: int) -> list[Group] | None:
    """How to cut up or fill a batch that fits the model but for the number of its samples, which is not ``size``; None for any other."""
    samples = _samples(batch, inputs)
    return None if samples is None or samples == size else groups(samples, size, fixed=True)


def _samples(batch: Batch, inputs: Sequence[InputInfo]) -> int | None:
    """The number of samples of a batch that fits the model but for that number."""
    if {i.name for i in inputs} != set(batch):
        return None
    counts: set[int] = set()
    for info in inputs:
        shape = np.shape(batch[info.name])
        if len(shape) != len(info.shape) or any(e is not None and e != d for e, d in zip(info.shape[1:], shape[1:], strict=True)):
            return None
        counts.update(shape[:1])
    return counts.pop() if len(counts) == 1 else None
