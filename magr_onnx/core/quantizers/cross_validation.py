"""Errors of a layer on rows that it was not solved from, and the solution without data where data cannot be trusted.

Rows are held out by samples, since rows of one sample are alike: of many samples a quarter, of few all of them in turn
(`magr_onnx.core.types.LayerStats.folds`). A layer is solved from the other rows, on a sample of its output channels (columns are
independent, so a sample is representative), its bias corrected from the same rows, and the squared error of its output is summed over the
rows held out.

From few rows, a solution can be worse than the nearest codes on any other row. `run` therefore compares every quantizer with itself without
data and with rounding to nearest (under an accumulator: A2Q+'s projection); where one of these is better, the layer is solved so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from magr_onnx.core import error_feedback
from magr_onnx.core.backends import HOST
from magr_onnx.core.gram import NOISE
from magr_onnx.core.layer import output_variance
from magr_onnx.core.linalg import error_of_inputs
from magr_onnx.core.quantizers import a2q, rtn
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, LayerStats, TargetMoments

SAMPLE = error_feedback.SAMPLE  # output channels


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """The sampled layer to be solved from the rows outside a fold, and what its error in the fold is measured by.

    Attributes:
        problem: The layer on the other rows; its reference is the model's weight.
        held_out: Statistics of the fold.
        factor: Of the fold's mean squared error: its share of the rows of all folds, over the variance of the output.
        target: Moments of the target output outside the fold and in it, where the layers before are quantized; else None.
    """

    problem: Problem
    held_out: LayerStats
    factor: float
    target: tuple[TargetMoments, TargetMoments] | None

    def error(self, weight: Array) -> float:
        """Return the fold's part of the squared error of the output with ``weight (K, n)``, relative to the variance of the output."""
        problem, held_out, fit = self.problem, self.held_out, self.problem.stats
        w = weight.astype(np.float64)
        if self.target is None:
            difference = w - problem.reference
            squared = error_of_inputs(difference, held_out, problem.centred)
            bias = difference.T @ (held_out.mean - fit.mean)
        else:
            outside, inside = self.target
            squared = error_feedback.squared_error(w, held_out, inside, problem.centred)
            bias = w.T @ (held_out.mean - fit.mean) - (inside.mean - outside.mean)
        if problem.centred:  # the mean error of the fold, of which the bias takes up that of the other rows
            squared += float(np.square(bias).sum())
        return self.factor * max(squared, 0.0)


def folds(problem: Problem) -> list[Fold]:
    """Return the folds of a layer; none where no rows are held out."""
    stats, moments = problem.stats, problem.target_moments
    if not stats.folds or (moments is not None and len(moments.folds) != len(stats.folds)):
        return []
    columns = error_feedback.sample(problem.weights.shape[1], SAMPLE)
    reference = np.ascontiguousarray(problem.reference[:, columns])
    moments = None if moments is None else moments.columns(columns)
    variance = output_variance(reference, stats, moments)
    rows = sum(fold.rows for fold in stats.folds)
    result = []
    for index, held_out in enumerate(stats.folds):
        target = problem.fit_targets[index] if problem.fit_targets else np.ascontiguousarray(problem.target[:, columns])
        sampled = replace(
            problem,
            weights=target,
            target=target,
            original=reference,
            stats=stats.without(index),
            fit_targets=(),
            target_moments=None,
            output_hessian=None,
            adaptive_hessian=None,
        )
        pair = None if moments is None else (moments.without(index), moments.folds[index])
        result.append(Fold(sampled, held_out, held_out.rows / rows / (variance or 1.0), pair))
    return result


def error(parts: list[Fold], solve: Callable[[Problem], Array]) -> float:
    """Return the squared error of a method of solving layers on the rows of all folds, relative to the variance of the output."""
    return errors(parts, lambda problem: [solve(problem)])[0]


def errors(parts: list[Fold], solve: Callable[[Problem], Sequence[Array]]) -> list[float]:
    """Return the error of each of several methods that are run together, as `error` does."""
    return [sum(of_method) for of_method in zip(*([fold.error(w) for w in solve(fold.problem)] for fold in parts), strict=True)]


def without_data(problem: Problem) -> Problem:
    """Return a problem as it is without calibration data; of the inputs the mean that all share is known, unless a bias absorbs it."""
    reference = problem.reference
    squared, power = float(problem.stats.mean.mean()) ** 2, float(problem.stats.gram.diagonal().mean())
    common = 0.0 if problem.centred or problem.stats.is_data_free else squared / (max(power - squared, NOISE * power) or 1.0)
    stats = LayerStats.data_free(len(reference), common)
    return replace(
        problem, weights=reference, target=reference, original=None, stats=stats, centred=False, fit_targets=(), target_moments=None
    )


def _unfit_for_device(quantizer: Quantizer, problem: Problem) -> str | None:
    """Return why a layer cannot be solved on a device; None if it can."""
    if not quantizer.on_device:
        return f"quantizer {quantizer.name} has no form for a device"
    if problem.budget is not None:
        return "sums within an accumulator have no form for a device"
    if problem.output_hessian is not None and quantizer.chooses:
        return "outputs weighed by gradients have no form for a device"
    return None


def run(quantizer: Quantizer, problem: Problem, options: Options) -> Solution:
    """Run a quantizer; without data, or by rounding to nearest, where that is better on rows held out.

    What has no form for the device that the layer was to be solved on is solved on the CPU, and a note says why.
    """
    if problem.stats.backend is not HOST and (reason := _unfit_for_device(quantizer, problem)):
        solution = run(quantizer, problem.on_host, options)
        return replace(solution, notes=(*solution.notes, f"solved on the CPU, not on {problem.stats.backend.name}: {reason}"))
    solution = quantizer.run(problem, options)
    if problem.stats.is_data_free or not (parts := folds(problem)):
        return solution
    held_out = solution.held_out
    if held_out is None:
        held_out = error(parts, lambda sampled: quantizer.run(sampled, options).weight.dequantize())
    free = without_data(problem)
    sampled = replace(without_data(parts[0].problem), stats=free.stats)
    nearest = rtn.QUANTIZER if problem.budget is None else a2q.A2Q_PLUS
    methods, of_methods = {method.name: method for method in (nearest, quantizer)}, {}
    for name, method in methods.items():
        weight = method.run(sampled, options).weight.dequantize()
        of_methods[name] = sum(fold.error(weight) for fold in parts)
    best = min(of_methods, key=lambda name: of_methods[name])
    if held_out <= of_methods[best] or held_out == of_methods[quantizer.name]:  # or data changes nothing: that is the method asked for
        return replace(solution, held_out=held_out)
    data_free = methods[best].run(free, options)
    excess = f"{10 * np.log10(held_out / of_methods[best]):.1f} dB" if of_methods[best] > 0 else "much"
    note = f"solved without data: on rows held out, that is {excess} better than quantizer {quantizer.name} from {problem.stats.rows} rows"
    return replace(data_free, notes=(*data_free.notes, note), held_out=of_methods[best], without_data=True)
