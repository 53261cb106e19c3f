"""Rounding rows one after the other, each with what the errors of those before it do to it.

The loops of `magr_onnx.core.quantizers.gptq`, `comq` and `grid_refinement`. A panel ``(p, N)`` is done `WIDTH` output channels at a time;
of these, `BLOCK` rows hear of each other one by one, and the rows after them of all of these at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.compiled.jit import compiled

WIDTH = 128  # output channels at a time
BLOCK = 8
NARROW = 32  # output channels at a time where several grids are tried

Array = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]


@compiled
def _hear(rows: Array, weights: Array, moved: Array, first: int, last: int, start: int, stop: int, width: int) -> None:
    """Subtract ``weights[start:stop, first:last] @ moved[first:last]`` from ``rows[start:stop]``, ``width`` columns."""
    for j in range(start, stop):
        row = rows[j]
        i = first
        while i + 4 <= last:
            a, b, c, d = weights[j, i], weights[j, i + 1], weights[j, i + 2], weights[j, i + 3]
            p, q, r, s = moved[i], moved[i + 1], moved[i + 2], moved[i + 3]
            for x in range(width):
                row[x] -= a * p[x] + b * q[x] + c * r[x] + d * s[x]
            i += 4
        while i < last:
            a, p = weights[j, i], moved[i]
            for x in range(width):
                row[x] -= a * p[x]
            i += 1


@compiled
def round_panel(
    weights: Array,
    corrected: Array,
    feedback: Array,
    groups: Integers,
    scales: Array,
    zeros: Array,
    top: int,
    difference: Array,
) -> None:
    """Round a panel for GPTQ.

    Args:
        weights: ``W (p, N)``.
        corrected: ``(p, N)``: less the weighted errors of the rows before the panel; receives the codes above the zero point.
        feedback: ``(p, p)``: row ``i`` weighs the errors of the rows before it.
        groups: Group of every row ``(p,)``.
        scales: ``(G, N)``.
        zeros: ``(G, N)`` float32.
        top: The largest code.
        difference: ``W_hat - W (p, N)``, written.
    """
    p, n = corrected.shape
    rows, moved = np.empty((p, WIDTH), np.float32), np.empty((p, WIDTH), np.float32)
    for at in range(0, n, WIDTH):
        width = min(WIDTH, n - at)
        for i in range(p):
            for x in range(width):
                rows[i, x] = corrected[i, at + x]
        for a in range(0, p, BLOCK):
            b = min(a + BLOCK, p)
            for i in range(a, b):
                _hear(rows, feedback, moved, a, i, i, i + 1, width)
                g, row, error = groups[i], rows[i], moved[i]
                for x in range(width):
                    z = zeros[g, at + x]
                    code = min(max(np.rint(row[x] / scales[g, at + x]), -z), np.float32(top) - z)
                    row[x] = code
                    error[x] = code * scales[g, at + x] - weights[i, at + x]
            _hear(rows, feedback, moved, a, b, b, p, width)
        for i in range(p):
            for x in range(width):
                corrected[i, at + x] = rows[i, x]
                difference[i, at + x] = moved[i, x]


@compiled
def move_rows(
    local: Array, residual: Array, codes: Array, scale: Array, low: Array, high: Array, change: Array, sums: Array, refit: bool
) -> None:
    """Move the rows of a piece of a layer to their least error, one after the other.

    Args:
        local: ``H (p, p)`` of these rows.
        residual: ``R (p, N)``, brought up to date in place.
        codes: Codes above the zero point ``(p, N)``, moved in place.
        scale: Their scales ``(N,)``.
        low: Least code above the zero point ``(N,)``.
        high: Greatest code above the zero point ``(N,)``.
        change: What is added to the weights ``(p, N)``, written.
        sums: ``(3, N)`` float64, written: by how much E falls; with ``refit``, slope and curvature of E in the scale.
        refit: Whether the scale will be refitted.
    """
    p, n = residual.shape
    rows, moved = np.empty((p, WIDTH), np.float32), np.empty((p, WIDTH), np.float32)
    before, held = np.empty((p, WIDTH), np.float32), np.empty((p, WIDTH), np.float32)
    for at in range(0, n, WIDTH):
        width = min(WIDTH, n - at)
        for i in range(p):
            for x in range(width):
                before[i, x] = rows[i, x] = residual[i, at + x]
        for a in range(0, p, BLOCK):
            b = min(a + BLOCK, p)
            for i in range(a, b):
                _hear(rows, local, moved, a, i, i, i + 1, width)
                row, step, h = rows[i], moved[i], local[i, i]
                for x in range(width):
                    s, old = scale[at + x], codes[i, at + x]
                    code = old
                    if h > 0:
                        code = min(max(np.rint(old + row[x] / max(h * s, np.float32(1.1754944e-38))), low[at + x]), high[at + x])
                    step[x] = (code - old) * s
                    held[i, x] = code
            _hear(rows, local, moved, a, b, b, p, width)
        for i in range(p):  # the rows so far heard of those before them only
            _hear(rows, local, moved, i, p, i, i + 1, width)
        for x in range(width):
            sums[0, at + x] = 0
        for i in range(p):
            for x in range(width):
                sums[0, at + x] += np.float64(moved[i, x]) * (before[i, x] + rows[i, x])
                residual[i, at + x] = rows[i, x]
                change[i, at + x] = moved[i, x]
                codes[i, at + x] = held[i, x]
        if refit:
            for x in range(width):
                sums[1, at + x] = 0
                sums[2, at + x] = 0
            for i in range(p):
                for x in range(width):
                    before[i, x] = 0
                    sums[1, at + x] += np.float64(held[i, x]) * rows[i, x]
            _hear(before, local, held, 0, p, 0, p, width)
            for i in range(p):
                for x in range(width):
                    sums[2, at + x] -= np.float64(held[i, x]) * before[i, x]


@compiled
def best_grids(
    wanted: Array, feedback: Array, power: Array, scales: Array, zeros: Array, top: int, loss: Array, best: Integers, codes: Array
) -> None:
    """Round a group on each of several grids, with error feedback, and keep the one of least error for every output channel.

    Args:
        wanted: Weights without any error ``(g, N)``.
        feedback: ``(g, g)``: row ``i`` weighs the errors of the rows before it.
        power: ``R_ii^2 (g,)`` of the factor ``H = R R^T`` of the group: E is the sum of the squared errors of the rounding, weighted by it.
        scales: ``(S, N)``.
        zeros: ``(S, N)`` float32.
        top: The largest code.
        loss: E of the present codes ``(N,)`` float64; receives the least.
        best: ``(N,)``, receives the best grid; -1 for none that is better.
        codes: ``(g, N)``, receives its codes above the zero point.
    """
    p, n = wanted.shape
    rows, errors, chosen = np.empty((p, NARROW), np.float32), np.empty((p, NARROW), np.float32), np.empty((p, NARROW), np.float32)
    total, inverse, better = np.empty(NARROW, np.float64), np.empty(NARROW, np.float32), np.empty(NARROW, np.bool_)
    for at in range(0, n, NARROW):
        width = min(NARROW, n - at)
        for x in range(width):
            best[at + x] = -1
        for g in range(len(scales)):
            scale, zero = scales[g], zeros[g]
            for x in range(width):
                total[x] = 0
                inverse[x] = np.float32(1) / scale[at + x]
            for i in range(p):
                row = rows[i]
                for x in range(width):
                    row[x] = wanted[i, at + x] * inverse[x]
                    errors[i, x] = row[x]
                _hear(rows, feedback, errors, 0, i, i, i + 1, width)
                for x in range(width):
                    z = zero[at + x]
                    code = min(max(np.rint(row[x]), -z), np.float32(top) - z)
                    rounding = (code - row[x]) * scale[at + x]
                    total[x] += power[i] * rounding * rounding
                    errors[i, x] = code - errors[i, x]
                    row[x] = code
            for x in range(width):
                better[x] = total[x] < loss[at + x]
                if better[x]:
                    loss[at + x] = total[x]
                    best[at + x] = g
            for i in range(p):
                for x in range(width):
                    chosen[i, x] = rows[i, x] if better[x] else chosen[i, x]
        for i in range(p):
            for x in range(width):
                codes[i, at + x] = chosen[i, x]
