"""Everything the other solvers have, with their options chosen for every layer by the error on held-out calibration rows.

A layer is first solved several times on a sample of its output channels (columns are independent, so a sample tells as much as all of
them) from the rows that are not held out, and judged on those that are: MagR's strength (0, which is none, among the choices), damping
and act-order, one after the other, each from the best so far. The choice is then solved for all channels from all rows: MagR, GPTQ,
coordinate descent with scale refits, and grid refits (scale and zero point) in between; no step is kept that raises the error it is
meant to lower. Where second moments of gradients are there, `magr_onnx.core.quantizers.two_sided` solves it instead, with the options so
chosen.

Options that are given are not chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from magr_onnx.core import error_feedback, magr
from magr_onnx.core.grid import choose
from magr_onnx.core.linalg import automatic_damping, layer_error
from magr_onnx.core.magr import Reduction
from magr_onnx.core.quantizers import comq, gptq, two_sided
from magr_onnx.core.quantizers.grid_refinement import MOST_ROWS, regrid
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution, damped_gram
from magr_onnx.core.types import Array, LayerStats, QuantizedWeight, WeightSpec

SAMPLE = 64  # output channels that choices are made on
ALPHAS = (1.0, 3.0)  # of MagR, times the usual strength
DAMPINGS = (0.5, 2.0)  # times the automatic one
MARGIN = 0.005  # by which the error must fall for MagR, another damping or another order to be taken: less is chance
SWEEPS, TRIAL_SWEEPS = 4, 2  # before the grids are refitted; in trials


@dataclass(frozen=True, slots=True)
class Choice:
    """Options of one layer: MagR's relative strength, damping (of the diagonal), and whether strong inputs are rounded first."""

    alpha: float
    damping: float
    act_order: bool


def usual_alpha(bits: int, group_size: int | None) -> float:
    """MagR's strength where nothing is known of the layer: from 5 bits on its change of the weights costs more than a finer grid saves."""
    if bits > 4:
        return 0.0
    return 1e-3 if group_size is None else 1e-4


def run(problem: Problem, options: Options) -> Solution:
    """The quantizer."""
    stats, spec = problem.stats, problem.spec
    if stats.is_data_free:
        return comq.run(problem, options)
    usual = Choice(
        usual_alpha(spec.bits, spec.group_size) if options.alpha is None else options.alpha,
        problem.damping(options),
        True if options.act_order is None else options.act_order,
    )
    if problem.budget is not None:
        reduced, reduction = _reduced(problem.weights, stats, problem.centred, usual, spec)
        return replace(comq.run(replace(problem, weights=reduced), options), reduction=reduction)
    choice, tried = (usual, 0) if stats.held_out is None else _choose(problem, options, usual)
    facts: dict[str, float] = {"alpha": choice.alpha, "damping": choice.damping, "act_order": choice.act_order, "tried": tried}
    if problem.outputs is not None:
        weight, errors, reduction = _coupled(problem, choice, options)
        facts |= {"coupled_start": errors[0], "coupled": errors[-1]}
    else:
        weight, errors, reduction = _solve(problem.weights, problem.target, stats, problem.centred, spec, choice, options)
        facts |= {"error_start": errors[0], "error": errors[-1]}
    used = gptq.prepared(stats, problem.centred, choice.damping, choice.act_order).damping
    notes = () if used == choice.damping else (f"Cholesky failed at damping {choice.damping:g}; used {used:g}",)
    return Solution(weight, notes, facts, errors, reduction)


def _choose(problem: Problem, options: Options, usual: Choice) -> tuple[Choice, int]:
    """The best options by held-out error, and how many were tried."""
    held_out = problem.stats.held_out
    assert held_out is not None
    training = problem.stats.memo("kept", lambda: problem.stats.combine(held_out, -1))
    columns = error_feedback.sample(problem.weights.shape[1], SAMPLE)
    reference = problem.reference[:, columns]
    target = problem.target if problem.fit_target is None else problem.fit_target
    target = np.ascontiguousarray(target[:, columns])
    moments = problem.target_moments
    held_moments = None if moments is None or moments.held_out is None else moments.held_out.columns(columns)
    damping = automatic_damping(len(target), training.rows) if options.damping is None else options.damping
    held_gram = held_out.objective_gram(problem.centred)
    results: dict[Choice, float] = {}

    def trial(choice: Choice) -> float:
        if choice not in results:
            weight, *_ = _solve(target, target, training, problem.centred, problem.spec, choice, options, quick=True)
            weights = weight.dequantize()
            if held_moments is None:
                results[choice] = layer_error(weights - reference, held_gram)
            else:
                results[choice] = error_feedback.error(weights.astype(np.float64), held_out, held_moments, problem.centred)
        return results[choice]

    def better(simple: Choice, others: list[Choice]) -> Choice:
        best_other = min(others, key=trial)
        return best_other if trial(best_other) < (1 - MARGIN) * trial(simple) else simple

    best = replace(usual, damping=damping)
    if options.alpha is None and usual.alpha > 0:
        best = better(replace(best, alpha=0.0), [replace(best, alpha=usual.alpha * a) for a in ALPHAS])
    if options.damping is None:
        best = better(best, [replace(best, damping=damping * d) for d in DAMPINGS])
    if options.act_order is None:
        best = better(best, [replace(best, act_order=False)])
    scale = best.damping / damping if damping else 1.0
    return replace(best, damping=problem.damping(options) * scale), len(results)


def _solve(
    weights: Array, target: Array, stats: LayerStats, centred: bool, spec: WeightSpec, choice: Choice, options: Options, quick: bool = False
) -> tuple[QuantizedWeight, tuple[float, ...], Reduction | None]:
    """One layer, or some columns of one, its error by sweep, and what MagR did; ``quick`` leaves out what hardly depends on the options."""
    gram = damped_gram(stats, centred, choice.damping)
    prepared = gptq.prepared(stats, centred, choice.damping, choice.act_order)
    reduced, reduction = _reduced(weights, stats, centred, choice, spec)
    start = gptq.solve(reduced, prepared, choose(reduced, spec, stats.objective_gram(centred).diagonal(), options.beta))
    refined = comq.refine(target, start, gram, sweeps=min(options.sweeps, TRIAL_SWEEPS if quick else SWEEPS), rescale=options.rescale)
    errors = refined.errors
    if not quick and options.rescale and options.sweeps > SWEEPS:
        weight = regrid(target, refined.weight, gram.astype(np.float32)) if spec.rows(len(weights)) <= MOST_ROWS else refined.weight
        refined = comq.refine(target, weight, gram, sweeps=options.sweeps - SWEEPS, rescale=options.rescale)
        errors += refined.errors[1:]
    return refined.weight, errors, reduction


def _coupled(problem: Problem, choice: Choice, options: Options) -> tuple[QuantizedWeight, tuple[float, ...], Reduction | None]:
    """The layer under the two-sided Hessian, E after its first pass and by sweep, and what MagR did."""
    assert problem.outputs is not None
    outputs = two_sided.damped_outputs(problem.outputs)
    gram = damped_gram(problem.stats, problem.centred, choice.damping)
    reduced, reduction = _reduced(problem.weights, problem.stats, problem.centred, choice, problem.spec)
    grid = choose(reduced, problem.spec, problem.gram.diagonal(), options.beta)
    blocks = two_sided.blocks_of(outputs)
    start = two_sided.solve(reduced, gptq.prepared(problem.stats, problem.centred, choice.damping, choice.act_order), grid, outputs, blocks)
    weight, errors = two_sided.refine(problem.target, start, gram, outputs, blocks, sweeps=options.sweeps)
    return weight, errors, reduction


def _reduced(weights: Array, stats: LayerStats, centred: bool, choice: Choice, spec: WeightSpec) -> tuple[Array, Reduction | None]:
    if choice.alpha == 0:
        return weights, None
    reduction = magr.reduce(weights, damped_gram(stats, centred, choice.damping), alpha=choice.alpha, group_size=spec.group_size)
    return reduction.weights, reduction


QUANTIZER = Quantizer("auto", "MagR and comq, options chosen per layer", run, "supported", chooses=True, batched="gram")
