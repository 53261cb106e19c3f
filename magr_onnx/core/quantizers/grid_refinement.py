"""Joint refit of a group's scale, zero point and codes, with the rest of its column fixed.

For fixed codes the best zero point is nearly always the present one (it is an integer, and the codes were rounded with it), so a closed
form over codes would never move it. Here every group is solved again: the weights that compensate for the errors of all other
groups, ``t = w_hat + H_gg^-1 R_g``, are quantized on each of a ladder of grids by GPTQ inside the group, and a column takes the grid of
smallest exact error. Groups are visited in sequence, and the error never rises.
"""

from __future__ import annotations

import numpy as np

from magr_onnx.core.grid import ladder
from magr_onnx.core.linalg import cholesky
from magr_onnx.core.types import Array, QuantizedWeight

SHRINKS = (1.1, 1.0, 0.93, 0.86, 0.79, 0.72)
MOST_ROWS = 256  # of a group; above it scales alone are refitted


def regrid(target: Array, weight: QuantizedWeight, gram: Array) -> QuantizedWeight:
    """Run one pass over all groups of ``weight`` towards ``target (K, N)`` under ``gram (K, K)`` float32, positive definite.

    ``2 K^2 N`` FLOPs in matrix products, and for every shrink factor as much element-wise work as one rounding of the layer.
    """
    spec = weight.spec
    k = len(target)
    rows, top = spec.rows(k), np.float32(spec.top)
    codes, scales, zeros = weight.codes.copy(), weight.scales.copy(), weight.zero_points.astype(np.float32)
    dequantized = weight.dequantize()
    residual = gram @ (target - dequantized)
    for g in range(spec.groups(k)):
        s = slice(g * rows, min((g + 1) * rows, k))
        upper = cholesky(gram[s, s][::-1, ::-1], 0.0).lower[::-1, ::-1]  # rounded to float32, the group may no longer be definite
        group_target = (dequantized[s] + np.linalg.solve(upper.T, np.linalg.solve(upper, residual[s]))).astype(np.float32)
        factor = (upper / np.diag(upper)).T.astype(np.float32)  # row i weighs the errors of the rows before it
        power = np.square(np.diag(upper)).astype(np.float32)
        best = _error(dequantized[s] - group_target, factor, power)
        for scale, zero in ladder(group_target, spec, SHRINKS):
            candidate = np.empty(group_target.shape, np.float32)
            difference = np.empty(group_target.shape, np.float32)
            for i in range(len(group_target)):
                corrected = group_target[i] - factor[i, :i] @ difference[:i]
                q = candidate[i]
                np.divide(corrected, scale, out=q)
                np.rint(q, out=q)
                q += zero
                np.maximum(q, 0, out=q)
                np.minimum(q, top, out=q)
                np.subtract(q, zero, out=difference[i])
                difference[i] *= scale
                difference[i] -= group_target[i]
            error = _error(difference, factor, power)
            better = error < best
            best = np.where(better, error, best)
            codes[s, better] = candidate[:, better].astype(np.uint8)
            scales[g, better], zeros[g, better] = scale[better], zero[better]
        group = (codes[s] - zeros[g]) * scales[g]
        residual -= gram[:, s] @ (group - dequantized[s])
        dequantized[s] = group
    return QuantizedWeight(codes, scales, zeros.astype(np.uint8), spec)


def _error(difference: Array, factor: Array, power: Array) -> Array:
    """Return ``d^T H d`` for every column, from the unit factor of H."""
    along = factor @ difference
    result: Array = np.einsum("k,kn,kn->n", power, along, along)
    return result
