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
from magr_onnx.runtime.calibration.context import CalibrationContext, GridChoice, Grids
from magr_onnx.runtime.calibration.moments import readers_of
from magr_onnx.runtime.measure.rounding import output_errors, trial_data
from magr_onnx.workflow.context import RunContext
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


def may_be_float(goal: Goal | None, plan: Plan, provider: str) -> bool:
    """Whether a budget is of loss, and may be spent on convolutions that stay float: where values between them have 8 bits and no more."""
    if goal is None or goal.loss is None or plan.activations is None or plan.activations.wide or plan.input_grids != "static":
        return False
    integer = plan.convolutions is not None and plan.convolutions.form == "integer" and plan.activations.type in ("uint8", "int8")
    return integer and (plan.rules is None or not is_spent_on_activations(goal, plan, provider))


def may_widen(
    model: ir.Model, layers: Sequence[LinearLayer], grids: Grids, known: Collection[str]
) -> dict[str, tuple[list[LinearLayer], ir.Value, list[tuple[ir.Node, int]]]]:
    """Find the inputs of layers that could have 16 bits, by name.

    Args:
        model: The float model.
        layers: Its layers.
        grids: The grids of 8 bits.
        known: Values that are on a grid before a layer reads them, and stay there.

    Returns:
        For each its layers, the value, and where their products read it.
    """
    values = {str(v.name): v for v in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs))}
    found = {}
    for name, of in readers_of(layers).items():
        products, grid = set(map(product_name, of)), None if name not in grids else grids[name].grid
        uses = [(use.node, use.idx) for use in values[name].uses() if use.node.outputs[0].name in products] if name in values else []
        if uses and isinstance(grid, ActivationGrid) and name not in known:
            found[name] = of, values[name], uses
    return found


def widen(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    grids: Grids,
    plan: Plan,
    known: Collection[str],
    calibration: CalibrationContext,
    context: RunContext,
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
        context: Of the run.

    Returns:
        The grids, and a sentence for the report.
    """
    assert plan.activations is not None
    readers = {name: of for name, (of, _, _) in may_widen(model, layers, grids, known).items()}
    if not readers:
        return grids, [NOTHING]
    of_data = calibration.data.labels
    losses = context.once(("losses of inputs", of_data), lambda: _losses(model, layers, grids, known, calibration, context))
    work = [float(sum(layer.k * layer.n for layer in of)) for of in readers.values()]
    items = [knapsack.Item(np.array([0.0, cost]), np.array([loss, 0.0])) for cost, loss in zip(work, losses, strict=True)]
    total = sum(layer.k * layer.n for layer in layers)
    point = knapsack.least_loss(items, plan.activations.wide * total)
    choices = dict(zip(readers, point.choices if point else [0] * len(readers), strict=True))
    names = [name for name, choice in choices.items() if choice]
    kind = replace(plan.activations, type="int16" if plan.activations.type == "int8" else "uint16")
    measured = context.once(("grids of inputs in 16 bits", of_data), dict[str, GridChoice])
    missing = [layer for layer in layers if layer.reads in names and layer.reads not in measured]
    measured |= choose_grids(model, missing, calibration, replace(plan, activations=kind), {}, None)
    result = {**grids, **{name: replace(measured[name], grid=_whole_steps(measured[name].grid)) for name in names}}
    done = sum(cost for cost, name in zip(work, readers, strict=True) if name in names) / total
    return result, [described("inputs of layers", dict(zip(readers, losses, strict=True)), names, done)]


def _losses(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    grids: Grids,
    known: Collection[str],
    calibration: CalibrationContext,
    context: RunContext,
) -> list[float]:
    """Measure the error that each input causes alone that could have 16 bits, in 8."""
    copy = model.clone()
    Names.rescan(copy.graph)
    trials = []
    for name, (of, value, uses) in may_widen(copy, layers, grids, known).items():
        value.dtype, grid = of[0].dtype, grids[name].grid  # models need not say the type
        assert isinstance(grid, ActivationGrid)
        trials.append({str(mark_value(copy.graph, value, uses, "rounded").name): grid})
    marks, data = [mark for trial in trials for mark in trial], trial_data(calibration.data, len(trials))
    return output_errors(copy, marks, trials, data, calibration.provider, context.stage("sensitivities"))


def _whole_steps(grid: Activation) -> Activation:
    """Return the grid of 16 bits over the same range whose every 256th value is on one of 8 (`ActivationGrid.halves`)."""
    return ActivationGrid.of_range(*grid.range, grid.signed).refined() if isinstance(grid, ActivationGrid) else grid
