"""Check on sample inputs that raising a model's opset has not changed its outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.errors import ModelError, RuntimeFailure, raise_all
from magr_onnx.model_io.writing import tensor_bytes
from magr_onnx.passes.providers import find_provider
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort import worker
from magr_onnx.runtime.ort.session import Arithmetic, Batch, InputInfo, Session, available_provider

Array = npt.NDArray[Any]

_UNKNOWN_OUTPUTS = "whether raising the model's opset has changed its outputs is not known"
_LARGEST_MODEL = 2 << 30  # bytes; a larger model is not compared on random inputs
_MEMORY = 8 << 30  # bytes a comparison on random inputs may allocate, where the system can limit them
_BATCHES = 2
# Sizes tried in turn for a dynamic first axis and for other dynamic axes; never 1 for the latter, which some operators broadcast.
_DYNAMIC_SIZES = ((4, 4), (1, 8), (2, 16))

_LARGEST = 1 << 24  # elements of a random input; a declared shape may ask for any number
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
    with limited_memory(_MEMORY) if find_provider(provider).host_memory else contextlib.nullcontext():
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


@contextlib.contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """Limit the memory of this process to ``size`` bytes, where the system supports it."""
    try:
        import resource
    except ImportError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


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


def random_inputs(inputs: Sequence[InputInfo]) -> list[Batch]:
    """Draw inputs of the declared types, normal floats and integers 0 or 1; one batch per guess at the dynamic sizes."""
    guesses = [
        {i.name: [d if d is not None else sizes[axis > 0] for axis, d in enumerate(i.shape)] for i in inputs} for sizes in _DYNAMIC_SIZES
    ]
    feasible = [shapes for shapes in guesses if all(math.prod(shape) <= _LARGEST for shape in shapes.values())]
    return [{i.name: _random(i, shapes[i.name]) for i in inputs} for shapes in feasible]


def _random(info: InputInfo, shape: Sequence[int]) -> Array:
    rng = np.random.default_rng(0)
    if info.dtype.kind == "f":
        return rng.standard_normal(shape).astype(info.dtype)
    if info.dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(info.dtype)
    return np.full(shape, "a", dtype=object)
