"""Tuning of scales by distillation: they follow the loss at the model's outputs, not the errors of their layers.

Once all layers are quantized, their codes stay as they are. Factors on their scales follow the gradient of the loss against the float
model's outputs (`magr_onnx.passes.instrument.distillation`), computed by onnxruntime, by Adam with rates that rise at the beginning and
fall to zero (the second phase of EfficientQAT; Chen et al., arXiv 2407.11062).

One batch in `HELD_OUT` is held out: the state after the epoch with the least loss there is the result, and nothing changes unless that is
lower by `GAIN` at least.

Deviations from EfficientQAT: targets are the float model's outputs, not the text's next tokens, since calibration data are few; and
a factor for each scale is tuned, not the scale itself, so that Adam's steps are relative to it. Rejected: tuning biases as well, which
changes the loss by less than a percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.adam import Adam
from magr_onnx.core.types import Array
from magr_onnx.errors import listed
from magr_onnx.passes.graph.kv_cache import current_mask
from magr_onnx.passes.instrument.decompose import decomposed
from magr_onnx.passes.instrument.distillation import Distillation, distillation_taps
from magr_onnx.passes.instrument.gradients import shaped_values
from magr_onnx.runtime.calibration.first_shapes import first_shapes
from magr_onnx.runtime.calibration.mask import kept_rows, masked_outputs
from magr_onnx.runtime.data.fixed_batch import Group
from magr_onnx.runtime.data.sources import Batches, Steps, shapes_of
from magr_onnx.runtime.measure.validate import is_logits
from magr_onnx.runtime.ort.session import Batch, Model, Session, Weights

HELD_OUT = 8  # one batch in so many
FEWEST = 4  # batches, for one to be held out
GAIN = 0.005  # least improvement, as a part of the loss: less is chance
STEPS = 64  # in an epoch, if there are as many samples
MOST_ELEMENTS = 1 << 26  # of outputs in a batch
WEIGHTS, OUTPUTS = 2.0, 20.0  # bytes of memory for each byte of the float model, and for each element of outputs in a step
SECOND = 0.95  # decay of the mean squares of gradients: steps are few
WARM_UP = 8  # steps until the rate is the full one
TINY = 1e-30
_CACHED = 1 << 27  # elements of the float model's outputs kept in memory; it runs anew, in every epoch, for more,
_SHARE = 1 / 8  # and for steps with more than this part of them


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """What tuning came to.

    Attributes:
        values: Of all scale inputs that gradients reach, by name; empty where the loss did not fall.
        before: Loss on held-out batches before.
        after: The same with ``values``.
        held_out: Number of batches held out.
        blocked: Operators that cannot be differentiated, before which layers stay as they are.
        why_not: Why nothing was tried; empty if something was.
    """

    values: Mapping[str, Array] = field(default_factory=dict)
    before: float = math.nan
    after: float = math.nan
    held_out: int = 0
    blocked: frozenset[str] = frozenset()
    why_not: str = ""


def tune(
    reference: Model,
    model: ir.Model,
    inputs: Sequence[str],
    data: Batches,
    *,
    epochs: int,
    rate: float,
    mask: str | None = None,
    provider: str = "cpu",
    progress: Steps | None = None,
) -> Tuned:
    """Lower the loss of ``model`` against the outputs of ``reference`` by its scale inputs.

    An epoch takes about as long as four passes of the float model over the data.

    Args:
        reference: The float model.
        model: The quantized model, with float weights and scale inputs.
        inputs: Names of its scale inputs (`magr_onnx.passes.instrument.scale_inputs`).
        data: Inputs of both models, of `FEWEST` samples at least.
        epochs: Passes over the data.
        rate: Largest relative change of a scale in a step.
        mask: The input that marks rows to count.
        provider: Where to run.
        progress: Told of steps.
    """
    model = decomposed(model)
    names = shaped_values(model)
    with Session(reference, provider, weights=Weights.PLAIN) as teacher:
        data = in_steps(data, teacher)
        if len(data) < FEWEST:
            return Tuned(why_not=f"that takes {FEWEST} samples or batches at least")
        taps = distillation_taps(model, inputs, first_shapes(model, names, data, provider), is_logits)
        if not taps.reached:
            return Tuned(why_not=f"{listed(sorted(taps.blocked))} cannot be differentiated" if taps.blocked else "no output has floats")
        starts = {name: model.graph.initializers[name].const_value for name in taps.reached}
        factors = {name: Adam(start.numpy(), SECOND) for name, start in starts.items() if start is not None}
        with Session(taps.model, provider, weights=Weights.PLAIN) as student:
            run = _Run(student, _Goals(teacher, taps, data, mask), data, factors)
            values, before, after = run.descend(rate, epochs, progress)
            return Tuned(values, before, after, sum(map(is_held_out, range(len(data)))), frozenset(taps.blocked))


def memory(model_bytes: int, data: Batches, elements: int) -> int:
    """Estimate the memory that tuning takes, bytes, of a float model with so many ``elements`` of outputs in a batch of ``data``."""
    a_sample = elements * len(data) / (data.samples or len(data))
    return int(WEIGHTS * model_bytes + OUTPUTS * max(a_sample, min(elements, MOST_ELEMENTS)))


def in_steps(data: Batches, session: Session) -> Batches:
    """Split batches into parts for a step each: `STEPS` of them at least, if there are as many samples, of `MOST_ELEMENTS` outputs at most.

    Batches whose samples are not along the first axis of all inputs, or that have the one size a model takes, stay whole.
    """
    dynamic = all(i.ranked and i.shape[:1] == (None,) for i in session.inputs)
    counts = [{shape[:1] for shape in shapes.values()} for shapes in data.shapes or map(shapes_of, data)]
    if not dynamic or any(len(count) != 1 or () in count for count in counts):
        return data
    sizes = [count.pop()[0] for count in counts]
    elements = sum(np.size(y) for y in session.run(Group(0, 1).part(next(iter(data)))))
    size = max(1, min(sum(sizes) // STEPS, MOST_ELEMENTS // max(elements, 1)))
    groups = [[Group(at, min(size, count - at)) for at in range(0, count, size)] for count in sizes]
    parts = [(i, group) for i, batch in enumerate(groups) for group in batch]

    def read() -> Iterator[Batch]:
        return (group.part(batch) for batch, split in zip(data, groups, strict=True) for group in split)

    weights = tuple(data.weight(i) for i, _ in parts)
    return Batches(len(parts), data.description, read, lambda i: data.label(parts[i][0]), samples=data.samples, weights=weights)


def is_held_out(step: int) -> bool:
    """Return whether a step's batch is held out."""
    return step % HELD_OUT == FEWEST - 1


class _Goals:
    """What the quantized model is compared with in every batch."""

    def __init__(self, teacher: Session, taps: Distillation, data: Batches, mask: str | None) -> None:
        self._teacher, self._taps, self._data, self._mask = teacher, taps, data, mask
        self._names = list(taps.targets)
        self._masked = masked_outputs(teacher, self._names, data, mask)
        self._kept: dict[int, Batch] = {}
        self._room = _CACHED

    def feeds(self, step: int, batch: Batch) -> Batch:
        """Return the batch with what the float model's outputs on it come to, and weights of their rows."""
        if step in self._kept:
            return {**batch, **self._kept[step]}
        goals: dict[str, npt.NDArray[Any]] = {}
        for name, y in zip(self._names, self._teacher.run(batch, self._names), strict=True):
            target, y = self._taps.targets[name], np.asarray(y, np.float32)
            goals[target.weights] = self._weights(name, y, batch) * np.float32(self._data.weight(step))
            if target.entropy:
                y, goals[target.entropy] = _distribution(y)
            goals[target.goal] = y
        if (elements := sum(array.size for array in goals.values())) <= min(self._room, _SHARE * _CACHED):
            self._kept[step] = goals
            self._room -= elements
        return {**batch, **goals}

    def _weights(self, name: str, y: Array, batch: Batch) -> Array:
        """Return weights of the rows of an output, with which its loss is a mean divergence, or relative to its power."""
        rows = y.reshape(-1, y.shape[-1])
        keep = kept_rows(current_mask(batch, self._mask), y.shape) if self._mask is not None and name in self._masked else None
        counted = np.ones(len(rows), bool) if keep is None else keep
        total = float(counted.sum()) if is_logits(name, y.ndim) else float(np.square(rows[counted], dtype=np.float64).sum())
        result: Array = (counted / max(total, TINY)).astype(np.float32).reshape(*y.shape[:-1], 1)
        return result


def _distribution(logits: Array) -> tuple[Array, Array]:
    """Return the probabilities and their entropies ``(..., 1)`` of logits, whose memory they take."""
    p = logits if logits.flags.writeable else logits.copy()
    p -= p.max(axis=-1, keepdims=True)
    expected = p.copy()
    np.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    expected[p == 0] = 0  # of masked outputs, minus infinity
    expected *= p
    return p, np.log(total) - expected.sum(axis=-1, keepdims=True)


class _Run:
    """The descent of a session's inputs."""

    def __init__(self, student: Session, goals: _Goals, data: Batches, factors: Mapping[str, Adam]) -> None:
        """``factors`` are the inputs that descend; the student's outputs are its losses, and gradients by them in their order."""
        self._losses = student.outputs[: len(student.outputs) - len(factors)]
        self._student, self._goals, self._data, self._factors = student, goals, data, factors

    def descend(self, rate: float, epochs: int, progress: Steps | None) -> tuple[Mapping[str, Array], float, float]:
        """Return the values of least loss on held-out batches, none where it did not fall, and that loss before and after."""
        report = progress or (lambda done, total: None)
        done, total = 0, epochs * sum(not is_held_out(step) for step in range(len(self._data)))
        report(0, total)
        before = least = self._held_out_loss()
        best: Mapping[str, Array] = {}
        for _ in range(epochs):
            for step, batch in enumerate(self._data):
                if is_held_out(step):
                    continue
                gradients = self._student.run({**self._goals.feeds(step, batch), **self._values})[len(self._losses) :]
                if all(np.isfinite(gradient).all() for gradient in gradients):
                    share = min(1.0, (done + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done / total))
                    for factor, gradient in zip(self._factors.values(), gradients, strict=True):
                        factor.step(gradient, share * rate)
                done += 1
                report(done, total)
            loss = self._held_out_loss()
            if loss < least:
                best, least = {name: value.copy() for name, value in self._values.items()}, loss
        return (best, before, least) if least < (1 - GAIN) * before else ({}, before, before)

    @property
    def _values(self) -> dict[str, Array]:
        return {name: factor.values for name, factor in self._factors.items()}

    def _held_out_loss(self) -> float:
        losses = [
            sum(map(float, self._student.run({**self._goals.feeds(step, batch), **self._values}, self._losses)))
            for step, batch in enumerate(self._data)
            if is_held_out(step)
        ]
        return sum(losses) / len(losses)
