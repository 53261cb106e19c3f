"""LRQ (Lee et al., arXiv 2407.11534): rounding learned through a low-rank matrix of factors; FlexRound (arXiv 2306.00317) at full rank.

Every weight is divided by a factor of its own before it is rounded, on a grid whose scales are learned, too:

    W_hat = s (clip(round(W / (s exp(S))) + z) - z),      S = A B + r + c,

with A ``(K, rank)``, B ``(rank, N)``, a column r ``(K, 1)`` and a row c ``(1, N)``; at full rank S is a matrix of parameters. The factors
only choose codes: they are not stored, and cost nothing at inference. All parameters descend together by Adam on the layer error

    E = tr((W_hat - W0)^T H (W_hat - W0)),

with the derivative of rounding taken for 1 (straight-through) where a code is not clipped. Every column keeps the codes and scales of
its least E over all iterations, so that none ends above the start.

Deviations from the papers:

- E is that of one layer over all rows, from their Gram matrix, instead of a Transformer block's on batches of two samples: there is no
  sampling noise, and so hundreds of iterations take the place of their thousands.
- Scales are learned by their logarithm, and rounded to the type they are stored in before codes are chosen.
- The start may be any quantized weight. W is then moved to the nearest value that rounds to its codes, so that S = 0 gives these.
- A layer is solved in blocks of columns that fit memory (`column_parts`), which share A within their block only.
"""

from __future__ import annotations

import numpy as np

from magr_onnx.core.adam import Adam
from magr_onnx.core.gram import Gram
from magr_onnx.core.grid import blocks, stored
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.quantizers import comq, gptq, rtn
from magr_onnx.core.quantizers.descent import Refined, joined
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight, column_parts

RANK, ITERATIONS = 32, 300
STARTS = {"rtn": rtn.run, "gptq": gptq.run, "comq": comq.run}
_RATE = 0.1  # of Adam at the beginning, from where it falls to zero, over the rank: the entries of A B move by about this much in a step
_FULL_RATE, _SCALE_RATE = 2e-3, 1e-3
_INSIDE = 0.49  # of a step from its code, where W is moved there
_MOST = 5.0  # of a logarithm


class Factors:
    """The logarithms S ``(K, N)`` of the factors, and their parameters; all zero at the start."""

    def __init__(self, shape: tuple[int, int], rank: int | None) -> None:
        k, n = shape
        self.rank = rank if rank is None else min(rank, k, n)
        if self.rank is None:
            self.full = Adam(np.zeros(shape, np.float32))
            return
        normal = np.random.default_rng(0).standard_normal((k, self.rank)).astype(np.float32)
        starts = normal, *(np.zeros(s, np.float32) for s in ((self.rank, n), (k, 1), (1, n)))
        self.a, self.b, self.row, self.column = (Adam(start) for start in starts)

    def logs(self) -> Array:
        """Return S."""
        s = self.full.values if self.rank is None else self.a.values @ self.b.values + self.row.values + self.column.values
        clipped: Array = np.clip(s, -_MOST, _MOST)
        return clipped

    def step(self, gradient: Array, share: float) -> None:
        """Take a step of all parameters, with a share of their rates, from the gradient of S ``(K, N)``."""
        if self.rank is None:
            self.full.step(gradient, _FULL_RATE * share)
            return
        rate = _RATE / self.rank * share
        of_a, of_b = gradient @ self.b.values.T, self.a.values.T @ gradient
        self.a.step(of_a, rate)
        self.b.step(of_b, rate)
        self.row.step(gradient.sum(axis=1, keepdims=True), rate)
        self.column.step(gradient.sum(axis=0, keepdims=True), rate)


def refine(
    weights: Array,
    target: Array,
    start: QuantizedWeight,
    gram: Gram,
    *,
    rank: int | None = RANK,
    iterations: int = ITERATIONS,
) -> Refined:
    """Learn factors and scales of least layer error; ``(2 K^2 + 6 K rank) N`` FLOPs an iteration.

    Args:
        weights: ``W (K, N)``, what is rounded.
        target: ``W0 (K, N)``, what the layer should compute.
        start: A quantized weight to begin from, such as the nearest codes.
        gram: ``H (K, K)``.
        rank: Of the matrix of factors; None for one parameter a weight, as in FlexRound.
        iterations: Steps of Adam.

    Returns:
        The weight, and its E at the start and after every iteration.
    """
    h = gram.astype(np.float32, copy=False)
    parts = column_parts(*target.shape)
    return joined([_refine(weights[:, c], target[:, c], start.columns(c), h, rank, iterations) for c in parts])


def _refine(weights: Array, target: Array, start: QuantizedWeight, gram: Gram, rank: int | None, iterations: int) -> Refined:
    """Do what `refine` does, for some columns."""
    spec, rows = start.spec, start.spec.group_of_row(len(target))
    zeros = start.zero_points.astype(np.float32)[rows]
    low, high = -zeros, spec.top - zeros
    moved = _moved(weights, start)
    factors, logs = Factors(target.shape, rank), Adam(np.zeros_like(start.scales))
    codes, scales, best = start.codes.copy(), start.scales.copy(), np.full(target.shape[1], np.inf)
    errors: list[float] = []
    for iteration in range(iterations + 1):
        scale = start.scales if not iteration else stored(start.scales * np.exp(logs.values), spec)
        steps = scale[rows]
        exact = moved / steps * np.exp(-factors.logs())
        rounded = np.clip(np.rint(exact), low, high)
        difference = steps * rounded - target
        slope = gram @ difference
        error = np.einsum("kn,kn->n", difference, slope, dtype=np.float64)
        better = error < best
        best[better], codes[:, better], scales[:, better] = error[better], (rounded + zeros)[:, better], scale[:, better]
        errors.append(float(best.sum()))
        slope *= steps
        exact *= (exact > low - 0.5) & (exact < high + 0.5)  # clipped codes do not move
        of_logs = -slope * exact
        size = np.abs(of_logs).mean(dtype=np.float64)
        if iteration == iterations or not 0 < size < np.inf:
            break
        of_scales = blocks(slope * (rounded - exact), spec).sum(axis=1)
        share = 1 - iteration / iterations
        factors.step(of_logs / np.float32(size), share)
        logs.step(of_scales / np.float32(size), _SCALE_RATE * share)
    return Refined(QuantizedWeight(codes, scales, start.zero_points, spec), tuple(errors))


def _moved(weights: Array, start: QuantizedWeight) -> Array:
    """Return the nearest to ``weights (K, N)`` that round to the codes of ``start``."""
    rows = start.spec.group_of_row(len(weights))
    scales, codes = start.scales[rows], start.codes - start.zero_points.astype(np.float32)[rows]
    low = np.where(start.codes == 0, -np.inf, codes - np.float32(_INSIDE))
    high = np.where(start.codes == start.spec.top, np.inf, codes + np.float32(_INSIDE))
    moved: Array = (np.clip(weights / scales, low, high) * scales).astype(np.float32)
    return moved


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer: the start that the options name, then LRQ under the damped matrix; the nearest codes without data."""
    values = {option.name: option.default for option in OPTIONS} | dict(options.method_options)
    rank, iterations = values["lrq_rank"] or None, values["lrq_iterations"]
    if problem.stats.is_data_free:  # nothing to learn from
        return rtn.run(problem, options)
    start = STARTS[values["lrq_start"]](problem, options)
    gram = problem.damped_gram(problem.damping(options))
    found = refine(problem.weights, problem.target, start.weight, gram, rank=rank, iterations=iterations)
    return Solution(
        found.weight, start.notes, {"iterations": found.sweeps, "error_start": found.errors[0], "error": found.errors[-1]}, found.errors
    )


OPTIONS = (
    OptionSpec(
        name="lrq_rank", help="Rank of the matrix of factors; 0 for a factor of its own for each weight (FlexRound).",
        types=(int,), default=RANK, least=0, metavar="R",
    ),
    OptionSpec(name="lrq_iterations", help="Steps of gradient descent.", types=(int,), default=ITERATIONS, least=0, metavar="N"),
    OptionSpec(name="lrq_start", help="Quantizer whose codes the descent begins with.", types=(str,), default="rtn", choices=tuple(STARTS)),
)  # fmt: skip

QUANTIZER = Quantizer("lrq", "rounding learned by low-rank scaling", run, batched="gram", options=OPTIONS)
