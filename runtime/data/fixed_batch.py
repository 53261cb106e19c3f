"""Batches of samples, also for models with a fixed batch size: every sample is fed and counts once.

Samples that do not fill a fixed batch are fed in groups whose size divides the batch size, each repeated to fill it. Calibration and
validation compute sums over samples; sums over such a batch are multiplied by `Group.weight`, so that every sample counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.runtime.data.hold_out import HELD_OUT
from magr_onnx.runtime.ort.session import Batch, InputInfo


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive samples that make a batch: index of the first, their number, and how often they are repeated."""

    start: int
    count: int
    repeats: int = 1

    @property
    def weight(self) -> float:
        """The factor of sums over the batch."""
        return 1 / self.repeats

    def of(self, array: npt.NDArray[Any], axis: int = 0) -> npt.NDArray[Any]:
        """Take the batch from an array of all samples along an axis; rank 0 arrays are shared by all."""
        if not array.ndim:
            return array
        samples = array[(*[slice(None)] * axis, slice(self.start, self.start + self.count))]
        return samples if self.repeats == 1 else np.concatenate([samples] * self.repeats, axis)

    def part(self, batch: Batch, axes: Mapping[str, int] | None = None) -> Batch:
        """Take the batch from arrays of all samples, by input name; those that have no axis, if axes are given, are shared by all."""
        return {
            name: array if axes is not None and name not in axes else self.of(array, (axes or {}).get(name, 0))
            for name, array in batch.items()
        }


def groups(samples: int, size: int, fixed: bool, fewest: int = HELD_OUT) -> list[Group]:
    """Split samples into batches of ``size``; the last is smaller. Where the size is ``fixed``, it is filled with repeated samples.

    Of few samples, batches have fewer, so that there are ``fewest`` at least: parts of them are held out.
    Filled batches come first, smallest first: batches are held out from the fourth on, and one should not stand for a sample or two.
    """
    few = samples < fewest * size
    if not fixed:
        size = max(1, samples // fewest) if few else size
        return [Group(start, min(size, samples - start)) for start in range(0, samples, size)]
    start = 0 if few else samples - samples % size
    batches = [Group(at, size) for at in range(0, start, size)]
    while start < samples:
        most = max(1, samples // fewest) if few else samples - start
        count = max(d for d in range(1, min(most, samples - start) + 1) if size % d == 0)
        batches.append(Group(start, count, size // count))
        start += count
    return sorted(batches, key=lambda group: group.count)


def notes_of(batches: Sequence[Group]) -> tuple[str, ...]:
    """Return a note for the report on repeated samples, if any."""
    repeated = [group for group in batches if group.repeats > 1]
    if not repeated:
        return ()
    size = repeated[0].count * repeated[0].repeats
    count, total = (sum(group.count for group in parts) for parts in (repeated, batches))
    return (f"the model takes {size} samples at a time: {count} of {total} were repeated to fill batches, and count once",)


def fixed_size(inputs: Sequence[InputInfo]) -> int | None:
    """Return the batch size that the model's inputs fix on their axes of samples; None where it is dynamic, or where they differ."""
    sizes = {size for i in inputs if i.shape and (size := i.shape[i.axis])}
    return sizes.pop() if len(sizes) == 1 else None


def groups_of(batch: Batch, inputs: Sequence[InputInfo]) -> list[Group]:
    """Split or fill a batch that has other than the fixed number of samples and fits the model otherwise; all other batches are a group.

    It is one of the caller's batches, which are held out as they are: no more are made of it than it fills.
    """
    size, samples = fixed_size(inputs), _samples(batch, inputs)
    if size is None or samples is None or samples in (0, size):
        sized = [i for i in inputs if np.ndim(batch.get(i.name, 0)) > i.axis]
        free = [i for i in sized if not i.ranked or i.shape[i.axis : i.axis + 1] == (None,)]
        return [Group(0, max((np.shape(batch[i.name])[i.axis] for i in free or sized), default=1))]
    return groups(samples, size, fixed=True, fewest=1)


def _samples(batch: Batch, inputs: Sequence[InputInfo]) -> int | None:
    """Count the samples of a batch that fits the model apart from their number; None if it does not."""
    if {i.name for i in inputs} != set(batch):
        return None
    if not all(info.fits(np.shape(batch[info.name]), 1) for info in inputs):
        return None
    counts = {count for info in inputs for count in np.shape(batch[info.name])[:1]}
    return counts.pop() if len(counts) == 1 else None
