"""What convolutions need to be computed in integers: grids of the values between them, and biases that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.int32_bias import with_room
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.types import ActivationGrid, Array
from magr_onnx.passes import Plan
from magr_onnx.passes.emit import tensors as tensor_emitter
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.instrument.taps import channel_taps
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layers.conv import ConvLayer, find
from magr_onnx.passes.tensors import channel_scales
from magr_onnx.passes.tensors.ort_cpu import RULES
from magr_onnx.passes.tensors.region import region_of
from magr_onnx.runtime.calibration import tensor_ranges
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Batches, run_batches
from magr_onnx.runtime.ort.session import as_floats
from magr_onnx.workflow.context import RunContext

CLIPPING, TRIALS = (1.0, 4.0, 16.0, 64.0), 16
"""Weights of clipping errors to choose ranges by, and batches that the outputs are compared on to choose the weight."""

POSITIONS, ROWS, PARTS = 8, 1024, 4
"""Positions of an activation that are looked at in every sample, rows of them that scales are chosen by, parts of the samples."""


def equalize(model: ir.Model, plan: Plan, data: Batches | None, context: RunContext) -> list[str]:
    """Scale the channels between convolutions of a float model, in place, where they will be rounded; return what was done."""
    stage = plan.convolutions
    if not plan.equalizes or data is None or stage is None or stage.form != "integer" or why_float(plan, stage, data) is not None:
        return []
    groups = channel_scales.classes_of(model.graph, [layer for layer in find(model, context.selection)[0] if may_be_integer(layer)])
    if not groups:
        return []
    names = [str(value.name) for group in groups for value in group.values]
    samples = iter(_channel_samples(model, names, data, context))
    scaled = 0
    for group in groups:
        factors = channel_scales.scales(group, [next(samples) for _ in group.values], stage.bits)
        if factors is not None:
            channel_scales.scale(group, factors)
            scaled += 1
    context.lap("equalize")
    return [f"channels of {scaled} of {len(groups)} activations between convolutions were scaled to share a grid"] if scaled else []


def _channel_samples(model: ir.Model, names: Sequence[str], data: Batches, context: RunContext) -> list[channel_scales.Samples]:
    """Sample values of a model, ``(batch, C, ...)``."""
    rows: list[list[Array]] = [[] for _ in names]
    peaks: list[list[list[Array]]] = [[[] for _ in range(PARTS)] for _ in names]
    taps = channel_taps(model, names, POSITIONS)
    for index, _, outputs in run_batches(taps, data, context.provider, context.stage("equalizing")):
        for i, (peak, sample) in enumerate(zip(outputs[::2], outputs[1::2], strict=True)):
            peaks[i][index % PARTS].append(peak)
            rows[i].append(sample)
    samples = []
    for of_value, parts in zip(rows, peaks, strict=True):
        of_all = np.concatenate(of_value)
        largest = np.stack([np.max(part, axis=0) for part in parts if part])
        samples.append(channel_scales.Samples(of_all[:: max(1, len(of_all) // ROWS)], largest))
    return samples


def why_float(plan: Plan, stage: Convolutions, data: Batches | None) -> str | None:
    """Say why convolutions stay float though the form is ``integer``; None if they need not."""
    if data is None:
        return "there is no calibration data to find ranges of activations with"
    if not stage.symmetric:
        return "onnxruntime's integer convolutions have symmetric weights"
    return None if plan.accumulator is None else "their accumulators are not constrained; no sum of theirs is part of the proof"


def round_activations(
    model: ir.Model, layers: Sequence[ConvLayer], plan: Plan, data: Batches | None, context: RunContext
) -> dict[str, ActivationGrid]:
    """Mark the values between the convolutions of a float model that will be computed in integers, in place, and choose their grids.

    Args:
        model: The float model.
        layers: Its convolutions that will be converted.
        plan: The whole plan.
        data: Batches that fit the model; without them there are no ranges.
        context: Of the run.

    Returns:
        Grids by the name of what is behind the mark (`magr_onnx.passes.emit.tensors`).
    """
    activations, stage = plan.activations, plan.convolutions
    if data is None or activations is None or stage is None or stage.form != "integer" or why_float(plan, stage, data) is not None:
        return {}
    integer = [layer for layer in layers if may_be_integer(layer)]
    if not integer:
        return {}
    signed = activations.type == "int8"
    # onnxruntime 1.32 rounds again behind moves itself, and refuses what it has made of int8 from opset 21 on
    region = region_of(model.graph, [layer.node for layer in integer], RULES, all_moves=signed)
    Names.rescan(model.graph)
    marked = tensor_emitter.mark(model.graph, region)
    calibration = CalibrationContext(data, provider=context.provider)
    measured = tensor_ranges.measure(model, region.grids, integer, calibration, signed=signed, progress=context.stage("ranges"))
    candidates = []
    for clipping in CLIPPING:
        grids = tensor_ranges.grids(measured, activations.ranges, clipping, signed)
        candidates.append({name: grids[str(value.name)] for name, value in marked.items()})
    chosen = candidates[0]
    if activations.ranges == "auto":
        errors = _output_errors(model, data, context, candidates)
        chosen = candidates[errors.index(min(errors))]
    context.lap("ranges")
    return chosen


def _output_errors(model: ir.Model, data: Batches, context: RunContext, candidates: Sequence[Mapping[str, ActivationGrid]]) -> list[float]:
    """Measure the error of the outputs that each of some grids causes, relative to each output, summed; on some batches."""
    trials = [_rounded(model, grids) for grids in candidates]
    errors: list[dict[int, float]] = [{} for _ in trials]
    powers: dict[int, float] = {}
    runs = [run_batches(each, data.limit(TRIALS), context.provider, fuses=False) for each in (model, *trials)]
    for results in zip(*runs, strict=True):
        for i, each in enumerate(zip(*(outputs for _, _, outputs in results), strict=True)):
            floats = [array for array in map(as_floats, each) if array is not None]
            if len(floats) < len(runs) or len({array.shape for array in floats}) > 1:
                continue
            real = floats[0].astype(np.float64)
            powers[i] = powers.get(i, 1e-30) + float(np.square(real).sum())
            for of_trial, output in zip(errors, floats[1:], strict=True):
                of_trial[i] = of_trial.get(i, 0.0) + float(np.square(real - output).sum())
    return [sum(of_trial[i] / powers[i] for i in of_trial) for of_trial in errors]


def _rounded(model: ir.Model, grids: Mapping[str, ActivationGrid]) -> ir.Model:
    """Round the marked values of a copy of a model."""
    trial = model.clone()
    Names.rescan(trial.graph)
    tensor_emitter.emit(trial.graph, grids)
    return trial


def may_be_integer(layer: ConvLayer) -> bool:
    """Whether onnxruntime has an integer kernel for a convolution, and its bias can be written."""
    return layer.op == "Conv" and not layer.nested and layer.dtype == ir.DataType.FLOAT and layer.takes_bias


def with_room_for_biases(
    readers: Sequence[ConvLayer], solutions: Sequence[LayerSolution], grids: Mapping[str, ActivationGrid]
) -> list[LayerSolution]:
    """Raise the scales of the channels of one weight whose biases would not fit into int32, for all convolutions that read it."""
    quantized = solutions[0].quantized
    assert quantized is not None
    for layer, solution in zip(readers, solutions, strict=True):
        parts = [bias for bias in (layer.read_bias(), solution.bias) if bias is not None]
        if layer.name in grids and parts:
            quantized = with_room(quantized, sum(parts[1:], start=parts[0]), grids[layer.name])
    return list(solutions) if quantized is solutions[0].quantized else [replace(s, quantized=quantized) for s in solutions]
