"""Which rows of a value count: those that the mask of padding keeps, where a value has one row for each element of the mask.

Shapes tell, but those of one batch do not: eight learned queries are not tokens, even where a batch has eight tokens. So a value follows
the mask if all its axes but the last are those of the mask in batches of different shapes (`MaskRule.follows`). An axis that is the same
in all batches is tried at another size on a *probe*: the first batch, cut by one or doubled along that axis, which counts nowhere. Where
the model fixes the axis, or does not run at another size, the shapes of the data are all there is to decide by.
In a batch in which the rows of such a value still do not fit the mask, all of them count (`kept_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
Dimensions = Mapping[str, Sequence[int | str | None]]
"""Of a model's inputs, by name: a number, the name of a free dimension, or None for a free one without a name."""


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
    def of(dimensions: Dimensions, data: Batches, mask: str | None) -> MaskRule:
        """The rule for the batches of ``data``, which fit a model whose inputs have these dimensions."""
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
        probe = _resized(dimensions, first, mask, sorted(same))
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
    if context.mask is None:
        return set()
    with Session(shape_taps(model, names), context.provider) as session:
        followers = _followers(session, names, lambda b: [tuple(map(int, s)) for s in session.run(b)], context.data, context.mask)
    return followers - hoisted(model)


def masked_outputs(session: Session, names: Sequence[str], data: Batches, mask: str | None) -> set[str]:
    """Those of a model's outputs ``names`` that follow the mask, by running it on a few batches."""
    if mask is None or mask not in session.dimensions:
        return set()
    return _followers(session, names, lambda batch: [np.shape(y) for y in session.run(batch, names)], data, mask)


def _followers(session: Session, names: Sequence[str], shapes_of: Callable[[Batch], Sequence[Shape]], data: Batches, mask: str) -> set[str]:
    rule = MaskRule.of(session.dimensions, data, mask)
    shapes = [shapes_of(batch) for batch in _at(data, rule.positions)]
    if rule.probe is not None:
        with contextlib.suppress(RuntimeFailure):  # the model does not take this shape, whatever its inputs declare
            shapes.append(shapes_of(rule.probe))
    return {name for name, *of_one in zip(names, *shapes, strict=True) if rule.follows(of_one)}


def dimensions_of(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """The declared dimensions of a model's inputs, by name, as `Session.dimensions` has them."""
    shapes = {str(v.name): v.shape for v in model.graph.inputs}
    return {name: tuple(d if isinstance(d, int) else d.value for d in shape or ()) for name, shape in shapes.items()}


def _fits(shape: Shape, mask: Shape) -> bool:
    return tuple(shape[:-1]) == tuple(mask)


def _at(data: Batches, positions: Sequence[int]) -> Iterator[Batch]:
    for index, batch in enumerate(data):
        if index in positions:
            yield batch
        if index == positions[-1]:
            return


def _resized(dimensions: Dimensions, batch: Batch, mask: str, axes: Sequence[int]) -> Batch | None:
    """The batch with other sizes of the mask's ``axes``, as far as the model leaves them free; None where it fixes all of them.

    The same dimension of other inputs goes along: of the same name, or, where the mask's stands alone, of the same size at the same axis.
    A decoder that is fed a past is left alone: its mask is longer than its tokens.
    """
    arrays: dict[str, npt.NDArray[Any]] = {name: np.asarray(batch[name]) for name in dimensions if name in batch}
    free = {(name, i): d for name, shape in dimensions.items() for i, d in enumerate(shape) if not isinstance(d, int) and name in arrays}
    cut = [axis for axis in axes if (mask, axis) in free]
    if not cut or any(name.startswith(PREFIX) for name in batch):
        return None
    for axis in cut:
        size, dimension = arrays[mask].shape[axis], free[mask, axis]
        same = [at for at, other in free.items() if dimension and other == dimension]
        if len({name for name, _ in same}) < 2:
            same = [(name, i) for name, i in free if i == axis and arrays[name].shape[i] == size]
        taken = np.arange(size - 1) if size > 1 else np.zeros(2, np.intp)
        for name, i in same:
            arrays[name] = np.take(arrays[name], taken, axis=i)
    return arrays
