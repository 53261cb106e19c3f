"""The data types that travel between the numeric core, the passes and the runtime.

Shapes used everywhere: a layer is ``Y = X W + b`` with ``X (n, K)``, ``W (K, N)``, output channels in columns. A *group* is
``g`` consecutive rows of one column; there are ``G = ceil(K / g)`` of them and the last one may be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from magr_onnx.errors import NonFiniteError, OptionError

Array = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.uint8]
ScaleType = Literal["float32", "float16"]
T = TypeVar("T")

BITS = tuple(range(2, 9))
LARGE = 6144
"""Inputs of a layer from which its ``(K, K)`` matrices are held in float32, few at a time, and worked on in place."""
LARGE_ROWS = 512  # of such a matrix worked on at a time
NOISE = 3e-7  # of a second moment that was summed in single precision
COLUMN_BYTES = 1 << 25  # of float32 output channels that solvers work on at a time: channels are independent of each other


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """A model or data that takes work to make, and is made when all that can be checked without it has been.

    Attributes:
        make: Makes it; called once for every place that takes it.
    """

    make: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """What integer grid a weight is put on.

    Attributes:
        bits: Code width, 2 to 8. Codes are unsigned, in ``[0, 2**bits - 1]``.
        group_size: Rows that share one scale and zero point; None for one grid a column (per channel).
        symmetric: Fix the zero point at ``2**(bits - 1)``; otherwise it is chosen per group.
        scale_dtype: Type the scales are stored in. Scales are rounded to it BEFORE codes are chosen, so that what was
            optimized is what runs.
    """

    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = False
    scale_dtype: ScaleType = "float32"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"bits={self.bits} is not supported; choose one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise OptionError(f"group_size={self.group_size} must be at least 1, or None for per channel")

    @property
    def top(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The symmetric zero point, ``2**(bits - 1)``."""
        return int(2 ** (self.bits - 1))

    def rows(self, k: int) -> int:
        """Rows in a full group of a column of ``k``."""
        return k if self.group_size is None else min(self.group_size, k)

    def groups(self, k: int) -> int:
        """Number of groups in a column of ``k`` rows."""
        return -(-k // self.rows(k))

    def group_of_row(self, k: int) -> npt.NDArray[np.intp]:
        """Group index of every row, ``(k,)``."""
        return np.arange(k) // self.rows(k)

    def __str__(self) -> str:
        per = "per channel" if self.group_size is None else f"block {self.group_size}"
        return f"{self.bits}-bit {'symmetric' if self.symmetric else 'asymmetric'}, {per}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer may become: bits, and rows that share a scale (None: a whole column). No bits: it stays float."""

    bits: int | None = None
    block_size: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """Integer codes and their grid: the only thing an emitter accepts.

    Attributes:
        codes: ``(K, N)`` uint8.
        scales: ``(G, N)`` float32, exactly representable in ``spec.scale_dtype``.
        zero_points: ``(G, N)`` uint8.
        spec: The grid's specification.
    """

    codes: Codes
    scales: Array
    zero_points: Codes
    spec: WeightSpec

    def __post_init__(self) -> None:
        k, n = self.codes.shape
        expected = (self.spec.groups(k), n)
        if self.scales.shape != expected or self.zero_points.shape != expected:
            raise ValueError(
                f"codes {self.codes.shape} with {self.spec} need scales and zero points {expected}; "
                f"got {self.scales.shape} and {self.zero_points.shape}"
            )

    def raw(self) -> npt.NDArray[np.int16]:
        """Codes as an int8 kernel multiplies them, ``code - 2^(bits - 1)``, ``(K, N)``."""
        return self.codes.astype(np.int16) - np.int16(self.spec.middle)

    def dequantize(self) -> Array:
        """``scale * (code - zero point)`` as ``(K, N)`` float32, the arithmetic of onnxruntime's kernels."""
        return scaled(self.codes, self.zero_points, self.scales, self.spec.group_of_row(len(self.codes)))


def scaled(codes: npt.NDArray[Any], zeros: npt.NDArray[Any], scales: npt.NDArray[Any], rows: npt.NDArray[np.intp]) -> Array:
    """``scale * (code - zero point)`` ``(K, N)`` float32 of grids ``(G, N)``; ``rows (K,)`` gives the group of every row."""
    result: Array = np.empty(codes.shape, np.float32)
    for at in range(0, len(codes), LARGE_ROWS):  # so that no more than the result is of its size
        part, group = result[at : at + LARGE_ROWS], rows[at : at + LARGE_ROWS]
        np.subtract(codes[at : at + LARGE_ROWS], zeros.astype(np.float32)[group], out=part)
        part *= scales.astype(np.float32, copy=False)[group]
    return result


def column_parts(k: int, n: int) -> list[slice]:
    """Output channels of a layer ``(k, n)`` in parts of `COLUMN_BYTES`: one for most layers."""
    count = max(1, -(-4 * k * n // COLUMN_BYTES))
    edges = [n * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def joined(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Objectives of two sets of columns, step by step, added up; the one that stopped earlier keeps its last."""
    length = max(len(a), len(b))
    long = [[*e, *[e[-1]] * (length - len(e))] if e else [0.0] * length for e in (a, b)]
    return [x + y for x, y in zip(*long, strict=True)]


def gram_type(k: int) -> type[np.float32] | type[np.float64]:
    """The type that ``(K, K)`` statistics are held in. They are summed in float64; rounding them after that changes nothing that matters
    beside the damping, and halves what the largest layers need."""
    return np.float32 if k >= LARGE else np.float64


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """The 8-bit grid a static activation is rounded to, one for the whole tensor.

    Attributes:
        scale: Step, exactly representable in float32.
        zero_point: The raw code of 0.
        signed: int8 codes (-128 to 127) instead of uint8 (0 to 255).
    """

    scale: float
    zero_point: int
    signed: bool = False

    @staticmethod
    def of_range(low: float, high: float, signed: bool = False) -> ActivationGrid:
        """The grid over ``[min(low, 0), max(high, 0)]``, zero exactly on it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / 255, float(np.finfo(np.float32).tiny) * 256)))
        zero = int(np.clip(np.rint(-low / scale), 0, 255))
        return ActivationGrid(scale, zero - 128 if signed else zero, signed)

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest raw code of the type."""
        return activation_limits(self.signed)

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value on the grid."""
        low, high = self.limits
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale


@dataclass(frozen=True, slots=True)
class DynamicRange:
    """A uint8 grid over what each tensor turns out to hold at run time, clipped to ``[low, high]`` first."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def clips(self) -> bool:
        return math.isfinite(self.low) or math.isfinite(self.high)


Activation = ActivationGrid | DynamicRange
"""How a layer's input becomes 8-bit integers."""


def activation_limits(signed: bool) -> tuple[int, int]:
    """Raw codes of int8 or uint8."""
    return (-128, 127) if signed else (0, 255)


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """Second moments of a layer's input, shared by every layer that reads the same value.

    Where the input will be quantized, the moments are of the quantized input: codes multiply that one.

    Attributes:
        gram: ``X^T X / n`` ``(K, K)``, float64; float32 from `LARGE` inputs on (see `gram_type`). To be read only.
        mean: ``mean(X)`` ``(K,)`` float64.
        rows: Calibration rows ``n`` that were counted; 0 marks data-free statistics (identity).
        float_mean: Mean of the input before it was quantized ``(K,)``; None where it is not quantized.
        activation: How the input is quantized; None where it stays float.
        held_out: Statistics of a part of the rows, for choices that would overfit on all of them; else None.
    """

    gram: Array
    mean: Array
    rows: int
    float_mean: Array | None = None
    activation: Activation | None = None
    held_out: LayerStats | None = None
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def data_free(k: int) -> LayerStats:
        """The statistics assumed without calibration data: uncorrelated inputs of unit power, mean zero."""
        line = np.zeros(2 * k - 1)
        line[k - 1] = 1
        return LayerStats(np.lib.stride_tricks.sliding_window_view(line, k)[::-1], np.zeros(k), 0)  # the identity, in 2 K numbers

    @property
    def target_mean(self) -> Array:
        """Mean of the input of the float layer, ``(K,)``."""
        return self.mean if self.float_mean is None else self.float_mean

    @property
    def is_data_free(self) -> bool:
        return self.rows == 0

    def combine(self, other: LayerStats, sign: int = 1) -> LayerStats:
        """Statistics of the rows of both, or (``sign=-1``) of those that are not in ``other``."""
        n = self.rows + sign * other.rows
        if n == 0:
            return self
        if self.activation != other.activation:
            raise ValueError(f"statistics under different grids cannot be combined: {self.activation} and {other.activation}")
        a, b = self.rows / n, sign * other.rows / n
        float_mean = None if self.float_mean is None or other.float_mean is None else a * self.float_mean + b * other.float_mean
        return LayerStats(a * self.gram + b * other.gram, a * self.mean + b * other.mean, n, float_mean, self.activation)

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, computed once: factorizations are shared by the layers that share these statistics."""
        if key not in self._memo:
            self._memo[key] = make()
        value: T = self._memo[key]
        return value

    def objective_gram(self, centred: bool) -> Array:
        """The matrix of the layer error: ``H``, or ``H - mu mu^T`` when a bias will absorb the mean error."""
        if not centred or self.is_data_free:
            return self.gram
        return self._centred() if len(self.mean) >= LARGE else self.memo("centred", self._centred)

    def _centred(self) -> Array:
        """The centred matrix row by row, without another of its size; inputs that never change leave only noise, which is taken out."""
        result: Array = self.gram.copy()
        for at in range(0, len(result), LARGE_ROWS):
            result[at : at + LARGE_ROWS] -= np.outer(self.mean[at : at + LARGE_ROWS], self.mean)
        still = np.flatnonzero(result.diagonal() <= NOISE * self.gram.diagonal())
        result[still] = 0
        result[:, still] = 0
        return result


@dataclass(frozen=True, slots=True, eq=False)
class TargetMoments:
    """Moments of what a layer should put out, ``Y (n, N)`` without its bias, beside its input ``X_q (n, K)`` behind quantized layers.

    Attributes:
        cross: ``X_q^T Y / n`` ``(K, N)`` float64.
        mean: ``mean(Y)`` ``(N,)``.
        power: ``mean(Y^2)`` ``(N,)``.
        rows: Rows ``n``.
        held_out: The same of the rows that `LayerStats.held_out` counts; else None.
    """

    cross: Array
    mean: Array
    power: Array
    rows: int
    held_out: TargetMoments | None = None

    def columns(self, chosen: npt.NDArray[np.intp]) -> TargetMoments:
        """The moments of some output channels."""
        return TargetMoments(self.cross[:, chosen], self.mean[chosen], self.power[chosen], self.rows)

    def combine(self, other: TargetMoments, sign: int = 1) -> TargetMoments:
        """As `LayerStats.combine`."""
        n = self.rows + sign * other.rows
        a, b = self.rows / n, sign * other.rows / n
        return TargetMoments(a * self.cross + b * other.cross, a * self.mean + b * other.mean, a * self.power + b * other.power, n)


LARGEST = 1e15
"""Of a weight: sums of squares of larger ones are infinite in float32."""


def check_finite(name: str, array: npt.NDArray[Any]) -> None:
    """Raise `NonFiniteError` naming the layer when ``array`` holds NaN or infinity."""
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise NonFiniteError(
            f"{name}: {len(bad)} of {array.size} values are NaN or infinite (first at index {tuple(map(int, bad[0]))}); "
            "repair the export or exclude the layer"
        )


def check_weight(name: str, weight: Array) -> None:
    """`check_finite`, of the squares too."""
    check_finite(name, weight)
    if (largest := max(float(weight.max(initial=0)), -float(weight.min(initial=0)))) > LARGEST:
        raise NonFiniteError(f"{name}: values up to {largest:.3g}, and {LARGEST:g} is the most that can be squared; exclude the layer")
