"""Interface of quantizers: problem, options, solution and registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from magr_onnx.core import backends
from magr_onnx.core.adaptive_hessian import AdaptiveHessian
from magr_onnx.core.backends import HOST
from magr_onnx.core.gram import Gram
from magr_onnx.core.linalg import automatic_damping, damped
from magr_onnx.core.magr import Reduction
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.overflow.accumulator import Budget
from magr_onnx.core.types import Array, LayerStats, QuantizedWeight, TargetMoments, WeightSpec


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Quantize ``weights`` so that the layer computes ``target``.

    Attributes:
        weights: ``(K, N)`` float32 to quantize (after MagR, if it ran).
        target: ``(K, N)`` float32, the reference of the layer error (before MagR).
        stats: Second moments of the layer's input.
        centred: Whether a bias absorbs the mean error, which makes ``H - mu mu^T`` the matrix of the error.
        spec: The integer grid.
        budget: Bound on sums of codes in an accumulator; None for no constraint.
        original: ``(K, N)`` the weight of the model, where ``target`` differs from it (error feedback); else None.
        fit_targets: For every fold of ``stats``, ``target`` from the rows outside it, where it depends on rows, of the output channels
            `magr_onnx.core.error_feedback.TargetWeights.fits`; else empty.
        target_moments: Moments of the target output, where layers before it are quantized; else None.
        output_hessian: ``(N, N)`` second moments of gradients at the layer's outputs, for solvers that couple outputs; else None.
        adaptive_hessian: What stands in for the Gram matrix, for solvers that take it; else None.
    """

    weights: Array
    target: Array
    stats: LayerStats
    centred: bool
    spec: WeightSpec
    budget: Budget | None = None
    original: Array | None = None
    fit_targets: tuple[Array, ...] = ()
    target_moments: TargetMoments | None = None
    output_hessian: Array | None = None
    adaptive_hessian: AdaptiveHessian | None = None

    @property
    def on_host(self) -> Problem:
        """Return the problem as it is solved on the CPU."""
        return replace(self, stats=replace(self.stats, backend=HOST))

    @property
    def reference(self) -> Array:
        """Return the weight of the model, ``(K, N)``."""
        return self.target if self.original is None else self.original

    @property
    def gram(self) -> Gram:
        """Return the matrix that weights are solved with, ``(K, K)`` (`LayerStats.regularized`)."""
        return self.stats.regularized(self.centred)

    def damping(self, options: Options) -> float:
        """Return the damping of the options, or the automatic one."""
        return automatic_damping(len(self.weights), self.stats.rows) if options.damping is None else options.damping

    def damped_gram(self, damping: float) -> Gram:
        """Return `damped_gram` of this layer."""
        return damped_gram(self.stats, self.centred, damping)


def damped_gram(stats: LayerStats, centred: bool, damping: float) -> Gram:
    """Return the damped matrix of the layer error ``(K, K)`` float32; computed once for all layers that share the statistics, unless
    they are large."""
    b = stats.backend
    if stats.is_large:
        return b.cast(damped(backends.gram_on(stats.regularized(centred), b), damping, overwrite=not stats.is_data_free), "float32")

    def make() -> Gram:
        return damped(backends.gram_on(stats.regularized(centred).astype(np.float32), b), damping, overwrite=True)

    return stats.memo(("damped", centred, damping, b.name), make)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of all quantizers; each reads those it knows.

    Attributes:
        alpha: Strength of MagR, relative to the layer (auto only; otherwise MagR is its own stage); None to search for it.
        beta: Shrink factor of the min-max grid; None searches the factor per group.
        damping: Multiple of ``diag H`` added to the diagonal (gptq, comq); None for `automatic_damping`.
        act_order: Round inputs in descending ``diag(H)`` (gptq, comq's start); None for yes (auto: searched).
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
    """A quantized weight and figures about it.

    Attributes:
        weight: Codes and grid.
        notes: Anything out of the ordinary, as sentences.
        figures: Figures for the report.
        errors: The layer error at the start and after every sweep, for iterative solvers.
        reduction: Result of MagR, where the solver ran it.
        held_out: Relative squared error on held-out rows (`magr_onnx.core.quantizers.cross_validation.error`), where it was measured.
        without_data: Whether it was solved from the model's weight and no data, though there was some.
    """

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    errors: tuple[float, ...] = ()
    reduction: Reduction | None = None
    held_out: float | None = None
    without_data: bool = False


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A method of choosing codes, and the facts the rest of the package needs about it.

    Attributes:
        name: Its name.
        summary: A few words.
        run: The method.
        accumulators: Whether it can keep sums within an accumulator: ``none``: it cannot, ``supported``: it can, ``only``: it requires one.
        chooses: Whether it chooses MagR's strength, damping and order for every layer, by the error on held-out rows, and so runs MagR
            itself.
        batched: How `magr_onnx.core.quantizers.batched` stands in for it where a convolution has many small groups: with their Gram
            matrices, with the diagonals of these, or not at all.
        on_device: Whether it computes where the statistics say (`magr_onnx.core.types.LayerStats.backend`); else on the CPU alone.
        quick: The quantizer that measures sensitivities in its place, where an error need not be the least.
        options: Options of the method; their values are in `Options.method_options`.
    """

    name: str
    summary: str
    run: Callable[[Problem, Options], Solution]
    accumulators: Literal["none", "supported", "only"] = "none"
    chooses: bool = False
    batched: Literal["gram", "diagonal"] | None = None
    on_device: bool = False
    quick: str = "gptq"
    options: tuple[OptionSpec, ...] = ()
