"""Joint refit of a group's scale, zero point and codes, with the rest of its column fixed.

For fixed codes the best zero point is nearly always the present one (it is an integer, and the codes were rounded with it), so a closed
form over codes would never move it. Here every group is solved again: the weights that compensate for the errors of all other
groups, ``t = w_hat + H_gg^-1 R_g``, are quantized on each of a ladder of grids by GPTQ inside the group, and a column takes the grid that
lowers its error most. Groups are visited in sequence, and the error never rises.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from magr_onnx.core import backends, compiled
from magr_onnx.core.gram import Gram
from magr_onnx.core.grid import ladder
from magr_onnx.core.linalg import cholesky
from magr_onnx.core.quantizers.blocked import PANEL, Piece, visit
from magr_onnx.core.quantizers.comq import Descent
from magr_onnx.core.types import Array, QuantizedWeight

SHRINKS = (1.1, 1.0, 0.93, 0.86, 0.79, 0.72)
MOST_ROWS = 256  # of a group; above it scales alone are refitted
_BLOCK = 8  # rows of a group that are rounded before the others hear of it
_VALUES = 1 << 17  # of all candidates of a group processed at a time, which stay in cache


class Regridded(NamedTuple):
    """A weight on other grids, and by how much its layer error is lower."""

    weight: QuantizedWeight
    gain: float


def regrid(target: Array, weight: QuantizedWeight, gram: Gram) -> Regridded:
    """Run one pass over all groups of ``weight`` towards ``target (K, N)`` under ``gram (K, K)`` float32, positive definite.

    ``2 K^2 N`` FLOPs in matrix products, and for every shrink factor as much element-wise work as one rounding of the layer.
    """
    b = backends.of(target)
    by_row = not compiled.serves(*target.shape, backend=b)
    parts = compiled.by_columns(
        lambda c: _regrid_columns(b.contiguous(target[:, c]), weight.columns(c), gram, by_row), *target.shape, backend=b
    )
    if len(parts) == 1:
        return parts[0]
    return Regridded(QuantizedWeight.side_by_side([part.weight for part in parts]), sum(part.gain for part in parts))


def _regrid_columns(target: Array, weight: QuantizedWeight, gram: Gram, by_row: bool) -> Regridded:
    """Do the same for the given output channels, ``by_row`` or compiled."""
    b = backends.of(target)
    rows, n = weight.spec.rows(len(target)), target.shape[1]
    state = Descent.of(target, weight, gram, most=max(PANEL, rows))
    width = max(1, b.part(_VALUES, rows * len(SHRINKS) * n) // (rows * len(SHRINKS)))

    def step(piece: Piece, local: Array, residual: Array) -> Array:
        lower = cholesky(b.xp.flip(local, axis=(0, 1)), 0.0).lower  # rounded to float32, the group may no longer be definite
        upper = b.xp.flip(lower, axis=(0, 1))
        inverse = b.xp.linalg.inv(upper)
        compensating = b.cast(inverse.T @ inverse, "float32") @ residual
        feedback = b.cast((upper / upper.diagonal()).T, "float32")  # row i weighs the errors of the rows before it
        if not by_row:
            return _regrid_compiled(state, piece, compensating, residual, np.square(np.diag(upper)).astype(np.float32), feedback)
        change: Array = b.xp.empty_like(residual)
        for at in range(0, n, width):
            c = slice(at, min(at + width, n))
            change[:, c] = _regrid(state, piece, c, compensating[:, c], residual[:, c], local, feedback)
        return change

    visit(state.arranged, gram, state.difference, step)
    return Regridded(state.weight(), -state.error)


def _regrid_compiled(state: Descent, piece: Piece, compensating: Array, residual: Array, power: Array, feedback: Array) -> Array:
    """Do what `_regrid` does, for all columns, in a compiled loop."""
    from magr_onnx.core.compiled.rounding import best_grids

    g, spec = piece.group, state.spec
    before = state.scales[g] * state.codes[piece.rows]
    wanted = before + compensating
    scales, zeros = ladder(wanted, spec, SHRINKS)
    present = np.einsum("kn,kn->n", compensating, residual, dtype=np.float64)
    loss, best, codes = present.copy(), np.empty(len(present), np.intp), np.empty_like(wanted)
    best_grids(wanted, np.ascontiguousarray(feedback), power, scales, zeros, spec.top, loss, best, codes)
    columns = np.flatnonzero(best >= 0)
    chosen = best[columns]
    state.scales[g, columns], state.zeros[g, columns] = scales[chosen, columns], zeros[chosen, columns]
    state.codes[piece.rows[:, None], columns] = codes[:, columns]
    state.error -= float((present - loss).sum())
    change: Array = state.scales[g] * state.codes[piece.rows] - before
    return change


def _regrid(state: Descent, piece: Piece, c: slice, compensating: Array, residual: Array, local: Array, feedback: Array) -> Array:
    """Give the columns ``c`` of a piece their best grid and codes; return the change of their weights ``(g, n)``."""
    g, spec, b = piece.group, state.spec, backends.of(residual)
    xp, index = b.xp, b.index(piece.rows)
    before = state.scales[g, c] * state.codes[index, c]
    rows, n = before.shape
    wanted = before + compensating
    scales, zeros = ladder(wanted, spec, SHRINKS)
    codes = wanted[:, None] / scales
    _round(codes.reshape(rows, -1), feedback, -zeros.reshape(-1), spec.top - zeros.reshape(-1))
    change = codes * scales
    change -= before[:, None]
    pull = (local @ change.reshape(rows, -1)).reshape(change.shape)
    xp.subtract(2 * residual[:, None], pull, out=pull)
    gain = xp.einsum("ksn,ksn->sn", change, pull)
    best = xp.argmax(gain, axis=0)
    better = xp.nonzero(gain[best, b.index(np.arange(n))] > 0)[0]
    best, columns = best[better], c.start + better
    state.scales[g, columns], state.zeros[g, columns] = scales[best, better], zeros[best, better]
    state.codes[index[:, None], columns] = codes[:, best, better]
    state.error -= float(xp.sum(gain[best, better], dtype=xp.float64))
    result: Array = xp.zeros_like(before)
    result[:, better] = change[:, best, better]
    return result


def _round(values: Array, feedback: Array, low: Array, high: Array) -> None:
    """Round ``values (g, n)``, in units of the scale, in place, every row fed back the errors of those before it."""
    b = backends.of(values)
    xp, rint, add_up = b.xp, b.rint, b.add_up
    errors = -values
    heard = xp.empty_like(low)
    for start in range(0, len(values), _BLOCK):
        end = min(start + _BLOCK, len(values))
        for i in range(start, end):
            value = values[i]
            if i > start:
                add_up(feedback[i, start:i], errors[start:i], heard)
                value -= heard
            rint(value, out=value)
            xp.maximum(value, low, out=value)
            xp.minimum(value, high, out=value)
            errors[i] += value
        if end < len(values):
            values[end:] -= feedback[end:, start:end] @ errors[start:end]
