"""Choice of a rotation by the weights that it turns: their rounding error falls with the range of every column, or of every block of one.

The step of a grid follows the largest magnitude of the weights that share it, whatever they were before. With ``V = Q^T W`` of what reads a
rotated value, and ``V = W Q`` of what writes one, Q minimises

    f(Q) = sum over weights   mean over groups v   ||v||_p^2 / mean(W^2),        p = 8,

a smooth stand-in for the squared range relative to the weights: a Hadamard matrix is the start, under which groups look normal, and the
descent goes on to where their tails are shorter. No data are used.

A step is ``Q <- Q (I + h/2 M)^-1 (I - h/2 M)``, the Cayley transform, with the skew-symmetric part M of ``Q^T grad f(Q)``, with momentum:
Q stays orthogonal. Where ``1 Q = 1`` and ``Q 1 = 1`` are to hold, rows and columns of M are centred.

SpinQuant (Liu et al., arXiv 2405.16406) descends on the loss of the quantized network, by gradients through all of it, with the same kind
of step. Here the objective is one of each weight alone, and costs seconds where that costs hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magr_onnx.core.grid import blocks
from magr_onnx.core.rotation import Rotation
from magr_onnx.core.types import Array, WeightSpec

STEP = 0.1  # largest angle of the first turn, in radians; it falls to 0
MOMENTUM = 0.8
SAMPLE = 1 << 22  # weights a step looks at, at least; of more, columns and matrices are drawn anew for each


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """A weight that a rotation turns.

    Attributes:
        weight: ``W`` float32: ``(K, N)`` of a reader, ``(M, K)`` of a writer.
        reads: Whether it is a reader, and ``V = Q^T W``; else ``V = W Q``.
    """

    weight: Array
    reads: bool


def descend(start: Rotation, weights: Sequence[Turned], spec: WeightSpec, steps: int, seed: int = 0) -> Rotation:
    """Choose a rotation by descent from another; see the module.

    Args:
        start: Of order K; what it does to the vector of ones is kept if it has a mirror.
        weights: What it turns, all that will be rounded.
        spec: The grid that they will be rounded to: its groups.
        steps: Of the descent.
        seed: Of what is drawn in each step, where there are many weights.
    """
    width, centred = len(start.signs), start.mirror is not None
    if not weights or not steps or width < 3:
        return start
    rng = np.random.default_rng(seed)
    share = min(1.0, max(SAMPLE, 2 * width * width) / sum(turned.weight.size for turned in weights))
    identity = np.eye(width, dtype=np.float32)
    q: Array = start.of_rows(np.eye(width)).astype(np.float32)
    momentum: Array = np.zeros_like(q)
    for step in range(steps):
        slope = q.T @ gradient(q, [_drawn(turned, share, rng) for turned in weights if turned.reads or rng.random() < share], spec)[1]
        skew = (slope - slope.T) / 2
        if centred:
            skew -= skew.mean(axis=0)
            skew -= skew.mean(axis=1, keepdims=True)
        momentum = MOMENTUM * momentum + skew
        half = np.float32(STEP * (1 - step / steps) / (2 * max(_largest(momentum, rng), 1e-30))) * momentum
        q = q @ np.linalg.solve(identity + half, identity - half)
    return Rotation(np.ones(width), (_orthogonal(q.astype(np.float64), centred),))


def gradient(q: Array, weights: Sequence[Turned], spec: WeightSpec) -> tuple[float, Array]:
    """Compute f and its gradient ``(K, K)`` for a matrix ``q``, orthogonal or not; see the module."""
    total, result = 0.0, np.zeros_like(q)
    for turned in weights:
        w = turned.weight
        power = float(np.square(w, dtype=np.float64).sum())
        if power == 0:
            continue
        value, slope = _ranges(q.T @ w if turned.reads else w @ q, spec)
        factor = w.shape[0] / power  # the mean over columns, in units of the mean square
        total += factor * value
        result += np.float32(factor) * (w @ slope.T if turned.reads else w.T @ slope)
    return total, result


def _ranges(v: Array, spec: WeightSpec) -> tuple[float, Array]:
    """Sum ``||v||_8^2`` over groups of ``v (K, N)``, weighted by their share of a column; also the gradient ``(K, N)``."""
    groups = blocks(v, spec)
    largest = np.maximum(np.abs(groups).max(axis=1, keepdims=True), np.float32(1e-30))
    t = groups / largest
    square = t * t
    fourth = square * square
    sums = np.maximum((fourth * fourth).sum(axis=1, keepdims=True), 1)  # which it is at least, but for a group of zeros
    squared = largest**2 * sums**0.25 / len(groups)
    slope = (2 * squared / (sums * largest)) * (fourth * square * t)
    return float(squared.sum(dtype=np.float64)), slope.reshape(-1, v.shape[1])[: len(v)]


def _drawn(turned: Turned, share: float, rng: np.random.Generator) -> Turned:
    """Draw a share of the columns of a reader; writers are taken as they are."""
    if share == 1 or not turned.reads:
        return turned
    n = turned.weight.shape[1]
    columns = rng.choice(n, max(1, round(share * n)), replace=False)
    return Turned(turned.weight[:, columns], True)


def _largest(skew: Array, rng: np.random.Generator) -> float:
    """Estimate the largest singular value of a skew-symmetric matrix by power iteration."""
    v = rng.standard_normal(len(skew)).astype(np.float32)
    for _ in range(8):
        v = skew @ (v / max(float(np.linalg.norm(v)), 1e-30))
    return float(np.linalg.norm(v))


def _orthogonal(q: Array, centred: bool) -> Array:
    """Return the orthogonal matrix next to one that is nearly so, by Newton's iteration; one that keeps ones if asked for."""
    if centred:
        q = q - q.mean(axis=0)
        q = q - q.mean(axis=1, keepdims=True) + 1 / len(q)
    for _ in range(3):
        q = 1.5 * q - 0.5 * q @ (q.T @ q)
    return q
