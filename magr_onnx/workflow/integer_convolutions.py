"""What convolutions need to be computed in integers: grids of the values between them, and biases that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.int32_bias import with_room
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.types import ActivationGrid, Array
from magr_onnx.passes import Plan
from magr_onnx.passes.instrument.taps import channel_taps
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layers.conv import ConvLayer, find
from magr_onnx.passes.tensors import channel_scales
from magr_onnx.passes.tensors.rules import Rules
from magr_onnx.runtime.data.sources import Batches, run_batches
from magr_onnx.workflow.context import RunContext

POSITIONS, ROWS, PARTS = 8, 1024, 4
"""Positions of an activation that are looked at in every sample, rows of them that scales are chosen by, parts of the samples."""


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """What is rounded how.

    Attributes:
        grids: By the name of what is behind the mark (`magr_onnx.passes.emit.tensors`).
        floats: Why convolutions stay float that could be computed in integers, by name.
        notes: Sentences for the report.
    """

    grids: Mapping[str, ActivationGrid] = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def equalize(model: ir.Model, plan: Plan, data: Batches | None, context: RunContext) -> list[str]:
    """Scale the channels between convolutions of a float model, in place, where they will be rounded; return what was done."""
    stage = plan.convolutions
    if not plan.equalizes or data is None or stage is None or stage.form != "integer" or why_float(stage, data) is not None:
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


def why_float(stage: Convolutions, data: Batches | None) -> str | None:
    """Say why convolutions stay float though the form is ``integer``; None if they need not."""
    if data is None:
        return "there is no calibration data to find ranges of activations with"
    return None if stage.symmetric else "onnxruntime's integer convolutions have symmetric weights"


def may_be_integer(layer: ConvLayer, rules: Rules | None = None) -> bool:
    """Whether a runtime, by default onnxruntime, has an integer kernel for a convolution, and its bias can be written."""
    has_kernel = layer.op == "Conv" or (rules is not None and rules.computes(layer.node))
    return has_kernel and not layer.nested and layer.dtype == ir.DataType.FLOAT and layer.takes_bias


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
