"""Running sums over rows, in float64; their means are the statistics solvers read.

A value ``x (..., K)`` is seen as rows ``X (n, K)``. A batch is added as sums computed in the graph by onnxruntime, or as rows.
Where the samples of a batch are repeated to fill it, its sums are multiplied by a weight below 1.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from magr_onnx.core import backends, threads
from magr_onnx.core.backends import HOST, Backend
from magr_onnx.core.error_feedback import target_moments
from magr_onnx.core.gram import LARGE_ROWS, Gram, RowGram, gram_type
from magr_onnx.core.product import RowProduct
from magr_onnx.core.types import Activation, Array, LayerStats, TargetMoments


class _Means(Protocol):
    @property
    def rows(self) -> int: ...

    def combine(self, other: Self) -> Self: ...


Means = TypeVar("Means", bound=_Means)


def with_folds(parts: Sequence[Means], folds: int) -> Means:
    """Combine the statistics of parts of the rows; the first ``folds`` of them, as far as they have rows, become folds of the result.

    Where all rows are in one part, there are no folds: nothing would be left to solve with.
    """
    counted = [(part, index < folds) for index, part in enumerate(parts) if part.rows]
    if len(counted) < 2:
        return counted[0][0] if counted else parts[0]
    combined: Means = reduce(lambda a, b: a.combine(b), (part for part, _ in counted))
    with_parts: Means = replace(combined, folds=tuple(part for part, held_out in counted if held_out))  # type: ignore[type-var]
    return with_parts


LEAST_POWER = 1e-3  # of the strongest reader's output: what is weaker counts as if it had this


def pooled(readers: Sequence[tuple[LayerStats, bool]], powers: Sequence[float]) -> LayerStats:
    """Pool the moments of all readers of one weight, so that the relative errors of their outputs count the same.

    Summed as they are, moments of a strong input would hide those of a weak one, whose output matters as much to the layers behind it.
    In a fold, every reader counts by its share of its own rows, so that what is left outside are moments too.

    Args:
        readers: Moments of every reader's input, and whether a bias of its own absorbs its mean error.
        powers: Mean square of every reader's output.
    """
    floor = LEAST_POWER * max(powers) or 1.0
    factors = [sum(powers) / max(power, floor) / len(powers) ** 2 for power in powers]

    def pool(parts: Sequence[LayerStats]) -> LayerStats:
        rows = sum(part.rows for part in parts)
        share = rows / sum(stats.rows for stats, _ in readers)
        grams = [
            f * part.rows / stats.rows / share * part.objective_gram(centred)
            for f, part, (stats, centred) in zip(factors, parts, readers, strict=True)
        ]
        return LayerStats(reduce(operator.add, grams), np.zeros(len(parts[0].mean)), rows, backend=parts[0].backend)

    folds = zip(*(stats.folds for stats, _ in readers), strict=False)
    return replace(pool([stats for stats, _ in readers]), folds=tuple(pool(parts) for parts in folds))


class MomentAccumulator:
    """Sums of ``x x^T`` and of ``x`` over the rows of one value.

    Attributes:
        gram: Sum of ``X^T X``, ``(K, K)``; ``(G, K, K)`` of the G groups of a convolution. Where only few rows are expected it is kept by
            its rows, as long as they are few.
        total: Sum of the rows, ``(K,)`` or ``(G, K)``.
        rows: Number of rows, weighted.
        float_total: Sum of the same rows of the float model, before quantization; None where ``total`` has them.
        cross: Sum of ``X_q^T X`` between the model being quantized and the float one ``(K, K)``; None unless asked for.
        float_gram: Sum of ``X^T X`` in the float model; None unless asked for.
    """

    def __init__(
        self,
        width: int,
        groups: int | None = None,
        *,
        float_mean: bool = False,
        paired: bool = False,
        few: bool = False,
        backend: Backend = HOST,
    ) -> None:
        """Start with no rows.

        Args:
            width: K.
            groups: G; None for a value without groups.
            float_mean: Whether to sum the rows of the float model too.
            paired: Whether to sum ``cross`` and ``float_gram`` too, which `target_moments` is made of.
            few: Whether few rows are expected (`magr_onnx.core.gram.few`).
            backend: Where solvers will compute with the statistics. Matrices are summed there, too.
        """
        self._backend = backend
        shape, zeros = (width,) if groups is None else (groups, width), partial(backend.zeros, kind="float64")
        self.gram: Gram = RowGram.diagonal_of(np.zeros(width)) if few else zeros((*shape, width))
        self.total: Array = np.zeros(shape)
        self.rows = 0.0
        self.float_total: Array | None = np.zeros(shape) if float_mean else None
        self.cross: Array | None = zeros((width, width)) if paired else None
        self.float_gram: Array | None = zeros((width, width)) if paired else None
        self._averaged = False  # whether these two are means

    def add(self, gram: Gram, total: Array, rows: float, float_total: Array | None = None, weight: float = 1.0) -> None:
        """Add the sums of a batch."""
        if isinstance(gram, RowGram):
            self.gram = self.gram + gram * weight
        else:
            self.gram += backends.of(self.gram).array(weighted(gram, weight))
        self.total += weighted(total, weight)
        self.rows += rows * weight
        if self.float_total is not None and float_total is not None:
            self.float_total += weighted(float_total, weight)

    def add_rows(self, quantized: Array, real: Array, weight: float = 1.0) -> None:
        """Add rows ``(n, K)`` float32 of the model being quantized, and the same rows ``real`` of the float model."""
        if isinstance(self.gram, RowGram):
            self.gram = self.gram + RowGram.of(quantized) * weight
        else:
            rows = backends.of(self.gram).array(quantized)
            _add_product(self.gram, rows, rows, weight)
        self.total += weighted(quantized.sum(axis=0, dtype=np.float64), weight)
        self.rows += len(quantized) * weight
        if self.float_total is not None:
            self.float_total += weighted(real.sum(axis=0, dtype=np.float64), weight)
        if self.cross is not None and self.float_gram is not None:
            floats = self._backend.array(real)
            _add_product(self.cross, self._backend.array(quantized), floats, weight)
            _add_product(self.float_gram, floats, floats, weight)

    def means(self) -> tuple[Gram, Array, int]:
        """Return second moments, mean and rows. Consumes the sums: the matrix may be the largest array in memory."""
        gram, self.gram = self.gram, np.zeros((0, 0))
        gram /= self._count
        return gram.joined() if isinstance(gram, RowGram) else backends.of(gram).host(gram), self.total / self._count, whole_rows(self.rows)

    def stats(self, activation: Activation | None = None) -> LayerStats:
        """Return `means` as `LayerStats` of a value quantized by ``activation``."""
        gram, mean, rows = self.means()
        float_mean = None if self.float_total is None else self.float_total / self._count
        return LayerStats(gram.astype(gram_type(len(mean)), copy=False), mean, rows, float_mean, activation, backend=self._backend)

    def target_moments(self, weights: Array) -> TargetMoments:
        """Return the moments of the float model's output of a layer of ``weights (K, N)``; no rows may be added afterwards."""
        assert self.cross is not None
        assert self.float_gram is not None
        assert self.float_total is not None
        n = self._count
        if not self._averaged:  # once for all layers, in place: matrices may be the largest arrays in memory
            self.cross /= n
            self.float_gram /= n
            self._averaged = True
        return target_moments(weights, self.cross, self.float_gram, self.float_total / n, whole_rows(self.rows))

    @property
    def _count(self) -> float:
        return self.rows or 1.0


def split_stats(parts: Sequence[MomentAccumulator], folds: int, activation: Activation | None) -> LayerStats | None:
    """Return the statistics of a value with its first ``folds`` parts as folds; None without rows. Consumes the sums."""
    return with_folds([part.stats(activation) for part in parts], folds) if any(part.rows for part in parts) else None


class OutputAccumulator:
    """Sums over rows of the target output of a layer whose output is added to a residual stream.

    The target is ``Y = X W + R - R_q`` for residuals ``R`` of the float model and ``R_q`` of the model being quantized.
    """

    def __init__(self, weights: Array, *, few: bool = False) -> None:
        """Start with no rows, for a layer of ``weights (K, N)``.

        Args:
            weights: The weights.
            few: Whether few rows are expected (`magr_onnx.core.gram.few`); they are kept.
        """
        self._weights = weights
        self._cross: Array | RowProduct = RowProduct.zeros(*weights.shape) if few else np.zeros(weights.shape)
        self._total, self._power = np.zeros((2, weights.shape[1]))
        self._rows = 0.0

    def add_rows(self, quantized: Array, real: Array, residual_error: Array | float, weight: float = 1.0) -> None:
        """Add rows ``(n, K)`` float32 of both models, and of ``R - R_q (n, N)``; 0 where no residual is added."""
        y = real @ self._weights
        y += residual_error
        if isinstance(self._cross, RowProduct):
            self._cross = self._cross + RowProduct.of(np.array(quantized, np.float32), y, weight)
        else:
            self._cross += weighted(quantized.T @ y, weight)
        self._total += weighted(y.sum(axis=0, dtype=np.float64), weight)
        self._power += weighted(np.einsum("nk,nk->k", y, y, dtype=np.float64), weight)
        self._rows += len(real) * weight

    def target_moments(self) -> TargetMoments:
        """Return the means over rows. Consumes the sums: the matrix may be the largest array in memory."""
        n, cross = self._rows or 1.0, self._cross
        self._cross = np.zeros((0, 0))
        if isinstance(cross, RowProduct):
            cross = 1 / n * cross
        else:
            cross /= n
            cross = cross.astype(gram_type(len(cross)), copy=False)
        return TargetMoments(cross, self._total / n, self._power / n, whole_rows(self._rows))


class GroupSums:
    """Sums over patches ``P_q (G, K, n)`` of a convolution's groups, in the model being quantized, and its target output ``Y (G, N, n)``.

    Attributes:
        rows: Number of patches of a group, weighted.
    """

    def __init__(self, groups: int, k: int, n: int) -> None:
        """Start with no patches, for ``groups`` of ``k`` inputs and ``n`` output channels each."""
        self._gram, self._total, self._cross = np.zeros((groups, k, k)), np.zeros((groups, k)), np.zeros((groups, k, n))
        self._target, self._power = np.zeros((groups, n)), np.zeros((groups, n))
        self.rows = 0.0

    def add(self, patches: Array, outputs: Array, weight: float = 1.0) -> None:
        """Add patches ``(G, K, n)`` float32 and the outputs ``(G, N, n)`` float32 that they should give, without a bias."""
        self._gram += weighted(patches @ patches.transpose(0, 2, 1), weight)
        self._cross += weighted(patches @ outputs.transpose(0, 2, 1), weight)
        self._total += weighted(patches.sum(axis=2, dtype=np.float64), weight)
        self._target += weighted(outputs.sum(axis=2, dtype=np.float64), weight)
        self._power += weighted(np.einsum("gnr,gnr->gn", outputs, outputs, dtype=np.float64), weight)
        self.rows += patches.shape[2] * weight

    def means(self) -> list[tuple[LayerStats, TargetMoments]]:
        """Return the means over rows, a group each."""
        n, rows, kind = self.rows or 1.0, whole_rows(self.rows), gram_type(self._gram.shape[1])
        sums = zip(self._gram, self._total, self._cross, self._target, self._power, strict=True)
        return [
            (LayerStats((gram / n).astype(kind, copy=False), total / n, rows), TargetMoments(cross / n, target / n, power / n, rows))
            for gram, total, cross, target, power in sums
        ]


def _add_product(total: Array, a: Array, b: Array, weight: float) -> None:
    """Add ``weight a^T b`` for ``a (n, K)``, ``b (n, N)`` to ``total (K, N)``: strip by strip, so that no second one is as large.

    Of a symmetric product, each strip is made from its diagonal on, and mirrored.
    """

    if not backends.of(total).cached:
        total += weighted(a.T @ b, weight)
        return

    def add(at: int) -> None:
        end, first = min(at + LARGE_ROWS, len(total)), at if a is b else 0
        product = weighted(a[:, at:end].T @ b[:, first:], weight)
        total[at:end, first:] += product
        if a is b:
            total[end:, at:end] += product[:, end - at :].T

    threads.each(add, range(0, len(total), LARGE_ROWS))


def whole_rows(rows: float) -> int:
    """Round weighted rows for reports and pooling; fewer than one row are one, since 0 stands for no data."""
    return max(round(rows), 1) if rows > 0 else 0


def weighted(sums: npt.NDArray[Any], weight: float) -> npt.NDArray[Any]:
    """Multiply the sums of a batch by its weight; returns the same array for weight 1."""
    return sums if weight == 1 else sums * weight
