"""Rounding of values between layers: which values, and on which grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.grid_type import GridType
from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes import Plan
from magr_onnx.passes.emit import tensors as tensor_emitter
from magr_onnx.passes.graph.inference import inferred_types
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.conv import find as find_convolutions
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.linear import find as find_linear
from magr_onnx.passes.tensors.ort_cpu import RULES
from magr_onnx.passes.tensors.region import Region, region_of
from magr_onnx.passes.tensors.whole import whole_graph
from magr_onnx.runtime.calibration import tensor_ranges
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Batches, run_batches
from magr_onnx.runtime.ort.session import as_floats
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.integer_convolutions import may_be_integer, why_float
from magr_onnx.workflow.non_linear import select_convolutions

CLIPPING, TRIALS = (1.0, 4.0, 16.0, 64.0), 16
"""Weights of clipping errors to choose ranges by, and batches that the outputs are compared on to choose the weight."""


def round_activations(model: ir.Model, plan: Plan, data: Batches | None, context: RunContext) -> dict[str, ActivationGrid]:
    """Mark the values of a float model that will be computed in integers, in place, and choose their grids.

    Args:
        model: The float model.
        plan: The whole plan.
        data: Batches that fit the model; without them there are no ranges.
        context: Of the run.

    Returns:
        Grids by the name of what is behind the mark (`magr_onnx.passes.emit.tensors`).
    """
    activations = plan.activations
    if data is None or activations is None or plan.input_grids != "static":
        return {}
    convolutions, linear = select_convolutions(model, plan, context.selection)[0], find_linear(model, context.selection)[0]
    region = _region(model, convolutions, linear, plan, data)
    if region is None:
        return {}
    Names.rescan(model.graph)
    marked = tensor_emitter.mark(model.graph, region)
    calibration, kind = CalibrationContext(data, provider=context.provider), grid_type(plan)
    measured = tensor_ranges.measure(
        model, region.grids, [*convolutions, *linear], calibration, kind=kind, progress=context.stage("ranges")
    )
    candidates = []
    for clipping in CLIPPING if kind.bits == 8 else CLIPPING[:1]:
        grids = tensor_ranges.grids(measured, activations.ranges, clipping, kind)
        candidates.append({name: grids[shared] for name, shared in marked.items()})
    chosen = candidates[0]
    if len(candidates) > 1 and activations.ranges == "auto":
        errors = _output_errors(model, data, context, candidates)
        chosen = candidates[errors.index(min(errors))]
    context.lap("ranges")
    return chosen


def _region(model: ir.Model, convolutions: Sequence[ConvLayer], linear: Sequence[LinearLayer], plan: Plan, data: Batches) -> Region | None:
    """Find what is computed in integers: the whole graph, or what is between convolutions."""
    integer = [layer for layer in convolutions if may_be_integer(layer, plan.rules)]
    if plan.rules is not None:
        layers: list[ConvLayer | LinearLayer] = [*integer, *linear]
        left_out = {layer.node for layer in (*find_convolutions(model)[0], *find_linear(model)[0])} - {layer.node for layer in layers}
        return whole_graph(model.graph, layers, plan.rules, inferred_types(model), left_out, grid_type(plan).bits)
    stage = plan.convolutions
    if not integer or stage is None or stage.form != "integer" or why_float(plan, stage, data) is not None:
        return None
    # onnxruntime 1.32 rounds again behind moves itself, and refuses what it has made of int8 from opset 21 on
    return region_of(model.graph, [layer.node for layer in integer], RULES, all_moves=grid_type(plan).signed)


def grid_type(plan: Plan) -> GridType:
    """Return what the grids of a plan's activations have in common."""
    assert plan.activations is not None
    return (plan.rules or RULES).grid_type(plan.activations.type)


def _output_errors(model: ir.Model, data: Batches, context: RunContext, candidates: Sequence[Mapping[str, ActivationGrid]]) -> list[float]:
    """Measure the error of the outputs that each of some grids causes, relative to each output, summed; on some batches."""
    trials = [rounded_copy(model, grids) for grids in candidates]
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


def rounded_copy(model: ir.Model, grids: Mapping[str, ActivationGrid]) -> ir.Model:
    """Copy a model with its marked values rounded."""
    copy = model.clone()
    Names.rescan(copy.graph)
    tensor_emitter.emit(copy.graph, grids)
    return copy
