"""One round over the linear layers of a model: all of them calibrated, solved and written, or written again with other solutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import onnx_ir as ir

from magr_onnx.config.options import Options
from magr_onnx.core.types import LayerStats, QuantizedWeight
from magr_onnx.passes import LinearLayer, Plan, Skip, SolvedLayer
from magr_onnx.passes.emit import tensors as tensor_emitter
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.linear import find
from magr_onnx.passes.layerwise import run_layers
from magr_onnx.runtime.calibration import fisher, moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.hold_out import NONE, HoldOut
from magr_onnx.workflow import mixed_precision, rounded_activations, tied_tables
from magr_onnx.workflow.calibrate import Models, completing, gather
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.converted import Converted
from magr_onnx.workflow.solutions import Solutions


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What every round over the linear layers starts from.

    Attributes:
        models: The float model and, as ``work``, that with its convolutions and tables converted, which every round copies.
        layers: Linear layers of ``work`` that will be converted, if a budget does not keep them.
        plan: The plan, as far as this model can be carried through it.
        calibration: What layers are calibrated with, grids of activations included; None for data-free.
        needs_statistics: Whether layers without statistics stay as they are.
        assigned: Options and plan of layers that have their own, by name.
        tied: Names of weights that are tables of embeddings, too, and one tensor with them in the result.
        convolutions: Convolutions of the float model whose bits a budget chooses; they are floats in ``work``.
        skips: What stays as it is.
        notes: Sentences for the report.
        may_widen: As in `Solved`.
    """

    models: Models
    layers: list[LinearLayer]
    plan: Plan
    calibration: CalibrationContext | None
    needs_statistics: bool
    assigned: Mapping[str, tuple[Options, Plan]]
    tied: frozenset[str]
    skips: list[Skip]
    notes: list[str]
    convolutions: Sequence[ConvLayer] = ()
    may_widen: bool = True

    @property
    def plans(self) -> dict[str, Plan]:
        """Plans of layers that have their own, by name."""
        return {name: plan for name, (_, plan) in self.assigned.items()}


@dataclass(kw_only=True, slots=True, eq=False)
class Round(Converted):
    """What one round over the linear layers has come to.

    Attributes:
        model: The model that is converted.
        layers: Its layers; those that a budget leaves float are among the ``skips``.
        unmasked: Layers whose rows the mask does not fit.
        spilled: Bytes of values between stages that went to a temporary folder.
        stages: The number of the stage that a layer is solved in, by layer name: layers of one stage share the codes of their weight.
        tied: Names of weights that are tables of embeddings, too.
        codes: Of layers with such weights, and the names of their nodes, by the name of the weight.
        tables: These tables.
        convolutions: Convolutions whose bits a budget chose.
        plans: Plans of layers that have their own, by name.
        solutions: Of all layers; None where they are not needed any more once they are written.
    """

    model: ir.Model
    layers: list[LinearLayer]
    unmasked: list[str] = field(default_factory=list)
    spilled: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    codes: dict[str, tuple[str, QuantizedWeight]] = field(default_factory=dict)
    tables: Converted = field(default_factory=Converted)
    convolutions: Converted = field(default_factory=Converted)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    solutions: Solutions | None = None

    def finish(self, context: RunContext, solved: SolvedLayer) -> None:
        """Take note of a layer that has been through the plan, and tell the caller."""
        quantized = solved.solution.quantized
        written = None
        if quantized is not None and solved.emitted is not None:
            written = solved.solution.weight if solved.solution.factors is None else quantized.dequantize()
        self.add(solved.layer, solved.solution, solved.emitted, written)
        if (
            quantized is not None
            and solved.emitted is not None
            and solved.solution.factors is None
            and solved.layer.weight_name in self.tied
        ):
            self.codes[solved.layer.weight_name] = solved.emitted.node, quantized
        if self.solutions is not None:
            self.solutions.keep(solved.layer, solved.solution)
        context.spill(self.model)
        context.report_layers(self.rows[-1:])
        context.stage("quantizing")(len(self.rows), len(self.layers))


def solve_layers(setup: Setup, search: mixed_precision.Search | None, hessian: fisher.Fisher | None, context: RunContext) -> Round:
    """Solve and write all linear layers in a copy of the base model."""
    done = begin(setup, search, context)
    if context.store is not None:
        context.store.set_plan(setup.plan, done.plans)
    context.report_layers(done.convolutions.rows)
    models = replace(setup.models, work=done.model, changed={*setup.models.changed, *done.convolutions.digests})
    layers, plan, plans = done.layers, setup.plan, done.plans
    readers_by_input = moments.readers_of(layers)
    held_out = any(p.holds_out for p in (plan, *plans.values()))
    calibration = setup.calibration
    if calibration is not None:
        calibration = replace(calibration, hold_out=HoldOut.of(calibration.data.samples) if held_out else NONE)
    fit, feedback = calibration if context.fits_weights else None, plan.error_feedback is not None
    for stage, (group, gathered) in enumerate(gather(models, layers, fit, feedback, context)):
        done.stages |= {layer.name: stage for layer in group}
        for name in gathered.unmasked:
            if name in readers_by_input:
                first = readers_by_input[name][0]
                done.unmasked.append(scope_of(first.node) or first.name)
        done.spilled = max(done.spilled, gathered.spilled)
        context.lap("calibrate")
        if not done.rows:
            context.stage("quantizing")(0, len(layers))  # the stage begins before its first layer is finished
        complete = completing(gathered, models.tapped, hessian, calibration, fit is not None)
        finished = _releasing(partial(done.finish, context), group, gathered)
        run_layers(plan, group, partial(_known, gathered.stats), finished, complete, plans, context.store, context.workers)
        context.lap("quantize")
    _finish(done, setup, context)
    return done


def begin(setup: Setup, search: mixed_precision.Search | None, context: RunContext) -> Round:
    """Copy the base model, find the layers to be solved in it, and write convolutions whose bits a budget chose."""
    work, plans, skips = setup.models.work.clone(), setup.plans, list[Skip]()
    layers = setup.models.tapped.split(find(work, context.selection)[0], setup.needs_statistics)[0]
    chosen = {layer.name for layer in setup.layers}
    layers = [layer for layer in layers if layer.name in chosen]
    if search is not None:
        plans = search.assigned()
        layers, skips = search.select(layers)
    layers = tied_tables.embedding(layers, setup.plan, plans, setup.tied)
    solutions = None if setup.plan.tuning is None else Solutions()
    done = Round(model=work, layers=layers, skips=skips, tied=setup.tied, plans=plans, solutions=solutions)
    if search is not None and search.source.convolutions is not None:
        done.convolutions = search.source.convolutions.write(work, search.conv_bits())
    return done


def write_again(done: Round, solutions: Solutions, setup: Setup, search: mixed_precision.Search | None, context: RunContext) -> Round:
    """Write the layers of a round with other solutions, in another copy of the base model."""
    again = replace(begin(setup, search, context), unmasked=done.unmasked, spilled=done.spilled, stages=done.stages, solutions=None)
    quiet = replace(context, progress=lambda *_: None, on_layer=None)  # these layers were reported before
    run_layers(setup.plan, again.layers, lambda layer: None, partial(again.finish, quiet), assigned=done.plans, store=solutions)
    _finish(again, setup, context)
    return again


def _finish(done: Round, setup: Setup, context: RunContext) -> None:
    """Write what follows from all layers: tables that share their codes, and constants between integers."""
    work, plan = done.model, setup.plan
    if setup.tied:
        nodes = {str(node.name): node for node in work.graph}
        codes = {weight: (nodes[name], quantized) for weight, (name, quantized) in done.codes.items() if name in nodes}
        done.tables = tied_tables.convert(tied_tables.tables_of(work, plan, context.selection, setup.tied), plan, codes)
    if plan.rules is not None:
        tensor_emitter.emit_constants(work.graph, plan.rules, rounded_activations.grid_type(plan))


def _releasing(
    finished: Callable[[SolvedLayer], None], group: Sequence[LinearLayer], gathered: moments.CalibrationResult
) -> Callable[[SolvedLayer], None]:
    """Let go of statistics, and of what was computed from them, as soon as all layers that share them are finished."""
    reads = {layer.name: layer.reads for layer in group}  # a finished layer has no inputs any more
    remaining = Counter(reads.values())

    def release(solved: SolvedLayer) -> None:
        finished(solved)
        name = reads[solved.layer.name]
        gathered.targets.pop(solved.layer.name, None)
        remaining[name] -= 1
        if not remaining[name]:
            gathered.stats.pop(name, None)

    return release


def _known(stats: Mapping[str, LayerStats], layer: LinearLayer) -> LayerStats | None:
    """The statistics of what a layer reads, where they were gathered."""
    return stats.get(layer.reads)
