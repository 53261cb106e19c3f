"""How much each layer's bits matter: layer errors of every choice, and what they do to the model's outputs.

The loss of a layer under a choice is that of a reference, measured at the model's outputs, moved along with the layer error:

1. The calibration batches that are held out for this are in no Gram matrix here, so a wide layer that overfits its statistics is seen to.
2. *Layer error*: a sample of output channels goes through the very passes of the choice, under the Gram matrix of the other batches. Output
   channels are independent given that matrix, so a sample estimates the error of all. It is measured under the Gram matrix of the held-out
   batches, centred where a bias will take up the mean.
3. *Effect*: GPTQ of the whole layer at each reference choice replaces the layer's float weight, alone, in one running session
   (`magr_onnx.passes.instrument.weight_inputs`), and the loss of the outputs (`magr_onnx.runtime.measure.loss`) is measured.
4. Loss over error is taken as a power law between the references, and as proportional beyond them: at small errors any loss with its least
   at the float model is quadratic in the weights, as the layer error is.

Layers with 8-bit inputs have no such session: there the effect of a choice is that of the layer emitted in this form, alone.
Losses are taken to add up over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.types import Array, Choice, LayerStats
from magr_onnx.passes.instrument.weight_inputs import Slot, overridable
from magr_onnx.passes.layer_state import problem_of
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layerwise import run_layers
from magr_onnx.passes.plan import Plan
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.activation_ranges import Grids
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.hold_out import HELD_OUT, HoldOut
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.loss import Reference
from magr_onnx.runtime.ort.session import Session

COLUMNS = 64  # output channels of a layer that are tried
SWEEPS = 2  # of coordinate descent on them: it converges fast, and what counts is how choices compare
ROWS = 4096  # rows of layer inputs behind the measured losses, about; one batch at least
FLOOR = 1e-12  # losses below are noise of the float model

Progress = Callable[[int, int], None]
Plans = Mapping[Choice, Plan]


@dataclass(frozen=True, slots=True)
class Split:
    """Calibration batches by what they are for.

    Attributes:
        fit: Gram matrices of the sensitivities.
        effects: Errors and losses of the sensitivities.
        held_out: For a measurement of the result that had no part in any of it.
        rest: All but ``held_out``.
    """

    fit: Batches
    effects: Batches
    held_out: Batches
    rest: Batches

    @staticmethod
    def of(data: Batches) -> Split:
        """Of at least 3 batches no part shares a batch with another; of 2, ``fit`` is ``effects``; one serves for all."""
        every = list(range(len(data)))
        held_out = [i for i in every if i in HoldOut()] or every[-1:]
        rest = [i for i in every if i not in held_out] or every
        effects = [i for i in rest if i % HELD_OUT == 1] or rest
        fit = [i for i in rest if i not in effects] or rest
        return Split(data.select(fit), data.select(effects), data.select(held_out), data.select(rest))


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Where sensitivities are measured, and on what.

    Attributes:
        mask: Input whose zero elements mark rows to leave out; None for none.
        provider: Where to run.
        gram_budget: Bytes of Gram matrices held at a time.
        grids: How layer inputs and products are quantized; None where they stay float.
    """

    mask: str | None = None
    provider: str = "cpu"
    gram_budget: int = moments.DEFAULT_BUDGET
    grids: Grids | None = None

    def moments(self, model: ir.Model, layers: Sequence[LinearLayer], data: Batches) -> dict[str, LayerStats]:
        """Statistics of what layers read, by value name."""
        quantize, bounds = ({}, {}) if self.grids is None else (self.grids.inputs, self.grids.bounds)
        return moments.collect(model, layers, CalibrationContext(data, self.mask, self.provider, quantize=quantize, bounds=bounds)).stats


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What was measured for one layer.

    Attributes:
        errors: Relative squared layer error ``tr(D^T H D) / tr(W^T H W)`` of every choice.
        references: The same of the references, and the loss of the model with this layer so and all others float; in rising error.
    """

    errors: Mapping[Choice, float]
    references: tuple[tuple[float, float], ...]

    def loss(self, choice: Choice) -> float:
        """The estimated loss of the model with this layer at a choice and all others float."""
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
    conditions: Conditions,
    progress: Progress | None = None,
) -> tuple[dict[str, Sensitivity], Reference]:
    """Sensitivities of all layers, by name, and what losses were measured against.

    Args:
        model: The float model; it is not changed.
        layers: Layers of ``model``, or of a copy with the same names.
        choices: What may be chosen, and the plan each stands for.
        references: Choices whose effect on the outputs is measured, one or two.
        split: Calibration batches.
        conditions: Where to run, and on which rows.
        progress: Called with steps done and in total.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        ModelError: The model has no output of floats.
    """
    sensitivities: dict[str, Sensitivity] = {}
    count = 1 + len(references)  # steps a layer
    overridden = [layer.name for layer in layers] if conditions.grids is None else []
    copy, slots = overridable(model, overridden)
    with Session(copy, conditions.provider) as session:
        reference: Reference | None = None
        for group in moments.grouped(layers, conditions.gram_budget // 2):
            fit, effects = (conditions.moments(model, group, part) for part in (split.fit, split.effects))
            if reference is None:
                rows = max([s.rows for s in effects.values()], default=1) / len(split.effects)
                reference = Reference(session, split.effects.limit(max(1, int(ROWS // rows))), conditions.mask)
            for layer in group:
                name, nothing = layer.reads, LayerStats.data_free(layer.k)  # where only other batches reach a layer
                trial = _Trial(layer, fit.get(name, nothing), effects.get(name, nothing))
                errors = _errors(trial, choices)
                points: list[tuple[float, float]] = []
                for choice in references:
                    if progress is not None:
                        progress(len(sensitivities) * count + len(points), len(layers) * count)
                    if conditions.grids is None:
                        error, loss = _replaced(trial, choices[choice], slots[layer.name], session, reference)
                    else:
                        error, loss = errors[choice], _emitted(model, trial, choices[choice], conditions, reference)
                    points.append((max(error, FLOOR), max(loss, FLOOR)))
                sensitivities[layer.name] = Sensitivity(errors, _rising(points))
        assert reference is not None
    if progress is not None:
        progress(len(layers) * count, len(layers) * count)
    return sensitivities, reference


def _rising(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """In rising error; where the loss does not rise with it, noise was measured, and the one of larger error stands alone."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        while kept and (kept[-1][1] >= point[1] or kept[-1][0] >= point[0]):
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _columns(n: int) -> Array:
    return np.unique(np.linspace(0, n - 1, min(n, COLUMNS)).round().astype(int))


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """A layer with the statistics it is solved under (``fit``) and those it is measured under."""

    layer: LinearLayer
    fit: LayerStats
    effects: LayerStats

    def problem(self, columns: Array | slice = slice(None)) -> LayerProblem:
        """The problem of some output channels."""
        problem = problem_of(self.layer, self.fit)
        bias = None if problem.bias is None else problem.bias[columns]
        return replace(problem, weight=np.ascontiguousarray(problem.weight[:, columns]), bias=bias)


def _errors(trial: _Trial, choices: Plans) -> dict[Choice, float]:
    """Of every choice; blocks that span the column are one."""
    k = trial.layer.k
    problem = trial.problem(_columns(trial.layer.n))
    known: dict[Choice, float] = {}
    errors = {}
    for choice, plan in choices.items():
        same = Choice(choice.bits, min(choice.block_size or k, k))
        if same not in known:
            known[same] = _error(problem, _fast(plan).solve(problem).weight, trial.effects, plan)
        errors[choice] = known[same]
    return errors


def _replaced(trial: _Trial, plan: Plan, slot: Slot, session: Session, reference: Reference) -> tuple[float, float]:
    """Error and loss with the weight of one layer replaced in a running session."""
    problem, columns = trial.problem(), _columns(trial.layer.n)
    solution = _reference(plan).solve(problem)
    feeds = slot.feeds(solution.weight, solution.bias)
    loss = reference.loss(lambda batch: session.run({**batch, **feeds}))
    sample = replace(problem, weight=problem.weight[:, columns])
    return _error(sample, solution.weight[:, columns], trial.effects, plan), loss


def _error(problem: LayerProblem, weight: Array, held_out: LayerStats, plan: Plan) -> float:
    """Relative squared layer error of a weight, under the moments of the held-out batches."""
    power = layer_error(problem.weight, held_out.gram)
    gram = held_out.objective_gram(problem.centred(plan.bias_policy))
    return max(layer_error(weight - problem.weight, gram), 0.0) / power if power > 0 else 0.0


def _fast(plan: Plan) -> Plan:
    """What decides the error of a choice: MagR and the quantizer, with fewer sweeps."""
    plan = plan.resolved
    quantize = plan.quantize
    return Plan(magr=plan.magr, quantize=None if quantize is None else replace(quantize, sweeps=min(quantize.sweeps, SWEEPS)))


def _reference(plan: Plan) -> Plan:
    """The plan of a reference: its grid and bias with GPTQ (or what is quicker), for its error is measured and need not be the least."""
    quantize = plan.resolved.quantize
    if quantize is not None:
        quantize = quantize.by(quantize.quantizer.quick)
    return Plan(quantize=quantize, bias=plan.bias)


def _emitted(model: ir.Model, trial: _Trial, plan: Plan, conditions: Conditions, reference: Reference) -> float:
    """The loss of the model with one layer emitted."""
    copy, grids = model.clone(), conditions.grids
    assert grids is not None
    products = grids.products
    layer = next(layer for layer in find(copy)[0] if layer.name == trial.layer.name)

    def complete(layer: LinearLayer, problem: LayerProblem) -> LayerProblem:
        return replace(problem, output_grid=products.get(str(layer.node.outputs[0].name)))

    run_layers(plan, [layer], lambda _: trial.fit, lambda _: None, complete)
    with Session(copy, conditions.provider) as session:
        return reference.loss(session.run)
