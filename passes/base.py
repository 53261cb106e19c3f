"""The stages a plan is made of (`magr_onnx.passes.plan.Plan`), and those of them that are passes by themselves."""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import onnx_ir as ir

from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import ModelError, OptionError, raise_all
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.job import Job, jobs

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

    def __str__(self) -> str:
        """The text that `magr_onnx.passes.plan.Plan.parse` turns back into this stage."""
        options = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


@dataclass(frozen=True)
class LayerStage(Stage):
    """A stage that treats every linear layer by itself."""

    solves: ClassVar[bool] = False
    """Whether the stage chooses a weight: for all layers that share one together (`magr_onnx.passes.layer_passes.shared_weights`)."""

    @abc.abstractmethod
    def apply(self, job: Job) -> bool:
        """Treat one layer; True if the job or the graph changed."""


@dataclass(frozen=True)
class LayerPass(LayerStage, ir.passes.InPlacePass):
    """A stage that is a pass by itself, too: alone or in `ir.passes.Sequential`, it treats all layers of a model."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        Names.rescan(model.graph)
        layers = list(jobs(model))
        spec = next((j.quantized.spec for j in layers if j.quantized is not None), None)
        raise_all(OptionError, self.problems(spec))
        modified = self.prepare(model, spec)
        if any(job.layer.root is not model.graph for job in layers):
            raise ModelError(f"{self.name}: raising the opset rebuilt the graph; convert the model before the first pass")
        for job in layers:
            modified |= self.apply(job)
            job.write_back()
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class ModelPass(Stage, ir.passes.InPlacePass):
    """A stage that treats a model as a whole, and is a pass by itself."""


@dataclass(frozen=True)
class Emitter(LayerPass):
    """The pass that writes quantized layers in an output format."""

    slot: ClassVar[str] = "emitter"
    input_grids: ClassVar[InputGrids | None] = None
    """The grids of layer inputs that the format needs; None for float inputs."""

    @property
    def quantizes_outputs(self) -> bool:
        """Whether products of layers are put on a static grid, too."""
        return False

    def accumulator(self) -> Accumulator | None:
        """The accumulator that no sum of the emitted kernel may overflow, where the emitter sizes its blocks for one."""
        return None

    def suited(self, largest_block: int) -> Self:
        """This emitter for kernels that take blocks of at most so many rows."""
        del largest_block
        return self


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
