"""Check on sample inputs that raising a model's opset has not changed its outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import ModelError, RuntimeFailure, raise_all
from magr_onnx.model_io.writing import tensor_bytes
from magr_onnx.passes.providers import find_provider
from magr_onnx.runtime.data.made_up import random_inputs
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort import worker
from magr_onnx.runtime.ort.session import Arithmetic, Batch, Session, available_provider

Array = npt.NDArray[Any]

_UNKNOWN_OUTPUTS = "whether raising the model's opset has changed its outputs is not known"
_LARGEST_MODEL = 2 << 30  # bytes; a larger model is not compared on random inputs
_BATCHES = 2
# Tolerated difference relative to the largest value, by bytes per value, 1e-3 for others: sums in another order, with casts to half
# precision inside, stay within that.
_TOLERANCE = {2: 1e-2}


def check(before: ir.Model | Path, after: ir.Model, data: Batches | None, provider: str) -> list[str]:
    """Compare the outputs of a model before and after its opset was raised; return notes for the report on what could not be compared.

    The inputs are some batches of ``data``, or random ones of the declared types.

    Raises:
        ModelError: Outputs differ in name or value.
        RuntimeFailure: onnxruntime cannot load one of the two.
    """
    if data is not None:
        return _check(before, after, data, provider)
    size = tensor_bytes(after)
    if size > _LARGEST_MODEL:
        return [f"{_UNKNOWN_OUTPUTS}: the model is large, and there is no calibration data"]
    try:
        with worker.as_file(before) as old, worker.as_file(after) as new:
            name = available_provider(provider).onnxruntime
            return list(worker.run_in_worker(compare, 2 * size, before=old, after=new, provider=name))
    except worker.WorkerCrashed as error:
        return [f"{_UNKNOWN_OUTPUTS}: on made-up inputs, {error}"]


def compare(before: str, after: str, provider: str) -> list[str]:
    """Compare two files on random inputs; for a worker process, which this may crash."""
    with worker.limited_memory() if find_provider(provider).host_memory else contextlib.nullcontext():
        return _check(Path(before), Path(after), None, provider)


def _check(before: ir.Model | Path, after: ir.Model | Path, data: Batches | None, provider: str) -> list[str]:
    with Session(before, provider, Arithmetic.UNOPTIMIZED) as old, Session(after, provider, Arithmetic.UNOPTIMIZED) as new:
        if old.outputs != new.outputs or {i.name for i in old.inputs} != {i.name for i in new.inputs}:
            raise ModelError(
                f"raising the opset changed the model's inputs or outputs ({', '.join(old.outputs)} became {', '.join(new.outputs)}); "
                "export the model with a newer opset"
            )
        failure = "they would be too large"
        compared = 0
        for batch in data.limit(_BATCHES) if data is not None else random_inputs(old.inputs):
            try:
                expected = old.run(batch)
            except RuntimeFailure as error:
                failure = str(error)
                continue
            try:
                actual = new.run(batch)
            except RuntimeFailure as error:
                raise ModelError(f"raising the opset broke the model; export it with a newer opset: {error}") from error
            compared += 1
            _compare(old, batch, expected, actual)
            if data is None:
                break
    if compared:
        return []
    return [f"{_UNKNOWN_OUTPUTS}: it does not run on made-up inputs: {failure}"]


def _compare(old: Session, batch: Batch, expected: Sequence[Any], actual: Sequence[Any]) -> None:
    differing = [i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if not _same(a, b)]
    if not differing:
        return
    repeated = old.run(batch)
    problems = [
        f"raising the opset changed output {old.outputs[i]!r} ({_distance(expected[i], actual[i])}); export the model with a newer opset"
        for i in differing
        if _same(expected[i], repeated[i])  # random operators give other values in every run
    ]
    raise_all(ModelError, problems)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, np.ndarray):
        return type(a) is type(b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.dtype.kind not in "fc" or a.size == 0:
        return bool((a == b).all())
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    return bool(np.allclose(a, b, rtol=0, atol=_TOLERANCE.get(a.dtype.itemsize, 1e-3) * size, equal_nan=True))


def _distance(a: Any, b: Any) -> str:
    if not isinstance(a, np.ndarray) or a.shape != np.shape(b) or a.dtype.kind != "f":
        return "another type, shape or value"
    return f"by up to {float(np.nanmax(np.abs(a - b))):.3g}, where the largest value is {float(np.nanmax(np.abs(a))):.3g}"
