"""Sequential calibration with error feedback: each stage of layers is calibrated on the outputs of the quantized layers before it.

The float model and the model being quantized run side by side, segment by segment (`magr_onnx.passes.instrument.segments`), each on its
own live values. The inputs of a stage are ``X`` in one and ``X_q`` in the other; from their second and cross moments, quantizers compute
weights that reproduce ``X W0`` from ``X_q``. Every segment runs once in each model, so the cost is two forward passes over the data,
however many stages there are.

Without error feedback only the float model runs. A session then has the weights of a single segment, which calibrates models larger than
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.activation_ranges import rounded
from magr_onnx.core.gram import few
from magr_onnx.core.moments import MomentAccumulator, OutputAccumulator, split_stats, with_folds
from magr_onnx.core.types import LayerStats, TargetMoments
from magr_onnx.errors import ModelError, NonFiniteError, RuntimeFailure, raise_all
from magr_onnx.passes.graph.kv_cache import current_mask
from magr_onnx.passes.instrument.segments import P, Segments, cut, downstream, fed_inputs, residual_operand, segments_of
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weighted import Product
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import MaskRule, dimensions_of, kept_rows
from magr_onnx.runtime.calibration.moments import CalibrationResult, check_rows, grouped, not_finite, readers_of
from magr_onnx.runtime.calibration.row_pool import RowPool
from magr_onnx.runtime.calibration.value_cache import Cache
from magr_onnx.runtime.data.hold_out import HoldOut, Parts
from magr_onnx.runtime.data.sources import Steps
from magr_onnx.runtime.ort.session import Session

DEFAULT_CACHE = 2 << 30

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Options of a calibration in stages.

    Attributes:
        feedback: Whether the model being quantized runs beside the float model; else layers see float inputs and have no targets.
        cache: Bytes of live values in memory; the rest goes to a temporary folder.
        changed: Names of values that are already different in the model being quantized: convolutions, and layers outside all stages, are
            quantized first.
        gram_budget: Most bytes of Gram matrices in memory (at least one matrix); larger stages are split. None for no limit.
        is_unsolved: Whether a layer needs statistics; parts of a stage without such layers get none.
        unmoved: Names of weights that are something else too, such as tables of embeddings: layers with these get no targets.
        cuts: Layers to cut the model at, including those to calibrate, so that segments are small; None for the latter alone.
    """

    feedback: bool = True
    cache: int = DEFAULT_CACHE
    changed: Collection[str] = ()
    gram_budget: int | None = None
    is_unsolved: Callable[[LinearLayer], bool] = lambda layer: True
    unmoved: Collection[str] = ()
    cuts: Sequence[LinearLayer] | None = None


def staged(
    original: ir.Model,
    quantized: ir.Model,
    layers: Sequence[LinearLayer],
    context: CalibrationContext,
    schedule: Schedule | None = None,
    progress: Steps | None = None,
) -> Iterator[tuple[Sequence[LinearLayer], CalibrationResult]]:
    """Yield stages of layers, each with the statistics of its inputs.

    The caller quantizes the layers of a stage in ``quantized`` before requesting the next one, and releases the statistics. ``quantized``
    is a copy of ``original``, the float model, except for the changed values of the schedule. With feedback, batches are always held out.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """
    schedule = schedule or Schedule()
    if schedule.feedback and not context.hold_out:
        context = replace(context, hold_out=HoldOut.of(context.data.samples))
    steps = segments_of(quantized, layers if schedule.cuts is None else schedule.cuts)
    calibrated = {id(layer.node): layer for layer in layers}
    lives = lives_of(original, steps)
    with Cache(schedule.cache // 2) as floats, Cache(schedule.cache // 2) as quants:
        values = Values(original, quantized, context, floats, quants, downstream(quantized, schedule.changed))
        report = progress or (lambda done, total: None)
        report(0, len(steps.stages))
        for s, (stage, live) in enumerate(zip(steps.stages, lives, strict=True)):
            values.advance(live, schedule.feedback, first=s == 0)
            report(s + 1, len(steps.stages))
            members = tuple(calibrated[id(layer.node)] for layer in stage if id(layer.node) in calibrated)
            budget = schedule.gram_budget
            for part in [members] if budget is None else grouped(members, budget, context.hold_out):
                unsolved = part if any(map(schedule.is_unsolved, part)) else []  # layers that share a weight are solved together
                result = _gather(unsolved, values, context, schedule)
                yield part, replace(result, spilled=floats.spilled + quants.spilled)
                del result  # before the next is measured
            values.keep(live)


def lives_of(original: ir.Model, steps: Segments[P]) -> list[list[str]]:
    """Return the values that later segments read, as far as the float model has them: weights dequantized in the other are recomputed."""
    names = {str(v.name) for v in original.graph.inputs} | {str(v.name) for node in original.graph for v in node.outputs}
    return [[n for n in live if n in names] for live in steps.live]


class Values:
    """Live values of both models for all batches.

    Attributes:
        floats: Values of the float model.
        quants: Values of the model being quantized, where they differ.
        shared: Names of values that are the same in both.
        live: Names of values that the current or a later stage reads.
        masks: The mask of every batch; None without one.
    """

    def __init__(
        self, original: ir.Model, quantized: ir.Model, context: CalibrationContext, floats: Cache, quants: Cache, changed: Collection[str]
    ) -> None:
        self.floats, self.quants = floats, quants
        self.live: Sequence[str] = ()
        self._models, self._provider, self._changed = (original, quantized), context.provider, changed
        self._mask = MaskRule.of(dimensions_of(original), context.data, context.mask)
        self.masks: list[npt.NDArray[np.bool_] | None] = []
        names = fed_inputs(original)
        for b, batch in enumerate(context.data):
            self.masks.append(None if context.mask is None else current_mask(batch, context.mask))
            for name in names:
                floats.put(name, b, np.asarray(batch[name]))
        self.shared = set(names)  # nothing before them is quantized
        self._probe = None if self._mask.probe is None else {name: np.asarray(self._mask.probe[name]) for name in names}

    def __len__(self) -> int:
        return len(self.masks)

    def advance(self, live: Sequence[str], feedback: bool, first: bool) -> None:
        """Compute the values that are ``live`` from this stage on, with ``feedback`` in both models."""
        original, quantized = self._models
        previous = self.floats.names(0)
        new = [n for n in live if n not in previous]
        if not feedback:
            self.shared |= set(new)
        elif first:
            self.shared |= set(new) - set(self._changed)
        self._run(original, previous, new, self.floats, probe=True)
        if feedback:
            self._run(quantized, previous, [n for n in new if n not in self.shared], self.quants)
        self.live = live

    def _run(self, model: ir.Model, sources: Sequence[str], targets: Sequence[str], cache: Cache, probe: bool = False) -> None:
        """Compute the values ``targets`` from the values ``sources``, for all batches, into ``cache``."""
        if not targets:  # the layers read the model's inputs
            return
        caches = {name: self.floats if name in self.shared else cache for name in sources}
        with Session(cut(model, {n: caches[n].get(n, 0) for n in sources}, targets), self._provider) as session:
            needed = [i.name for i in session.inputs]
            for b in range(len(self)):
                for name, array in zip(targets, session.run({n: caches[n].get(n, b) for n in needed}, list(targets)), strict=True):
                    cache.put(name, b, array)
            if probe and self._probe is not None:
                try:
                    results = session.run({n: self._probe[n] for n in needed}, list(targets))
                except RuntimeFailure:  # the model fails at this shape, whatever its inputs declare
                    self._probe = None
                else:
                    self._probe |= zip(targets, results, strict=True)

    def keep(self, live: Sequence[str]) -> None:
        """Drop values that no later stage reads."""
        self.floats.keep(live)
        self.quants.keep(live)
        if self._probe is not None:
            self._probe = {name: array for name, array in self._probe.items() if name in live}

    def pair(self, name: str, batch: int) -> tuple[Tensor, Tensor]:
        """Return a value in the float model and in the model being quantized."""
        x = self.floats.get(name, batch)
        return x, x if name in self.shared else self.quants.get(name, batch)

    def most_rows(self, name: str) -> int:
        """Count the rows of a value, with those that a mask leaves out."""
        return sum(math.prod(self.floats.get(name, b).shape[:-1]) for b in range(len(self)))

    def follows_mask(self, name: str) -> bool:
        """See `MaskRule.follows`."""
        arrays = [self.floats.get(name, b) for b in self._mask.positions]
        return self._mask.follows([a.shape for a in (*arrays, *([] if self._probe is None else [self._probe[name]]))])

    def summand(self, layer: Product) -> str | None:
        """Name what is added to the output of a layer, if it is live and differs between the models."""
        residual = residual_operand(layer)
        return None if residual is None or residual not in self.live or residual in self.shared else residual

    def residual(self, layer: LinearLayer, name: str) -> str | None:
        """Name the `summand` of a layer that reads ``name``, if it has the same rows."""
        residual = self.summand(layer)
        if residual is None:
            return None
        return residual if self.floats.get(residual, 0).shape == (*self.floats.get(name, 0).shape[:-1], layer.n) else None


def _gather(stage: Sequence[LinearLayer], values: Values, context: CalibrationContext, schedule: Schedule) -> CalibrationResult:
    """Measure the inputs of a stage and, with feedback, the target moments of its layers."""
    stats: dict[str, LayerStats] = {}
    targets: dict[str, TargetMoments] = {}
    bad: list[str] = []
    unmasked: list[str] = []
    for name, readers in readers_of(stage).items():
        aimed = [layer for layer in readers if schedule.feedback and layer.weight_name not in schedule.unmoved]
        measured, masked, targets_of_readers = _measure(name, readers[0], values, context, aimed)
        if context.mask is not None:
            check_rows([0 if measured is None else measured.rows], context.mask)
            unmasked += [] if masked else [name]
        if measured is None:
            continue
        if not (np.isfinite(measured.target_mean).all() and np.isfinite(measured.gram.diagonal()).all()):
            bad.append(not_finite(name, readers, context.data.description))
        stats[name] = measured
        targets |= targets_of_readers
    raise_all(NonFiniteError, bad)
    return CalibrationResult(stats, tuple(unmasked), targets)


def _measure(
    name: str, first: LinearLayer, values: Values, context: CalibrationContext, aimed: Sequence[LinearLayer]
) -> tuple[LayerStats | None, bool, dict[str, TargetMoments]]:
    """Measure one value: its moments, whether the mask was applied in all batches, and the target moments of layers that read it.

    Its ``first`` reader says how wide it is, and is named in errors; those that are ``aimed`` get target moments, if it has changed.
    """
    choice = context.grids.get(name)
    activation, bounds = (None, None) if choice is None else (choice.grid, choice.bounds)
    aimed = [] if name in values.shared and activation is None else aimed
    residuals = {layer.name: value for layer in aimed if (value := values.residual(layer, name)) is not None}
    hold_out, k = context.hold_out, first.k
    of_few = few(1, k) and few(values.most_rows(name), k)  # then no matrix of K x K
    by_output = of_few or 4 * sum(layer.n for layer in aimed) < 3 * k  # fewer FLOPs than two matrices of K x K
    weights = {layer.name: layer.read() for layer in aimed if layer.name in residuals or by_output}
    outputs = {layer_name: Parts(hold_out, k, partial(OutputAccumulator, weight, few=of_few)) for layer_name, weight in weights.items()}
    paired = len(outputs) < len(aimed)
    inputs = Parts(hold_out, k, partial(MomentAccumulator, k, float_mean=True, paired=paired, few=of_few, backend=context.backend))
    follows = masked = values.follows_mask(name)

    def add(key: tuple[int, float], rows: list[Tensor]) -> None:
        (part, weight), (y, x, *errors) = key, rows
        inputs.sums[part].add_rows(y, x, weight)
        error_of = dict(zip(residuals, errors, strict=True))
        for layer_name, sums in outputs.items():
            sums.sums[part].add_rows(y, x, error_of.get(layer_name, 0.0), weight)

    with RowPool(add) as pool:
        for b in range(len(values)):
            x, y = values.pair(name, b)
            if bounds is not None:
                x, y = np.clip(x, *bounds), np.clip(y, *bounds)
            y = rounded(y, activation)
            kept = kept_rows(values.masks[b], x.shape) if follows else None
            masked &= kept is not None
            if x.shape[-1] != k:
                what = f"layer {first.name}: its input {name} has {x.shape[-1]} columns, and its weight {k} rows"
                raise ModelError(f"{what}; correct the shapes that the model declares, or the weight")
            errors = [_residual_error(values, residual, b, kept) for residual in residuals.values()]
            pool.put((inputs.part(b), context.data.weight(b)), (_rows(y, kept), _rows(x, kept), *errors))
    split = sum(sums.rows > 0 for sums in inputs.sums) > 1
    targets = {}
    for layer in aimed if split else ():
        if layer.name in outputs:
            targets[layer.name] = with_folds([sums.target_moments() for sums in outputs[layer.name].sums], inputs.folds)
        else:
            target = layer.read()
            targets[layer.name] = with_folds([sums.target_moments(target) for sums in inputs.sums], inputs.folds)
    return split_stats(inputs.sums, inputs.folds, activation), masked, targets


def _residual_error(values: Values, residual: str, batch: int, kept: npt.NDArray[np.bool_] | None) -> Tensor:
    """Return what ``residual`` differs by between the models ``(n, N)``."""
    r, r_hat = values.pair(residual, batch)
    return _rows(r - r_hat, kept)


def _rows(x: Tensor, kept: npt.NDArray[np.bool_] | None) -> Tensor:
    """Return the rows ``(n, K)`` of a value that count, in float32."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat if kept is None else flat[kept]).astype(np.float32, copy=False)
