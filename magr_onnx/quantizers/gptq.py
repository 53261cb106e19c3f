"""GPTQ, also known as OPTQ (Frantar et al., arXiv 2210.17323): rounding with error feedback under the layer error.

Minimises ``E = tr((W_hat - W)^T H (W_hat - W))`` one input row at a time. With ``H = R R^T``, R upper triangular, and
``D = W_hat - W``,

    E = sum_k R_kk^2 || D_k + sum_{j<k} (R_jk / R_kk) D_j ||^2,

so row ``k`` rounds ``w_k - sum_{j<k} (R_jk / R_kk) D_j``: the error of all earlier rows is fed forward. This is the LDL form of
GPTQ (Chee et al., "QuIP", arXiv 2307.13304, theorem 6, prove the codes to be the same); it needs one Cholesky factor and no
inverse of H.

Deviations from the authors' code:

- Rows of inputs that were zero in all calibration data are rounded, not set to zero: no data is no licence to delete a weight.
- With ``act_order`` (descending ``diag(H)``) groups keep their original rows (static groups), so the result needs no group index.
- Damping is relative to each input's own ``H_kk``, not to their mean (`magr_onnx.linalg.damped`). It is multiplied by ten when the
  factorization fails, and the result says what was used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.grid import Grid, choose
from magr_onnx.linalg import cholesky
from magr_onnx.quantizers.problem import Options, Problem, Solution
from magr_onnx.types import Array, QuantizedWeight, WeightSpec

BLOCK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """What GPTQ needs of H; layers that share H share it.

    Attributes:
        matrix: ``(K, K)`` float32, strictly lower: row ``k`` weighs the errors of the rows before it.
        order: ``(K,)`` the order in which rows are rounded.
        damping: Damping in use, in units of ``diag H``.
    """

    matrix: Array
    order: npt.NDArray[np.intp]
    damping: float


def prepare(gram: Array, damping: float = 0.1, act_order: bool = True) -> Feedback:
    """Factor ``gram (K, K)``; ``K^3 / 3`` FLOPs in float64.

    Raises:
        NonFiniteError: The Gram matrix cannot be factored at any damping.
    """
    k = len(gram)
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(k)
    reverse = order[::-1]
    factor = cholesky(gram[np.ix_(reverse, reverse)], damping)
    upper = factor.lower[::-1, ::-1]
    matrix = np.tril((upper / np.diag(upper)).T, -1).astype(np.float32)
    return Feedback(matrix, order, factor.damping)


def solve(weights: Array, feedback: Feedback, grid: Grid) -> QuantizedWeight:
    """Codes of ``weights (K, N)`` on ``grid``; ``K^2 N`` FLOPs, nearly all of them in matrix products."""
    k = len(weights)
    order, f = feedback.order, feedback.matrix
    groups = grid.spec.group_of_row(k)[order]
    w = weights[order].astype(np.float32, copy=False)
    inverse = 1 / grid.scales
    top = np.float32(grid.spec.top)
    difference = np.empty_like(w)
    codes = np.empty(w.shape, np.uint8)
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        wanted = w[begin:end] - f[begin:end, :begin] @ difference[:begin]
        for i in range(begin, end):
            g = groups[i]
            q = wanted[i - begin] * inverse[g]
            np.rint(q, out=q)
            q += grid.zeros[g]
            np.clip(q, 0, top, out=q)
            codes[i] = q
            q -= grid.zeros[g]
            q *= grid.scales[g]
            np.subtract(q, w[i], out=difference[i])
            if i + 1 < end:
                wanted[i + 1 - begin :] -= f[i + 1 : end, i, None] * difference[i]
    result = np.empty_like(codes)
    result[order] = codes
    return QuantizedWeight(result, grid.scales, grid.zeros.astype(np.uint8), grid.spec)


def quantize(
    weights: Array,
    gram: Array,
    spec: WeightSpec,
    *,
    beta: float | None = None,
    damping: float = 0.1,
    act_order: bool = True,
) -> QuantizedWeight:
    """GPTQ of ``weights (K, N)`` under ``gram (K, K)``; ``beta`` as in `magr_onnx.grid.choose`."""
    return solve(weights, prepare(gram, damping, act_order), choose(weights, spec, gram.diagonal(), beta))


def run(problem: Problem, options: Options) -> Solution:
    """Registry form; see `magr_onnx.quantizers`. Layers that share statistics share the factorization."""
    damping = problem.damping(options)
    key = ("gptq", problem.centred, damping, options.act_order)
    feedback = problem.stats.memo(key, lambda: prepare(problem.gram, damping, options.act_order))
    grid = choose(problem.weights, problem.spec, problem.gram.diagonal(), options.beta)
    notes: tuple[str, ...] = ()
    if feedback.damping != damping:
        notes = (f"Cholesky failed at damping {damping:g}; used {feedback.damping:g}",)
    return Solution(solve(problem.weights, feedback, grid), notes)
