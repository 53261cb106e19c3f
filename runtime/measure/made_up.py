"""Comparisons of the float and quantized models on made-up inputs, where there are no data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.errors import listed
from magr_onnx.model_io.legacy import read
from magr_onnx.passes.providers import find_provider
from magr_onnx.report.serialization import decode, plain
from magr_onnx.report.validation import MADE_UP, Validation
from magr_onnx.runtime.data.made_up import first_that_runs, uniform
from magr_onnx.runtime.data.sources import in_memory
from magr_onnx.runtime.measure.noise import mean_noise
from magr_onnx.runtime.measure.recording import bytes_of
from magr_onnx.runtime.measure.validate import compare_outputs, validate
from magr_onnx.runtime.ort import worker
from magr_onnx.runtime.ort.session import Arithmetic, Session, available_provider

SECONDS = 30.0  # most for a check of the result, without what large models take
CHOOSING = 300.0  # most for a choice between candidates: the choice is to be the same on a busy machine
DRAWS, MOST_DRAWS = 4, 32  # inputs of each kind that candidates are compared on
NUMBERS = 128  # that models put out for them, in so many draws: of fewer, such as a scalar for each, the better is found by chance
_TIMING = 1.0  # seconds


def check(float_model: ir.Model | Path, quantized_model: ir.Model | Path, provider: str, mask: str | None) -> Validation:
    """Compare outputs and time on one batch of random inputs, in the worker process.

    It takes the loading of both models and 1 s or 12 passes of each, and at most `SECONDS` and what `worker.run_in_worker` adds by size.

    Args:
        float_model: The reference.
        quantized_model: The model to compare with it.
        provider: Where to run both.
        mask: Input whose zero elements mark rows to leave out of the metrics.

    Raises:
        RuntimeFailure: The float model runs with nothing that was tried, or the quantized one does not run.
        WorkerCrashed: onnxruntime crashed or exceeded the time limit.
    """
    name, size = available_provider(provider).onnxruntime, bytes_of(float_model) + bytes_of(quantized_model)
    with worker.as_file(float_model) as a, worker.as_file(quantized_model) as b:
        answer = worker.run_in_worker(compare, size, SECONDS, float_model=a, quantized_model=b, provider=name, mask=mask)
    return decode(Validation, answer, MADE_UP)


def noises(float_model: ir.Model | Path, candidates: Sequence[ir.Model], provider: str, mask: str | None) -> Array:
    """Measure candidates on two kinds of made-up inputs, whose floats are normal or uniform between 0 and 1, `DRAWS` of each or more.

    It takes the loading of the models and as many passes, in the worker process, and at most `CHOOSING` and what
    `worker.run_in_worker` adds by size.

    Returns:
        The noise of the outputs relative to their energy, the mean over outputs, by kind and candidate ``(2, candidates)``.

    Raises:
        RuntimeFailure: The float model runs with nothing that was tried, or a candidate does not run.
        WorkerCrashed: onnxruntime crashed or exceeded the time limit.
    """
    name, size = available_provider(provider).onnxruntime, sum(map(bytes_of, (float_model, *candidates)))
    with contextlib.ExitStack() as stack:
        a, *others = (stack.enter_context(worker.as_file(model)) for model in (float_model, *candidates))
        answer = worker.run_in_worker(measure, size, CHOOSING, float_model=a, candidates=others, provider=name, mask=mask)
    return np.array(answer, np.float64)


def measure(float_model: str, candidates: Sequence[str], provider: str, mask: str | None) -> list[list[float]]:
    """Measure `noises` of files; for a worker process, which made-up inputs may crash."""
    path = Path(float_model)
    with worker.limited_memory() if find_provider(provider).host_memory else contextlib.nullcontext(), contextlib.ExitStack() as stack:
        reference, *sessions = (stack.enter_context(Session(file, provider)) for file in (path, *map(Path, candidates)))
        feeds = first_that_runs(read(path), mask, reference)
        normal = [next(feeds)]
        numbers = sum(np.size(output) for output in reference.run(normal[0]))
        draws = min(max(DRAWS, -(-NUMBERS // max(numbers, 1))), MOST_DRAWS)
        normal += itertools.islice(feeds, draws - 1)
        kinds = [normal, [uniform(batch, mask, seed) for seed, batch in enumerate(normal)]]
        by_name = {str(i): session for i, session in enumerate(sessions)}
        compared = [compare_outputs(reference, by_name, in_memory(b, MADE_UP), mask, losses=False)[0] for b in kinds]
        return [[*map(mean_noise, of_kind.values())] for of_kind in compared]


def compare(float_model: str, quantized_model: str, provider: str, mask: str | None) -> dict[str, Any]:
    """Compare two files; for a worker process, which made-up inputs may crash."""
    a, b = Path(float_model), Path(quantized_model)
    with worker.limited_memory() if find_provider(provider).host_memory else contextlib.nullcontext():
        with Session(a, provider) as session:
            batch = next(first_that_runs(read(a), mask, session))
        shapes = listed([f"{name} {array.shape}" for name, array in batch.items()])
        data = in_memory([batch], f"{MADE_UP} {shapes}")
        comparison = validate(
            a, b, data, provider=provider, arithmetics=(Arithmetic.DEFAULT,), mask=mask, details=("latency",), seconds=_TIMING
        )
    return dict(plain(dataclasses.asdict(comparison)))
