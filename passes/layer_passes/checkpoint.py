"""What the passes before the emitter come to, as plain arrays and JSON: all that a run needs to go on without solving the layer again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from magr_onnx.core.low_rank import Factors
from magr_onnx.core.types import QuantizedWeight, WeightSpec
from magr_onnx.passes.job import Job

Arrays = dict[str, npt.NDArray[Any]]


class Store(Protocol):
    """Where outcomes are kept from one run to the next."""

    def restore(self, job: Job) -> bool:
        """Put the outcome of the job's layer into it; False where it is not here."""

    def keep(self, job: Job) -> None:
        """Keep the job's outcome."""


def to_arrays(job: Job) -> Arrays:
    """The outcome of a job: codes, scales, zero points, low-rank factors, bias, or the float weight; the rest as JSON in ``facts``."""
    arrays: Arrays = {}
    facts: dict[str, Any] = {"facts": job.facts, "notes": job.notes, "rows": job.stats.rows, "changed": job.changed}
    if job.quantized is not None:
        q = job.quantized
        arrays |= {"codes": q.codes, "scales": q.scales, "zero_points": q.zero_points}
        facts["spec"] = asdict(q.spec)
    elif job.changed:
        arrays["weight"] = job.weight
    if job.factors is not None:
        arrays |= {"down": job.factors.down, "up": job.factors.up}
    if job.bias is not None:
        arrays["bias"] = job.bias
    arrays["facts"] = np.frombuffer(json.dumps(facts, default=_plain).encode(), np.uint8)
    return arrays


def from_arrays(job: Job, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Put an outcome into a fresh job of the same layer.

    Raises:
        ValueError: The arrays are no outcome of this layer: one is missing, or has another shape or type.
        KeyError: An array or a fact is missing.
    """
    facts = json.loads(arrays["facts"].tobytes())
    k, n = job.layer.k, job.layer.n
    quantized, factors, weight, bias = None, None, job.weight, None
    if "spec" in facts:
        spec = WeightSpec(**facts["spec"])
        grid = (spec.groups(k), n)
        quantized = QuantizedWeight(
            _array(arrays, "codes", (k, n), np.uint8),
            _array(arrays, "scales", grid, np.float32),
            _array(arrays, "zero_points", grid, np.uint8),
            spec,
        )
        weight = quantized.dequantize()
    elif "weight" in arrays:
        weight = _array(arrays, "weight", (k, n), np.float32)
    if "down" in arrays:
        rank = arrays["down"].shape[-1]
        factors = Factors(_array(arrays, "down", (k, rank), np.float32), _array(arrays, "up", (rank, n), np.float32))
        weight = weight + factors.product()
    if "bias" in arrays:
        bias = _array(arrays, "bias", (n,), np.float64)
    job.stats = replace(job.stats, rows=int(facts["rows"]))
    job.facts, job.notes, job.changed = dict(facts["facts"]), list(facts["notes"]), bool(facts["changed"])
    job.quantized, job.factors, job.weight, job.bias = quantized, factors, weight, bias


def most_bytes(job: Job) -> int:
    """More than an outcome of the layer can have: what is larger is none."""
    k, n = job.layer.k, job.layer.n
    return 16 * k * n + 16 * min(k, n) * (k + n) + (1 << 20)


def _array(arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    array = arrays[name]
    if array.shape != shape or array.dtype != kind:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, and should be {np.dtype(kind)} {shape}")
    return array


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's."""
    return value.item() if isinstance(value, np.generic) else str(value)
