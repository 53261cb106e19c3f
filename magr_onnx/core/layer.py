"""One layer as the solvers see it: a problem, and the solution that the stages of a plan refine step by step.

Plain arrays, no graph. A layer computes ``Y = X W + b`` with ``W (K, N)`` and ``b (N,)``; see `magr_onnx.core.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from magr_onnx.core import error_feedback
from magr_onnx.core.adaptive_hessian import AdaptiveHessian
from magr_onnx.core.gram import NOISE
from magr_onnx.core.histograms import sketch
from magr_onnx.core.linalg import error_of_inputs, transposed_product
from magr_onnx.core.low_rank import Factors
from magr_onnx.core.types import (
    Activation,
    ActivationGrid,
    Array,
    LayerStats,
    QuantizedWeight,
    ScaleType,
    TargetMoments,
    column_parts,
    sum_traces,
)

BiasPolicy = Literal["existing", "any", "none"]
"""Layers that bias correction applies to: those with a bias, all, or none."""


def absorbs_mean(policy: BiasPolicy | None, has_bias: bool) -> bool:
    """Return whether a layer's bias absorbs its mean error under a policy of bias correction."""
    return policy == "any" or (policy == "existing" and has_bias)


@dataclass(frozen=True, slots=True, eq=False)
class LayerProblem:
    """Everything known about one layer before it is solved.

    Attributes:
        weight: ``(K, N)`` float32, as the model has it: errors are measured against it.
        bias: ``(N,)`` float64, as the model has it, or None.
        stats: Second moments of the layer's input.
        float_type: The type the model stores the weight in; scales and float factors are stored in it too.
        activation: The 8-bit grid of the layer's input, or None where it stays float.
        output_grid: The static 8-bit grid of the layer's product, or None where it stays float.
        target_moments: Moments of the output the layer should have, where the layers before it are quantized; else None.
        output_hessian: ``(N, N)`` second moments of the gradients at the layer's outputs, or None.
        adaptive_hessian: What stands in for the Gram matrix in the solvers, or None.
        input_noise: Squared error of the output that rounding the input alone causes, over the variance of the output.
        taps: Kernel taps of a convolution, whose rows are (channels, taps); 1 for others.
        depthwise: Whether the layer is a group of a convolution with one input and one output channel.
        notes: Sentences for the report.
    """

    weight: Array
    bias: Array | None
    stats: LayerStats
    float_type: ScaleType = "float32"
    activation: Activation | None = None
    output_grid: ActivationGrid | None = None
    target_moments: TargetMoments | None = None
    output_hessian: Array | None = None
    adaptive_hessian: AdaptiveHessian | None = None
    input_noise: float = 0.0
    taps: int = 1
    depthwise: bool = False
    notes: tuple[str, ...] = ()
    _memo: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    @property
    def output_variance(self) -> float:
        """Return `output_variance` of the weight, computed once."""
        if "variance" not in self._memo:
            self._memo["variance"] = output_variance(self.weight, self.stats, self.target_moments)
        return self._memo["variance"]

    def centred(self, policy: BiasPolicy | None) -> bool:
        """Return whether a bias absorbs the mean error, so that the centred Gram matrix is the objective."""
        return not self.stats.is_data_free and absorbs_mean(policy, self.bias is not None)


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """Figures of one solution for the report, as plain data: those fields of `magr_onnx.report.layer_row.LayerRow` that solvers know."""

    rows: int = 0
    error: float | None = None
    magr: dict[str, Any] | None = None
    solver: dict[str, float] | None = None
    bias_compensated: bool = False
    activation: dict[str, Any] | None = None
    feedback: dict[str, Any] | None = None
    low_rank: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    errors: tuple[float, ...] = ()
    tiles: dict[str, Any] | None = None
    fitted_error: float | None = None
    notes: tuple[str, ...] = ()

    def noting(self, *notes: str) -> LayerRecord:
        """Return the record with more notes."""
        return replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True, slots=True, eq=False)
class LayerSolution:
    """The state of a layer after the stages so far.

    Attributes:
        weight: ``(K, N)`` float32 that the layer multiplies by now: reduced, or dequantized, with the product of ``factors``.
        bias: ``(N,)`` now, or None.
        target: ``(K, N)`` that the quantizer minimises the layer error against: the model's weight, or the result of error feedback.
        fit_targets: For every fold of the statistics, ``target`` from the rows outside it, where it depends on rows, of the output
            channels `magr_onnx.core.error_feedback.TargetWeights.fits`; else empty.
        quantized: The codes and their grid, once chosen.
        factors: A low-rank float branch beside the quantized product, or None.
        changed: Whether ``weight`` or ``bias`` differ from what the graph holds.
        record: Figures for the report.
    """

    weight: Array
    bias: Array | None
    target: Array
    fit_targets: tuple[Array, ...] = ()
    quantized: QuantizedWeight | None = None
    factors: Factors | None = None
    changed: bool = False
    record: LayerRecord = field(default_factory=LayerRecord)

    @staticmethod
    def unsolved(problem: LayerProblem) -> LayerSolution:
        """Return the layer as it is in the model."""
        return LayerSolution(problem.weight, problem.bias, problem.weight, record=LayerRecord(problem.stats.rows, notes=problem.notes))


def relative_error(weight: Array, problem: LayerProblem, centred: bool) -> float:
    """Return the root mean square error of the output with ``weight (K, N)``, over the standard deviation of the output.

    It is that of the rows of the statistics. After quantized layers (``problem.target_moments``) the errors of the layers
    before are in it; else ``problem.input_noise``, of a quantized input.
    """
    variance = problem.output_variance
    noise = problem.input_noise * variance if problem.target_moments is None else 0.0
    return ratio(output_error(weight, problem, centred) + noise, variance)


def output_error(weight: Array, problem: LayerProblem, centred: bool) -> float:
    """Return the mean squared error of the output with ``weight (K, N)``, summed over channels; without that of a quantized input alone."""
    if problem.target_moments is not None:
        return error_feedback.squared_error(weight, problem.stats, problem.target_moments, centred)
    squared = 0.0
    for c in column_parts(*weight.shape):
        difference = weight[:, c] - problem.weight[:, c]
        if problem.stats.is_data_free:  # H = I
            squared += float(np.einsum("kn,kn->", difference, difference, dtype=np.float64))
        else:
            squared += error_of_inputs(difference, problem.stats, centred)
    return squared


def groups_error(problems: Sequence[LayerProblem], weights: Sequence[Array], centred: bool) -> float:
    """Return the `relative_error` of the groups of a convolution together, with weights ``(K, N)`` each."""
    squared = sum(output_error(weight, problem, centred) for problem, weight in zip(problems, weights, strict=True))
    return ratio(squared, sum(problem.output_variance for problem in problems))


def output_variance(weight: Array, stats: LayerStats, moments: TargetMoments | None = None) -> float:
    """Return the variance of the target output, summed over channels; its mean square where the output is constant.

    What is constant the layers behind it take for a bias, so that errors are to be compared with what varies.
    """
    if moments is not None:
        power = float(moments.power.sum())
        variance = power - float(np.square(moments.mean).sum())
    elif stats.is_data_free:
        power = variance = float(np.einsum("kn,kn->", weight, weight, dtype=np.float64))
    else:
        variance = error_of_inputs(weight, stats, True)
        power = variance + float(np.square(transposed_product(weight, stats.mean)).sum())
    return variance if variance > NOISE * power else power


def ratio(error: float, power: float) -> float:
    """Return ``sqrt(error / power)`` of a squared error and the squared output; 0 without output."""
    return float(np.sqrt(max(error, 0) / power)) if power > 0 else 0.0


def join_groups(problems: Sequence[LayerProblem], solutions: Sequence[LayerSolution], centred: bool) -> LayerSolution:
    """Join the solutions of a convolution's groups, with their output channels side by side: ``(K, G N)``.

    Squared errors and objectives are summed over groups, and equal notes appear once.
    """
    quantized = QuantizedWeight.side_by_side([s.quantized for s in solutions if s.quantized is not None])
    weight, target = (np.hstack([getattr(s, name) for s in solutions]) for name in ("weight", "target"))
    biases = [s.bias for s in solutions if s.bias is not None]
    error = groups_error(problems, [s.weight for s in solutions], centred)
    records = [s.record for s in solutions]
    alone = records[0] if len(records) == 1 else LayerRecord(weights=sketch(np.hstack([p.weight for p in problems]), None, quantized))
    objectives, notes = sum_traces(*[r.errors for r in records]), dict.fromkeys(note for r in records for note in r.notes)
    record = LayerRecord(records[0].rows, error, alone.magr, bias_compensated=bool(biases), weights=alone.weights)
    record = replace(record, feedback=alone.feedback, errors=tuple(objectives), notes=tuple(notes))
    return LayerSolution(weight, np.concatenate(biases) if biases else None, target, (), quantized, None, True, record)
