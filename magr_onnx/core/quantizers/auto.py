"""MagR, GPTQ and COMQ combined, with their options chosen for every layer by the error on held-out calibration rows.

A layer is first solved several times on a sample of its output channels (columns are independent, so a sample is representative) from
the rows that are not held out, and evaluated on the held-out ones: MagR's strength (including 0), damping and act-order, one after the
other, each from the best so far. Without MagR and with it are columns of one solve; a greater strength is tried only where it gains, and a
larger damping only where a smaller one is no better.
All channels are then solved from all rows with the chosen options: MagR, GPTQ, coordinate descent with scale refits, and grid refits
(scale and zero point) in between; a step that raises its error is rejected. With second moments of gradients,
`magr_onnx.core.quantizers.two_sided` solves the layer instead, with the same options. An output-adaptive Hessian
(`magr_onnx.core.adaptive_hessian`) stands in for the Gram matrix in the last solve: options are chosen by the layer error either way.

Options set by the user are not searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from magr_onnx.core import compiled, magr
from magr_onnx.core.grid import choose
from magr_onnx.core.magr import Reduction
from magr_onnx.core.quantizers import comq, cross_validation, gptq, two_sided
from magr_onnx.core.quantizers.descent import Refined, joined
from magr_onnx.core.quantizers.grid_refinement import MOST_ROWS, regrid
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight

ALPHAS = (1.0, 3.0)  # of MagR, times the usual strength
DAMPINGS = (0.5, 2.0)  # times the automatic one
MARGIN = 0.005  # least improvement for MagR, another damping or another order to be chosen: less is noise
SWEEPS, TRIAL_SWEEPS = 4, 2  # before the grids are refitted; in trials

Solved = tuple[QuantizedWeight, tuple[float, ...], Reduction | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """Options of one layer: MagR's relative strength, damping (of the diagonal), and whether strong inputs are rounded first."""

    alpha: float
    damping: float
    act_order: bool


def usual_alpha(bits: int, group_size: int | None, beta: float | None = None) -> float:
    """Return the default strength of MagR: from 5 bits on, changing the weights costs more than the finer grid saves.

    A searched grid (``beta`` None) clips a column's peaks by itself. A min-max grid spans them all, and so gains more from weights without
    peaks, the fewer the bits: the strength of least error on held-out rows is three times as large for every bit less.
    """
    if bits > 4:
        return 0.0
    if group_size is not None:
        return 1e-4
    return 1e-3 if beta is None else 1e-3 * 3.0 ** (4 - bits)


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer with options chosen on held-out rows."""
    stats, spec = problem.stats, problem.spec
    if stats.is_data_free:
        return comq.run(problem, options)
    alpha = usual_alpha(spec.bits, spec.group_size, options.beta) if options.alpha is None else options.alpha
    usual = Choice(alpha, problem.damping(options), options.act_order is not False)
    if problem.budget is not None:
        reduced, reduction = _reduced(problem, usual)
        return replace(comq.run(replace(problem, weights=reduced), options), reduction=reduction)
    parts = cross_validation.folds(problem)
    choice, trials, held_out = _choose(parts, problem, options, usual) if parts else (usual, 0, None)
    solve, error = (_solve, "error") if problem.output_hessian is None else (_coupled, "coupled")
    if problem.adaptive_hessian is not None:
        problem, error = replace(problem, stats=problem.adaptive_hessian.mixed(stats, problem.centred), centred=False), "adaptive"
    weight, errors, reduction = solve(problem, choice, options)
    figures = {"alpha": choice.alpha, "damping": choice.damping, "act_order": choice.act_order, "tried": trials}
    figures |= {f"{error}_start": errors[0], error: errors[-1]}
    notes = gptq.prepared(problem, choice.damping, choice.act_order).notes(choice.damping)
    return Solution(weight, notes, figures, errors, reduction, held_out)


def _choose(parts: list[cross_validation.Fold], problem: Problem, options: Options, usual: Choice) -> tuple[Choice, int, float]:
    """Return the best options by held-out error, the number of trials, and that error."""
    damping = parts[-1].problem.damping(options)
    results: dict[Choice, float] = {}

    def error(*choices: Choice) -> float:
        """Return the least error of some choices, which may differ in MagR's strength alone where they are not yet tried."""
        if new := [choice for choice in choices if choice not in results]:
            results.update(zip(new, cross_validation.errors(parts, lambda p: _trials(p, new, options)), strict=True))
        return min(results[choice] for choice in choices)

    def better(simple: Choice, *others: Choice) -> Choice:
        best = min(others, key=error)
        return best if error(best) < (1 - MARGIN) * error(simple) else simple

    best = replace(usual, damping=damping)
    if options.alpha is None and usual.alpha > 0:
        choices = [replace(best, alpha=usual.alpha * a) for a in (0.0, *ALPHAS)]
        error(*choices[:2])  # in one solve
        best = better(*choices) if error(choices[1]) < error(choices[0]) else choices[0]
    if options.damping is None:
        for factor in DAMPINGS:
            if error(other := replace(best, damping=damping * factor)) < error(best):  # then the other side is worse
                best = better(best, other)
                break
    if options.act_order is None:
        best = better(best, replace(best, act_order=False))
    scale = best.damping / damping if damping else 1.0
    tried = len(results)
    return replace(best, damping=problem.damping(options) * scale), tried, error(best)


def _trials(problem: Problem, choices: Sequence[Choice], options: Options) -> list[Array]:
    """Return the weights of choices that differ in MagR's strength alone, quickly: they are solved as columns of one layer."""
    reduced = np.hstack([_reduced(problem, choice)[0] for choice in choices])
    together = replace(problem, weights=reduced, target=np.tile(problem.target, len(choices)))
    weight, *_ = _solve(together, replace(choices[0], alpha=0.0), options, quick=True)
    return np.split(weight.dequantize(), len(choices), axis=1)


def _solve(problem: Problem, choice: Choice, options: Options, quick: bool = False) -> Solved:
    """Solve the layer; return its weight, error by sweep, and MagR's result. ``quick`` skips what hardly depends on the options."""
    b = problem.stats.backend
    gram = b.single(problem.damped_gram(choice.damping))
    feedback = gptq.prepared(problem, choice.damping, choice.act_order)
    reduced, reduction = _reduced(problem, choice)
    power, whole, spec = problem.gram.diagonal(), problem.target, problem.spec

    def solve(c: slice) -> Refined:  # may travel: it is to hold no more than it needs
        target, weights = b.array(np.ascontiguousarray(whole[:, c])), b.array(reduced[:, c])
        start = gptq.solve(weights, feedback, choose(weights, spec, power, options.beta))
        refined = comq.refine(target, start, gram, sweeps=min(options.sweeps, TRIAL_SWEEPS if quick else SWEEPS), rescale=options.rescale)
        if quick or not options.rescale or options.sweeps <= SWEEPS:
            return refined
        weight, error = refined.weight, refined.errors[-1]
        if spec.rows(len(target)) <= MOST_ROWS:
            weight, gain = regrid(target, weight, gram)
            error -= gain
        again = comq.refine(target, weight, gram, sweeps=options.sweeps - SWEEPS, rescale=options.rescale, error=error)
        return Refined(again.weight, refined.errors + again.errors[1:])

    weight, errors = joined(compiled.by_columns(solve, *problem.target.shape, backend=b))
    return weight.host(), errors, reduction


def _coupled(problem: Problem, choice: Choice, options: Options) -> Solved:
    """Solve the layer under the two-sided Hessian; return as `_solve` does, with E by sweep."""
    assert problem.output_hessian is not None
    outputs = two_sided.damped_outputs(problem.output_hessian)
    gram = problem.damped_gram(choice.damping)
    reduced, reduction = _reduced(problem, choice)
    grid = choose(reduced, problem.spec, problem.gram.diagonal(), options.beta)
    blocks = two_sided.blocks_of(outputs)
    start = two_sided.solve(reduced, gptq.prepared(problem, choice.damping, choice.act_order), grid, outputs, blocks)
    return *two_sided.refine(problem.target, start, gram, outputs, blocks, sweeps=options.sweeps), reduction


def _reduced(problem: Problem, choice: Choice) -> tuple[Array, Reduction | None]:
    if choice.alpha == 0:
        return problem.weights, None
    gram = problem.damped_gram(choice.damping)
    weights = problem.stats.backend.array(problem.weights)
    reduction = magr.reduce(weights, gram, alpha=choice.alpha, group_size=problem.spec.group_size).host()
    return reduction.weights, reduction


QUANTIZER = Quantizer("auto", "MagR and comq, options chosen per layer", run, "supported", chooses=True, batched="gram", on_device=True)
