"""Padding masks: which values have one row per element of the mask, and which of their rows count.

This follows from shapes, but not from those of a single batch: eight learned queries are not tokens, even in a batch of eight tokens. A
value follows the mask if all its axes but the last equal those of the mask in batches of different shapes (`MaskRule.follows`). An axis
of the same size in all batches is tested at another size on a *probe*, the first batch shortened by one or doubled along that axis, which
enters no statistics. Where the model fixes the axis, or fails at another size, the shapes of the data decide alone.
In a batch where the rows of such a value do not match the mask, all rows count (`kept_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import CalibrationError, RuntimeFailure
from magr_onnx.passes.graph.kv_cache import DEFAULT_MASK, PREFIX, current_mask, current_shape
from magr_onnx.passes.instrument.hoist import hoisted
from magr_onnx.passes.instrument.taps import shape_taps
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Batches, shapes_of
from magr_onnx.runtime.ort.session import Batch, Runner, Session, as_floats

Shape = Sequence[int]
Dimensions = Mapping[str, Sequence[int | str | None]]  # of a model's inputs: a size, the name of a dynamic one, or None without a name


def resolve_mask(model: ir.Model, mask: str | None) -> str | None:
    """Return the name of the mask input: with ``"auto"``, ``attention_mask`` if there is one; None for ``None`` and ``"none"``.

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
    """Rule for the rows that a mask excludes; without a mask all rows count.

    Attributes:
        mask: Name of the mask input; None for no mask.
        positions: Positions in the data of batches whose masks differ in shape, including the first.
        probe: A batch of another shape; None where the data covers all axes, or no probe can be made.
    """

    mask: str | None
    positions: tuple[int, ...] = ()
    probe: Batch | None = None
    _shapes: tuple[Shape, ...] = ()

    @staticmethod
    def of(dimensions: Dimensions, data: Batches, mask: str | None) -> MaskRule:
        """Make the rule for the batches of ``data``, given the dimensions of the model's inputs."""
        if mask is None:
            return MaskRule(None)
        first, *others = (current_shape(known, mask) for known in data.shapes or map(shapes_of, data))
        shapes = {0: first}
        constant_axes = set(range(len(first)))
        for index, shape in enumerate(others, 1):
            different = {axis for axis in constant_axes if len(shape) != len(first) or shape[axis] != first[axis]}
            if different:
                constant_axes -= different
                shapes[index] = shape
        probe = _resized(dimensions, next(iter(data)), mask, sorted(constant_axes)) if constant_axes else None
        probe_shapes = [] if probe is None else [np.shape(probe[mask])]
        return MaskRule(mask, tuple(shapes), probe, (*shapes.values(), *probe_shapes))

    def follows(self, shapes: Sequence[Shape]) -> bool:
        """Whether a value has one row per element of the mask, by its shapes at `positions` and, if it ran, on the probe."""
        return self.mask is not None and all(_fits(shape, mask) for shape, mask in zip(shapes, self._shapes, strict=False))


def kept_rows(mask: npt.NDArray[np.bool_] | None, shape: Shape) -> npt.NDArray[np.bool_] | None:
    """Flatten a batch's mask ``(n,)`` for a value that follows it; None, for all rows, without a mask or where the shape differs."""
    return mask.reshape(-1) if mask is not None and _fits(shape, mask.shape) else None


def excludes(data: Batches, mask: str) -> bool:
    """Whether a mask excludes any row, in the batches up to the first where it does."""
    return not all(current_mask(batch, mask).all() for batch in data)


def masked_values(model: ir.Model, names: Iterable[str], context: CalibrationContext) -> set[str]:
    """Select the values that follow the mask, by running the model on a few batches, once for every value (`followers` of ``context``).

    Values hoisted out of subgraphs never do: their rows may match one batch and not the next.
    """
    names = list(names)
    unknown = [name for name in names if name not in context.followers]
    if context.mask is not None and unknown:
        with Session(shape_taps(model, unknown), context.provider) as session:
            rule = MaskRule.of(session.dimensions, context.data, context.mask)
            followers = _followers(rule, unknown, lambda batch: [tuple(map(int, s)) for s in session.run(batch)], context.data)
        context.followers.update((name, name in followers - hoisted(model)) for name in unknown)
    return {name for name in names if context.followers.get(name)}


def masked_outputs(
    session: Runner, names: Sequence[str], data: Batches, mask: str | None, known: Sequence[Sequence[Shape]] = ()
) -> set[str]:
    """Select the model outputs that follow the mask.

    The model runs on a few batches, or only on the probe where the shapes of its outputs in every batch are ``known``.
    """
    if mask is None or mask not in session.dimensions:
        return set()
    rule = MaskRule.of(session.dimensions, data, mask)
    return _followers(
        rule, names, lambda batch: [() if (y := as_floats(v)) is None else y.shape for v in session.run(batch, names)], data, known
    )


def _followers(
    rule: MaskRule, names: Sequence[str], measured: Callable[[Batch], Sequence[Shape]], data: Batches, known: Sequence[Sequence[Shape]] = ()
) -> set[str]:
    """Select the values that follow a mask, by their shapes at the positions of its rule and on its probe."""
    shapes = [known[i] for i in rule.positions] if known else list(map(measured, data.select(rule.positions)))
    if rule.probe is not None:
        with contextlib.suppress(RuntimeFailure):  # the model fails at this shape, whatever its inputs declare
            shapes.append(measured(rule.probe))
    return {name for name, *value_shapes in zip(names, *shapes, strict=True) if rule.follows(value_shapes)}


def dimensions_of(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """Return the declared dimensions of a model's inputs, by name, as `Session.dimensions` does."""
    shapes = {str(v.name): v.shape for v in model.graph.inputs}
    return {name: tuple(d if isinstance(d, int) else d.value for d in shape or ()) for name, shape in shapes.items()}


def _fits(shape: Shape, mask: Shape) -> bool:
    return tuple(shape[:-1]) == tuple(mask)


def _resized(dimensions: Dimensions, batch: Batch, mask: str, axes: Sequence[int]) -> Batch | None:
    """Resize the mask's dynamic ``axes`` in a batch; None where the model fixes all of them.

    The same dimension of other inputs is resized too: that of the same name or, if no other input has the name, of the same size and axis.
    A batch with a past is not resized: its mask is longer than its tokens.
    """
    arrays: dict[str, npt.NDArray[Any]] = {name: np.asarray(batch[name]) for name in dimensions if name in batch}
    dynamic = {(name, i): d for name, shape in dimensions.items() for i, d in enumerate(shape) if not isinstance(d, int) and name in arrays}
    resized = [axis for axis in axes if (mask, axis) in dynamic]
    if not resized or any(name.startswith(PREFIX) for name in batch):
        return None
    for axis in resized:
        size, dimension = arrays[mask].shape[axis], dynamic[mask, axis]
        linked = [key for key, symbol in dynamic.items() if dimension and symbol == dimension]
        if len({name for name, _ in linked}) < 2:
            linked = [(name, i) for name, i in dynamic if i == axis and arrays[name].shape[i] == size]
        indices = np.arange(size - 1) if size > 1 else np.zeros(2, np.intp)
        for name, i in linked:
            arrays[name] = np.take(arrays[name], indices, axis=i)
    return arrays
