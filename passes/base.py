"""The base of the passes of a pipeline."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import onnx_ir as ir

from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import ModelError, OptionError, raise_all
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.job import Job, jobs


@dataclass(frozen=True)
class LayerPass(ir.passes.InPlacePass):
    """A pass that treats every linear layer by itself. Its dataclass fields are its options."""

    name: ClassVar[str]
    summary: ClassVar[str]
    solves: ClassVar[bool] = False
    """Whether the pass chooses a weight: for all layers that share one together (`magr_onnx.passes.layer_passes.shared_weights`)."""

    @abc.abstractmethod
    def apply(self, job: Job) -> bool:
        """Treat one layer; True if the job or the graph changed."""

    def problems(self, spec: WeightSpec | None) -> list[str]:
        """Everything wrong with the options, given what the pipeline quantized to before this pass."""
        del spec
        return []

    def fits(self, passes: Sequence[LayerPass]) -> list[str]:
        """Everything wrong with this pass among ``passes``, the whole pipeline."""
        del passes
        return []

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        """Changes to the whole model this pass needs for weights on a grid (an opset, say); True if there were any."""
        del model, spec
        return False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        Names.rescan(model.graph)
        found = list(jobs(model))
        spec = next((j.quantized.spec for j in found if j.quantized is not None), None)
        raise_all(OptionError, self.problems(spec))
        modified = self.prepare(model, spec)
        if any(job.layer.root is not model.graph for job in found):
            raise ModelError(f"{self.name}: raising the opset rebuilt the graph; convert the model before the first pass")
        for job in found:
            modified |= self.apply(job)
            job.write_back()
        return ir.passes.PassResult(model, modified)

    def __str__(self) -> str:
        """The text that `magr_onnx.passes.pipeline.parse` turns back into this pass."""
        given = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (f"{{{','.join(given)}}}" if given else "")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
