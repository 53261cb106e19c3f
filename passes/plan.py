"""The plan of a run: one field per stage, in the order of execution."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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
from magr_onnx.passes.base import Emitter, InputGrids, LayerStage, Stage, run_stages
from magr_onnx.passes.emit import FORMATS
from magr_onnx.passes.layer_passes.activations import ActivationType, QuantizeActivations
from magr_onnx.passes.layer_passes.bias_compensation import CompensateBias, compensate_groups
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layer_passes.embeddings import Embeddings
from magr_onnx.passes.layer_passes.error_feedback import ErrorFeedback
from magr_onnx.passes.layer_passes.low_rank import LowRank
from magr_onnx.passes.layer_passes.magr import MagR
from magr_onnx.passes.layer_passes.output_hessian import OutputHessian
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.layer_passes.recurrent import Recurrent
from magr_onnx.passes.layer_passes.scale_tuning import TuneScales
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.providers import find_provider
from magr_onnx.passes.rewrites.base import Rewrite
from magr_onnx.passes.tensors import ort_cpu
from magr_onnx.passes.tensors.backends import BACKENDS
from magr_onnx.passes.tensors.rules import Rules

S = TypeVar("S", bound=Stage)

_INPUTS = {"static": "quantize-activations with type uint8 or int8", "dynamic": "quantize-activations with type dynamic"}


@dataclass(frozen=True)
class Plan:
    """The stages of a run, each optional.

    Attributes:
        rewrites: Changes to the float graph, before layers are matched.
        error_feedback: Calibration in stages, each layer towards its float output.
        output_hessian: Weighting of output errors by gradients.
        magr: Reduction of weight magnitudes.
        activations: Grids of 8-bit layer inputs.
        quantize: The quantizer and its grid.
        low_rank: A float branch beside every quantized product.
        bias: Bias correction.
        tuning: Tuning of scales by the loss at the model's outputs.
        emitter: The pass that writes quantized layers.
        convolutions: Convolutions, converted before linear layers.
        recurrent: Recurrent operators, converted after convolutions.
        embeddings: Embedding tables, converted before all of them.
    """

    rewrites: tuple[Rewrite, ...] = ()
    error_feedback: ErrorFeedback | None = None
    output_hessian: OutputHessian | None = None
    magr: MagR | None = None
    activations: QuantizeActivations | None = None
    quantize: Quantize | None = None
    low_rank: LowRank | None = None
    bias: CompensateBias | None = None
    tuning: TuneScales | None = None
    emitter: Emitter | None = None
    convolutions: Convolutions | None = None
    recurrent: Recurrent | None = None
    embeddings: Embeddings | None = None

    @staticmethod
    def of(stages: Iterable[Stage]) -> Plan:
        """Make a plan of stages in the order of its fields.

        Raises:
            PipelineError: Stages are out of order, appear twice, or have no slot.
        """
        order = [f.name for f in fields(Plan)]
        values: dict[str, Any] = {}
        preceding: list[Stage] = []
        problems: list[str] = []
        for stage in stages:
            if getattr(stage, "slot", None) not in order:
                problems.append(f"{stage.name} has no place in a plan: set its class attribute slot to one of {', '.join(order)}")
                continue
            later = next((other for other in preceding if order.index(other.slot) > order.index(stage.slot)), None)
            same_slot = [other for other in preceding if other.slot == stage.slot]
            if later is not None:
                problems.append(f"{stage.name} must come before {later.name}")
            if any(other.name == stage.name for other in same_slot):
                problems.append(f"{stage.name} appears twice")
            elif stage.slot == "rewrites":
                values["rewrites"] = (*values.get("rewrites", ()), stage)
            elif same_slot:
                problems.append(f"{same_slot[0].name} and {stage.name}: a pipeline has one of them")
            else:
                values[stage.slot] = stage
            preceding.append(stage)
        raise_all(PipelineError, problems)
        return Plan(**values)

    @staticmethod
    def parse(text: str) -> Plan:
        """Parse a pipeline text.

        Raises:
            PipelineError: The text does not parse, or names an unknown pass or option, or a value has the wrong type, or stages are out
                of order or appear twice.
        """
        return Plan.of(pipeline_text.parse(text))

    @staticmethod
    def read(value: str | Plan | Sequence[Stage]) -> Plan:
        """Return a plan unchanged, or make one from pipeline text or stages.

        Raises:
            PipelineError: As `parse` and `of`, or for any other type.
        """
        if isinstance(value, Plan):
            return value
        if isinstance(value, str):
            return Plan.parse(value)
        if not isinstance(value, list | tuple) or not all(map(registry.is_stage, value)):
            raise PipelineError(f"pipeline_text = {value!r}: expected a text, a plan, or a list of passes of magr_onnx.passes")
        return Plan.of(value)

    def __str__(self) -> str:
        """Format the plan as text that `parse` reads."""
        return ",".join(map(str, self.stages))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in order."""
        return (*self.rewrites, *(stage for f in fields(self)[1:] if (stage := getattr(self, f.name)) is not None))

    @property
    def passes(self) -> tuple[ir.passes.PassBase, ...]:
        """The resolved stages that also work as separate passes, for `ir.passes.Sequential`."""
        return tuple(filter(registry.is_pass, self.resolved.stages))

    @property
    def solving(self) -> tuple[LayerStage, ...]:
        """The resolved stages that solve a layer, before it is emitted."""
        plan = self.resolved
        stages = (plan.error_feedback, plan.magr, plan.activations, plan.quantize, plan.low_rank, plan.bias)
        return tuple(stage for stage in stages if stage is not None)

    def solve(self, problem: LayerProblem) -> LayerSolution:
        """Run the solving stages on a layer, in order."""
        return run_stages(self.solving, problem)

    def for_channels(self, stage: Convolutions | Recurrent, absorbs: bool = False, activation: ActivationType | None = None) -> Plan:
        """Derive the plan for weights with one scale per output channel: error feedback, MagR, the quantizer and the bias correction.

        Args:
            stage: The stage of the operators, which has the grid.
            absorbs: Whether the biases of all operators with the weight can absorb its mean error.
            activation: Type of the integers that the operators multiply, and so have accumulators for; None if they compute in float.
        """
        quantize = self.quantize
        assert quantize is not None
        if quantize.quantizer.accumulators == "only" and activation is None:  # these have none
            quantize = quantize.by("comq")
        chooses = quantize.quantizer.chooses
        alpha = usual_alpha(stage.bits, None, quantize.beta) if stage.alpha is None else stage.alpha
        magr = MagR(alpha, damping=None if self.magr is None else self.magr.damping) if alpha and not chooses else None
        demand = ("target", "accumulator_bits", "accumulator_tile")
        unset: dict[str, Any] = {} if activation else dict.fromkeys(demand)
        unset |= {"block_size": None, "bias": None, "activation": activation}
        quantize = replace(quantize, bits=stage.bits, symmetric=stage.symmetric, alpha=stage.alpha if chooses else None, **unset)
        feedback = ErrorFeedback() if stage.feedback else None
        return Plan(error_feedback=feedback, magr=magr, quantize=quantize, bias=CompensateBias("any") if absorbs else None)

    def for_experts(self, block_size: int | None) -> Plan:
        """Derive the plan for experts, in blocks of another size: MagR, the quantizer and the bias correction.

        There is no error feedback: experts are calibrated on the float model.
        """
        assert self.quantize is not None
        magr = None if self.magr is None else replace(self.magr, block_size=block_size)
        return Plan(magr=magr, quantize=replace(self.quantize, block_size=block_size), bias=self.bias)

    def solve_groups(self, problems: Sequence[LayerProblem]) -> LayerSolution:
        """Solve groups of a convolution, or directions of a recurrent operator, in a batch if many and small, else one by one."""
        plan = self.resolved
        if plan.quantize is not None and plan.quantize.takes_groups(len(problems), len(problems[0].weight)):
            begun = [LayerSolution.unsolved(problem) for problem in problems]
            if plan.error_feedback is not None:
                begun = [plan.error_feedback.solve(problem, solution) for problem, solution in zip(problems, begun, strict=True)]
            solution = plan.quantize.solve_groups(problems, [solution.target for solution in begun])
            return compensate_groups(problems, solution) if problems[0].centred(plan.bias_policy) else solution
        return join_groups(problems, [plan.solve(problem) for problem in problems], problems[0].centred(plan.bias_policy))

    def placeholder(self, problem: LayerProblem) -> LayerSolution:
        """Make a solution with arrays of the right shapes, without solving."""
        solution = LayerSolution.unsolved(problem)
        for stage in self.solving:
            solution = stage.placeholder(problem, solution)
        return solution

    @property
    def resolved(self) -> Plan:
        """The plan with its bias policy and activation type set in stages that leave them open."""
        bias, activation = self.bias_policy, None if self.activations is None else self.activations.type
        return replace(
            self,
            error_feedback=_with_defaults(self.error_feedback, bias=bias),
            magr=_with_defaults(self.magr, bias=bias),
            quantize=_with_defaults(self.quantize, bias=bias, activation=activation),
            low_rank=_with_defaults(self.low_rank, bias=bias),
        )

    @property
    def bias_policy(self) -> BiasPolicy | None:
        """Policy of the bias correction; None without one."""
        return None if self.bias is None else self.bias.bias

    @property
    def input_grids(self) -> InputGrids | None:
        """Kind of grids of 8-bit layer inputs; None if inputs stay float."""
        return None if self.activations is None else self.activations.grids

    @property
    def quantizes_outputs(self) -> bool:
        """Whether products of layers are quantized too."""
        return self.emitter is not None and self.emitter.quantizes_outputs

    @property
    def rules(self) -> Rules | None:
        """What the whole graph is rounded by; None where layers alone are converted."""
        return None if self.emitter is None else self.emitter.rules

    @property
    def needs_gemm(self) -> bool:
        """Whether products with a bias must be one operator: onnxruntime 1.32 makes invalid files of others in int8 and opset 21."""
        signed = self.activations is not None and self.activations.type in ("int8", "int16")
        return signed or (self.rules is not None and self.rules.gemm_only)

    @property
    def needs_pooling(self) -> bool:
        """Whether means over space must be a GlobalAveragePool for the runtime to compute them in integers."""
        table = (self.rules or ort_cpu.RULES).computed
        return self.input_grids == "static" and "ReduceMean" not in table and "GlobalAveragePool" in table

    @property
    def compounds(self) -> Collection[str]:
        """Return the operators that several others are written as (`magr_onnx.passes.canonical.compounds`)."""
        return (self.rules or ort_cpu.RULES).computed if self.input_grids == "static" else ()

    @property
    def equalizes(self) -> bool:
        """Whether scales move between channels."""
        return any(rewrite.equalizes for rewrite in self.rewrites)

    @property
    def holds_out(self) -> bool:
        """Whether the quantizer compares solutions on held-out rows."""
        return self.quantize is not None

    @property
    def spec(self) -> WeightSpec | None:
        """The grid of float32 weights; None without a quantizer, or if its options are invalid."""
        quantize = self.resolved.quantize
        return None if quantize is None or quantize.problems(None) else quantize.spec()

    @property
    def accumulator(self) -> Target | Accumulator | None:
        """The accumulator that must not overflow, if any."""
        if self.quantize is not None and self.quantize.target is not None:
            return find_target(self.quantize.target)
        if self.quantize is not None and self.quantize.accumulator_bits is not None:
            return self.quantize.accumulator()
        return None if self.emitter is None else self.emitter.accumulator()

    def suited(self, provider: str) -> Plan:
        """Limit block sizes to those that the kernels of ``provider`` support."""
        largest = find_provider(provider).largest_block
        return self if self.emitter is None or largest is None else replace(self, emitter=self.emitter.suited(largest))

    def layer_problems(self, layer: LinearLayer, provider: str) -> list[str]:
        """Say why the kernels of ``provider`` cannot have the weight of a layer that other layers can have."""
        known, spec = find_provider(provider), self.spec
        if spec is None or self.emitter is None or not known.whole_blocks or not self.emitter.ends_short(spec, layer.k):
            return []
        return [
            f"{layer.name}: its {layer.k} rows are no multiple of blocks of {spec.rows(layer.k)}, as {known.name} needs behind "
            "DequantizeLinear; give another block size (block_size, for single layers with --layer), or take format matmulnbits"
        ]

    def prepare(self, model: ir.Model) -> bool:
        """Change the model as the stages need, in place; return whether it changed."""
        spec = self.spec
        changed = [stage.prepare(model, spec) for stage in self.stages]
        return any(changed)

    def check(self, provider: str = "cpu") -> None:
        """Check the plan, and report all problems in one error.

        Raises:
            OptionError: With all `problems`.
        """
        raise_all(OptionError, self.problems(provider))

    def problems(self, provider: str = "cpu") -> list[str]:
        """List the problems of the plan.

        Args:
            provider: Where the result will run; kernels differ.
        """
        plan = self.resolved
        spec = plan.spec
        quantized = False  # whether the quantizer precedes
        problems: list[str] = []
        for stage in plan.stages:
            if not quantized:
                problems += stage.problems(None)
            elif spec is not None or stage is not plan.emitter:
                problems += stage.problems(spec or WeightSpec())  # of an invalid quantizer any grid serves: other options are checked
            quantized |= stage is plan.quantize
        problems += [*plan._unmet_requirements(), *plan._input_problems()]
        return problems if spec is None else problems + find_provider(provider).refuses(spec)

    def _unmet_requirements(self) -> list[str]:
        """List stages whose requirements on other stages are not met."""
        problems: list[str] = []
        for rewrite in self.rewrites:
            if self.quantize is None:
                problems.append(f"{rewrite.name} needs a quantize pass after it: it is made for a grid")
            if rewrite.input_grids == "static" and (self.emitter is None or self.emitter.input_grids != "static"):
                problems.append(f"{rewrite.name} is for static 8-bit inputs: use format {formats_with('static')}, or leave it out")
        if self.low_rank is not None and self.activations is not None:
            problems.append(
                f"{self.low_rank.name} adds float products of the float input, which layers with 8-bit inputs do without; "
                f"use format {formats_with(None)}, or leave it out"
            )
        if self.tuning is not None and self.activations is not None:
            problems.append(
                f"{self.tuning.name} is for layers with float inputs: gradients do not see how 8-bit inputs are rounded; "
                f"use format {formats_with(None)}, or leave it out"
            )
        for stage in (self.convolutions, self.recurrent):
            if stage is not None and self.quantize is None:
                problems.append(f"{stage.name} needs a quantize pass: it names the quantizer")
        if self.convolutions is not None:
            problems += form_problems(self.convolutions.form, self.input_grids)
        sized = self.emitter is not None and self.emitter.accumulator() is not None
        if self.recurrent is not None and self.recurrent.form == "dynamic-quantize-lstm" and sized:
            problems.append(
                "recurrent=dynamic-quantize-lstm has no blocks to be sized for accumulator_bits; take fold, or format dynamic-int8"
            )
        return problems

    def _input_problems(self) -> list[str]:
        """Check that emitter and quantizer match the plan's layer inputs, and that an accumulator has integer inputs."""
        problems: list[str] = []
        emitter, quantize, activations = self.emitter, self.quantize, self.activations
        if quantize is not None and quantize.activation not in (None, None if activations is None else activations.type):
            actual = "no pass quantizes them" if activations is None else f"quantize-activations has type {activations.type}"
            problems.append(f"quantize expects {quantize.activation} activations, and {actual}; leave activation out")
        if quantize is not None and quantize.accumulator_bits is not None and quantize.activation is None:
            integer = formats_with("static", "dynamic")
            problems.append(f"accumulator_bits needs integer activations (format {integer}): floats have no accumulator to overflow")
        if self.rules is not None and self.accumulator is not None:
            problems.append(f"{self.rules.name} has no accumulators to be proved; use target and accumulator_bits with format qdq-int8")
        if emitter is not None and activations is not None and emitter.input_grids == self.input_grids == "static":
            rules = emitter.rules or ort_cpu.RULES
            if activations.type not in rules.types:
                problems.append(f"activation type {activations.type} is not for {rules.name}, which takes {' or '.join(rules.types)}")
        if self.rules is not None and not self.rules.int4:
            few = [what for what, stage in (("bits", quantize), ("conv_bits", self.convolutions)) if stage is not None and stage.bits <= 4]
            have = ", ".join(name for name, rules in BACKENDS.items() if rules.int4)
            problems += [f"{what} of 4 or less: {self.rules.name} has no such weights beside integers; these have: {have}" for what in few]
        if activations is not None and activations.wide:
            wider = activations.type.replace("8", "16")
            if self.rules is None and self.accumulator is not None:
                problems.append("wide activations make two products a layer, whose sum no accumulator constrains; leave them out")
            if self.quantizes_outputs:
                problems.append("wide activations make two products a layer, whose sum has no grid; leave out quantize_outputs")
            if emitter is None or wider == activations.type or (emitter.rules is not None and wider not in emitter.rules.types):
                problems.append(
                    "wide activations of 16 bits are for activations of 8 bits in format qdq-int8, or in qdq-full with a backend that has "
                    f"{wider}"
                )
        if emitter is not None and emitter.input_grids != self.input_grids:
            needed = emitter.input_grids
            problems.append(
                f"{emitter.name} keeps activations float; remove quantize-activations"
                if needed is None
                else f"{emitter.name} needs {_INPUTS[needed]} before it"
            )
        return problems


def formats_with(*grids: InputGrids | None) -> str:
    """List the formats with these kinds of input grids, for a message."""
    return " or ".join(name for name, form in FORMATS.items() if form.emitter.input_grids in grids)


def form_problems(form: str | None, grids: InputGrids | None) -> list[str]:
    """Check a form of convolutions against the kind of grids of layer inputs."""
    if form != "integer" or grids == "static":
        return []
    return [f"conv_form=integer needs static 8-bit activations; use format {formats_with('static')}, or another form of convolutions"]


def _with_defaults(stage: S | None, **values: Any) -> S | None:
    """Set values of options that a stage leaves open."""
    return None if stage is None else replace(stage, **{name: value for name, value in values.items() if getattr(stage, name) is None})
