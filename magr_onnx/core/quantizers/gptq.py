"""GPTQ, also known as OPTQ (Frantar et al., arXiv 2210.17323): rounding with error feedback under the layer error.

Minimises ``E = tr((W_hat - W)^T H (W_hat - W))`` one input row at a time. With ``H = R R^T``, R upper triangular, and ``D = W_hat - W``,

    E = sum_k R_kk^2 || D_k + sum_{j<k} (R_jk / R_kk) D_j ||^2,

so row ``k`` rounds ``w_k - sum_{j<k} (R_jk / R_kk) D_j``: the error of all earlier rows is fed forward. This is the LDL form of GPTQ (Chee
et al., "QuIP", arXiv 2307.13304, theorem 6, prove the codes to be the same); it needs one Cholesky factor and no inverse of H.

Deviations from the authors' code:

- Rows of inputs that were zero in all calibration data are rounded, not set to zero: missing data is no reason to delete a weight.
- With ``act_order`` (descending ``diag(H)``) groups keep their original rows (static groups), so the result needs no group index.
- Damping is relative to each input's own ``H_kk``, not to their mean (`magr_onnx.core.linalg.damped`). It is multiplied by ten when the
  factorization fails, and the result says what was used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import numpy as np
import numpy.typing as npt

from magr_onnx.core import backends, compiled
from magr_onnx.core.gram import Gram, RowGram
from magr_onnx.core.grid import Grid, choose, stored
from magr_onnx.core.linalg import cholesky, column_errors, damped
from magr_onnx.core.overflow.accumulator import Budget, RunningSums
from magr_onnx.core.quantizers import row_feedback, rtn
from magr_onnx.core.quantizers.a2q import project
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.quantizers.row_feedback import RowFeedback
from magr_onnx.core.types import Array, QuantizedWeight

PANEL, BLOCK = 128, 16  # rows whose feedback is a product of its own, and of these rows rounded before the others hear of it
_TILE = 64
_RATIO, _MOST_RUNGS = 1.25, 24  # of neighbouring scales tried for a column that does not fit its accumulator, and how many
_LADDER_BYTES = 128 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """The factor of H that GPTQ needs; layers that share H share it.

    Attributes:
        matrix: ``(K, K)`` float32, strictly lower: row ``k`` weighs the errors of the rows before it.
        order: ``(K,)`` the order in which rows are rounded.
        damping: Damping in use, in units of ``diag H``.
    """

    matrix: Array
    order: npt.NDArray[np.intp]
    damping: float

    def local(self, start: int, end: int) -> Array:
        """Return the part of the matrix within a panel, ``(p, p)``."""
        return self.matrix[start:end, start:end]

    def past(self, difference: Array) -> Callable[[int, int], Array]:
        """Return a function from each panel, in turn, to the weighted errors ``(p, N)`` of all rows of ``difference (K, N)`` before it."""
        product = backends.of(difference).product
        return lambda start, end: product(self.matrix[start:end, :start], difference[:start])

    def notes(self, requested: float) -> tuple[str, ...]:
        """Return a note where another damping than the ``requested`` one is in use."""
        return () if self.damping == requested else (f"Cholesky failed at damping {requested:g}; used {self.damping:g}",)


@overload
def prepare(gram: Array, damping: float = ..., act_order: bool = ...) -> Feedback: ...
@overload
def prepare(gram: RowGram, damping: float = ..., act_order: bool = ...) -> RowFeedback: ...
@overload
def prepare(gram: Gram, damping: float = ..., act_order: bool = ...) -> Feedback | RowFeedback: ...
def prepare(gram: Gram, damping: float = 0.1, act_order: bool = True) -> Feedback | RowFeedback:
    """Factor ``gram (K, K)``; ``K^3 / 3`` FLOPs, in single precision where that is enough, and fewer where it has few rows.

    Raises:
        NonFiniteError: The Gram matrix cannot be factored at any damping.
    """
    k, b = len(gram), backends.of(gram)
    order = np.argsort(-b.host(gram.diagonal()), kind="stable") if act_order else np.arange(k)
    if isinstance(gram, RowGram):
        return row_feedback.prepare(damped(gram, damping), order)
    reverse = order[::-1]
    factor = cholesky(gram, damping, order=reverse, single=True)
    del gram  # the only reference to a large one, freed before the matrix below is allocated
    lower = factor.lower
    lower /= b.copy(lower.diagonal())
    b.diagonal(lower)[:] = 0
    matrix, upper = b.zeros((k, k)), b.xp.flip(lower, axis=(0, 1))
    tile = b.part(_TILE, k)
    for at in range(0, k, tile):  # transposed tile by tile, which stay in cache
        for before in range(0, at + 1, tile):
            matrix[at : at + tile, before : before + tile] = upper[before : before + tile, at : at + tile].T
    return Feedback(matrix, order, factor.damping)


def prepared(problem: Problem, damping: float, act_order: bool) -> Feedback | RowFeedback:
    """Run `prepare` on the matrix of the layer error; once for all layers that share the statistics, unless they are large."""
    stats = problem.stats

    def make() -> Feedback | RowFeedback:
        return prepare(backends.gram_on(problem.gram, stats.backend), damping, act_order)

    return make() if stats.is_large else stats.memo(("gptq", problem.centred, damping, act_order, stats.backend.name), make)


def solve(weights: Array, feedback: Feedback | RowFeedback, grid: Grid, budget: Budget | None = None) -> QuantizedWeight:
    """Choose codes of ``weights (K, N)`` on ``grid``; ``K^2 N`` FLOPs, nearly all of them in matrix products.

    With a ``budget`` every code is clipped to what still fits its tile's register (AXE, arXiv 2409.17092); the clipped error is
    fed forward like any rounding error.
    """
    (k, n), b = weights.shape, backends.of(weights)
    by_row = budget is not None or not compiled.serves(k, n, backend=b)
    solved = compiled.by_columns(lambda c: _solve(weights[:, c], feedback, grid.columns(c), budget, by_row), k, n, backend=b)
    return solved[0] if len(solved) == 1 else QuantizedWeight.side_by_side(solved)


def _solve(weights: Array, feedback: Feedback | RowFeedback, grid: Grid, budget: Budget | None, by_row: bool) -> QuantizedWeight:
    """Solve the given output channels, ``by_row`` or compiled."""
    (k, n), b = weights.shape, backends.of(weights)
    sums = None if budget is None else RunningSums(budget, k, n)
    round_panel: Callable[..., None] = _round_panel
    if not by_row:
        from magr_onnx.core.compiled import rounding

        round_panel = rounding.round_panel
    order, spec = feedback.order, grid.spec
    groups = spec.group_of_row(k)[order]
    scales, zeros = b.contiguous(grid.scales), b.contiguous(grid.zeros)
    difference, codes = b.empty((k, n)), b.empty((k, n), "uint8")
    past = feedback.past(difference)
    for start in range(0, k, PANEL):
        p = slice(start, min(start + PANEL, k))
        rows = b.index(order[p])
        w = b.contiguous(weights[rows], "float32")
        corrected = w - past(p.start, p.stop)
        local = b.contiguous(feedback.local(p.start, p.stop))
        clip = () if sums is None else (partial(_clip, sums, order[p], groups[p], spec.middle - zeros),)
        round_panel(w, corrected, local, groups[p], scales, zeros, spec.top, difference[p], *clip)
        corrected += zeros[b.index(groups[p])]
        codes[rows] = b.cast(corrected, "uint8")
    return QuantizedWeight(codes, grid.scales, b.cast(grid.zeros, "uint8"), spec)


def _round_panel(
    weights: Array,
    corrected: Array,
    feedback: Array,
    groups: npt.NDArray[np.intp],
    scales: Array,
    zeros: Array,
    top: int,
    difference: Array,
    clip: Callable[[int, Array], None] | None = None,
) -> None:
    """Do what `magr_onnx.core.compiled.rounding.round_panel` does, row by row; ``clip`` changes the codes of a row."""
    backend = backends.of(corrected)
    xp, rint, add_up = backend.xp, backend.rint, backend.add_up
    heard = backend.empty(corrected.shape[1:])
    low, high = -zeros, top - zeros
    for a in range(0, len(corrected), BLOCK):
        b = min(a + BLOCK, len(corrected))
        for i in range(a, b):
            g, q, d = groups[i], corrected[i], difference[i]
            if i > a:
                add_up(feedback[i, a:i], difference[a:i], heard)
                q -= heard
            q /= scales[g]
            rint(q, out=q)
            xp.maximum(q, low[g], out=q)  # np.clip costs several times as much on a short row
            xp.minimum(q, high[g], out=q)
            if clip is not None:
                clip(i, q)
            xp.multiply(q, scales[g], out=d)
            d -= weights[i]
        if b < len(corrected):
            corrected[b:] -= feedback[b:, a:b] @ difference[a:b]


def _clip(sums: RunningSums, rows: npt.NDArray[np.intp], groups: npt.NDArray[np.intp], offsets: Array, i: int, codes: Array) -> None:
    """Clip the codes of a panel's row to what still fits the accumulator."""
    sums.clip(rows[i], codes, offsets[groups[i]])


def under_budget(
    weights: Array, target: Array, unconstrained: QuantizedWeight, gram: Gram, feedback: Feedback | RowFeedback, budget: Budget
) -> tuple[QuantizedWeight, int]:
    """Solve the columns whose codes could overflow again, under the budget.

    A larger scale makes codes smaller: it costs resolution everywhere and saves clipping. So each column takes the best, by its layer
    error, of a ladder of scales from the unconstrained one to the one that needs no clipping at all, with the weights as they are and with
    the weights projected on the budget first (the soft threshold that AXE starts from, A2Q+'s projection). Where the grid has a zero
    point, zero-centred columns (A2Q+) are candidates too.

    Args:
        weights: ``(K, N)`` to quantize.
        target: ``(K, N)`` reference of the layer error.
        unconstrained: The solution without a budget, one grid a column.
        gram: ``(K, K)`` the damped matrix of the error.
        feedback: Of the same matrix.
        budget: The constraint.

    Returns:
        The weight, and the number of columns that were solved again.
    """
    spec, k = unconstrained.spec, len(weights)
    low, high = budget.column_extremes(unconstrained.raw())
    overflowing = np.flatnonzero((low < budget.low) | (high > budget.high))
    codes, scales, zeros = unconstrained.codes.copy(), unconstrained.scales.copy(), unconstrained.zero_points.copy()
    grid = Grid.of(unconstrained)
    overflowing = overflowing[np.argsort(-excess(weights[:, overflowing], grid.columns(overflowing), budget), kind="stable")]
    at = 0
    while at < len(overflowing):
        rungs = rungs_of(excess(weights[:, overflowing[at : at + 1]], grid.columns(overflowing[at : at + 1]), budget)[0])
        c = overflowing[at : at + max(1, _LADDER_BYTES // (16 * k * rungs))]  # columns of like excess, so that few rungs serve them
        at += len(c)
        best = np.full(len(c), np.inf)
        for ladder, start in _ladder(weights[:, c], grid.columns(c), budget, rungs):
            candidate = solve(start, feedback, ladder, budget)
            error = column_errors(candidate.dequantize() - np.tile(target[:, c], rungs), gram).reshape(rungs, -1)
            for i in range(rungs):
                better = error[i] < best
                chosen = i * len(c) + np.flatnonzero(better)
                best[better] = error[i][better]
                codes[:, c[better]] = candidate.codes[:, chosen]
                scales[:, c[better]] = candidate.scales[:, chosen]
                zeros[:, c[better]] = candidate.zero_points[:, chosen]
    return QuantizedWeight(codes, scales, zeros, spec), len(overflowing)


def excess(weights: Array, grid: Grid, budget: Budget) -> Array:
    """Return the factor on every column's scale with which its unrounded codes fit, at least 1, ``(N,)``."""
    low, high = budget.column_extremes(weights / grid.scales + (grid.zeros - grid.spec.middle))
    return np.maximum(np.maximum(high / budget.high, low / budget.low), 1)


def rungs_of(factor: float) -> int:
    """Return how many scales are tried for a column that fits its accumulator with a scale ``factor`` times as large."""
    return int(np.clip(np.ceil(np.log(factor) / np.log(_RATIO)) + 1, 2, _MOST_RUNGS))


def _ladder(weights: Array, grid: Grid, budget: Budget, rungs: int) -> Iterator[tuple[Grid, Array]]:
    """Yield grids and weights to try, all rungs side by side: unchanged, then projected; with the grid's zero, then centred."""
    spec, k = grid.spec, len(weights)
    zeros = [grid.zeros]
    if not spec.symmetric:
        zeros.append(np.clip(np.rint(spec.middle - weights.mean(axis=0) / grid.scales), 0, spec.top).astype(np.float32))
    for zero in zeros:
        factors = excess(weights, replace(grid, zeros=zero), budget) ** np.linspace(0, 1, rungs)[:, None]
        scales = stored((grid.scales * factors).reshape(1, -1), spec)
        shift = np.rint(((zero - spec.middle) / factors).reshape(1, -1)).astype(np.float32)
        ladder = Grid(scales, shift + spec.middle, spec, k)
        repeated = np.tile(weights, rungs)
        yield ladder, repeated
        yield ladder, ((project(repeated / scales + shift, budget) - shift) * scales).astype(np.float32)


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer. Layers that share statistics share the factorization."""
    if problem.stats.is_data_free and problem.budget is None:  # nothing to feed forward
        return rtn.run(problem, options)
    damping = problem.damping(options)
    act_order = options.act_order is not False
    feedback, weights = prepared(problem, damping, act_order), problem.stats.backend.array(problem.weights)
    weight = solve(weights, feedback, choose(weights, problem.spec, problem.gram.diagonal(), options.beta)).host()
    notes = feedback.notes(damping)
    if problem.budget is None:
        return Solution(weight, notes)
    gram = problem.damped_gram(damping)
    constrained, columns = under_budget(problem.weights, problem.target, weight, gram, feedback, problem.budget)
    return Solution(constrained, notes, {"columns_constrained": columns})


QUANTIZER = Quantizer("gptq", "round with error feedback", run, "supported", batched="gram", on_device=True)
