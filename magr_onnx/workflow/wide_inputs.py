"""Inputs of linear layers in 16 bits among those of 8, where these cost the most at the outputs of the model.

The product of such an input takes two of 8 bits (`magr_onnx.passes.emit.int8`), and about twice the time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core import knapsack
from magr_onnx.core.types import Activation, ActivationGrid
from magr_onnx.passes import Plan
from magr_onnx.passes.emit.tensors import mark_value
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.runtime.calibration.activation_ranges import choose_grids, product_name
from magr_onnx.runtime.calibration.context import CalibrationContext, Grids
from magr_onnx.runtime.calibration.moments import readers_of
from magr_onnx.runtime.data.sources import Steps
from magr_onnx.runtime.measure.rounding import output_errors, trial_data
from magr_onnx.workflow.goal import Goal
from magr_onnx.workflow.rounded_activations import described

NOTHING = (
    "no activations have 16 bits: in format qdq-int8 these are for inputs of linear layers, and there are none but those that convolutions "
    "read or make, too; format qdq-full can have them anywhere"
)


def with_share(plan: Plan, share: float) -> Plan:
    """Return a plan with a share of the work that may be done in 16 bits."""
    assert plan.activations is not None
    return replace(plan, activations=replace(plan.activations, wide=share))


def is_spent_on_activations(goal: Goal | None, plan: Plan, provider: str) -> bool:
    """Whether a budget is of loss, and the plan has activations of 8 bits that could have 16, where no share of these was asked for."""
    if goal is None or goal.loss is None or plan.activations is None or plan.activations.wide or plan.input_grids != "static":
        return False
    return not with_share(plan, 1.0).problems(provider)


def widen(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    grids: Grids,
    plan: Plan,
    known: Collection[str],
    calibration: CalibrationContext,
    progress: Steps,
) -> tuple[Grids, list[str]]:
    """Give inputs grids of 16 bits.

    The error that each causes alone is measured at the outputs; errors are assumed to add up, and layers to take time by the size of
    their weights.

    Args:
        model: The float model; not changed.
        layers: Its layers.
        grids: The grids of 8 bits, by the name of the value.
        plan: The plan; its ``activations.wide`` is the share of the work that layers with inputs of 16 bits may have, at most.
        known: Values that are on a grid before a layer reads them, and stay there.
        calibration: The data, and where to run.
        progress: Called after every batch.

    Returns:
        The grids, and a sentence for the report.
    """
    assert plan.activations is not None
    copy = model.clone()
    Names.rescan(copy.graph)
    values = {str(v.name): v for v in (*copy.graph.inputs, *(out for node in copy.graph for out in node.outputs))}
    readers, trials = {}, []
    for name, of in readers_of(layers).items():
        products, grid = set(map(product_name, of)), None if name not in grids else grids[name].grid
        uses = [(use.node, use.idx) for use in values[name].uses() if use.node.outputs[0].name in products] if name in values else []
        if uses and isinstance(grid, ActivationGrid) and name not in known:
            values[name].dtype = of[0].dtype  # which models need not say
            readers[name] = of
            trials.append({str(mark_value(copy.graph, values[name], uses, "rounded").name): grid})
    if not readers:
        return grids, [NOTHING]
    marks = [mark for trial in trials for mark in trial]
    losses = output_errors(copy, marks, trials, trial_data(calibration.data, len(trials)), calibration.provider, progress)
    work = [float(sum(layer.k * layer.n for layer in of)) for of in readers.values()]
    items = [knapsack.Item(np.array([0.0, cost]), np.array([loss, 0.0])) for cost, loss in zip(work, losses, strict=True)]
    total = sum(layer.k * layer.n for layer in layers)
    point = knapsack.least_loss(items, plan.activations.wide * total)
    choices = dict(zip(readers, point.choices if point else [0] * len(readers), strict=True))
    names = [name for name, choice in choices.items() if choice]
    readers_of_wide = [layer for layer in layers if layer.reads in names]
    kind = replace(plan.activations, type="int16" if plan.activations.type == "int8" else "uint16")
    chosen = choose_grids(model, readers_of_wide, calibration, replace(plan, activations=kind), {}, None)
    result = {**grids, **{name: replace(choice, grid=_whole_steps(choice.grid)) for name, choice in chosen.items()}}
    done = sum(cost for cost, name in zip(work, readers, strict=True) if name in names) / total
    return result, [described("inputs of layers", dict(zip(readers, losses, strict=True)), names, done)]


def _whole_steps(grid: Activation) -> Activation:
    """Return the grid of 16 bits over the same range whose every 256th value is on one of 8 (`ActivationGrid.halves`)."""
    return ActivationGrid.of_range(*grid.range, grid.signed).refined() if isinstance(grid, ActivationGrid) else grid
