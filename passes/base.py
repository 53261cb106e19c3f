"""The stages a plan is made of (`magr_onnx.passes.plan.Plan`), and those of them that are passes by themselves."""

from __future__ import annotations

import abc
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import ModelError, OptionError, raise_all
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.layer_state import LayerState, states, write_floats
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.tensors.rules import Rules

InputGrids = Literal["static", "dynamic"]
"""How layer inputs become 8-bit integers: on a grid found by calibration, or on one found at run time."""


@dataclass(frozen=True)
class Stage(abc.ABC):
    """A stage of a plan. Its dataclass fields are its options."""

    name: ClassVar[str]
    summary: ClassVar[str]
    slot: ClassVar[str]
    """The field of `magr_onnx.passes.plan.Plan` the stage stands in."""

    def problems(self, spec: WeightSpec | None) -> list[str]:
        """Everything wrong with the options, for weights that are on a grid by now (None: they are float)."""
        del spec
        return []

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        """Change the whole model as weights on a grid will need it (raise its opset, say); True if anything changed."""
        del model, spec
        return False

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Any]]:
        """Type and default of every option, by name."""
        hints = typing.get_type_hints(cls)
        return {f.name: (hints[f.name], f.default) for f in fields(cls)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make a stage of values of its options."""
        return cls(**values)

    @property
    def non_default(self) -> dict[str, Any]:
        """Values of the options that differ from their defaults, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        """The text that `magr_onnx.passes.plan.Plan.parse` turns back into this stage."""
        options = [f"{name}={_text(value)}" for name, value in self.non_default.items()]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@dataclass(frozen=True)
class LayerStage(Stage):
    """A stage that solves a part of every linear layer's problem, each layer by itself."""

    solves: ClassVar[bool] = False
    """Whether the stage chooses a weight: for all layers that share one together (`magr_onnx.passes.layer_passes.shared_weights`)."""

    @abc.abstractmethod
    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        """Carry a solution on by this stage."""

    def placeholder(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        """Give a solution arrays of the shapes that `solve` would, without the work: what the size of a file depends on."""
        del problem
        return solution


def run_stages(stages: Iterable[LayerStage], problem: LayerProblem) -> LayerSolution:
    """Run stages on a layer, in order."""
    solution = LayerSolution.unsolved(problem)
    for stage in stages:
        solution = stage.solve(problem, solution)
    return solution


@dataclass(frozen=True)
class LayerPass(LayerStage, ir.passes.InPlacePass):
    """A stage that is a pass by itself, too: alone or in `ir.passes.Sequential`, it treats all layers of a model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, layers = layers_of(self, model)
        for state in layers:
            solution = self.solve(state.problem, state.solution)
            modified |= solution.changed
            replace(state, solution=write_floats(state.layer, solution, WeightConstants())).keep()
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class ModelPass(Stage, ir.passes.InPlacePass):
    """A stage that treats a model as a whole, and is a pass by itself."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change a model by itself.

        Raises:
            OptionError: The stage has options that are wrong.
        """
        raise_all(OptionError, self.problems(None))
        Names.rescan(model.graph)
        return ir.passes.PassResult(model, self.change(model))

    @abc.abstractmethod
    def change(self, model: ir.Model) -> bool:
        """Change a model without the rest of a plan; True if anything changed."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """What was written for one layer.

    Attributes:
        node: Name of the node that multiplies by the quantized weight.
        stored_bits: Bits of a code in the file.
        bytes: Size of the constants made of the weight.
        stored_block: Rows of the blocks that the file has scales for, where the solution has fewer scales; else None.
        repeated_bytes: Size of the scales and zero points that are in the file again because of that.
        notes: Sentences for the report.
    """

    node: str
    stored_bits: int
    bytes: int
    stored_block: int | None = None
    repeated_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Emitter(Stage, ir.passes.InPlacePass):
    """The pass that writes quantized layers in an output format."""

    slot: ClassVar[str] = "emitter"
    input_grids: ClassVar[InputGrids | None] = None
    """The grids of layer inputs that the format needs; None for float inputs."""
    shares_codes: ClassVar[bool] = False
    """Whether GatherBlockQuantized can read the codes of a layer with 4 or 8 bits."""
    experts: ClassVar[bool] = False
    """Whether mixtures of experts become QMoE, on the grid of linear layers."""

    @abc.abstractmethod
    def emit(self, layer: LinearLayer, problem: LayerProblem, solution: LayerSolution, constants: WeightConstants) -> Emitted | None:
        """Replace a layer by nodes that compute with the solution's codes, its low-rank branch and its bias.

        Args:
            layer: The layer as the graph has it.
            problem: What is known of it: the grids of its input and its product.
            solution: What was made of it.
            constants: What was made of its weight before, for other layers that read it.

        Returns:
            What was written; None, and an unchanged graph, where the solution has no codes or the problem no grid that the format needs.
        """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, layers = layers_of(self, model)
        for state in layers:
            modified |= self.emit(state.layer, state.problem, state.solution, WeightConstants()) is not None
        return ir.passes.PassResult(model, modified)

    @property
    def quantizes_outputs(self) -> bool:
        """Whether products of layers are put on a static grid, too."""
        return False

    @property
    def rules(self) -> Rules | None:
        """What the whole graph is rounded by; None where layers alone are converted."""
        return None

    @property
    def expert_attributes(self) -> dict[str, int]:
        """Further attributes of QMoE."""
        return {}

    def accumulator(self) -> Accumulator | None:
        """The accumulator that no sum of the emitted kernel may overflow, where the emitter sizes its blocks for one."""
        return None

    def undecided(self, model: ir.Model, names: Collection[str]) -> list[ir.Node]:
        """The nodes of these names that may compute with int8 inputs or with float ones, which `decide` chooses."""
        del model, names
        return []

    def decide(self, nodes: Iterable[ir.Node], int8: bool) -> Self:
        """Have undecided nodes compute with int8 inputs, or with float ones; the emitter that writes such nodes."""
        del nodes, int8
        return self

    def ends_short(self, spec: WeightSpec, k: int) -> bool:
        """Whether the last block of a column of ``k`` rows has fewer than the others, in the nodes that are written."""
        del spec, k
        return False

    def suited(self, largest_block: int) -> Self:
        """This emitter for kernels that take blocks of at most so many rows, if it writes blocks."""
        del largest_block
        return self


def layers_of(stage: Stage, model: ir.Model) -> tuple[bool, list[LayerState]]:
    """Prepare a model for a stage that works by itself; whether it changed, and its layers.

    Raises:
        OptionError: The stage has options that are wrong for these layers.
        ModelError: The opset had to be raised, which made another graph without what is known of the layers.
    """
    Names.rescan(model.graph)
    layers = states(model)
    spec = next((s.solution.quantized.spec for s in layers if s.solution.quantized is not None), None)
    raise_all(OptionError, stage.problems(spec))
    modified = stage.prepare(model, spec)
    if any(state.layer.root is not model.graph for state in layers):
        raise ModelError(f"{stage.name}: raising the opset rebuilt the graph; convert the model before the first pass")
    return modified, layers


def negative_or_infinite(name: str, value: float | None) -> list[str]:
    """What is wrong with an option that must be 0 or more, and finite; None is an option left open."""
    return [] if value is None or 0 <= value < math.inf else [f"{name}={value} must be 0 or more, and finite"]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
