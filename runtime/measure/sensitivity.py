"""Sensitivity of the model's outputs to the bits of each layer.

The loss of a layer under a choice of bits is interpolated, by layer error, between losses measured at the model's outputs:

1. Some calibration batches are held out of the Gram matrices here, so that overfitting of a wide layer shows in its error.
2. *Layer error*: a sample of output channels is solved with the plan of the choice under the Gram matrix of the other batches. Channels are
   independent given that matrix, so a sample estimates the error of all. The error is measured under the Gram matrix of the held-out
   batches, centred where a bias will absorb the mean.
3. *Effect*: the layer's float weight alone is replaced in one running session (`magr_onnx.passes.instrument.weight_inputs`) by its GPTQ
   solution at each reference choice, and the loss of the outputs (`magr_onnx.runtime.measure.loss`) is measured.
4. Loss as a function of error is a power law between the references and proportional beyond them: near the float model, its minimum,
   any loss is quadratic in the weights, as the layer error is.

For layers with 8-bit inputs, the effect of a reference is measured on a copy of the model with the layer emitted instead. Losses are
assumed to add up over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.types import Array, Choice, LayerStats
from magr_onnx.passes.instrument.weight_inputs import WeightInputs, with_weight_inputs
from magr_onnx.passes.layer_state import problem_of
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layerwise import run_layers
from magr_onnx.passes.plan import Plan
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.activation_ranges import with_grids
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import masked_values
from magr_onnx.runtime.data.hold_out import HELD_OUT, HoldOut
from magr_onnx.runtime.data.sources import Batches, Steps
from magr_onnx.runtime.measure.loss import Reference
from magr_onnx.runtime.ort.session import Session

COLUMNS = 64  # output channels of a layer in the sample
SWEEPS = 2  # of coordinate descent on the sample: it converges fast, and only comparisons between choices matter
ROWS = 4096  # of layer inputs behind a measured loss, approximately; at least one batch
FLOOR = 1e-12  # losses below are noise of the float model

Plans = Mapping[Choice, Plan]


@dataclass(frozen=True, slots=True)
class Split:
    """Calibration batches by purpose.

    Attributes:
        fit: For the Gram matrices that sample channels are solved under.
        effects: For measuring errors and losses.
        held_out: For measuring the result, and nothing before it.
        rest: All but ``held_out``.
    """

    fit: Batches
    effects: Batches
    held_out: Batches
    rest: Batches

    @staticmethod
    def of(data: Batches) -> Split:
        """Split batches: 3 or more into disjoint parts, 2 with ``fit`` equal to ``effects``; a single batch is in all parts."""
        indices = list(range(len(data)))
        held_out = [i for i in indices if i in HoldOut()] or indices[-1:]
        rest = [i for i in indices if i not in held_out] or indices
        effects = [i for i in rest if i % HELD_OUT == 1] or rest
        fit = [i for i in rest if i not in effects] or rest
        return Split(data.select(fit), data.select(effects), data.select(held_out), data.select(rest))


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Measured sensitivity of one layer.

    Attributes:
        errors: Relative squared layer error ``tr(D^T H D) / tr(W^T H W)`` of every choice.
        references: Error of each reference choice, and loss of the model with this layer at it and all others float; by rising error.
    """

    errors: Mapping[Choice, float]
    references: tuple[tuple[float, float], ...]

    def loss(self, choice: Choice) -> float:
        """Estimate the loss of the model with this layer at a choice and all others float."""
        error = max(self.errors[choice], FLOOR)
        points = self.references
        if error <= points[0][0] or len(points) == 1:
            return points[0][1] * error / points[0][0]
        if error >= points[-1][0]:
            return points[-1][1] * error / points[-1][0]
        x, y = np.log(np.array(points)).T
        return float(np.exp(np.interp(np.log(error), x, y)))


def measure(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    choices: Plans,
    references: Sequence[Choice],
    split: Split,
    context: CalibrationContext,
    gram_budget: int = moments.DEFAULT_BUDGET,
    progress: Steps | None = None,
) -> tuple[dict[str, Sensitivity], Reference]:
    """Measure the sensitivities of all layers, by name, and return them with the reference of the losses.

    The layers are those of ``model``, the float model, or of a copy with the same names. The effect on the outputs is measured of
    ``references``, one or two of the choices. ``split`` is of the data of ``context``. The model is not changed.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        ModelError: The model has no float output.
    """
    sensitivities: dict[str, Sensitivity] = {}
    report, steps = progress or (lambda done, total: None), 1 + len(references)  # steps of each layer
    overridden = [] if context.grids else [layer.name for layer in layers]
    copy, slots = with_weight_inputs(model, overridden)
    masked_values(model, moments.readers_of(layers), context)  # by all of the data
    calibrations = [replace(context, data=part) for part in (split.fit, split.effects)]
    with Session(copy, context.provider) as session:
        reference: Reference | None = None
        for group in moments.grouped(layers, gram_budget // 2):
            fit, effects = (moments.collect(model, group, calibration).stats for calibration in calibrations)
            if reference is None:
                rows = max([s.rows for s in effects.values()], default=1) / len(split.effects)
                reference = Reference(session, split.effects.limit(max(1, int(ROWS // rows))), context.mask)
            for layer in group:
                problem = problem_of(layer, fit.get(layer.reads))
                measured_on = effects.get(layer.reads) or LayerStats.data_free(layer.k)  # where these batches do not reach a layer
                errors = _errors(problem, measured_on, choices)
                points: list[tuple[float, float]] = []
                for choice in references:
                    report(len(sensitivities) * steps + len(points), len(layers) * steps)
                    plan, error = choices[choice], errors[choice]
                    if context.grids:
                        loss = _emitted_loss(model, layer.name, problem.stats, plan, context, reference)
                    else:
                        error, loss = _replacement_loss(problem, measured_on, plan, slots[layer.name], session, reference)
                    points.append((max(error, FLOOR), max(loss, FLOOR)))
                sensitivities[layer.name] = Sensitivity(errors, _increasing(points))
        assert reference is not None
    report(len(layers) * steps, len(layers) * steps)
    return sensitivities, reference


def _increasing(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Sort points by error; of points whose loss does not rise with the error, which is noise, keep the one of largest error."""
    increasing: list[tuple[float, float]] = []
    for point in sorted(points):
        while increasing and (increasing[-1][1] >= point[1] or increasing[-1][0] >= point[0]):
            increasing.pop()
        increasing.append(point)
    return tuple(increasing)


def _columns(n: int) -> Array:
    return np.unique(np.linspace(0, n - 1, min(n, COLUMNS)).round().astype(int))


def _errors(problem: LayerProblem, effects: LayerStats, choices: Plans) -> dict[Choice, float]:
    """Measure the layer error of every choice; block sizes of K or more are solved once."""
    k, columns = len(problem.weight), _columns(problem.weight.shape[1])
    bias = None if problem.bias is None else problem.bias[columns]
    sample = replace(problem, weight=np.ascontiguousarray(problem.weight[:, columns]), bias=bias)
    by_grid: dict[Choice, float] = {}
    errors = {}
    for choice, plan in choices.items():
        grid = Choice(choice.bits, min(choice.block_size or k, k))
        if grid not in by_grid:
            by_grid[grid] = _error(sample, _fast_plan(plan).solve(sample).weight, effects, plan)
        errors[choice] = by_grid[grid]
    return errors


def _replacement_loss(
    problem: LayerProblem, effects: LayerStats, plan: Plan, slot: WeightInputs, session: Session, reference: Reference
) -> tuple[float, float]:
    """Measure error and loss with the weight of one layer replaced in a running session."""
    columns = _columns(problem.weight.shape[1])
    solution = _reference_plan(plan).solve(problem)
    feeds = slot.feeds(solution.weight, solution.bias)
    loss = reference.loss(lambda batch: session.run({**batch, **feeds}))
    sample = replace(problem, weight=problem.weight[:, columns])
    return _error(sample, solution.weight[:, columns], effects, plan), loss


def _error(problem: LayerProblem, weight: Array, held_out: LayerStats, plan: Plan) -> float:
    """Compute the relative squared layer error of a weight under the moments of the held-out batches."""
    power = layer_error(problem.weight, held_out.gram)
    gram = held_out.objective_gram(problem.centred(plan.bias_policy))
    return max(layer_error(weight - problem.weight, gram), 0.0) / power if power > 0 else 0.0


def _fast_plan(plan: Plan) -> Plan:
    """Reduce a plan to the stages that decide the layer error: MagR and the quantizer, with fewer sweeps."""
    plan = plan.resolved
    quantize = plan.quantize
    return Plan(magr=plan.magr, quantize=None if quantize is None else replace(quantize, sweeps=min(quantize.sweeps, SWEEPS)))


def _reference_plan(plan: Plan) -> Plan:
    """Return a fast plan with the same grid and bias, by GPTQ or a quicker quantizer: its error is measured and need not be minimal."""
    quantize = plan.resolved.quantize
    if quantize is not None:
        quantize = quantize.by(quantize.quantizer.quick)
    return Plan(quantize=quantize, bias=plan.bias)


def _emitted_loss(model: ir.Model, name: str, fit: LayerStats, plan: Plan, context: CalibrationContext, reference: Reference) -> float:
    """Measure the loss of a copy of the model with one layer emitted."""
    copy = model.clone()
    layer = next(layer for layer in find(copy)[0] if layer.name == name)
    run_layers(plan, [layer], lambda _: fit, lambda _: None, lambda layer, problem: with_grids(problem, layer, context.grids))
    with Session(copy, context.provider) as session:
        return reference.loss(session.run)
