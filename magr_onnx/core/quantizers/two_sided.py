"""Rounding under a two-sided Hessian: errors of different outputs cancel where the model is sensitive to them.

The error of a layer matters as far as it changes the outputs of the model. With ``M (N, N)`` the second moments of gradients at the
layer's outputs (`magr_onnx.runtime.calibration.fisher`), the Fisher information of the weights is about ``H (x) M`` (K-FAC; Martens and
Grosse, arXiv 1503.05671), and

    E = tr(M D^T H D),        D = W_hat - W

approximates the increase of the model's loss. Other methods have M = I: they treat every output by itself. This one follows
YAQA (Tseng et al., arXiv 2505.22988): GPTQ over blocks of columns, each block rounded towards weights that compensate for
the errors of the blocks before (the LDL form, in M as GPTQ has it in H), then coordinate descent and scale refits by block, towards

    W_J - (D M_:,J - D_J diag(M_JJ)) / diag(M_JJ).

Deviations from YAQA: couplings inside a block of columns count only in the sweeps, and a block's new codes are kept only if E falls.
M is damped by its own mean diagonal as well as by its diagonal: otherwise an output of nearly zero gradient would take
errors beyond the range where a second-order model holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from magr_onnx.core.gram import Gram
from magr_onnx.core.grid import Grid
from magr_onnx.core.quantizers import comq, gptq
from magr_onnx.core.quantizers.descent import Refined, descend
from magr_onnx.core.quantizers.row_feedback import RowFeedback
from magr_onnx.core.types import Array, QuantizedWeight

BLOCKS = 16
DAMPING = 0.3

Blocks = Sequence[npt.NDArray[np.intp]]


def damped_outputs(outputs: Array, damping: float = DAMPING) -> Array:
    """Return ``M (N, N)``, damped and scaled to a mean diagonal of 1."""
    mean = float(outputs.diagonal().mean())
    m = outputs / mean if mean > 0 else np.eye(len(outputs))
    m[np.diag_indices(len(m))] += damping * (0.5 * m.diagonal() + 1)
    result: Array = m / m.diagonal().mean()
    return result


def energy(difference: Array, gram: Gram, outputs: Array) -> float:
    """Return ``tr(M D^T H D)`` of ``D (K, N)``."""
    return float(np.einsum("kn,kn->", gram @ difference, difference @ outputs, dtype=np.float64))


def blocks_of(outputs: Array) -> Blocks:
    """Split the columns into `BLOCKS` blocks, in descending power."""
    order = np.argsort(-outputs.diagonal(), kind="stable")
    return [part for part in np.array_split(order, BLOCKS) if len(part)]


def solve(weights: Array, feedback: gptq.Feedback | RowFeedback, grid: Grid, outputs: Array, blocks: Blocks) -> QuantizedWeight:
    """Run GPTQ on ``weights (K, N)`` by blocks of columns; ``feedback`` is that of the Gram matrix. ``K^2 N + K N^2`` FLOPs."""
    order = np.concatenate(blocks)
    couplings = gptq.prepare(outputs[np.ix_(order, order)], 0.0, act_order=False).matrix
    codes = np.empty(weights.shape, np.uint8)
    difference = np.zeros(weights.shape, np.float32)  # columns in the order of the blocks
    at = 0
    for c in blocks:
        target = weights[:, c] - difference[:, :at] @ couplings[at : at + len(c), :at].T
        block = gptq.solve(target, feedback, grid.columns(c))
        codes[:, c] = block.codes
        difference[:, at : at + len(c)] = block.dequantize() - weights[:, c]
        at += len(c)
    return QuantizedWeight(codes, grid.scales, grid.zeros.astype(np.uint8), grid.spec)


def refine(
    target: Array, start: QuantizedWeight, gram: Gram, outputs: Array, blocks: Blocks, *, sweeps: int = 8, tolerance: float = 5e-3
) -> Refined:
    """Lower E of ``start`` by coordinate descent, a block of columns at a time; the result, and E before and after every sweep.

    Args:
        target: ``W (K, N)``.
        start: Where to begin.
        gram: ``H (K, K)``, damped.
        outputs: ``M (N, N)``, damped.
        blocks: The columns, in blocks.
        sweeps: Most sweeps over all blocks, of ``4 K^2 N + 4 K N^2`` FLOPs.
        tolerance: Stop when a sweep lowers E by less than this fraction.
    """
    h, m = gram.astype(np.float32, order="C", copy=False), outputs.astype(np.float32)
    codes, scales, zeros = start.codes.copy(), start.scales.copy(), start.zero_points.copy()
    d: Array = start.dequantize() - target

    def sweep(d: Array, last: bool) -> Array:
        for c in blocks:
            block = QuantizedWeight(codes[:, c], scales[:, c], zeros[:, c], start.spec)
            pull = d @ m[:, c]
            power = m[c, c]
            block_target = target[:, c] - (pull - d[:, c] * power) / power
            before = target[:, c] + d[:, c]
            descent = comq.Descent.of(block_target, block, h)
            descent.sweep(h, rescale=True)
            block_now = descent.weight()
            change = block_now.dequantize() - before
            gradient_change = h @ change
            linear = np.einsum("kn,kn->", pull, gradient_change, dtype=np.float64)
            quadratic = np.einsum("kn,kn->", change @ m[np.ix_(c, c)], gradient_change, dtype=np.float64)
            if 2 * linear + quadratic < 0:
                codes[:, c], scales[:, c], zeros[:, c] = block_now.codes, block_now.scales, block_now.zero_points
                d[:, c] += change
        return d

    _, errors = descend(d, sweep, lambda d: energy(d, h, m), sweeps, tolerance)
    return Refined(QuantizedWeight(codes, scales, zeros, start.spec), errors)
