"""MagR: weight magnitude reduction (Zhang et al., "MagR: Weight Magnitude Reduction for Enhancing Post-Training
Quantization", NeurIPS 2024, arXiv 2406.00800).

Solves, per output channel (or per group of input rows),

    argmin_W  F(W) = 1/2 tr((W - W0)^T H (W - W0)) + a * sum over groups ||w_group||_inf

before any quantizer runs: weights of smaller range at almost the same output, hence a finer grid. Nothing changes at inference.

Deviations from the authors' code:

- Accelerated proximal gradient in the diagonal metric ``D = L diag(H)`` (Jacobi preconditioning; the prox stays a clip, see
  `magr_onnx.core.prox`), instead of 200 plain steps. A few outlier inputs dominate ``lambda_max(H)`` and stall the plain iteration;
  they do not stall this one. The acceleration is the greedy FISTA of Liang, Luo and Schoenlieb (arXiv 1811.01430): constant
  momentum and a step above ``1 / L``, with restart (O'Donoghue and Candes 2015) of a channel whenever its objective rises.
- Stops when the last steps added little to the decrease of F, or on a duality gap, not on a count alone.
- ``alpha`` is by default relative to the layer (see `penalty`), so it is invariant to the scale of weights and inputs.
- H comes from all calibration rows (the published code keeps the last batch only).

``method="authors"`` with ``relative=False`` is the published iteration: H normalised by its largest eigenvalue, threshold
``alpha`` in weight units (1e-3 per channel, 1e-4 per group), 200 plain steps, no stopping rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from magr_onnx.core import backends, compiled
from magr_onnx.core.gram import Gram, RowGram
from magr_onnx.core.linalg import lambda_max, left_product
from magr_onnx.core.prox import levels
from magr_onnx.core.types import Array, sum_traces
from magr_onnx.errors import OptionError

Method = Literal["fista", "authors"]

AUTHORS_ITERATIONS = 200
_STEP = 1.25  # in units of 1 / L; a plain step lowers the objective up to 2
_MOMENTUM = 0.95
_CHUNK, _ALL = 1 << 16, 1 << 26  # elements of a row block whose element-wise work stays in cache, and where there is none


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """Result of `reduce`.

    Attributes:
        weights: ``(K, N)`` reduced weights, in the dtype they came in.
        objective: ``F(W)`` at the result.
        start: ``F(W0)``.
        gap: Relative duality gap at the result: ``F(W) - min F <= gap * F(W)``.
        iterations: Steps taken.
        converged: Whether a stopping rule ended the iteration rather than the count.
        penalty: The ``a`` of the objective.
        trace: ``F`` at the start and after every step.
    """

    weights: Array
    objective: float
    start: float
    gap: float
    iterations: int
    converged: bool
    penalty: float
    trace: tuple[float, ...] = ()

    def host(self) -> Reduction:
        """Return the result with weights of NumPy."""
        return replace(self, weights=backends.of(self.weights).host(self.weights))


def penalty(weights: Array, gram: Gram, alpha: float, relative: bool = True, group_size: int | None = None) -> float:
    """Return the ``a`` of the objective for a given ``alpha``.

    Relative: ``alpha * g * mean|W0| * mean(diag H)``, so that ``alpha`` is about the fraction of a group's l1 mass that
    may be clipped. It follows the scale of the weights and inputs, and a few outlier inputs do not change it.
    Absolute (the authors' convention): ``alpha * lambda_max(H)``.
    """
    if not relative:
        return float(alpha) * lambda_max(gram)
    rows = len(weights) if group_size is None else min(group_size, len(weights))
    xp = backends.of(weights).xp
    return float(alpha) * rows * float(xp.mean(xp.abs(weights))) * float(gram.diagonal().sum()) / len(gram)


def reduce(
    weights: Array,
    gram: Gram,
    *,
    alpha: float = 1e-3,
    relative: bool = True,
    group_size: int | None = None,
    method: Method = "fista",
    max_iterations: int | None = None,
    tolerance: float = 0.03,
) -> Reduction:
    """Reduce the magnitude of ``weights`` at nearly unchanged output.

    Args:
        weights: ``W0 (K, N)``.
        gram: ``H (K, K)``, symmetric positive semidefinite.
        alpha: Strength; see `penalty`. 0 returns the weights unchanged.
        relative: Whether ``alpha`` is relative to the layer or in absolute weight units.
        group_size: Rows per l_inf norm; None for whole columns.
        method: ``"fista"``, or ``"authors"`` for the published iteration.
        max_iterations: Bound on steps; None for 30 (fista) or 200 (authors).
        tolerance: Stop when five steps add less than this fraction to the decrease of F so far, or when the relative duality
            gap is below it (fista only).

    Raises:
        OptionError: A negative or infinite alpha, an unknown method, or shapes that do not fit.
    """
    k, b = len(weights), backends.of(weights)
    if gram.shape != (k, k):
        raise OptionError(f"weights {tuple(weights.shape)} need a Gram matrix {(k, k)}; got {tuple(gram.shape)}")
    if not 0 <= alpha < math.inf:
        raise OptionError(f"alpha={alpha} must be 0 or more, and finite")
    if group_size is not None and group_size < 1:
        raise OptionError(f"group_size={group_size} must be at least 1, or None for whole columns")
    if method not in get_args(Method):
        raise OptionError(f"method={method!r} is not known; choose one of {', '.join(get_args(Method))}")
    a = penalty(weights, gram, alpha, relative, group_size)
    if a == 0:
        return Reduction(b.copy(weights), 0.0, 0.0, 0.0, 0, True, 0.0)
    accelerate = method == "fista"
    limit = (30 if accelerate else AUTHORS_ITERATIONS) if max_iterations is None else max_iterations
    size = k if group_size is None else min(group_size, k)
    problem = _Problem.make(gram, a, size, accelerate, by_row=not compiled.serves(*weights.shape, backend=b))

    def solve(c: slice) -> Reduction:
        target = problem.targets(weights[:, c])
        x, trace, gap, converged = _iterate(problem, target, limit, tolerance if accelerate else 0.0, accelerate)
        result = b.cast(b.contiguous(x[:, :k].T), weights.dtype)
        return Reduction(result, trace[-1], trace[0], gap, len(trace) - 1, converged, a, tuple(trace))

    parts = compiled.by_columns(solve, *weights.shape, backend=b)
    return parts[0] if len(parts) == 1 else _joined(parts, a)


def _joined(parts: list[Reduction], a: float) -> Reduction:
    """Join output channels solved in slices; the gap is the weighted mean, an upper bound for all of them."""
    objective = sum(p.objective for p in parts)
    start, gap = sum(p.start for p in parts), sum(p.gap * p.objective for p in parts) / max(objective, 1e-300)
    xp = backends.of(parts[0].weights).xp
    weights, trace = xp.concatenate([p.weights for p in parts], axis=1), tuple(sum_traces(*[p.trace for p in parts]))
    iterations, converged = max(p.iterations for p in parts), all(p.converged for p in parts)
    return Reduction(weights, objective, start, gap, iterations, converged, a, trace)


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """The problem of a layer, with output channels in rows, K padded with zeros to whole groups, in float32."""

    gram: Gram  # (K', K')
    metric: Array  # (K',), D with 2 D - H positive definite
    penalty: float
    group: int
    by_row: bool  # steps in NumPy; else compiled

    @staticmethod
    def make(gram: Gram, a: float, size: int, precondition: bool, by_row: bool) -> _Problem:
        k, b = len(gram), backends.of(gram)
        padded = -(-k // size) * size
        h = b.single(gram)
        if padded != k and isinstance(h, RowGram):
            h = h.padded(padded)
        elif padded != k:
            h, inner = b.zeros((padded, padded)), h
            h[:k, :k] = inner
        power = h.diagonal()
        diagonal = b.cast(b.xp.maximum(power, 1e-6 * max(float(power[:k].mean()), 1e-30)), "float32")
        if precondition:
            metric = lambda_max(h, scale=b.host(1 / b.xp.sqrt(diagonal))) / _STEP * diagonal
        else:
            metric = b.xp.full_like(diagonal, lambda_max(gram))
        return _Problem(h, b.cast(metric, "float32"), a, size, by_row)

    def targets(self, weights: Array) -> Array:
        """Return ``weights (K, N)`` as ``(N, K')``."""
        target = backends.of(weights).zeros((weights.shape[1], len(self.metric)))
        target[:, : len(weights)] = weights.T
        return target

    def grouped(self, x: Array) -> Array:
        return x.reshape(len(x), -1, self.group)

    def norms(self, x: Array) -> Array:
        """Return ``sum over groups ||w_group||_inf`` of every channel, ``(N,)``."""
        xp = backends.of(x).xp
        result: Array = xp.sum(xp.max(xp.abs(self.grouped(x)), axis=-1), axis=-1, dtype=xp.float64)
        return result

    def gap(self, x: Array, target: Array, gradient: Array) -> float:
        """Return the relative duality gap at ``x``; the dual point is the gradient scaled into the dual ball."""
        b = backends.of(x)
        xp = b.xp
        l1 = xp.max(xp.sum(xp.abs(self.grouped(gradient)), axis=-1), axis=-1)
        theta = b.cast(xp.minimum(1, self.penalty / xp.maximum(l1, 1e-30 * max(self.penalty, 1.0))), "float64")
        quadratic = b.contract("nk,nk->n", x - target, gradient)
        inner = b.contract("nk,nk->n", target, gradient)
        primal = 0.5 * quadratic + self.penalty * self.norms(x)
        dual = -0.5 * theta**2 * quadratic - theta * inner
        return float((primal - dual).sum() / max(primal.sum(), 1e-300))


def _iterate(problem: _Problem, target: Array, limit: int, tolerance: float, accelerate: bool) -> tuple[Array, list[float], float, bool]:
    """Run proximal gradient towards ``target (N, K')``, one matrix product per step; momentum and restart are per output channel.

    The gradient step from the extrapolated point ``x + m (x - x')`` is ``s + m (s - s')`` with ``s = x - D^-1 H (x - W0)``: the
    step is linear, so neither extrapolated points nor old gradients are stored, and the remaining work is a dozen
    passes over rows that stay in cache.

    Returns:
        The weights, the objective at the start and after every step, the relative duality gap, and whether a stopping rule ended it.
    """
    a, group, b = problem.penalty, problem.group, backends.of(target)
    xp = b.xp
    x = b.copy(target)
    channels, width = target.shape
    metric = problem.metric.reshape(-1, group)
    inverse = 1 / problem.metric
    take: Callable[..., None] = _step
    if not problem.by_row:
        from magr_onnx.core.compiled import reduction

        take = reduction.step
    difference = x - target
    product = xp.zeros_like(difference)  # so far they are equal
    values = a * problem.norms(x)
    trace = [float(values.sum())]
    objective_before = trace[0]
    before = x - product * inverse
    level, momentum = b.zeros((channels, width // group)), b.zeros((channels,))
    converged = False
    for count in range(1, limit + 1):
        take(x, product, before, momentum, inverse, metric, level, a)
        before, product = product, before
        xp.subtract(x, target, out=difference)
        left_product(difference, problem.gram, product)
        previous = values
        values = 0.5 * b.cast(xp.einsum("nk,nk->n", difference, product), "float64") + a * xp.sum(level, axis=1, dtype=xp.float64)
        if accelerate:
            momentum = _MOMENTUM * b.cast(~(values > previous), "float32")
        objective = float(values.sum())
        trace.append(objective)
        if tolerance and count % 5 == 0:
            if objective_before - objective <= tolerance * (trace[0] - objective) or problem.gap(x, target, product) <= tolerance:
                converged = True
                break
            objective_before = objective
    return x, trace, problem.gap(x, target, product), converged


def _step(
    x: Array,
    product: Array,
    before: Array,
    momentum: Array,
    inverse: Array,
    metric: Array,
    level: Array,
    threshold: float,
) -> None:
    """Do what `magr_onnx.core.compiled.reduction.step` does, in whole arrays, for some output channels at a time, which stay in cache."""
    (channels, width), b = x.shape, backends.of(x)
    xp = b.xp
    rows = max(1, b.part(_CHUNK, _ALL) // width)
    for at in range(0, channels, rows):
        s = slice(at, min(at + rows, channels))
        point = product[s]
        xp.multiply(point, inverse, out=point)
        xp.subtract(x[s], point, out=point)
        v = before[s]
        xp.subtract(point, v, out=v)
        v *= momentum[s, None]
        v += point
        shaped = v.reshape(len(v), *metric.shape)
        level[s] = levels(shaped, threshold, metric, start=level[s] if xp.any(level[s]) else None)
        c = level[s][..., None]
        xp.clip(shaped, -c, c, out=x[s].reshape(shaped.shape))
