"""What a quantizer is, and what it is given and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from magr_onnx.core.linalg import automatic_damping, damped
from magr_onnx.core.magr import Reduction
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.overflow.accumulator import Budget
from magr_onnx.core.types import LARGE, Array, LayerStats, QuantizedWeight, TargetMoments, WeightSpec


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Quantize ``weights`` so that the layer computes ``target``.

    Attributes:
        weights: ``(K, N)`` float32, what to put on the grid (after MagR, if it ran).
        target: ``(K, N)`` float32, what the layer error is measured against (before MagR).
        stats: Second moments of the layer's input.
        centred: Whether a bias will absorb the mean error, which makes ``H - mu mu^T`` the matrix of the error.
        spec: The integer grid.
        budget: What the codes that share an accumulator may add up to; None for no constraint.
        original: ``(K, N)`` the weight as the model came, where ``target`` is not it (error feedback); else None.
        fit_target: ``target`` from the calibration rows that are not held out, where it depends on them; else None.
        target_moments: Moments of the output the layer should have, where layers before it are quantized; else None.
        outputs: ``(N, N)`` second moments of gradients at the layer's outputs, for solvers that couple outputs; else None.
    """

    weights: Array
    target: Array
    stats: LayerStats
    centred: bool
    spec: WeightSpec
    budget: Budget | None = None
    original: Array | None = None
    fit_target: Array | None = None
    target_moments: TargetMoments | None = None
    outputs: Array | None = None

    @property
    def reference(self) -> Array:
        """The weight as the model came, ``(K, N)``."""
        return self.target if self.original is None else self.original

    @property
    def gram(self) -> Array:
        """The matrix of the layer error, ``(K, K)`` float64."""
        return self.stats.objective_gram(self.centred)

    def damping(self, options: Options) -> float:
        """The damping asked for, or the one these statistics need."""
        return automatic_damping(len(self.weights), self.stats.rows) if options.damping is None else options.damping

    def damped_gram(self, damping: float) -> Array:
        """`damped_gram` of this layer."""
        return damped_gram(self.stats, self.centred, damping)


def damped_gram(stats: LayerStats, centred: bool, damping: float) -> Array:
    """The matrix of the layer error, damped; computed once for all that share the statistics where K is not `LARGE`."""
    if len(stats.mean) >= LARGE:
        return damped(stats.objective_gram(centred), damping, overwrite=centred and not stats.is_data_free)
    return stats.memo(("damped", centred, damping), lambda: damped(stats.objective_gram(centred), damping))


@dataclass(frozen=True, slots=True)
class Options:
    """Options of all quantizers; each reads those it knows.

    Attributes:
        alpha: Strength of MagR, relative to the layer (auto; the others leave MagR to its own pass); None for one chosen.
        beta: Shrink factor of the min-max grid; None searches the factor per group.
        damping: Multiple of ``diag H`` added to the diagonal (gptq, comq); None for `automatic_damping`.
        act_order: Round inputs in descending ``diag(H)`` (gptq, comq's start); None for yes (auto: chosen).
        sweeps: Most coordinate-descent sweeps (comq).
        rescale: Refit scales between sweeps (comq).
        method_options: Values of the options that the quantizer declares itself (`Quantizer.options`), by name.
    """

    beta: float | None = None
    damping: float | None = None
    act_order: bool | None = None
    sweeps: int = 8
    rescale: bool = True
    alpha: float | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A quantized weight and how it was found.

    Attributes:
        weight: Codes and grid.
        notes: Anything out of the ordinary, as sentences.
        facts: Figures for the report.
        errors: The layer error at the start and after every sweep, for solvers that have any.
        reduction: What MagR did to the weights before, where the solver called it.
    """

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)
    errors: tuple[float, ...] = ()
    reduction: Reduction | None = None


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A method of choosing codes, and all that the rest of the package must know of it.

    Attributes:
        name: What users call it.
        summary: What it does, in a few words.
        run: The method.
        accumulators: Whether it can keep sums within an accumulator: ``none`` cannot, ``supported`` can, ``only`` does nothing else.
        chooses: Whether it chooses MagR's strength, damping and order for every layer, by the error on held-out rows, and so runs MagR
            itself.
        batched: How `magr_onnx.core.quantizers.batched` stands in for it where a convolution has many small groups: with their Gram
            matrices, with the diagonals of these, or not at all.
        quick: The quantizer that measures sensitivities in its place, where an error need not be the least.
        options: Options of the method; their values are in `Options.method_options`.
    """

    name: str
    summary: str
    run: Callable[[Problem, Options], Solution]
    accumulators: Literal["none", "supported", "only"] = "none"
    chooses: bool = False
    batched: Literal["gram", "diagonal"] | None = None
    quick: str = "gptq"
    options: tuple[OptionSpec, ...] = ()
