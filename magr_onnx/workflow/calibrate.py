"""What calibration gathers for a plan: grids of activations, statistics of what layers read, gradients of what they put out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.product import Product
from magr_onnx.errors import RuntimeFailure, listed
from magr_onnx.passes import LinearLayer, Plan
from magr_onnx.passes.instrument import segments
from magr_onnx.passes.layers.linear import find
from magr_onnx.passes.layers.weighted import sharing
from magr_onnx.runtime.calibration import activation_ranges, fisher, moments, subgraphs
from magr_onnx.runtime.calibration import staged as stages
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import masked_values
from magr_onnx.runtime.data.sources import Batches, part_of
from magr_onnx.workflow.context import RunContext


def calibration_of(data: Batches | None, context: RunContext) -> CalibrationContext | None:
    """What calibration is done with: data, and mask and provider of the run; None without data."""
    return None if data is None else CalibrationContext(data, context.mask, context.provider, backend=context.backend)


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """The models of a calibration.

    Attributes:
        original: The float model.
        work: The model being quantized: a copy of ``original`` but for what makes the ``changed`` values.
        tapped: The float model, with what layers in bodies read as values of the main graph.
        changed: Names of the values of ``work`` that are not the float model's from the beginning.
        unmoved: Names of weights that error feedback is not to move.
    """

    original: ir.Model
    work: ir.Model
    tapped: subgraphs.TappedModel
    changed: Collection[str] = ()
    unmoved: Collection[str] = ()


def gather(
    models: Models, layers: Sequence[LinearLayer], calibration: CalibrationContext | None, feedback: bool, context: RunContext
) -> Iterator[tuple[Sequence[LinearLayer], moments.CalibrationResult]]:
    """Groups of layers with the statistics of what they read; layers that a job directory has come without.

    There are three ways: without data no layer has statistics; with error feedback, or where the model is large, layers come in stages, as
    far as they have a place among stages; all others have statistics of the float model, run as a whole.

    Args:
        models: The caller quantizes the layers of a group in ``models.work`` before it asks for the next one.
        layers: Layers of ``models.work``.
        calibration: Data and how to read it; None for none.
        feedback: Whether stages see the quantized layers before them.
        context: Of the run.
    """
    if calibration is None:
        yield layers, moments.CalibrationResult({}, ())
        return
    split = _split(models, layers, feedback, context.memory.large)
    yield from _of_the_whole(models.tapped, split, calibration, context)
    if split.staged:
        yield from _in_stages(models, split, calibration, feedback, context)


@dataclass(frozen=True, slots=True, eq=False)
class _Split:
    """Layers by where their statistics come from.

    Attributes:
        unstaged: From the float model, run as a whole.
        staged: From stages, after those; None where the model is not run in stages.
        cuts: Layers to cut the model at; None for the staged ones.
        changed: Values that differ from the float model's where the stages begin, by name.
    """

    unstaged: Sequence[LinearLayer]
    staged: Sequence[LinearLayer] | None = None
    cuts: Sequence[LinearLayer] | None = None
    changed: Collection[str] = ()


def _split(models: Models, layers: Sequence[LinearLayer], feedback: bool, large: bool) -> _Split:
    """Where the statistics of each layer come from.

    Layers in bodies and those that share a weight have no one place among stages: they come first, with statistics of the float model, and
    the stages see them quantized. Where the float model cannot run as a whole, layers in bodies have none, and those that share a weight
    are solved one by one.
    """
    cuttable = large and not uncuttable(models.work)
    if not (feedback or cuttable):
        return _Split(layers)
    first = [layer for layer in segments.outside_stages(layers) if layer.nested or not large]
    names = {layer.name for layer in first}
    cuts = _main_layers(models.work) if cuttable else None  # cut at all of them, no segment is large
    changed = {*models.changed, *segments.outputs_of(models.work, first)}
    return _Split(first, [layer for layer in layers if layer.name not in names], cuts, changed)


def _of_the_whole(
    tapped: subgraphs.TappedModel, split: _Split, calibration: CalibrationContext, context: RunContext
) -> Iterator[tuple[Sequence[LinearLayer], moments.CalibrationResult]]:
    """Groups of layers whose Gram matrices fit into memory together, one pass over the data each."""
    groups = moments.grouped(split.unstaged, context.memory.gram_budget, calibration.hold_out)
    unsolved = [tapped.reached(group) if any(map(context.is_unsolved, group)) else [] for group in groups]
    masked_values(tapped.model, moments.readers_of(itertools.chain.from_iterable(unsolved)), calibration)  # for all groups at once
    for index, (group, reached) in enumerate(zip(groups, unsolved, strict=True)):
        progress = part_of(context.stage("calibrating"), index, len(groups)) if split.staged is None else None
        yield group, moments.collect(tapped.model, reached, calibration, progress)


def _in_stages(
    models: Models, split: _Split, calibration: CalibrationContext, feedback: bool, context: RunContext
) -> Iterator[tuple[Sequence[LinearLayer], moments.CalibrationResult]]:
    """Stages of layers; the float model of a large model too is never in memory as a whole."""
    memory = context.memory
    schedule = stages.Schedule(
        feedback=feedback,
        cache=memory.cache,
        changed=split.changed,
        unmoved=models.unmoved,
        gram_budget=memory.gram_budget if memory.large else None,
        is_unsolved=context.is_unsolved,
        cuts=split.cuts,
    )
    return stages.staged(models.original, models.work, split.staged or [], calibration, schedule, context.stage("calibrating"))


def _main_layers(model: ir.Model) -> list[LinearLayer]:
    return [layer for layer in find(model)[0] if not layer.nested]


def uncuttable(model: ir.Model) -> list[str]:
    """Values between linear layers that cannot be kept from one stage to the next, by name."""
    return segments.non_tensors(model, segments.segments_of(model, _main_layers(model)))


def held_out_for(plan: Plan) -> str:
    """What needs a part of the rows held out."""
    wants = ["comparison with solutions without data"] if plan.holds_out else []
    return " and no ".join(["error feedback"] * (plan.error_feedback is not None) + wants)


def without_stages(model: ir.Model, layers: Sequence[LinearLayer], plan: Plan) -> tuple[Plan, list[str]]:
    """The plan, without error feedback where the model cannot be cut into stages, and why."""
    if plan.error_feedback is None:
        return plan, []
    taken = {layer.name for layer in segments.outside_stages(layers)}
    containers = segments.non_tensors(model, segments.segments_of(model, [layer for layer in layers if layer.name not in taken]))
    if not containers:
        return plan, []
    note = f"no error feedback: {listed(containers)} between layers is no tensor, and cannot be kept from stage to stage"
    return replace(plan, error_feedback=None), [note]


def output_hessian(
    model: ir.Model, layers: Sequence[LinearLayer], data: Batches | None, plan: Plan, context: RunContext, notes: list[str]
) -> contextlib.AbstractContextManager[fisher.Fisher | None]:
    """Second moments of gradients, if the plan asks for them; what could not be had is noted."""
    if plan.output_hessian is None:
        return contextlib.nullcontext()
    quantize, adaptive = plan.resolved.quantize, plan.output_hessian.kind == "adaptive"
    without_them = "the Gram matrix alone counts" if adaptive else "their outputs weigh the same"
    if data is None or quantize is None or not quantize.weighs_outputs:
        reason = "there is no calibration data" if data is None else "the quantizer takes none, or none under an accumulator"
        notes.append(f"no gradients for any layer: {reason}; {without_them}")
        return contextlib.nullcontext()
    shared, outputs = sharing(layers), {value.name for value in model.graph.outputs}
    inner = [layer for layer in layers if adaptive or layer.output.name not in outputs]  # errors there weigh the same in any case
    left_out = [layer for layer in inner if layer.nested or layer.name in shared or fisher.is_wide(layer, adaptive)]
    if left_out:
        reasons = f"in the body of a node, of one weight with others, or wider than {fisher.MAX_WIDTH}"
        notes.append(f"no gradients for {listed([layer.name for layer in left_out])}: {reasons}; {without_them}")
    taken = [layer for layer in inner if layer not in left_out]
    where: dict[str, Any] = {"provider": context.provider, "progress": context.stage("differentiating")}
    try:
        if adaptive:
            hessians = fisher.collect_adaptive(model, taken, data, plan.output_hessian.share, **where)
        else:
            hessians = fisher.collect(model, taken, data, **where)
    except RuntimeFailure as error:  # the model itself runs: this is about the gradients
        notes.append(f"no gradients for any layer: {str(error).splitlines()[0]}; {without_them}")
        return contextlib.nullcontext()
    missing = sum(hessians.moments(str(layer.output.name)) is None for layer in taken)
    if missing:
        blocked = ", ".join(sorted(hessians.blocked))
        reason = f"{blocked} cannot be differentiated" if blocked else "they change no output"
        notes.append(f"no gradients for {missing} layers: {reason}; {without_them}")
    return hessians


def completing(
    result: moments.CalibrationResult,
    source: subgraphs.TappedModel,
    hessian: fisher.Fisher | None,
    calibration: CalibrationContext | None,
    measured: bool,
) -> Callable[[LinearLayer, LayerProblem], LayerProblem]:
    """A function that adds to a layer's problem what calibration found beside the moments of its input, if these were ``measured``."""

    def complete(layer: LinearLayer, problem: LayerProblem) -> LayerProblem:
        data_free = measured and problem.stats.is_data_free
        moments = result.targets.get(layer.name)
        completed = replace(
            activation_ranges.with_grids(problem, layer, {} if calibration is None else calibration.grids),
            weight=moments.cross.right if moments is not None and isinstance(moments.cross, Product) else problem.weight,  # one copy
            target_moments=moments,
            notes=(f"data-free: {source.missing_reason(layer) or subgraphs.NEVER}",) if data_free else (),
        )
        return completed if hessian is None else hessian.completed(completed, str(layer.output.name))

    return complete
