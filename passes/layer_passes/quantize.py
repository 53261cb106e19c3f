"""Choosing integer codes. Alone, it leaves a float model that computes what the quantized one will (fake quantization)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core import error_feedback
from magr_onnx.core.histograms import sketch, tile_headroom
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.overflow.accumulator import Accumulator, Budget, smallest_feasible
from magr_onnx.core.overflow.targets import find_target
from magr_onnx.core.quantizers import QUANTIZERS, UNDER_A_BUDGET, Options, Problem, Solution
from magr_onnx.core.types import BITS, WeightSpec, activation_limits
from magr_onnx.errors import OptionError
from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.job import BiasPolicy, Job
from magr_onnx.passes.layer_passes.activations import ActivationType
from magr_onnx.passes.layer_passes.magr import facts_of


@dataclass(frozen=True)
class Quantize(LayerPass):
    """Quantize every layer with a method of `magr_onnx.core.quantizers.QUANTIZERS`.

    Attributes:
        method: A name in the registry.
        bits: 2 to 8.
        block_size: Rows that share a scale; none for one grid a column.
        symmetric: Fix the zero point in the middle of the grid.
        beta: Shrink of the min-max grid; none searches it per group.
        damping: Multiple of the diagonal added to the Gram matrix; none for one that follows from the number of rows (auto: chosen
            around it).
        act_order: Round inputs in descending power; none for yes (auto: chosen).
        sweeps: Most coordinate-descent sweeps (comq).
        rescale: Refit scales between sweeps (comq).
        bias: Policy of the bias compensation that will follow: where a bias will absorb the mean error, the centred Gram
            matrix is the objective. A plan fills it in from its compensate-bias pass; none where there is none.
        target: Machine whose accumulators must not overflow (`magr_onnx.core.overflow.targets.TARGETS`).
        accumulator_bits: Width of the accumulator that must not overflow, instead of a target.
        accumulator_tile: Consecutive terms along K that share it; none for whole dot products.
        alpha: Strength of the MagR inside method auto, relative to the layer; none for one chosen. Other methods leave MagR to its
            own pass.
        activation: Type of the layer inputs that the codes meet. A plan fills it in from its quantize-activations pass.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "choose integer codes: auto; rtn, gptq, comq, hqq; a2q, a2q+"
    slot: ClassVar[str] = "quantize"
    solves: ClassVar[bool] = True

    method: str = "gptq"
    bits: int = 4
    block_size: int | None = 32
    symmetric: bool = False
    beta: float | None = None
    damping: float | None = None
    act_order: bool | None = None
    sweeps: int = 8
    rescale: bool = True
    bias: BiasPolicy | None = None
    target: str | None = None
    accumulator_bits: int | None = None
    accumulator_tile: int | None = None
    alpha: float | None = None
    activation: ActivationType | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        found = []
        if spec is not None:
            found.append("quantize appears twice")
        if self.method not in QUANTIZERS:
            found.append(f"quantizer {self.method!r} is not known; choose one of {', '.join(QUANTIZERS)}")
        if self.bits not in BITS:
            found.append(f"bits={self.bits} is not supported; choose one of {', '.join(map(str, BITS))}")
        if self.block_size is not None and self.block_size < 1:
            found.append(f"block size {self.block_size} must be at least 1, or 'channel'")
        if self.beta is not None and not 0 < self.beta <= 1:
            found.append(f"beta={self.beta} must be above 0 and at most 1")
        if self.damping is not None and not 0 <= self.damping < math.inf:
            found.append(f"damping={self.damping} must be 0 or more, and finite")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            found.append(f"quantize: alpha={self.alpha} must be 0 or more, and finite")
        if self.alpha is not None and self.method != "auto":
            found.append(f"quantize: alpha is for method auto; put a magr pass before method {self.method}")
        if self.sweeps < 0:
            found.append(f"sweeps={self.sweeps} must be 0 or more")
        return found + self._accumulator_problems()

    def _accumulator_problems(self) -> list[str]:
        asked = self.target is not None or self.accumulator_bits is not None
        if not asked:
            if self.accumulator_tile is not None:
                return ["accumulator_tile needs accumulator_bits"]
            wants = self.method in QUANTIZERS and self.method.startswith("a2q")
            return [f"quantizer {self.method} is for accumulators only; give a target or accumulator_bits"] if wants else []
        found = []
        if self.activation is None and self.method.startswith("a2q"):
            found.append(f"quantizer {self.method} needs 8-bit activations; put a quantize-activations pass before it")
        if self.activation is not None and self.block_size is not None:
            found.append(f"block size {self.block_size} under an accumulator: its sums need one scale a column; use 'channel'")
        if self.target is not None and self.accumulator_bits is not None:
            found.append("give a target or accumulator_bits, not both")
        if self.target is not None and self.accumulator_tile is not None:
            found.append("a target has a tile of its own; leave accumulator_tile out, or give accumulator_bits instead of the target")
        if self.method in QUANTIZERS and self.method not in UNDER_A_BUDGET:
            found.append(f"quantizer {self.method} knows no accumulators; choose one of {', '.join(UNDER_A_BUDGET)}")
        try:
            budget = self.budget()
        except OptionError as error:
            return [*found, str(error)]
        if budget is not None and budget.largest_code < 1 and self.activation is not None:
            least = smallest_feasible(budget)
            found.append(
                f"accumulator_bits={self.accumulator_bits}: with {self.activation} activations only zero weights cannot overflow; "
                f"the smallest that works is {least}"
            )
        return found

    @property
    def holds_out(self) -> bool:
        """Whether the method judges its choices on rows that are held out."""
        return self.method == "auto"

    def budget(self) -> Budget | None:
        """The accumulator the codes must fit, or None for no constraint.

        Raises:
            OptionError: An unknown target, or an accumulator that is none.
        """
        signed, dynamic = self.activation == "int8", self.activation == "dynamic"
        if self.target is not None:
            return find_target(self.target).weight_budget(signed, True, qdq=not dynamic)
        if self.accumulator_bits is None:
            return None
        return Budget(self.accumulator(), *activation_limits(signed))

    def accumulator(self) -> Accumulator:
        """The registers of ``accumulator_bits``."""
        assert self.accumulator_bits is not None
        return Accumulator(self.accumulator_bits, self.accumulator_tile, max(32, self.accumulator_bits))

    def spec(self, dtype: ir.DataType = ir.DataType.FLOAT) -> WeightSpec:
        """The grid for weights of a type: half-precision weights store half-precision scales."""
        half = dtype == ir.DataType.FLOAT16 and self.activation is None  # integer kernels have float32 scales
        return WeightSpec(self.bits, self.block_size, self.symmetric, "float16" if half else "float32")

    def apply(self, job: Job) -> bool:
        centred = job.centred(self.bias)
        problem = Problem(
            job.weight,
            job.target,
            job.stats,
            centred,
            self.spec(job.layer.dtype),
            self.budget() if self.activation else None,
            job.reference,
            job.kept_target,
            job.goal,
            job.outputs,
        )
        options = Options(self.beta, self.damping, self.act_order, self.sweeps, self.rescale, self.alpha)
        solution = QUANTIZERS[self.method](problem, options)
        if solution.reduction is not None:
            job.facts["magr"] = facts_of(job.weight, solution.reduction)
        job.facts["weights"] = self._sketch(job, solution)
        if problem.budget is not None:
            job.facts["tiles"] = tile_headroom(solution.weight, problem.budget)
        job.quantized = solution.weight
        job.weight = solution.weight.dequantize()
        job.changed = True
        job.notes.extend(solution.notes)
        if solution.facts:
            job.facts["solver"] = solution.facts
        if solution.errors:
            job.facts["errors"] = solution.errors
        job.facts["error"] = relative_error(job, centred)
        return True

    def _sketch(self, job: Job, solution: Solution) -> dict[str, Any]:
        """The weight before and after MagR, which ran in the solver, or in a pass before (then the target is what it was given)."""
        reduced = job.weight if solution.reduction is None else solution.reduction.weights
        return sketch(job.target, reduced if "magr" in job.facts else None, solution.weight)


def relative_error(job: Job, centred: bool) -> float:
    """Output error of ``job.weight`` over output, as norms; with error feedback what the layers before did wrong is in it."""
    if job.goal is not None:
        return float(np.sqrt(error_feedback.error(job.weight.astype(np.float64), job.stats, job.goal, centred)))
    if job.stats.is_data_free:  # H = I
        difference = job.weight - job.reference
        squares = [float(np.einsum("kn,kn->", a, a, dtype=np.float64)) for a in (difference, job.reference)]
        return float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else 0.0
    power = layer_error(job.reference, job.stats.gram)
    left = layer_error(job.weight - job.reference, job.stats.objective_gram(centred))
    return float(np.sqrt(max(left, 0) / power)) if power > 0 else 0.0
