"""Errors of a model's outputs under grids of its activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import ActivationGrid
from magr_onnx.passes.instrument import grid_inputs
from magr_onnx.runtime.data.sources import Batches, Steps, with_progress
from magr_onnx.runtime.measure.layer_errors import finite_power, squared_distance
from magr_onnx.runtime.ort.session import Session, as_floats

RUNS, LEAST_BATCHES, MOST_BATCHES = 2048, 4, 64
"""Runs of a model to measure the error of every value by, and batches of each."""


def trial_data(data: Batches, trials: int) -> Batches:
    """Return the batches that so many trials are measured on."""
    return data.limit(max(LEAST_BATCHES, min(MOST_BATCHES, RUNS // max(trials, 1))))


def output_errors(
    model: ir.Model,
    marks: Collection[str],
    trials: Sequence[Mapping[str, ActivationGrid]],
    data: Batches,
    provider: str,
    progress: Steps | None = None,
) -> list[float]:
    """Measure the error that rounding causes at the outputs, relative to each output, summed.

    Args:
        model: The float model; not changed.
        marks: Names behind the marks of values that may be rounded (`magr_onnx.passes.emit.tensors.mark`).
        trials: Grids of those that are rounded, by name.
        data: Batches to run.
        provider: Where to run.
        progress: Called after every batch.

    Returns:
        The error of every trial.
    """
    copy, inputs = grid_inputs.with_grid_inputs(model, marks)
    feeds = [grid_inputs.feeds(grids, inputs) for grids in trials]
    errors: list[dict[int, float]] = [{} for _ in trials]
    powers: dict[int, float] = {}
    with Session(copy, provider, fuses=False) as session:
        for _, batch in with_progress(data, progress):
            exact = {i: y.astype(np.float64) for i, y in enumerate(map(as_floats, session.run(batch))) if y is not None}
            for i, y in exact.items():
                powers[i] = powers.get(i, 1e-30) + finite_power(y)
            for of_trial, of_grids in zip(errors, feeds, strict=True):
                outputs = session.run({**batch, **of_grids})
                for i, y in exact.items():
                    actual = as_floats(outputs[i])
                    if actual is not None and actual.shape == y.shape:  # shapes may depend on values
                        of_trial[i] = of_trial.get(i, 0.0) + squared_distance(y, actual)
    return [sum(of_trial[i] / powers[i] for i in of_trial) for of_trial in errors]
