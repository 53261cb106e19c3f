"""Runs of a float model that candidates to replace it, before anything is quantized, are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.rewrites.base import Trial
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure import made_up
from magr_onnx.runtime.measure.layer_errors import finite_power, some_for, squared_distance
from magr_onnx.runtime.measure.loss import Reference
from magr_onnx.runtime.ort.session import Session, as_floats
from magr_onnx.workflow.context import RunContext


@dataclass(frozen=True, slots=True, eq=False)
class OnData(Trial):
    """A model on a few batches of data."""

    reference: Reference
    outputs: list[list[Array | None]]
    data: Batches
    provider: str

    @staticmethod
    def of(model: ir.Model, data: Batches, context: RunContext) -> OnData:
        """Run a model on a few batches."""
        few = some_for(model, data)
        with Session(model, context.provider) as session:
            return OnData(Reference(session, few, context.mask), [list(map(as_floats, session.run(b))) for b in few], few, context.provider)

    def difference(self, candidate: ir.Model) -> float:
        worst = 0.0
        with Session(candidate, self.provider) as session:
            for batch, expected in zip(self.data, self.outputs, strict=True):
                for a, y in zip(expected, session.run(batch), strict=True):
                    b = as_floats(y)
                    if a is not None and b is not None:
                        worst = max(worst, squared_distance(a, b) / max(finite_power(a), 1e-60))
        return math.sqrt(worst)

    def loss(self, candidate: ir.Model) -> float:
        return self.reference.loss_of(candidate, self.provider)


@dataclass(frozen=True, slots=True, eq=False)
class OnMadeUp(Trial):
    """A model on made-up inputs, in the worker process."""

    model: ir.Model
    context: RunContext

    def _noise(self, candidate: ir.Model) -> float:
        return float(made_up.noises(self.model, [candidate], self.context.provider, self.context.mask).max())

    def difference(self, candidate: ir.Model) -> float:
        return float(np.sqrt(self._noise(candidate)))

    def loss(self, candidate: ir.Model) -> float:
        return self._noise(candidate)


def trial_of(model: ir.Model, data: Batches | None, context: RunContext) -> Trial:
    """Take a float model for the reference, on a few batches of data, or on made-up inputs where there are none."""
    return OnMadeUp(model.clone(), context) if data is None else OnData.of(model, data, context)
