"""Serialization of a layer's solution as arrays and JSON, for resumed runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.layer import LayerRecord, LayerSolution
from magr_onnx.core.low_rank import Factors
from magr_onnx.core.types import QuantizedWeight, WeightSpec

Arrays = dict[str, npt.NDArray[Any]]


def to_arrays(solution: LayerSolution) -> Arrays:
    """Convert a solution to arrays: codes and grid, or the weight; low-rank factors; bias; the rest as JSON in ``facts``."""
    arrays: Arrays = {}
    metadata: dict[str, Any] = {"record": asdict(solution.record), "changed": solution.changed}
    if solution.quantized is None:
        arrays["weight"] = solution.weight
    else:
        q = solution.quantized
        arrays |= {"codes": q.codes, "scales": q.scales, "zero_points": q.zero_points}
        metadata["spec"] = asdict(q.spec)
    if solution.factors is not None:
        arrays |= {"down": solution.factors.down, "up": solution.factors.up}
    if solution.bias is not None:
        arrays["bias"] = solution.bias
    text = json.dumps(metadata, default=lambda value: value.item() if isinstance(value, np.generic) else str(value))
    arrays["facts"] = np.frombuffer(text.encode(), np.uint8)
    return arrays


def from_arrays(arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int) -> LayerSolution:
    """Restore the solution of a layer ``(k, n)`` from `to_arrays`. Its ``target`` is its weight: it is not solved again.

    Raises:
        ValueError: An array has another shape or type than this layer's.
        KeyError: An array or a field is missing.
        TypeError: The metadata has another form.
    """
    metadata = json.loads(arrays["facts"].tobytes())
    quantized, factors = None, None
    if "spec" in metadata:
        spec = WeightSpec(**metadata["spec"])
        grid = (spec.groups(k), n)
        codes, scales = _array(arrays, "codes", (k, n), np.uint8), _array(arrays, "scales", grid, np.float32)
        quantized = QuantizedWeight(codes, scales, _array(arrays, "zero_points", grid, np.uint8), spec)
        weight = quantized.dequantize()
    else:
        weight = _array(arrays, "weight", (k, n), np.float32)
    if "down" in arrays:
        rank = arrays["down"].shape[-1]
        factors = Factors(_array(arrays, "down", (k, rank), np.float32), _array(arrays, "up", (rank, n), np.float32))
        weight = weight + factors.product()
    bias = _array(arrays, "bias", (n,), np.float64) if "bias" in arrays else None
    record = metadata["record"]
    record = LayerRecord(**{**record, "errors": tuple(record["errors"]), "notes": tuple(record["notes"])})
    return LayerSolution(weight, bias, weight, (), quantized, factors, bool(metadata["changed"]), record)


def most_bytes(k: int, n: int) -> int:
    """Return an upper bound on the bytes of a layer ``(k, n)``: a larger file is damaged."""
    return 16 * k * n + 16 * min(k, n) * (k + n) + (1 << 20)


def _array(arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    array = arrays[name]
    if array.shape != shape or array.dtype != kind:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, and should be {np.dtype(kind)} {shape}")
    return array
