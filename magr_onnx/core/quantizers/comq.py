"""COMQ (Zhang et al., arXiv 2403.07134): coordinate descent on the layer error, in Gram form.

Minimises ``E = tr((W_hat - W0)^T H (W_hat - W0))`` over codes AND scales, from any start. With ``R = H (W0 - W_hat)``, row ``k`` of
every column moves to the grid point nearest to ``w_hat_k + R_k / H_kk``, which is the exact minimiser over that row. Scales are
refitted in closed form: per column for one grid a column, by the small normal equations over a column's groups otherwise.
Codes and scales never raise E, so this refines any quantizer; no inverse of H is needed.

Deviations from the paper:

- All columns visit rows in one order, descending ``sqrt(H_kk) ||w_k||``, not one greedy order per column. The update of R then is a
  matrix product per block of rows instead of K rank-one updates of the whole of R.
- A refitted scale is rounded to the type it is stored in, and kept only in columns where the stored scale lowers E.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from magr_onnx.core.grid import Grid, blocks, stored
from magr_onnx.core.overflow.accumulator import Budget, RunningSums
from magr_onnx.core.quantizers import diagonal, gptq
from magr_onnx.core.quantizers.descent import Refined, by_columns, descend
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight, column_parts

BLOCK = 64
TINY = np.finfo(np.float32).tiny
_NORMAL_BYTES = 64 << 20  # bound on one batch of normal equations

State = tuple[QuantizedWeight, Array]
"""A weight, and its residual ``H (W0 - W_hat)``."""


def refine(
    target: Array,
    start: QuantizedWeight,
    gram: Array,
    *,
    sweeps: int = 8,
    rescale: bool = True,
    tolerance: float = 2e-3,
    budget: Budget | None = None,
) -> Refined:
    """Lower the layer error of ``start`` against ``target (K, N)`` under ``gram (K, K)``.

    One sweep costs ``2 K^2 N`` FLOPs in matrix products; a scale refit costs as much again.

    Args:
        target: ``W0 (K, N)``, what the layer should compute.
        start: A quantized weight to begin from.
        gram: ``H (K, K)``.
        sweeps: Most sweeps over all rows.
        rescale: Refit the scales after every sweep but the last.
        tolerance: Stop when a sweep lowers E by less than this fraction.
        budget: Codes of ``start`` fit it, and every new code must: each row moves to the best code that still fits its tile, so E
            still never rises. A refitted scale changes no code.
    """
    if len(parts := column_parts(*target.shape)) > 1:
        gram = np.ascontiguousarray(gram, dtype=np.float32)
        options: dict[str, Any] = {"sweeps": sweeps, "rescale": rescale, "tolerance": tolerance, "budget": budget}
        return by_columns(parts, target, start, lambda part, weight: refine(np.ascontiguousarray(part), weight, gram, **options))
    h = np.ascontiguousarray(gram, dtype=np.float32)
    w0 = target.astype(np.float32, copy=False)

    def sweep(state: State, last: bool) -> State:
        weight, residual = sweep_once(w0, state[0], h, state[1], budget)
        return refit_scales(w0, weight, h, residual) if rescale and not last else (weight, residual)

    begin: State = start, h @ (w0 - start.dequantize())
    (weight, _), errors = descend(begin, sweep, lambda state: _energy(w0, *state), sweeps, tolerance)
    return Refined(weight, errors)


def _energy(target: Array, weight: QuantizedWeight, residual: Array) -> float:
    return float(np.einsum("kn,kn->", target - weight.dequantize(), residual, dtype=np.float64))


def sweep_once(target: Array, weight: QuantizedWeight, gram: Array, residual: Array, budget: Budget | None) -> State:
    """Run one pass of exact coordinate minimisation over all rows."""
    grid = Grid.of(weight)
    k = len(target)
    diagonal = gram.diagonal()
    order = np.argsort(-np.sqrt(np.maximum(diagonal, 0)) * np.linalg.norm(target, axis=1), kind="stable")
    order = order[diagonal[order] > 0]
    groups = grid.spec.group_of_row(k)
    top = np.float32(grid.spec.top)
    codes = weight.codes.astype(np.float32)
    middle = np.float32(grid.spec.middle)
    sums = None if budget is None else RunningSums(budget, k, codes.shape[1], weight.raw())
    residual = residual.copy()
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        local = gram[np.ix_(rows, rows)]
        pending = residual[rows]
        change = np.empty_like(pending)
        scales = grid.scales[groups[rows]]
        curvature = np.maximum(diagonal[rows, None] * scales, TINY)  # the product of a faint input and a small scale may be 0
        for i, k_i in enumerate(rows):
            q = pending[i] / curvature[i]
            q += codes[k_i]
            np.rint(q, out=q)
            np.maximum(q, 0, out=q)  # np.clip costs several times as much on a short row
            np.minimum(q, top, out=q)
            if sums is not None:
                sums.take(k_i, codes[k_i] - middle, sign=-1)
                sums.clip(k_i, q, middle)
            np.subtract(q, codes[k_i], out=change[i])
            change[i] *= scales[i]
            codes[k_i] = q
            if i + 1 < len(rows):
                pending[i + 1 :] -= local[i + 1 :, i, None] * change[i]
        residual -= gram[:, rows] @ change
    return grid.weight(codes), residual


def refit_scales(target: Array, weight: QuantizedWeight, gram: Array, residual: Array) -> State:
    """Refit scales by least squares for fixed codes: ``A s = b`` per column, ``A = C^T H C``, ``b = C^T H w0``.

    C holds the column's centred codes ``Q - z``, a group in each of its columns. Solved as a correction to the present
    scales, ``A ds = C^T R``, with a trace of damping for groups whose codes are all at the zero point.
    """
    spec = weight.spec
    k, n = weight.codes.shape
    groups, rows = spec.groups(k), spec.rows(k)
    grid = Grid.of(weight)
    centred = weight.codes.astype(np.float32) - grid.zeros[spec.group_of_row(k)]
    scales = weight.scales.copy()
    step = max(1, min(n, _NORMAL_BYTES // (8 * groups * groups)))
    for at in range(0, n, step):
        c = slice(at, min(at + step, n))
        codes = centred[:, c]
        width = codes.shape[1]
        normal = np.empty((width, groups, groups))
        for g in range(groups):
            s = slice(g * rows, min((g + 1) * rows, k))
            product = gram[:, s] @ codes[s]
            normal[:, :, g] = blocks(product * codes, spec).sum(axis=1, dtype=np.float64).T
        right = blocks(residual[:, c] * codes, spec).sum(axis=1, dtype=np.float64).T
        trace = np.trace(normal, axis1=1, axis2=2)[:, None, None]
        normal += (1e-6 * trace / groups + 1e-30) * np.eye(groups)
        change = np.linalg.solve(normal, right[..., None])[..., 0]
        proposal = scales[:, c] + change.T
        scales[:, c] = stored(np.where(proposal > 0, proposal, scales[:, c]), spec)
    proposed = QuantizedWeight(weight.codes, scales, weight.zero_points, spec)
    new_residual = gram @ (target - proposed.dequantize())
    before = np.einsum("kn,kn->n", target - weight.dequantize(), residual, dtype=np.float64)
    after = np.einsum("kn,kn->n", target - proposed.dequantize(), new_residual, dtype=np.float64)
    keep = after < before
    result = QuantizedWeight(weight.codes, np.where(keep, scales, weight.scales), weight.zero_points, spec)
    return result, np.where(keep, new_residual, residual)


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer: GPTQ, then sweeps under the same damped matrix."""
    start = gptq.run(problem, options)
    if problem.stats.is_data_free and problem.budget is None:
        stats = problem.stats
        refined = diagonal.refine(problem.target, start.weight, options.sweeps, options.rescale, stats.common_mean, stats.taps)
    else:
        gram = problem.damped_gram(problem.damping(options))
        refined = refine(problem.target, start.weight, gram, sweeps=options.sweeps, rescale=options.rescale, budget=problem.budget)
    figures = {"sweeps": refined.sweeps, "error_start": refined.errors[0], "error": refined.errors[-1]} | start.figures
    return Solution(refined.weight, start.notes, figures, refined.errors)


QUANTIZER = Quantizer("comq", "GPTQ, refined by coordinate descent", run, "supported", batched="gram")
