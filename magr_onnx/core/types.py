"""The data types that travel between the numeric core, the passes and the runtime.

Shapes used everywhere: a layer is ``Y = X W + b`` with ``X (n, K)``, ``W (K, N)``, output channels in columns. A *group* is
``g`` consecutive rows of one column; there are ``G = ceil(K / g)`` of them and the last one may be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import RLock
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from magr_onnx.core import backends
from magr_onnx.core.backends import HOST, Backend
from magr_onnx.core.gram import LARGE, LARGE_ROWS, LEAST_WIDTH, NOISE, Gram, RowGram
from magr_onnx.core.product import Product, RowProduct
from magr_onnx.errors import OptionError

Array = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.uint8]
Columns = slice | npt.NDArray[np.intp]
ScaleType = Literal["float32", "float16"]
T = TypeVar("T")

BITS = tuple(range(2, 9))
PRIOR_ROWS = 4  # see `LayerStats.regularized`
COMMON_MEAN = 0.25
"""Squared mean over variance that inputs share, as assumed without data: 0.47 behind the Relu of normal values, 0 behind a LayerNorm."""
NEIGHBOURS = 1.0
"""Variance that taps of one channel share, over what each has alone, as assumed without data; 0.5 and 2 are hardly worse."""
COLUMN_BYTES = 1 << 25  # of float32 output channels a solver processes at a time: channels are independent


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """The integer grid of a weight.

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
    """One candidate for a layer in mixed precision: bits and rows per scale (None: the whole column); without bits it stays float."""

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

    @staticmethod
    def side_by_side(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Join weights ``(K, N)`` on grids of one kind to ``(K, G N)``."""
        xp = backends.of(weights[0].codes).xp
        codes, scales, zeros = (xp.concatenate([getattr(w, part) for w in weights], axis=1) for part in ("codes", "scales", "zero_points"))
        return QuantizedWeight(codes, scales, zeros, weights[0].spec)

    def columns(self, chosen: Columns) -> QuantizedWeight:
        """Return the ``chosen`` output channels."""
        return QuantizedWeight(self.codes[:, chosen], self.scales[:, chosen], self.zero_points[:, chosen], self.spec)

    def dequantize(self) -> Array:
        """``scale * (code - zero point)`` as ``(K, N)`` float32, the arithmetic of onnxruntime's kernels."""
        return dequantize(self.codes, self.zero_points, self.scales, self.spec.group_of_row(len(self.codes)))

    def host(self) -> QuantizedWeight:
        """Return the weight with arrays of NumPy, as everything but a solver expects it."""
        b = backends.of(self.codes)
        return QuantizedWeight(b.host(self.codes), b.host(self.scales), b.host(self.zero_points), self.spec)

    def on(self, backend: Backend) -> QuantizedWeight:
        """Return a weight of NumPy with arrays of a solver's backend."""
        codes, zeros = backend.array(self.codes), backend.array(self.zero_points)
        return QuantizedWeight(codes, backend.array(self.scales), zeros, self.spec)


def dequantize(codes: npt.NDArray[Any], zeros: npt.NDArray[Any], scales: npt.NDArray[Any], rows: npt.NDArray[np.intp]) -> Array:
    """``scale * (code - zero point)`` ``(K, N)`` float32 of grids ``(G, N)``; ``rows (K,)`` is the group of every row."""
    result: Array = np.empty(codes.shape, np.float32)
    for at in range(0, len(codes), LARGE_ROWS):  # so that no temporary is as large as the result
        values, group = result[at : at + LARGE_ROWS], rows[at : at + LARGE_ROWS]
        np.subtract(codes[at : at + LARGE_ROWS], zeros.astype(np.float32)[group], out=values)
        values *= scales.astype(np.float32, copy=False)[group]
    return result


def column_parts(k: int, n: int, *, most: int | None = None) -> list[slice]:
    """Split the output channels of a layer ``(k, n)`` into slices of ``most`` bytes, or `COLUMN_BYTES`; most layers need one."""
    count = max(1, -(-4 * k * n // (most or COLUMN_BYTES)))
    edges = [n * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def sum_traces(*traces: Sequence[float]) -> list[float]:
    """Add the objectives of sets of columns, step by step; a shorter trace keeps its last value."""
    length = max(map(len, traces))
    padded = [[*trace, *[trace[-1]] * (length - len(trace))] for trace in traces if trace]
    return [sum(values) for values in zip(*padded, strict=True)]


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """The grid of 8 or 16 bits a static activation is rounded to, one for the whole tensor.

    Attributes:
        scale: Step, exactly representable in float32.
        zero_point: The raw code of 0.
        signed: Signed codes (int8: -128 to 127) instead of unsigned ones (uint8: 0 to 255).
        bits: Of a code.
    """

    scale: float
    zero_point: int
    signed: bool = False
    bits: int = 8

    @staticmethod
    def of_range(low: float, high: float, signed: bool = False, bits: int = 8) -> ActivationGrid:
        """Return the grid over ``[min(low, 0), max(high, 0)]``, with zero exactly on it."""
        low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
        scale = float(np.float32(max((high - low) / top, float(np.finfo(np.float32).tiny) * 256)))
        zero = int(np.clip(np.rint(-low / scale), 0, top))
        return ActivationGrid(scale, zero - 2 ** (bits - 1) if signed else zero, signed, bits)

    def refined(self) -> ActivationGrid:
        """Return the grid of 16 bits that has all values of this one of 8."""
        return ActivationGrid(self.scale / 256, self.zero_point * 256, self.signed, 16)

    def halves(self) -> tuple[ActivationGrid, ActivationGrid]:
        """Return grids of 8 bits whose sums are the values of this one of 16: of every 256th value, and of what lies about each."""
        middle = 0 if self.signed else 128
        return ActivationGrid(self.scale * 256, self.zero_point // 256, self.signed), ActivationGrid(self.scale, middle, self.signed)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Integer type of the codes."""
        return np.dtype(f"{'int' if self.signed else 'uint'}{self.bits}")

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest raw code of the type."""
        return activation_limits(self.signed, self.bits)

    @property
    def multiples(self) -> tuple[int, int]:
        """Least and greatest value on the grid, in steps."""
        low, high = self.limits
        return low - self.zero_point, high - self.zero_point

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value on the grid."""
        low, high = self.multiples
        return low * self.scale, high * self.scale


@dataclass(frozen=True, slots=True)
class DynamicRange:
    """A uint8 grid over the range of each tensor at run time, after clipping to ``[low, high]``."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value that is not clipped."""
        return self.low, self.high

    @property
    def clips(self) -> bool:
        return math.isfinite(self.low) or math.isfinite(self.high)


Activation = ActivationGrid | DynamicRange
"""How a layer's input becomes 8-bit integers."""


def activation_limits(signed: bool, bits: int = 8) -> tuple[int, int]:
    """Raw codes of a signed or unsigned type of so many bits."""
    low = -(2 ** (bits - 1)) if signed else 0
    return low, low + 2**bits - 1


class _Memo(dict[Any, Any]):
    """What was computed from statistics, and who may add to it."""

    def __init__(self) -> None:
        self.lock = RLock()


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """Second moments of a layer's input, shared by every layer that reads the same value.

    Where the input will be quantized, the moments are of the quantized input: codes multiply that one.

    Attributes:
        gram: ``X^T X / n`` ``(K, K)``, float64; float32 from `LARGE` inputs on (see `magr_onnx.core.gram.gram_type`); of few rows, these.
            Read-only.
        mean: ``mean(X)`` ``(K,)`` float64.
        rows: Number of calibration rows ``n``; 0 marks data-free statistics (identity).
        float_mean: Mean of the input before it was quantized ``(K,)``; None where it is not quantized.
        activation: How the input is quantized; None where it stays float.
        folds: Statistics of parts of the rows that are held out in turn, for choices that would overfit on all rows.
        common_mean: Squared mean over variance that inputs are assumed to share; of data-free statistics only.
        taps: Consecutive inputs that are one channel at neighbouring positions, and so alike; of data-free statistics only.
        backend: Where solvers compute with them. The arrays here are of NumPy.
    """

    gram: Gram
    mean: Array
    rows: int
    float_mean: Array | None = None
    activation: Activation | None = None
    folds: tuple[LayerStats, ...] = ()
    common_mean: float = 0.0
    taps: int = 1
    backend: Backend = HOST
    _memo: _Memo = field(default_factory=_Memo, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without what was computed; the matrix of data-free statistics is made again, since a copy is no view."""
        if self.is_data_free:
            return _data_free, (len(self.mean), self.activation, self.common_mean, self.taps)
        return LayerStats, (self.gram, self.mean, self.rows, self.float_mean, self.activation, self.folds, self.common_mean, self.taps)

    @staticmethod
    def data_free(k: int, common_mean: float = COMMON_MEAN, taps: int = 1) -> LayerStats:
        """Return the statistics assumed without calibration data: uncorrelated inputs of unit power."""
        if 1 < taps == k:  # one channel
            common_mean += NEIGHBOURS
        return LayerStats(_identity_plus(k, 0.0), np.zeros(k), 0, common_mean=common_mean, taps=taps, backend=HOST)

    @property
    def target_mean(self) -> Array:
        """Mean of the input of the float layer, ``(K,)``."""
        return self.mean if self.float_mean is None else self.float_mean

    @property
    def is_data_free(self) -> bool:
        return self.rows == 0

    @property
    def is_large(self) -> bool:
        """Whether the matrix has `LARGE` inputs and all its entries: nobody keeps others that are computed from it."""
        return len(self.mean) >= LARGE and isinstance(self.gram, np.ndarray)

    def combine(self, other: LayerStats, sign: int = 1) -> LayerStats:
        """Return the statistics of the rows of both, or (``sign=-1``) of the rows that are not in ``other``."""
        n = self.rows + sign * other.rows
        if n == 0:
            return self
        if self.activation != other.activation:
            raise ValueError(f"statistics under different grids cannot be combined: {self.activation} and {other.activation}")
        a, b = self.rows / n, sign * other.rows / n
        float_mean = None if self.float_mean is None or other.float_mean is None else a * self.float_mean + b * other.float_mean
        gram, mean = a * self.gram + b * other.gram, a * self.mean + b * other.mean
        return LayerStats(gram, mean, n, float_mean, self.activation, backend=self.backend)

    def without(self, fold: int) -> LayerStats:
        """Return the statistics of the rows outside a fold; computed once."""
        return self.memo(("without", fold, self.backend.name), lambda: self.combine(self.folds[fold], -1))

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """Compute ``make()`` once, in one thread: layers that share these statistics share factorizations."""
        with self._memo.lock:
            if key not in self._memo:
                self._memo[key] = make()
            value: T = self._memo[key]
        return value

    def objective_gram(self, centred: bool) -> Gram:
        """Return the matrix that errors are measured by: ``H``, or ``H - mu mu^T`` when a bias absorbs the mean error.

        Computed once for all who measure by it, unless `is_large`. Read-only.
        """
        if not centred or self.is_data_free:
            return self.gram
        return self._centred() if self.is_large else self.memo("centred", self._centred)

    def _centred(self) -> Gram:
        """Centre the matrix block by block, without a second temporary; what constant inputs leave is noise, and is set to zero."""
        if isinstance(self.gram, RowGram):
            return self.gram.centred(self.mean)
        result: Array = self.gram.copy()
        for at in range(0, len(result), LARGE_ROWS):
            result[at : at + LARGE_ROWS] -= np.outer(self.mean[at : at + LARGE_ROWS], self.mean)
        constant = np.flatnonzero(result.diagonal() <= NOISE * self.gram.diagonal())
        result[constant] = 0
        result[:, constant] = 0
        return result

    def regularized(self, centred: bool) -> Gram:
        """Return the matrix that weights are solved with: `objective_gram` plus a prior worth `PRIOR_ROWS` rows of ``n``.

        In the prior, inputs are uncorrelated and of the median power of those that were active. From few rows, an input that
        was hardly active would else take up the errors of all others, by changes that are large where it is active after all.
        Computed once for all layers that share these statistics, unless `is_large`.

        Without data, inputs are assumed to share a mean: errors that add up where all inputs are positive are to cancel.
        """
        if self.is_data_free:
            return _identity_plus(len(self.mean), self.common_mean)
        if self.is_large:
            return self._regularized(centred)
        return self.memo(("regularized", centred), lambda: self._regularized(centred))

    def _regularized(self, centred: bool) -> Gram:
        gram = self.objective_gram(centred)
        power = gram.diagonal()
        active = power[power > 0]
        prior = PRIOR_ROWS / self.rows * (float(np.median(active)) if len(active) else 1.0)
        if isinstance(gram, RowGram):
            return gram.plus_diagonal(prior)
        result = gram if centred and self.is_large else gram.copy()  # nobody else has a large one
        result[np.diag_indices(len(power))] += prior
        return result


def _data_free(k: int, activation: Activation | None, common_mean: float, taps: int) -> LayerStats:
    """Return data-free statistics as they were."""
    return LayerStats(_identity_plus(k, 0.0), np.zeros(k), 0, activation=activation, common_mean=common_mean, taps=taps)


def _identity_plus(k: int, value: float) -> Gram:
    """Return the identity ``(K, K)`` with ``value`` added to every entry: one row, or a view of 2 K numbers. Read-only."""
    if k >= LEAST_WIDTH:
        return RowGram.of(np.ones((1, k), np.float32), np.array([value])).plus_diagonal(1.0)
    line = np.full(2 * k - 1, value)
    line[k - 1] += 1
    return np.lib.stride_tricks.sliding_window_view(line, k)[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class TargetMoments:
    """Moments of a layer's target output ``Y (n, N)`` (without bias) and its input ``X_q (n, K)`` after quantized layers.

    Attributes:
        cross: ``X_q^T Y / n`` ``(K, N)``; of wide layers and of few rows by columns.
        mean: ``mean(Y)`` ``(N,)``.
        power: ``mean(Y^2)`` ``(N,)``.
        rows: Rows ``n``.
        folds: The same over the rows of `LayerStats.folds`.
    """

    cross: Array | Product | RowProduct
    mean: Array
    power: Array
    rows: int
    folds: tuple[TargetMoments, ...] = ()

    def columns(self, chosen: Columns) -> TargetMoments:
        """Return the moments of the ``chosen`` output channels."""
        folds = tuple(fold.columns(chosen) for fold in self.folds)
        return TargetMoments(self.cross[:, chosen], self.mean[chosen], self.power[chosen], self.rows, folds)

    def without(self, fold: int) -> TargetMoments:
        """Return the moments of the rows outside a fold."""
        return self.combine(self.folds[fold], -1)

    def combine(self, other: TargetMoments, sign: int = 1) -> TargetMoments:
        """Combine as `LayerStats.combine` does."""
        n = self.rows + sign * other.rows
        a, b = self.rows / n, sign * other.rows / n
        cross: Any = a * self.cross + b * other.cross  # type: ignore[operator]  # both are of one kind
        return TargetMoments(cross, a * self.mean + b * other.mean, a * self.power + b * other.power, n)
