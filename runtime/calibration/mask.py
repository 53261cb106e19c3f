"""Which rows of a value count: those that the mask of padding keeps, where a value has one row for each element of the mask.

Shapes tell, but those of one batch do not: eight learned queries are not tokens, even where a batch has eight tokens. So a value follows
the mask if all its axes but the last are those of the mask in batches of different shapes (`MaskRule.follows`). An axis that is the same
in all batches is tried at another size on a *probe*: the first batch, cut by one or doubled along that axis, which counts nowhere.
In a batch in which the rows of such a value still do not fit the mask, all of them count (`kept_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import CalibrationError, RuntimeFailure
from magr_onnx.passes.graph.kv_cache import DEFAULT_MASK, PREFIX, current_mask
from magr_onnx.passes.instrument.hoist import hoisted
from magr_onnx.passes.instrument.taps import shape_taps
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort.session import Batch, Session

Shape = Sequence[int]


def resolve_mask(model: ir.Model, mask: str | None) -> str | None:
    """The name of the mask input: ``"auto"`` takes ``attention_mask`` if there is one; ``None`` or ``"none"`` takes none.

    Raises:
        CalibrationError: A named mask is not an input of the model.
    """
    names = [v.name for v in model.graph.inputs]
    if mask in (None, "none"):
        return None
    if mask == "auto":
        return DEFAULT_MASK if DEFAULT_MASK in names else None
    if mask not in names:
        raise CalibrationError(f"mask {mask!r} is not an input of the model; its inputs are {', '.join(map(str, names))}")
    return mask


@dataclass(frozen=True, slots=True, eq=False)
class MaskRule:
    """The one rule for what rows a mask leaves out; without a mask all count.

    Attributes:
        mask: The name of the mask input; None for no mask.
        positions: Batches whose masks differ in shape, by their position in the data; the first batch is one.
        probe: A batch of yet another shape; None where the data has all shapes, or none could be made.
    """

    mask: str | None
    positions: tuple[int, ...] = ()
    probe: Batch | None = None
    _shapes: tuple[Shape, ...] = ()

    @staticmethod
    def of(model: ir.Model, data: Batches, mask: str | None) -> MaskRule:
        """The rule for the batches of ``data``, which fit ``model``."""
        if mask is None:
            return MaskRule(None)
        batches = iter(data)
        first = next(batches)
        shapes = {0: current_mask(first, mask).shape}
        same = set(range(len(shapes[0])))
        for index, batch in enumerate(batches, 1):
            if not same:
                break
            shape = current_mask(batch, mask).shape
            different = {axis for axis in same if len(shape) != len(shapes[0]) or shape[axis] != shapes[0][axis]}
            if different:
                same -= different
                shapes[index] = shape
        probe = _resized(model, first, mask, sorted(same))
        last = [] if probe is None else [np.shape(probe[mask])]
        return MaskRule(mask, tuple(shapes), probe, (*shapes.values(), *last))

    def follows(self, shapes: Sequence[Shape]) -> bool:
        """Whether a value has a row for each element of the mask: its shapes at `positions`, and that on the probe if it ran, tell."""
        return self.mask is not None and all(_fits(shape, mask) for shape, mask in zip(shapes, self._shapes, strict=False))

    def truth(self, batch: Batch) -> npt.NDArray[np.bool_] | None:
        """The elements of the mask in a batch; None without a mask."""
        return None if self.mask is None else current_mask(batch, self.mask)


def kept_rows(truth: npt.NDArray[np.bool_] | None, shape: Shape) -> npt.NDArray[np.bool_] | None:
    """The rows to count of a value that follows the mask, ``(n,)``; None for all, where they do not fit its elements in this batch."""
    return truth.reshape(-1) if truth is not None and _fits(shape, truth.shape) else None


def masked_values(model: ir.Model, names: Sequence[str], context: CalibrationContext) -> set[str]:
    """Those of the values ``names`` that follow the mask, by running the model on a few batches.

    None that was brought out of a body: its rows may fit one batch and not the next.
    """
    rule = MaskRule.of(model, context.data, context.mask)
    if rule.mask is None:
        return set()
    outside = hoisted(model)
    with Session(shape_taps(model, names), context.provider) as session:
        shapes = [session.run(batch) for batch in _at(context.data, rule.positions)]
        if rule.probe is not None:
            with contextlib.suppress(RuntimeFailure):  # the model does not take this shape, whatever its inputs declare
                shapes.append(session.run(rule.probe))
    return {name for name, *own in zip(names, *shapes, strict=True) if name not in outside and rule.follows(own)}


def _fits(shape: Shape, mask: Shape) -> bool:
    return tuple(shape[:-1]) == tuple(mask)


def _at(data: Batches, positions: Sequence[int]) -> Iterator[Batch]:
    for index, batch in enumerate(data):
        if index in positions:
            yield batch
        if index == positions[-1]:
            return


def _resized(model: ir.Model, batch: Batch, mask: str, axes: Sequence[int]) -> Batch | None:
    """The batch with other sizes of the mask's ``axes``, as far as the model leaves them free; None where it fixes all of them.

    The same dimension of other inputs goes along: of the same name, or, where the mask's stands alone, of the same size at the same axis.
    A decoder that is fed a past is left alone: its mask is longer than its tokens.
    """
    inputs = {str(v.name): v.shape for v in model.graph.inputs if str(v.name) in batch}
    free = [axis for axis in axes if _dimension(inputs, mask, axis) is not None]
    if not free or any(name.startswith(PREFIX) for name in batch):
        return None
    arrays: dict[str, npt.NDArray[Any]] = {name: np.asarray(batch[name]) for name in inputs}
    for axis in free:
        size = arrays[mask].shape[axis]
        taken = np.arange(size - 1) if size > 1 else np.zeros(2, np.intp)
        for name, other in _same_dimension(inputs, arrays, mask, axis):
            arrays[name] = np.take(arrays[name], taken, axis=other)
    return arrays


def _dimension(inputs: Mapping[str, ir.Shape | None], name: str, axis: int) -> str | None:
    """The name of a free dimension, empty for one without a name; None for a fixed one, or where nothing is declared."""
    shape = inputs[name]
    if shape is None or axis >= len(shape) or isinstance(shape[axis], int):
        return None
    return getattr(shape[axis], "value", None) or ""


def _same_dimension(
    inputs: Mapping[str, ir.Shape | None], arrays: Mapping[str, npt.NDArray[Any]], mask: str, axis: int
) -> list[tuple[str, int]]:
    """Inputs and their axes that have the dimension ``axis`` of the mask."""
    wanted = _dimension(inputs, mask, axis)
    free = [(name, i) for name, array in arrays.items() for i in range(array.ndim) if _dimension(inputs, name, i) is not None]
    named = [(name, i) for name, i in free if wanted and _dimension(inputs, name, i) == wanted]
    if any(name != mask for name, _ in named):
        return named
    size = arrays[mask].shape[axis]
    return [(name, i) for name, i in free if i == axis and arrays[name].shape[i] == size]
