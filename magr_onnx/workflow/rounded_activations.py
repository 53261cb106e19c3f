"""Rounding of values between layers: which values, and on which grids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.activation_ranges import Histogram, Method
from magr_onnx.core.grid_type import GridType
from magr_onnx.core.types import ActivationGrid
from magr_onnx.errors import ModelError, listed
from magr_onnx.passes import Plan
from magr_onnx.passes.emit import hard_activations
from magr_onnx.passes.emit import tensors as tensor_emitter
from magr_onnx.passes.graph.inference import inferred_types, inferred_values
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import layer_name
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.conv import find as find_convolutions
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.linear import find as find_linear
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.tensors import widths
from magr_onnx.passes.tensors.ort_cpu import RULES
from magr_onnx.passes.tensors.region import Region, SharedGrid, region_of
from magr_onnx.passes.tensors.whole import whole_graph
from magr_onnx.runtime.calibration import tensor_ranges
from magr_onnx.runtime.calibration.activation_ranges import hold_out_of
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Batches, Steps
from magr_onnx.runtime.measure.rounding import output_errors, trial_data
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.integer_convolutions import Rounding, may_be_integer, why_float
from magr_onnx.workflow.non_linear import select_convolutions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranges:
    """How ranges are chosen: by `magr_onnx.runtime.calibration.tensor_ranges.grid_of` with these arguments."""

    clipping: float = 1.0
    stretch: float = 0.0
    method: Method = "auto"


CANDIDATES = (*(Ranges(weight) for weight in (1.0, 4.0, 16.0, 64.0)), Ranges(method="percentile"), Ranges(stretch=1.1))
"""Ways of choosing the ranges of all values together; the last one has some to spare."""
INSURANCE, TRIALS = 1.12, 32
"""Rise of the error for which ranges are stretched, since unseen values go beyond those seen, and batches that errors are measured on."""


def round_activations(
    model: ir.Model,
    plan: Plan,
    data: Batches | None,
    context: RunContext,
    floats: Mapping[str, str] | None = None,
    float_share: float = 0.0,
) -> Rounding:
    """Mark the values of a float model that will be computed in integers, in place, and choose their grids.

    Args:
        model: The float model.
        plan: The whole plan.
        data: Batches that fit the model; without them there are no ranges.
        context: Of the run.
        floats: Why convolutions stay float that could be computed in integers, by name.
        float_share: Share of the work of what could be computed in integers that may stay float for accuracy.
    """
    floats, notes = dict(floats or {}), list[str]()
    if float_share and data is not None:
        costly, notes = _costly(model, plan, data, context, floats, float_share)
        floats |= costly
    activations, region = plan.activations, integer_region(model, plan, data, context.selection, floats)
    if data is None or activations is None or region is None:
        return Rounding(floats=floats, notes=tuple(notes))
    names = {group: str(group.values[0].name) for group in region.grids}
    choice, ranges = _choice(model, region, plan, data, context, floats)
    marks, kind, of_data = choice.marks, choice.kind, data.labels
    grids = choice.grids(ranges)
    context.lap("ranges")
    if plan.rules is None:
        return Rounding(grids, floats, tuple(notes))
    edges = widths.edges_of(region.units, marks, plan.rules)
    if kind.bits > 8:
        return Rounding({**grids, **choice.converted(edges, region.grids, grids, ranges)}, floats, tuple(notes))
    if not activations.wide:
        return Rounding(grids, floats, tuple(notes))
    groups = widths.may_be_wide(edges)
    found = context.once(("losses", of_data), lambda: choice.losses(grids, groups, context.stage("sensitivities")))
    losses = dict(zip(groups, found, strict=True))
    wide = widths.choose_wide(edges, losses, activations.wide)
    stored = widths.stored_wide(edges, wide)
    grids |= {name: choice.grid(choice.measured[group], Ranges(), 16) for name, group in marks.items() if group in stored}
    context.lap("sensitivities")
    by_name, chosen = {names[group]: loss for group, loss in losses.items()}, [names[group] for group in losses if group in wide]
    notes.append(described("activations", by_name, chosen, widths.share_of(edges, wide)))
    return Rounding({**grids, **choice.converted(edges, wide, grids, ranges)}, floats, tuple(notes))


def _choice(
    model: ir.Model, region: Region, plan: Plan, data: Batches, context: RunContext, floats: Collection[str]
) -> tuple[_Choice, Ranges]:
    """Mark the values of a region, in place, measure them, and choose how ranges are chosen; once for nodes that stay float."""
    activations = plan.activations
    assert activations is not None
    layers = [*select_convolutions(model, plan, context.selection)[0], *find_linear(model, context.selection)[0]]
    Names.rescan(model.graph)
    marks, kind = tensor_emitter.mark(model.graph, region), grid_type(plan)
    calibration, key = CalibrationContext(data, provider=context.provider), (data.labels, frozenset(floats))

    def measure() -> list[tuple[tuple[Histogram, ...], ActivationGrid | None, float]]:
        steps = context.stage("ranges")
        by_channel = activations.ranges == "daq"
        measured = tensor_ranges.measure(model, region.grids, layers, calibration, kind=kind, by_channel=by_channel, progress=steps)
        return [(each.parts, each.levels, each.reach) for each in measured]

    known = zip(region.grids, context.once(("ranges", key), measure), strict=True)
    each_of = {group: tensor_ranges.Measured(group, *of_group) for group, of_group in known}
    choice = _Choice(model, each_of, marks, activations.ranges, kind, data, context.provider)
    return choice, context.once(("choice of ranges", key), choice.ranges) if kind.bits == 8 else Ranges()


def _costly(
    model: ir.Model, plan: Plan, data: Batches, context: RunContext, floats: Mapping[str, str], share: float
) -> tuple[dict[str, str], list[str]]:
    """Choose what stays float since rounding the values around it costs the most at the outputs; return why, by name, and what to say.

    A value is not rounded where all operators that read or make it are float, as it has 16 bits where they have
    (`magr_onnx.passes.tensors.widths`): the same knapsack chooses. Values around linear layers are not among them.
    """
    copy = model.clone()
    region = integer_region(copy, plan, data, context.selection, floats)
    if region is None:
        return {}, []
    _set_shapes(copy, data)
    linear = {layer.node for layer in find_linear(copy, context.selection)[0]}
    convolutions = {layer.node: layer.name for layer in select_convolutions(copy, plan, context.selection)[0]}
    choice, ranges = _choice(copy, region, plan, data, context, floats)
    edges = widths.edges_of(region.units, choice.marks, plan.rules or RULES)
    fixed = {group for each in edges if each.unit.node in linear for group in each.groups}
    groups = [group for group in region.grids if group not in fixed]
    grids = choice.grids(ranges)
    key = ("losses of values", data.labels, frozenset(floats))
    found = context.once(key, lambda: choice.losses(grids, groups, context.stage("sensitivities")))
    losses = dict(zip(groups, found, strict=True))
    chosen = widths.choose_wide(edges, losses, share)
    context.lap("sensitivities")
    names = [layer_name(each.unit.node) for each in edges if each.is_wide(chosen)]
    few = [name for node, name in convolutions.items() if name in names]
    note = (
        f"{len(few)} of {len(convolutions)} convolutions are computed in float, {widths.share_of(edges, chosen):.1%} of the work; rounding "
        f"the values around them had caused {_share_of_error(losses, chosen):.0%} of the error: {listed(few)}"
    )
    return dict.fromkeys(names, "computed in float: rounding the values around it costs too much"), [note] if few else []


def _set_shapes(model: ir.Model, data: Batches) -> None:
    """Set the shapes that values of a model have for a batch, as far as they can be inferred."""
    batch = next(iter(data))
    for value in model.graph.inputs:
        if value.name in batch:  # those with a default may be missing
            value.shape = ir.Shape(np.shape(batch[str(value.name)]))
    shapes = {str(value.name): value.shape for value in inferred_values(model)}
    for node in model.graph:
        for value in node.outputs:
            value.shape = shapes.get(str(value.name)) or value.shape


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """Choices of grids, by errors at the outputs of a model.

    Attributes:
        model: The float model, with marks.
        measured: What is known of values that share a grid.
        marks: These values by the names behind their marks.
        method: Which ranges to try.
        kind: What grids have in common.
        data: Batches that fit the model.
        provider: Where to run.
    """

    model: ir.Model
    measured: Mapping[SharedGrid, tensor_ranges.Measured]
    marks: Mapping[str, SharedGrid]
    method: Method
    kind: GridType
    data: Batches
    provider: str

    def grid(self, measured: tensor_ranges.Measured, ranges: Ranges, bits: int) -> ActivationGrid:
        kind = replace(self.kind, bits=bits)
        method = ranges.method if self.method == "auto" else self.method
        return tensor_ranges.grid_of(measured, method, ranges.clipping, kind, ranges.stretch)

    def grids(self, ranges: Ranges, without: int | None = None) -> dict[str, ActivationGrid]:
        """Choose the grids of all values, by name; ``without`` a part of the data."""
        measured = self.measured if without is None else {group: each.without(without) for group, each in self.measured.items()}
        chosen = {group: self.grid(each, ranges, self.kind.bits) for group, each in measured.items()}
        return {name: chosen[group] for name, group in self.marks.items()}

    def ranges(self) -> Ranges:
        """Choose how ranges are chosen, by the error at the outputs.

        Few samples are run in parts, each on grids that the others give. The stretched ranges are taken if they cost little.
        """
        if self.method != "auto":
            return Ranges()
        hold_out, errors = hold_out_of(self.data), [0.0] * len(CANDIDATES)
        for part in range(hold_out.parts):
            data = self.data.select([i for i in range(len(self.data)) if hold_out.part(i) == part]).limit(TRIALS // hold_out.parts)
            trials = [self.grids(each, part) for each in CANDIDATES]
            of_part = output_errors(self.model, self.marks, trials, data, self.provider) if len(data) else [0.0] * len(trials)
            errors = [a + b for a, b in zip(errors, of_part, strict=True)]
        return CANDIDATES[-1 if errors[-1] <= INSURANCE * min(errors) else errors.index(min(errors))]

    def losses(self, grids: Mapping[str, ActivationGrid], groups: Sequence[SharedGrid], progress: Steps) -> list[float]:
        """Measure the error that each of some grids of 8 bits causes alone."""
        trials = [{name: grids[name] for name, of_mark in self.marks.items() if of_mark is group} for group in groups]
        return output_errors(self.model, self.marks, trials, trial_data(self.data, len(trials)), self.provider, progress)

    def converted(
        self, edges: Sequence[widths.Edges], wide: Collection[SharedGrid], grids: Mapping[str, ActivationGrid], ranges: Ranges
    ) -> dict[str, ActivationGrid]:
        """Mark what is converted where some values have 16 bits; return the grids by name."""
        own = {group: grids[name] for name, group in self.marks.items()}
        marked = tensor_emitter.mark_conversions(self.model.graph, list(widths.conversions(edges, wide)))
        return {
            name: own[each.group].refined() if each.exact else self.grid(self.measured[each.group], ranges, each.bits)
            for name, each in marked.items()
        }


def described(what: str, losses: Mapping[str, float], wide: Collection[str], work: float) -> str:
    """Say which values have 16 bits.

    Args:
        what: What the values are.
        losses: What rounding each to 8 bits costs, by name.
        wide: Names of those of 16 bits.
        work: The share of the work that is done in 16 bits.
    """
    if losses and not wide:
        return f"none of {len(losses)} {what} have 16 bits: the readers of any have more than that share of the work; give a larger one"
    return (
        f"{len(wide)} of {len(losses)} {what} have 16 bits, in {work:.1%} of the work; they had caused "
        f"{_share_of_error(losses, wide):.0%} of the error of rounding to 8: {listed(sorted(wide, key=lambda name: -losses[name]))}"
    )


def _share_of_error(losses: Mapping[T, float], chosen: Collection[T]) -> float:
    """Return what rounding some values costs, of what rounding all costs."""
    return sum(losses[value] for value in chosen) / max(sum(losses.values()), 1e-300)


def integer_region(model: ir.Model, plan: Plan, data: Batches | None, selection: Selection, floats: Collection[str] = ()) -> Region | None:
    """Find what is computed in integers: the whole graph, or what is between convolutions, but for nodes named ``floats``.

    None where nothing is: without ``data`` there are no ranges of activations.
    """
    if data is None or plan.activations is None or plan.input_grids != "static":
        return None
    convolutions, linear = select_convolutions(model, plan, selection)[0], find_linear(model, selection)[0]
    integer = [layer for layer in convolutions if may_be_integer(layer, plan.rules) and layer.name not in floats]
    left_out = {node for node in model.graph if layer_name(node) in floats}
    if plan.rules is not None:
        layers: list[ConvLayer | LinearLayer] = [*integer, *linear]
        left_out |= {layer.node for layer in (*find_convolutions(model)[0], *find_linear(model)[0])} - {layer.node for layer in layers}
        whole = whole_graph(model.graph, layers, plan.rules, inferred_types(model), left_out)
        if not whole.grids and not floats:
            kinds = ", ".join(sorted({layer.dtype.name.lower() for layer in layers}))
            raise ModelError(
                f"format qdq-full rounds float32 values, and no operator that {plan.rules.name} takes reads and makes any (weights are "
                f"{kinds or 'of no layer'}); export the model in float32, or use format qdq"
            )
        return whole if whole.grids else None
    stage = plan.convolutions
    if not integer or stage is None or stage.form != "integer" or why_float(stage, data) is not None:
        return None
    # onnxruntime 1.32 rounds again behind moves itself, and refuses what it has made of int8 from opset 21 on
    return region_of(model.graph, [layer.node for layer in integer], RULES, left_out, all_moves=grid_type(plan).signed)


def grid_type(plan: Plan) -> GridType:
    """Return what the grids of a plan's activations have in common."""
    assert plan.activations is not None
    return (plan.rules or RULES).grid_type(plan.activations.type)


def rounded_copy(model: ir.Model, grids: Mapping[str, ActivationGrid], plan: Plan) -> ir.Model:
    """Copy a model with its marked values rounded, in the form of the runtime that a plan is for."""
    copy = model.clone()
    Names.rescan(copy.graph)
    tensor_emitter.emit(copy.graph, grids)
    if (plan.rules or RULES).lowered:
        hard_activations.lower(copy.graph)
    return copy
