"""What calibration gathers for a pipeline: grids of activations, statistics of what layers read, gradients of what they put out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem
from magr_onnx.errors import RuntimeFailure
from magr_onnx.passes import LinearLayer, Plan
from magr_onnx.passes.instrument import segments
from magr_onnx.passes.layers.linear import find
from magr_onnx.runtime.calibration import activation_ranges, fisher, moments, subgraphs
from magr_onnx.runtime.calibration import staged as stages
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.hold_out import NONE, HoldOut
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.workflow.context import RunContext


def gather(
    original: ir.Model,
    work: ir.Model,
    source: subgraphs.Tapped,
    layers: Sequence[LinearLayer],
    data: Batches | None,
    feedback: bool,
    hold_out: bool,
    grids: activation_ranges.Grids,
    context: RunContext,
    changed: Collection[str] = (),
) -> Iterator[tuple[Sequence[LinearLayer], moments.Calibration]]:
    """Groups of layers with the statistics of what they read: in stages behind quantized layers, or all of the float model's.

    ``changed`` are values of ``work``, by name, that are not the float model's from the beginning. The float model of a large model
    runs in stages too, so that it is never in memory as a whole. Layers that a job directory has come without statistics.

    Layers in bodies and those that share a weight have no one place among stages: they come first, with statistics of the float model
    (tapped as ``source``), and the stages see them quantized. Where the float model cannot run as a whole, layers in bodies have none, and
    those that share a weight are solved one by one.
    """
    if data is None:
        yield layers, moments.Calibration({}, ())
        return
    large, progress = context.memory.large, context.stage("calibrating")
    setup = CalibrationContext(data, context.mask, context.provider, HoldOut() if hold_out else NONE, grids.inputs, grids.bounds)
    first = [layer for layer in segments.apart(layers) if layer.nested or not large]
    taken = {layer.name for layer in first}
    rest = [layer for layer in layers if layer.name not in taken]
    every = _main_layers(work) if large else []  # cut at all of them, no segment is large
    cuttable = large and not uncuttable(work)
    staged = feedback or cuttable
    if not staged:
        first, rest = list(layers), []
    changed = {*changed, *segments.made_by(work, first)} if rest else changed
    groups = moments.plan(first, context.memory.gram_budget, hold_out)
    for index, group in enumerate(groups):
        seen = source.reached(group) if any(map(context.is_unsolved, group)) else []
        yield (
            group,
            moments.collect(source.model, seen, setup, None if staged else _part(progress, index, len(groups))),
        )
    if rest:
        yield from stages.staged(
            original,
            work,
            rest,
            setup,
            stages.Schedule(
                feedback,
                context.memory.cache,
                changed,
                context.memory.gram_budget if large else None,
                context.is_unsolved,
                every if cuttable else None,
            ),
            progress,
        )


def _main_layers(model: ir.Model) -> list[LinearLayer]:
    return [layer for layer in find(model)[0] if not layer.nested]


def uncuttable(model: ir.Model) -> list[str]:
    """Values between linear layers that cannot be kept from one stage to the next, by name."""
    return segments.not_tensors(model, segments.segments_of(model, _main_layers(model)))


def held_out_for(plan: Plan) -> str:
    """What needs a part of the rows held out."""
    wants = ["choice of options per layer"] if plan.holds_out else []
    return " and no ".join(["error feedback"] * (plan.error_feedback is not None) + wants)


def without_stages(model: ir.Model, layers: Sequence[LinearLayer], plan: Plan) -> tuple[Plan, list[str]]:
    """The plan, without error feedback where the model cannot be cut into stages, and why."""
    if plan.error_feedback is None:
        return plan, []
    taken = {layer.name for layer in segments.apart(layers)}
    containers = segments.not_tensors(model, segments.segments_of(model, [layer for layer in layers if layer.name not in taken]))
    if not containers:
        return plan, []
    note = f"no error feedback: {', '.join(containers[:3])} between layers is no tensor, and cannot be kept from stage to stage"
    return replace(plan, error_feedback=None), [note]


@contextlib.contextmanager
def output_hessian(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    data: Batches | None,
    plan: Plan,
    provider: str,
    progress: Callable[[int, int], None] | None,
    notes: list[str],
) -> Iterator[fisher.Fisher | None]:
    """Second moments of gradients at layer outputs, if the plan asks for them; what could not be had is noted."""
    if data is None or plan.output_hessian is None:
        yield None
        return
    layers = [layer for layer in layers if not layer.nested]  # gradients do not reach into bodies
    try:
        found = fisher.collect(model, layers, data, provider=provider, progress=progress)
    except RuntimeFailure as error:  # the model itself runs: this is about the gradients
        notes.append(f"no gradients, all outputs weigh the same: {str(error).splitlines()[0]}")
        yield None
        return
    if found.blocked:
        without = sum(found.get(str(layer.output.name)) is None for layer in layers)
        blocked = ", ".join(sorted(found.blocked))
        notes.append(f"no gradients for {without} layers: {blocked} cannot be differentiated; their outputs weigh the same")
    with found:
        yield found


def completing(
    result: moments.Calibration,
    source: subgraphs.Tapped,
    grids: activation_ranges.Grids,
    hessian: fisher.Fisher | None,
    data: Batches | None,
) -> Callable[[LinearLayer, LayerProblem], LayerProblem]:
    """A function that adds to a layer's problem what calibration found beside the moments of its input."""

    def complete(layer: LinearLayer, problem: LayerProblem) -> LayerProblem:
        data_free = data is not None and problem.stats.is_data_free
        return replace(
            problem,
            activation=grids.inputs.get(moments.input_name(layer)),
            output_grid=grids.products.get(str(layer.node.outputs[0].name)),
            target_moments=result.goals.get(layer.name),
            output_hessian=None if hessian is None else hessian.get(str(layer.output.name)),
            notes=(f"data-free: {source.why(layer) or subgraphs.NEVER}",) if data_free else (),
        )

    return complete


def _part(progress: Callable[[int, int], None], index: int, count: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(index * total + done, count * total)
