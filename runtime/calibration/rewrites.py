"""Rewrites of a plan, run on the float model; statistics are collected on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.plan import Plan
from magr_onnx.passes.rewrites.base import Context, Groups
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import masked_values


def rewrite(
    model: ir.Model,
    plan: Plan,
    calibration: CalibrationContext | None,
    *,
    selection: Selection = ALL,
    gram_budget: int = moments.DEFAULT_BUDGET,
) -> list[str]:
    """Run the rewrites of a plan on ``model``, in place, and return notes for the report.

    Args:
        model: The float model.
        plan: The plan; its rewrites depend on its grid and its bias compensation.
        calibration: Data, mask and provider; None without data.
        selection: The layers that will be converted.
        gram_budget: Most bytes of Gram matrices in memory.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        CalibrationError: The mask leaves no rows.
    """

    def statistics(current: ir.Model, layers: Sequence[LinearLayer]) -> Groups:
        context = None if calibration is None else replace(calibration, followers={})  # the model has changed
        if context is not None:
            masked_values(current, moments.readers_of(layers), context)
        for group in moments.grouped(layers, gram_budget):
            yield group, {} if context is None else moments.collect(current, group, context).stats

    context = Context(plan.spec or Context().spec, plan.bias_policy, plan.activations is not None, selection, statistics)
    notes: list[str] = []
    for stage in plan.rewrites:
        notes += stage.rewrite(model, context) or [f"{stage.name} changed nothing: no layer meets its conditions and gains by it"]
    return notes
