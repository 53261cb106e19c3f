"""COMQ (Zhang et al., arXiv 2403.07134): coordinate descent on the layer error, in Gram form.

Minimises ``E = tr((W_hat - W0)^T H (W_hat - W0))`` over codes AND scales, from any start. With ``R = H (W0 - W_hat)``, row ``k`` of
every column moves to the grid point nearest to ``w_hat_k + R_k / H_kk``, which is the exact minimiser over that row. When all rows of a
group have moved, its scale does: to the exact minimiser over that scale, for these codes. Codes and scales never raise E, so this refines
any quantizer; no inverse of H is needed.

Deviations from the paper:

- All columns visit rows in one order, group by group in descending ``sqrt(H_kk) ||w_k||`` (`magr_onnx.core.quantizers.blocked`), not in one
  greedy order per column. The residuals then are matrix products instead of K rank-one updates.
- A refitted scale is rounded to the type it is stored in, and kept only in columns where the stored scale lowers E.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Self

import numpy as np

from magr_onnx.core import backends, compiled
from magr_onnx.core.gram import Block, Gram
from magr_onnx.core.grid import stored
from magr_onnx.core.linalg import inner
from magr_onnx.core.overflow.accumulator import Budget, RunningSums
from magr_onnx.core.quantizers import diagonal, gptq
from magr_onnx.core.quantizers.blocked import PANEL, Panel, Piece, Rows, panels, visit
from magr_onnx.core.quantizers.descent import Refined, descend, joined
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight, WeightSpec

BLOCK = 32  # rows that move one by one before the others of their group hear of it
TINY = float(np.finfo(np.float32).tiny)


def refine(
    target: Array,
    start: QuantizedWeight,
    gram: Gram,
    *,
    sweeps: int = 8,
    rescale: bool = True,
    tolerance: float = 2e-3,
    budget: Budget | None = None,
    error: float | None = None,
) -> Refined:
    """Lower the layer error of ``start`` against ``target (K, N)`` under ``gram (K, K)``.

    One sweep costs ``2 K^2 N`` FLOPs in matrix products; refitting scales of groups up to `blocked.PANEL` rows hardly more, of larger
    ones two to three times as much.

    Args:
        target: ``W0 (K, N)``, what the layer should compute.
        start: A quantized weight to begin from.
        gram: ``H (K, K)``.
        sweeps: Most sweeps over all rows.
        rescale: Refit the scales in every sweep.
        tolerance: Stop when a sweep lowers E by less than this fraction.
        budget: Codes of ``start`` fit it, and every new code must: each row moves to the best code that still fits its tile, so E
            still never rises. A refitted scale changes no code.
        error: E of ``start``, where it is known; only the trace and when to stop depend on it.
    """
    b = backends.of(target)
    h = b.single(gram)
    by_row = budget is not None or not compiled.serves(*target.shape, backend=b)

    def refine_columns(c: slice) -> Refined:
        part = b.contiguous(target[:, c])
        whole = part.shape == target.shape
        weight = start if whole else start.columns(c)
        sums = None if budget is None else RunningSums(budget, len(part), part.shape[1], weight.raw())
        begin = Descent.of(part, weight, h, sums, by_row=by_row)
        begin.error = inner(begin.difference, h @ begin.difference) if error is None or not whole else error
        state, errors = descend(begin, sweep, lambda state: state.error, sweeps, tolerance)
        return Refined(state.weight() if len(errors) > 1 else weight, errors)

    def sweep(state: Descent, last: bool) -> Descent:
        del last
        state.sweep(h, rescale)
        return state

    return joined(compiled.by_columns(refine_columns, *target.shape, backend=b))


@dataclass(slots=True, eq=False)
class Descent:
    """A weight on its way down, changed in place.

    Attributes:
        spec: The grid's specification.
        codes: Codes above the zero point ``(K, N)`` float32.
        scales: ``(G, N)``.
        zeros: ``(G, N)`` float32.
        difference: ``W0 - W_hat (K, N)`` float32.
        arranged: All rows, in the order of visits.
        sums: What still fits an accumulator; None for no constraint.
        by_row: Whether rows are moved one by one; else in compiled loops.
        error: E, less what it was at the start unless the caller has set it.
    """

    spec: WeightSpec
    codes: Array
    scales: Array
    zeros: Array
    difference: Array
    arranged: list[Panel]
    sums: RunningSums | None = None
    by_row: bool = True
    error: float = field(default=0.0)

    @classmethod
    def of(
        cls, target: Array, weight: QuantizedWeight, gram: Gram, sums: RunningSums | None = None, most: int = PANEL, by_row: bool = True
    ) -> Self:
        """Begin with ``weight``, towards ``target (K, N)`` under ``gram (K, K)``; at ``most`` so many rows are visited together."""
        b, spec = backends.of(target), weight.spec
        zeros, rows = b.cast(weight.zero_points, "float32"), b.index(spec.group_of_row(len(target)))
        codes = b.cast(weight.codes, "float32")
        codes -= zeros[rows]
        difference = b.cast(target, "float32") - weight.scales[rows] * codes
        importance = b.xp.sqrt(b.xp.maximum(gram.diagonal(), 0)) * b.xp.linalg.norm(target, axis=1)
        return cls(spec, codes, b.copy(weight.scales), zeros, difference, panels(b.host(importance), spec, most), sums, by_row)

    def weight(self) -> QuantizedWeight:
        """Return the weight as it is now."""
        b = backends.of(self.codes)
        codes = self.codes + self.zeros[b.index(self.spec.group_of_row(len(self.codes)))]
        return QuantizedWeight(b.cast(codes, "uint8"), b.copy(self.scales), b.cast(self.zeros, "uint8"), self.spec)

    def sweep(self, gram: Gram, rescale: bool) -> None:
        """Move every row once, to the least E; with ``rescale``, every scale too. ``gram (K, K)`` is float32."""
        k, b = len(self.codes), backends.of(self.codes)
        size = self.spec.rows(k)
        together = rescale and size <= PANEL

        def step(piece: Piece, local: Array, residual: Array) -> Array:
            before = b.copy(residual)
            change = self._move(piece, local, residual)
            b.xp.subtract(before, local @ change, out=residual)
            before += residual
            self.error -= inner(change, before)
            if together:
                change += self._refit(piece.group, self.codes[b.index(piece.rows)], local, residual)
            return change

        visit(self.arranged, gram, self.difference, step if self.by_row else partial(self._step, together))
        if rescale and not together:
            residual = gram @ self.difference
            for g in range(self.spec.groups(k)):
                s = slice(g * size, min((g + 1) * size, k))
                change = self._refit(g, self.codes[s], gram[s, s], residual[s])
                self.difference[s] -= change
                if s.stop < k:
                    residual[s.stop :] -= gram[s.stop :, s] @ change

    def _step(self, together: bool, piece: Piece, local: Array, residual: Array) -> Array:
        """Move the rows of a piece in a compiled loop; with ``together``, refit its scale. Return the change of their weights."""
        from magr_onnx.core.compiled.rounding import move_rows

        codes, scale, zero = self.codes[piece.rows], self.scales[piece.group], self.zeros[piece.group]
        change, sums = np.empty_like(codes), np.empty((3, codes.shape[1]))
        move_rows(np.ascontiguousarray(local), residual, codes, scale, -zero, np.float32(self.spec.top) - zero, change, sums, together)
        self.codes[piece.rows] = codes
        self.error -= float(sums[0].sum())
        if together:
            change += codes * self._rescale(piece.group, *sums[1:].astype(np.float32))
        return change

    def _move(self, piece: Piece, local: Array, residual: Array) -> Array:
        """Move the rows of a piece; return the change of their weights. What is left of ``residual`` has no meaning."""
        b = backends.of(residual)
        rows = b.index(piece.rows)
        old = self.codes[rows]
        change: Array = b.xp.empty_like(old)
        scale, zero = self.scales[piece.group], self.zeros[piece.group]
        low, high = -zero, self.spec.top - zero
        for start in range(0, len(old), BLOCK):
            s = slice(start, min(start + BLOCK, len(old)))
            h = local[s, s]
            diagonal = h.diagonal()[:, None]
            wanted = residual[s] / b.xp.maximum(diagonal * scale, TINY)  # the product of a faint input and a small scale may be 0
            feedback = h / b.xp.maximum(diagonal, TINY)
            dead = diagonal[:, 0] <= 0
            wanted[dead], feedback[dead] = 0, 0
            wanted += old[s]
            if self.sums is None:
                _settle(wanted, old[s], feedback, low, high, change[s])
            else:
                self._settle_within(self.sums, piece.rows[s], wanted, old[s], feedback, change[s])
            self.codes[rows[s]] = wanted
            change[s] *= scale
            if s.stop < len(old):
                residual[s.stop :] -= local[s.stop :, s] @ change[s]
        return change

    def _settle_within(self, sums: RunningSums, rows: Rows, wanted: Array, old: Array, feedback: Array, change: Array) -> None:
        """Do what `_settle` does, with codes that fit the accumulator."""
        zero = self.zeros[rows[0] // self.spec.rows(len(self.codes))]
        offset = np.float32(self.spec.middle) - zero
        for i, row in enumerate(rows):
            sums.take(row, old[i] - offset, sign=-1)
            new = wanted[i]
            new -= feedback[i, :i] @ change[:i]
            np.rint(new, out=new)
            np.clip(new, -zero, self.spec.top - zero, out=new)
            sums.clip(row, new, offset)
            np.subtract(new, old[i], out=change[i])

    def _refit(self, group: int, codes: Array, local: Array | Block, residual: Array) -> Array:
        """Refit the scale of a group to the least E for its ``codes (g, N)`` and ``residual (g, N)``; return the change of its weights."""
        einsum = backends.of(codes).xp.einsum
        step = self._rescale(group, einsum("kn,kn->n", codes, residual), einsum("kn,kn->n", codes, local @ codes))
        change: Array = codes * step
        return change

    def _rescale(self, group: int, slope: Array, curvature: Array) -> Array:
        """Refit the scale of a group to the least E, of this slope and curvature ``(N,)``; return its change ``(N,)``."""
        b = backends.of(slope)
        xp = b.xp
        scale, some = b.copy(self.scales[group]), curvature > 0
        proposal = scale + slope / xp.where(some, curvature, 1)
        proposal = stored(xp.where(some & (proposal > 0), proposal, scale), self.spec)
        step = proposal - scale
        gain = step * (2 * slope - step * curvature)
        self.scales[group] = xp.where(gain > 0, proposal, scale)
        self.error -= float(xp.sum(xp.maximum(gain, 0), dtype=xp.float64))
        change: Array = self.scales[group] - scale
        return change


def _settle(wanted: Array, old: Array, feedback: Array, low: Array, high: Array, change: Array) -> None:
    """Round the rows of ``wanted (b, N)``, in units of the scale, one after the other, in place.

    Each hears of the ``change`` of those before it: row ``i`` of ``feedback (b, b)`` weighs them.
    """
    b = backends.of(wanted)
    xp, rint, add_up = b.xp, b.rint, b.add_up
    heard = xp.empty_like(low)
    for i, (new, before, moved) in enumerate(zip(wanted, old, change, strict=True)):
        if i:
            add_up(feedback[i, :i], change[:i], heard)
            xp.subtract(new, heard, out=new)
        rint(new, out=new)
        xp.maximum(new, low, out=new)  # np.clip costs several times as much on a short row
        xp.minimum(new, high, out=new)
        xp.subtract(new, before, out=moved)


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer: GPTQ, then sweeps under the same damped matrix."""
    start = gptq.run(problem, options)
    if problem.stats.is_data_free and problem.budget is None:
        stats = problem.stats
        refined = diagonal.refine(problem.target, start.weight, options.sweeps, options.rescale, stats.common_mean, stats.taps)
    else:
        b, gram = problem.stats.backend, problem.damped_gram(problem.damping(options))
        target, begin = b.array(problem.target), start.weight.on(b)
        refined = refine(target, begin, gram, sweeps=options.sweeps, rescale=options.rescale, budget=problem.budget)
    figures = {"sweeps": refined.sweeps, "error_start": refined.errors[0], "error": refined.errors[-1]} | start.figures
    return Solution(refined.weight.host(), start.notes, figures, refined.errors)


QUANTIZER = Quantizer("comq", "GPTQ, refined by coordinate descent", run, "supported", batched="gram", on_device=True)
