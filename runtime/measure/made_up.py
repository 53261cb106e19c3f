"""Comparison of the float and the quantized model on made-up inputs, where there are no data."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir

from magr_onnx.errors import RuntimeFailure, listed
from magr_onnx.model_io.legacy import read
from magr_onnx.passes.providers import find_provider
from magr_onnx.report.serialization import decode, plain
from magr_onnx.report.validation import Validation
from magr_onnx.runtime.data.made_up import feeds_for
from magr_onnx.runtime.data.sources import in_memory
from magr_onnx.runtime.measure.validate import bytes_of, latency, validate
from magr_onnx.runtime.ort import worker
from magr_onnx.runtime.ort.session import Arithmetic, Batch, Session, available_provider

SECONDS = 30.0  # most for a comparison, without what large models take
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
    return decode(Validation, answer, "made-up inputs")


def compare(float_model: str, quantized_model: str, provider: str, mask: str | None) -> dict[str, Any]:
    """Compare two files; for a worker process, which made-up inputs may crash."""
    a, b = Path(float_model), Path(quantized_model)
    with worker.limited_memory() if find_provider(provider).host_memory else contextlib.nullcontext():
        batch = _runnable(a, provider, mask)
        shapes = listed([f"{name} {array.shape}" for name, array in batch.items()])
        data = in_memory([batch], f"made-up inputs {shapes}")
        comparison = validate(a, b, data, provider=provider, arithmetics=(Arithmetic.DEFAULT,), mask=mask, details=())
        times = latency(a, b, data, provider, _TIMING)
    return dict(plain(dataclasses.asdict(dataclasses.replace(comparison, latency=times))))


def _runnable(path: Path, provider: str, mask: str | None) -> Batch:
    """The first of the made-up feeds that the model runs with."""
    failures = []
    with Session(path, provider) as session:
        for batch in feeds_for(read(path), mask):
            try:
                session.run(batch)
            except RuntimeFailure as error:
                failures.append(str(error))
            else:
                return batch
    raise RuntimeFailure(f"it does not run on made-up inputs: {failures[0] if failures else 'they would be too large'}")
