"""Statistics of what convolutions read, and of what they should put out where error feedback reaches them.

With error feedback convolutions come in stages, each behind the quantized ones before it
(`magr_onnx.runtime.calibration.conv_stages`). Those without a place among stages come first, without: they are in bodies, share a weight,
have far fewer patches than inputs, or there are values between them that cannot be kept from one stage to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.core.types import LayerStats, TargetMoments
from magr_onnx.errors import ModelError, RuntimeFailure
from magr_onnx.passes.instrument import segments
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.weighted import by_weight
from magr_onnx.runtime.calibration import conv_patches, conv_stages
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.hold_out import HoldOut
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.workflow.context import RunContext

Gathered = tuple[list[ConvLayer], list[list[LayerStats] | None], list[TargetMoments]]


@dataclass(frozen=True, slots=True, eq=False)
class ConvModels:
    """The models that convolutions are measured in.

    Attributes:
        original: The float model.
        work: Its copy that is being quantized, whose convolutions these are.
        source: A copy of it from before any of them is quantized.
        changed: Names of values that are rounded in both copies.
    """

    original: ir.Model
    work: ir.Model
    source: ir.Model
    changed: Collection[str] = ()


def gather(
    models: ConvModels,
    layers: Sequence[ConvLayer],
    data: Batches | None,
    feedback: bool,
    context: RunContext,
    unmeasured: dict[str, str],
) -> Iterator[Gathered]:
    """Yield the convolutions of one weight with the statistics of what each reads, or None, and of its groups' target outputs, if any.

    The caller quantizes them in ``models.work`` before it asks for the next ones. ``unmeasured`` gets the reason of those without.
    """
    staged = _staged(models, layers, data, context, unmeasured) if feedback and data is not None else []
    names = {layer.name for layer in staged}
    first = [layer for layer in layers if layer.name not in names]
    for readers, stats in patch_moments(models.source, first, data, context, unmeasured):
        yield readers, stats, []
    if data is None or not staged:
        return
    changed = {*models.changed, *segments.outputs_of(models.work, first)}
    calibration = CalibrationContext(data, provider=context.provider)
    for layer, stats_of_groups, targets in conv_stages.staged(
        models.original, models.work, staged, calibration, changed, context.memory.cache
    ):
        yield [layer], [stats_of_groups], targets


def _staged(
    models: ConvModels, layers: Sequence[ConvLayer], data: Batches, context: RunContext, unmeasured: Collection[str]
) -> list[ConvLayer]:
    """Select the convolutions that have a place among stages, in the order of the graph."""
    outside = {layer.name for layer in segments.outside_stages(layers)}
    inside = [layer for layer in layers if layer.name not in outside and layer.name not in unmeasured]
    few = conv_patches.few_patches(models.source, inside, data, context.provider)
    place = {id(node): index for index, node in enumerate(models.work.graph)}
    inside = sorted((layer for layer in inside if layer.name not in few), key=lambda layer: place[id(layer.node)])
    return [] if segments.non_tensors(models.work, segments.segments_of(models.work, inside)) else inside


def patch_moments(
    model: ir.Model, layers: Sequence[ConvLayer], data: Batches | None, context: RunContext, unmeasured: dict[str, str]
) -> Iterator[tuple[list[ConvLayer], list[list[LayerStats] | None]]]:
    """Convolutions of one weight with their statistics, or None; ``unmeasured`` gets the reason of those that have none."""
    units = iter(by_weight(layers))
    readers = next(units, None)
    gathered: dict[str, list[LayerStats] | None] = {}
    hold_out = HoldOut.of(None if data is None else data.samples)
    for group in conv_patches.grouped(layers, context.memory.gram_budget, hold_out):
        measured = [layer for layer in group if layer.name not in unmeasured]
        stats: dict[str, list[LayerStats]] = {}
        if data is not None and measured:
            try:
                stats = conv_patches.collect(model, measured, data, provider=context.provider)
            except (ModelError, RuntimeFailure) as error:  # the model itself runs: this is about a copy with patches
                unmeasured |= dict.fromkeys((layer.name for layer in measured), conv_patches.cannot_gather(error))
        gathered |= {layer.name: stats.get(layer.name) for layer in group}
        while readers is not None and all(layer.name in gathered for layer in readers):
            yield readers, [gathered.pop(layer.name) for layer in readers]
            readers = next(units, None)
