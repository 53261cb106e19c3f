"""Choosing integer codes. Alone, it leaves a float model that computes what the quantized one will (fake quantization)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from magr_onnx.core.gram import dense
from magr_onnx.core.histograms import sketch, tile_headroom
from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerRecord, LayerSolution, groups_error, relative_error
from magr_onnx.core.linalg import automatic_damping
from magr_onnx.core.overflow.accumulator import Accumulator, Budget, smallest_feasible
from magr_onnx.core.overflow.targets import find_target
from magr_onnx.core.quantizers import (
    QUANTIZERS,
    Options,
    Problem,
    Quantizer,
    batched,
    cross_validation,
    method_options,
    quantizers_with,
    rtn,
)
from magr_onnx.core.types import BITS, Array, QuantizedWeight, ScaleType, WeightSpec, activation_limits
from magr_onnx.errors import OptionError, choose_one
from magr_onnx.passes.base import LayerPass, negative_or_infinite
from magr_onnx.passes.layer_passes import magr
from magr_onnx.passes.layer_passes.activations import ActivationType


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
        bias: Policy of the bias compensation that follows, and so whether the centred Gram matrix is the objective; a plan fills it in.
        target: Machine whose accumulators must not overflow (`magr_onnx.core.overflow.targets.TARGETS`).
        accumulator_bits: Width of the accumulator that must not overflow, instead of a target.
        accumulator_tile: Consecutive terms along K that share it; none for whole dot products.
        alpha: Strength of the MagR inside method auto, relative to the layer; none for one chosen. Other methods leave MagR to its
            own pass.
        activation: Type of the layer inputs that the codes meet. A plan fills it in from its quantize-activations pass.
        method_options: Values of the options that the method declares itself (`magr_onnx.core.quantizers.Quantizer.options`), by name;
            in pipeline text they stand beside the others.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = f"choose integer codes: {', '.join(QUANTIZERS)}"
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
    method_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Any]]:
        shared = {name: option for name, option in super().options().items() if name != "method_options"}
        return shared | {name: (functools.reduce(operator.or_, o.types), o.default) for name, o in method_options().items()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        declared = method_options()
        shared = {name: value for name, value in values.items() if name not in declared}
        return cls(**shared, method_options={name: value for name, value in values.items() if name in declared})

    @property
    def non_default(self) -> dict[str, Any]:
        return {name: value for name, value in super().non_default.items() if name != "method_options"} | dict(self.method_options)

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of the method; round to nearest where the method is not known."""
        return QUANTIZERS.get(self.method, rtn.QUANTIZER)

    def by(self, method: str) -> Self:
        """The same grid and options for another method."""
        if method == self.method:
            return self
        return replace(self, method=method, method_options={}, alpha=self.alpha if QUANTIZERS[method].chooses else None)

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = []
        if spec is not None:
            problems.append("quantize appears twice")
        if self.method not in QUANTIZERS:
            problems.append(f"quantizer {self.method!r} is not known; {choose_one(self.method, QUANTIZERS)}")
        if self.bits not in BITS:
            problems.append(f"bits={self.bits} is not supported; choose one of {', '.join(map(str, BITS))}")
        if self.block_size is not None and self.block_size < 1:
            problems.append(f"block size {self.block_size} must be at least 1, or 'channel'")
        if self.beta is not None and not 0 < self.beta <= 1:
            problems.append(f"beta={self.beta} must be above 0 and at most 1")
        problems += [*negative_or_infinite("damping", self.damping), *negative_or_infinite("quantize: alpha", self.alpha)]
        if self.alpha is not None and self.method in QUANTIZERS and not self.quantizer.chooses:
            choosing = " or ".join(quantizer.name for quantizer in QUANTIZERS.values() if quantizer.chooses)
            problems.append(f"quantize: alpha is for method {choosing}; put a magr pass before method {self.method}")
        if self.sweeps < 0:
            problems.append(f"sweeps={self.sweeps} must be 0 or more")
        return problems + self._method_problems() + self._accumulator_problems()

    def _method_problems(self) -> list[str]:
        """Everything wrong with the options that methods declare themselves."""
        declared = {option.name: option for option in self.quantizer.options}
        problems: list[str | None] = []
        for name, value in self.method_options.items():
            if name in declared:
                problems.append(declared[name].problem(value))
            else:
                owners = " or ".join(quantizers_with(name))
                problems.append(f"{name} is for quantizer {owners} only" if owners else f"quantize has no option {name!r}")
        return [problem for problem in problems if problem is not None]

    def _accumulator_problems(self) -> list[str]:
        if self.target is None and self.accumulator_bits is None:
            if self.accumulator_tile is not None:
                return ["accumulator_tile needs accumulator_bits"]
            wants = self.quantizer.accumulators == "only"
            return [f"quantizer {self.method} is for accumulators only; give a target or accumulator_bits"] if wants else []
        problems = []
        if self.activation is None and self.quantizer.accumulators == "only":
            problems.append(f"quantizer {self.method} needs 8-bit activations; put a quantize-activations pass before it")
        if self.activation is not None and self.block_size is not None:
            problems.append(f"block size {self.block_size} under an accumulator: its sums need one scale a column; use 'channel'")
        if self.target is not None and self.accumulator_bits is not None:
            problems.append("give a target or accumulator_bits, not both")
        if self.target is not None and self.accumulator_tile is not None:
            problems.append("a target has a tile of its own; leave accumulator_tile out, or give accumulator_bits instead of the target")
        if self.method in QUANTIZERS and self.quantizer.accumulators == "none":
            names = ", ".join(quantizer.name for quantizer in QUANTIZERS.values() if quantizer.accumulators != "none")
            problems.append(f"quantizer {self.method} knows no accumulators; choose one of {names}")
        try:
            budget = self.budget()
        except OptionError as error:
            return [*problems, str(error)]
        if budget is not None and budget.largest_code < 1 and self.activation is not None:
            least = smallest_feasible(budget)
            problems.append(
                f"accumulator_bits={self.accumulator_bits}: with {self.activation} activations only zero weights cannot overflow; "
                f"the smallest that works is {least}"
            )
        return problems

    @property
    def weighs_outputs(self) -> bool:
        """Whether the method takes second moments of gradients, in a plan that is resolved."""
        return self.quantizer.chooses and (self.activation is None or self.budget() is None)

    def budget(self, taps: int = 1, depthwise: bool = False) -> Budget | None:
        """The accumulator the codes must fit, or None for no constraint.

        Args:
            taps: Kernel taps of a convolution. Which of its rows share a tile of an accumulator that is no target's is not known: the
                constraint is that of both orders, (channels, taps) and (taps, channels).
            depthwise: Whether its groups have one input and one output channel.

        Raises:
            OptionError: An unknown target, or an accumulator that is none.
        """
        signed, dynamic = self.activation == "int8", self.activation == "dynamic"
        if self.target is not None:
            return find_target(self.target).weight_budget(signed, True, qdq=not dynamic, taps=taps, depthwise=depthwise)
        if self.accumulator_bits is None:
            return None
        orders = (1,) if taps == 1 or depthwise or self.accumulator_tile is None else (1, taps)
        return Budget(self.accumulator(), *activation_limits(signed), orders)

    def budget_of(self, problem: LayerProblem) -> Budget | None:
        """The accumulator that the codes of a layer must fit; None for no constraint, or if its inputs are floats."""
        return None if self.activation is None else self.budget(problem.taps, problem.depthwise)

    def accumulator(self) -> Accumulator:
        """The registers of ``accumulator_bits``."""
        assert self.accumulator_bits is not None
        return Accumulator(self.accumulator_bits, self.accumulator_tile, max(32, self.accumulator_bits))

    def spec(self, float_type: ScaleType = "float32") -> WeightSpec:
        """The grid for weights of a type: half-precision weights store half-precision scales."""
        scales = float_type if self.activation is None else "float32"  # integer kernels have float32 scales
        return WeightSpec(self.bits, self.block_size, self.symmetric, scales)

    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        centred, record = problem.centred(self.bias), solution.record
        spec, budget, fits = self.spec(problem.float_type), self.budget_of(problem), solution.fit_targets
        task = Problem(
            solution.weight,
            solution.target,
            problem.stats,
            centred,
            spec,
            budget,
            problem.weight,
            fits,
            problem.target_moments,
            problem.output_hessian,
            problem.adaptive_hessian,
        )
        declared = {option.name: option.default for option in self.quantizer.options} | dict(self.method_options)
        options = Options(self.beta, self.damping, self.act_order, self.sweeps, self.rescale, self.alpha, declared)
        result = cross_validation.run(QUANTIZERS[self.method], task, options)
        weight = result.weight.dequantize()
        if result.reduction is not None:
            record = replace(record, magr=magr.figures(solution.weight, result.reduction))
        if result.without_data:  # from the model's weight
            unused = (
                None
                if record.feedback is None
                else {**record.feedback, "damping": None, "held_out_after": record.feedback["held_out_before"]}
            )
            record = replace(record, magr=None, feedback=unused)
        reduced = solution.weight if result.reduction is None else result.reduction.weights  # by MagR, here or in a stage before
        fitted = relative_error(weight, problem, centred)
        noise = problem.input_noise if problem.target_moments is None else 0.0
        record = replace(
            record.noting(*result.notes),
            error=fitted if result.held_out is None else float(np.sqrt(result.held_out + noise)),
            fitted_error=fitted,
            solver=result.figures or record.solver,
            weights=sketch(
                problem.weight if result.without_data else solution.target, None if record.magr is None else reduced, result.weight
            ),
            errors=result.errors or record.errors,
            tiles=None if budget is None else tile_headroom(result.weight, budget),
        )
        return replace(solution, weight=weight, quantized=result.weight, changed=True, record=record)

    def takes_groups(self, count: int, rows: int) -> bool:
        """Whether ``count`` groups of a convolution, of ``rows`` rows each, are solved together rather than one by one."""
        small = count >= batched.FEWEST_GROUPS and rows <= batched.MOST_ROWS
        return small and self.quantizer.batched is not None and self.beta is None

    def solve_groups(self, problems: Sequence[LayerProblem], targets: Sequence[Array]) -> LayerSolution:
        """Solve the groups of a convolution together, each towards a weight ``(K, N)``; the channels of all groups are side by side."""
        matrices = np.stack(targets)
        k = matrices.shape[1]
        centred, stats = problems[0].centred(self.bias), problems[0].stats
        damping = automatic_damping(k, stats.rows) if self.damping is None else self.damping
        # nearest codes are the best where inputs are uncorrelated
        used = np.stack([dense(p.stats.regularized(centred)) for p in problems])
        used = used * np.eye(k) if self.quantizer.batched == "diagonal" else used
        result = batched.solve(matrices, used, self.spec(problems[0].float_type), damping, self.sweeps, self.budget_of(problems[0]))
        error = groups_error(problems, [w.dequantize() for w in result.weights], centred)
        quantized, target = QuantizedWeight.side_by_side(result.weights), np.hstack(list(matrices))
        weights = sketch(target, None, quantized)
        record = LayerRecord(stats.rows, error, weights=weights)
        return LayerSolution(quantized.dequantize(), None, target, (), quantized, None, True, record)

    def placeholder(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        """Codes of zero; there are zero points unless the grid is symmetric, as for nearly any real weight."""
        k, n = problem.weight.shape
        spec = self.spec(problem.float_type)
        grid = (spec.groups(k), n)
        zeros = np.full(grid, spec.middle if spec.symmetric else 0, np.uint8)
        return replace(solution, quantized=QuantizedWeight(np.zeros((k, n), np.uint8), np.ones(grid, np.float32), zeros, spec))
