"""What a run does to a model: one field for each stage, in the order they are carried out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import onnx_ir as ir

from magr_onnx.core.layer import BiasPolicy, LayerProblem, LayerSolution, join_groups
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import Target, find_target
from magr_onnx.core.quantizers.auto import usual_alpha
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import OptionError, PipelineError, raise_all
from magr_onnx.passes import pipeline_text, registry
from magr_onnx.passes.base import Emitter, InputGrids, LayerStage, Stage
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.layer_passes.activations import QuantizeActivations
from magr_onnx.passes.layer_passes.bias_compensation import CompensateBias
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layer_passes.embeddings import Embeddings
from magr_onnx.passes.layer_passes.error_feedback import ErrorFeedback
from magr_onnx.passes.layer_passes.low_rank import LowRank
from magr_onnx.passes.layer_passes.magr import MagR
from magr_onnx.passes.layer_passes.output_hessian import OutputHessian
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.providers import find_provider
from magr_onnx.passes.rewrites.base import Rewrite

S = TypeVar("S", bound=Stage)

_INPUTS = {"static": "quantize-activations with type uint8 or int8", "dynamic": "quantize-activations with type dynamic"}


@dataclass(frozen=True)
class Plan:
    """The stages of a run; None where there is no such stage.

    Attributes:
        rewrites: Changes to the float graph before its layers are looked for.
        error_feedback: Quantize in stages, each layer towards the float output.
        output_hessian: Weigh output errors by gradients.
        magr: Reduce weight magnitudes.
        activations: The grids of 8-bit layer inputs.
        quantize: The quantizer and its grid.
        low_rank: A float branch beside every quantized product.
        bias: Bias correction.
        emitter: The pass that writes quantized layers.
        convolutions: Convolutions, which are converted before linear layers.
        embeddings: Tables of embeddings, which are converted before both.
    """

    rewrites: tuple[Rewrite, ...] = ()
    error_feedback: ErrorFeedback | None = None
    output_hessian: OutputHessian | None = None
    magr: MagR | None = None
    activations: QuantizeActivations | None = None
    quantize: Quantize | None = None
    low_rank: LowRank | None = None
    bias: CompensateBias | None = None
    emitter: Emitter | None = None
    convolutions: Convolutions | None = None
    embeddings: Embeddings | None = None

    @staticmethod
    def of(stages: Iterable[Stage]) -> Plan:
        """Make a plan of stages in the order of its fields.

        Raises:
            PipelineError: Stages are out of order, or appear twice.
        """
        order = [f.name for f in fields(Plan)]
        filled: dict[str, Any] = {}
        before: list[Stage] = []
        problems: list[str] = []
        for stage in stages:
            later = next((other for other in before if order.index(other.slot) > order.index(stage.slot)), None)
            same = [other for other in before if other.slot == stage.slot]
            if later is not None:
                problems.append(f"{stage.name} must come before {later.name}")
            if any(other.name == stage.name for other in same):
                problems.append(f"{stage.name} appears twice")
            elif stage.slot == "rewrites":
                filled["rewrites"] = (*filled.get("rewrites", ()), stage)
            elif same:
                problems.append(f"{same[0].name} and {stage.name}: a pipeline has one of them")
            else:
                filled[stage.slot] = stage
            before.append(stage)
        raise_all(PipelineError, problems)
        return Plan(**filled)

    @staticmethod
    def parse(text: str) -> Plan:
        """Read the plan that a pipeline text stands for.

        Raises:
            PipelineError: The text does not parse, or names an unknown pass or option, or a value has the wrong type, or stages are out
                of order or appear twice.
        """
        return Plan.of(pipeline_text.parse(text))

    @staticmethod
    def read(value: str | Plan | Sequence[Stage]) -> Plan:
        """Take a plan as it is, or make one of pipeline text or of stages.

        Raises:
            PipelineError: As `parse` and `of`, or it is none of these.
        """
        if isinstance(value, Plan):
            return value
        if isinstance(value, str):
            return Plan.parse(value)
        if not isinstance(value, list | tuple) or not all(map(registry.is_stage, value)):
            raise PipelineError(f"pipeline_text = {value!r}: expected a text, a plan, or a list of passes of magr_onnx.passes")
        return Plan.of(value)

    def __str__(self) -> str:
        """The text that `parse` turns back into this plan."""
        return ",".join(map(str, self.stages))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        return (*self.rewrites, *(stage for f in fields(self)[1:] if (stage := getattr(self, f.name)) is not None))

    @property
    def passes(self) -> tuple[ir.passes.PassBase, ...]:
        """The stages that work by themselves, for `ir.passes.Sequential`; what only the plan knows is filled in."""
        return tuple(filter(registry.is_pass, self.resolved.stages))

    @property
    def solving(self) -> tuple[LayerStage, ...]:
        """What happens to a layer before it is written; what only the plan knows is filled in."""
        plan = self.resolved
        stages = (plan.error_feedback, plan.magr, plan.activations, plan.quantize, plan.low_rank, plan.bias)
        return tuple(stage for stage in stages if stage is not None)

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Solve a layer: its stages in order."""
        solution = LayerSolution.unsolved(problem)
        for stage in self.solving:
            solution = stage.solve(problem, solution)
        return solution

    def for_convolutions(self, absorbs: bool) -> Plan:
        """What the plan is for the groups of a convolution: MagR, the quantizer and the bias correction.

        Args:
            absorbs: Whether the biases of all convolutions with the weight can take up its mean error.
        """
        conv, quantize = self.convolutions, self.quantize
        assert conv is not None
        assert quantize is not None
        if quantize.quantizer.accumulators == "only":  # convolutions are kept within none
            quantize = quantize.by("comq")
        chooses = quantize.quantizer.chooses
        alpha = usual_alpha(conv.bits, None) if conv.alpha is None else conv.alpha
        magr = MagR(alpha, damping=None if self.magr is None else self.magr.damping) if alpha and not chooses else None
        quantize = replace(
            quantize,
            bits=conv.bits,
            block_size=None,
            symmetric=conv.symmetric,
            bias=None,
            target=None,
            accumulator_bits=None,
            accumulator_tile=None,
            alpha=conv.alpha if chooses else None,
            activation=None,
        )
        return Plan(magr=magr, quantize=quantize, bias=CompensateBias("any") if absorbs else None)

    def solve_groups(self, problems: Sequence[LayerProblem]) -> LayerSolution:
        """Solve the groups of a convolution: together where they are many and small, else one by one."""
        plan = self.resolved
        if plan.quantize is not None and plan.quantize.takes_groups(len(problems), len(problems[0].weight)):
            return plan.quantize.solve_groups(problems)
        return join_groups(problems, [plan.solve(problem) for problem in problems], problems[0].centred(plan.bias_policy))

    def placeholder(self, problem: LayerProblem) -> LayerSolution:
        """Make up a solution with arrays of the right shapes, without the work."""
        solution = LayerSolution.unsolved(problem)
        for stage in self.solving:
            solution = stage.placeholder(problem, solution)
        return solution

    @property
    def resolved(self) -> Plan:
        """The plan, with bias policy and activation type in the stages that leave them open."""
        bias, activation = self.bias_policy, None if self.activations is None else self.activations.type
        return replace(
            self,
            error_feedback=_filled(self.error_feedback, bias=bias),
            magr=_filled(self.magr, bias=bias),
            quantize=_filled(self.quantize, bias=bias, activation=activation),
            low_rank=_filled(self.low_rank, bias=bias),
        )

    @property
    def bias_policy(self) -> BiasPolicy | None:
        """Which biases will take up the mean error; None where there is no bias correction."""
        return None if self.bias is None else self.bias.bias

    @property
    def input_grids(self) -> InputGrids | None:
        """How layer inputs become 8-bit integers; None where they stay float."""
        return None if self.activations is None else self.activations.grids

    @property
    def quantizes_outputs(self) -> bool:
        """Whether products of layers are put on a static grid, too."""
        return self.emitter is not None and self.emitter.quantizes_outputs

    @property
    def holds_out(self) -> bool:
        """Whether the quantizer judges its choices on rows that are held out."""
        return self.quantize is not None and self.quantize.holds_out

    @property
    def spec(self) -> WeightSpec | None:
        """The grid of float32 weights; None where nothing is quantized, or the quantizer's options are wrong."""
        quantize = self.resolved.quantize
        return None if quantize is None or quantize.problems(None) else quantize.spec()

    @property
    def accumulator(self) -> Target | Accumulator | None:
        """The accumulator that may not overflow, if there is one."""
        if self.quantize is not None and self.quantize.target is not None:
            return find_target(self.quantize.target)
        if self.quantize is not None and self.quantize.accumulator_bits is not None:
            return self.quantize.accumulator()
        return None if self.emitter is None else self.emitter.accumulator()

    def suited(self, provider: str) -> Plan:
        """The plan, with blocks kept to what the kernels of ``provider`` take."""
        largest = find_provider(provider).largest_block
        return self if self.emitter is None or largest is None else replace(self, emitter=self.emitter.suited(largest))

    def prepare(self, model: ir.Model) -> bool:
        """Change the whole model as the stages need it, in place; True if anything changed."""
        spec = self.spec
        changed = [stage.prepare(model, spec) for stage in self.stages]
        return any(changed)

    def check(self, provider: str = "cpu") -> None:
        """Raise one error for everything that is wrong with the plan.

        Raises:
            OptionError: With all `problems`.
        """
        raise_all(OptionError, self.problems(provider))

    def problems(self, provider: str = "cpu") -> list[str]:
        """List everything wrong with the plan, before any work.

        Args:
            provider: Where the result will run: not every kernel exists everywhere.
        """
        plan = self.resolved
        spec = plan.spec
        behind = False  # the quantizer
        problems: list[str] = []
        for stage in plan.stages:
            invalid = behind and spec is None
            if not (invalid and stage is plan.emitter):
                problems += stage.problems(spec if behind else None)
            behind |= stage is plan.quantize
        problems += [*plan._missing(), *plan._input_problems()]
        return problems if spec is None else problems + find_provider(provider).refuses(spec)

    def _missing(self) -> list[str]:
        """What stages need beside them."""
        problems: list[str] = []
        for rewrite in self.rewrites:
            if self.quantize is None:
                problems.append(f"{rewrite.name} needs a quantize pass after it: it is made for a grid")
            if rewrite.input_grids == "static" and (self.emitter is None or self.emitter.input_grids != "static"):
                problems.append(f"{rewrite.name} is for static 8-bit inputs: use format {_formats('static')}, or leave it out")
        if self.low_rank is not None and self.activations is not None:
            problems.append(
                f"{self.low_rank.name} adds float products of the float input, which layers with 8-bit inputs do without; "
                f"use format {_formats(None)}, or leave it out"
            )
        if self.convolutions is not None and self.quantize is None:
            problems.append("convolutions needs a quantize pass: it names the quantizer")
        return problems

    def _input_problems(self) -> list[str]:
        """Whether the emitter has the inputs the plan asks for, and the accumulator is one of integers."""
        problems: list[str] = []
        emitter, quantize, activations = self.emitter, self.quantize, self.activations
        if quantize is not None and quantize.activation not in (None, None if activations is None else activations.type):
            other = "no pass quantizes them" if activations is None else f"quantize-activations has type {activations.type}"
            problems.append(f"quantize expects {quantize.activation} activations, and {other}; leave activation out")
        if quantize is not None and quantize.accumulator_bits is not None and quantize.activation is None:
            integer = _formats("static", "dynamic")
            problems.append(f"accumulator_bits needs integer activations (format {integer}): floats have no accumulator to overflow")
        if emitter is not None and emitter.input_grids != self.input_grids:
            needed = emitter.input_grids
            problems.append(
                f"{emitter.name} keeps activations float; remove quantize-activations"
                if needed is None
                else f"{emitter.name} needs {_INPUTS[needed]} before it"
            )
        return problems


def _formats(*grids: InputGrids | None) -> str:
    """The formats with such grids of layer inputs, for a message."""
    return " or ".join(name for name, form in FORMATS.items() if form.input_grids in grids)


def _filled(stage: S | None, **values: Any) -> S | None:
    """The stage, with values for the options that it leaves open."""
    return None if stage is None else replace(stage, **{name: value for name, value in values.items() if getattr(stage, name) is None})
