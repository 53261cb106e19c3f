"""A2Q (Colbert et al., arXiv 2308.13504) and A2Q+ (arXiv 2401.10432) after training: project on the accumulator's l1 ball, round to zero.

    argmin_v 1/2 ||v - w||^2   subject to   ||v / s||_1 <= budget in every tile of every column

Rounding towards zero can only shrink the norm, so the codes are safe. A2Q's radius holds for codes of any signs; A2Q+ subtracts the
column's mean first, which makes the positive and the negative codes add up to the same and doubles the radius for unsigned activations.
The mean goes into the grid's zero point, so A2Q+ needs an asymmetric grid.

Deviations from the papers: no training, the projection is their initialisation; scales come from the unprojected range; tiles
(AXE's multi-stage sums) each get a ball of their own; where a tile's mean is not the column's, each sign keeps to its own half.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from magr_onnx.core.grid import Grid, stored
from magr_onnx.core.overflow.accumulator import Budget
from magr_onnx.core.prox import project_l1_ball
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight, WeightSpec


def tiled(columns: Array, tile: int | None) -> Array:
    """Reshape ``(K, N)`` to ``(T, tiles * N)``: every tile a column, the last padded with zeros."""
    k, n = columns.shape
    size = k if tile is None else min(tile, k)
    count = -(-k // size)
    padded = np.zeros((count * size, n), columns.dtype)
    padded[:k] = columns
    return padded.reshape(count, size, n).transpose(1, 0, 2).reshape(size, -1)


def untiled(tiles: Array, k: int, n: int) -> Array:
    """Invert `tiled`."""
    size = len(tiles)
    return tiles.reshape(size, -1, n).transpose(1, 0, 2).reshape(-1, n)[:k]


def project(codes: Array, budget: Budget) -> Array:
    """Return the nearest real-valued codes ``(K, N)`` whose positive and negative parts each keep half of A2Q+'s l1 budget in every tile.

    For unsigned activations this is the exact constraint: the two signs never share the register's range. For signed ones it is sufficient.
    Where tiles of several orders of K must hold, they are projected one after the other: no projection enlarges a code.
    """
    half = budget.l1 / 2
    return _by_tile(codes, budget, lambda tiles: project_l1_ball(np.maximum(tiles, 0), half) + project_l1_ball(np.minimum(tiles, 0), half))


def _by_tile(codes: Array, budget: Budget, projection: Callable[[Array], Array]) -> Array:
    """Project every tile of ``codes (K, N)``, in all orders of K one after the other."""
    for order in budget.orders(len(codes)):
        projected = np.empty_like(codes)
        projected[order] = untiled(projection(tiled(codes[order], budget.accumulator.tile)), *codes.shape)
        codes = projected
    return codes


def quantize(weights: Array, spec: WeightSpec, budget: Budget, plus: bool) -> QuantizedWeight:
    """Quantize ``weights (K, N)`` by A2Q, or A2Q+ with ``plus``, with one grid per column."""
    k, n = weights.shape
    mean = weights.mean(axis=0, keepdims=True) if plus and not spec.symmetric else np.zeros((1, n), weights.dtype)
    span = np.abs(weights - mean).max(axis=0, keepdims=True) / (spec.middle - 1 or 1)
    scales = stored(np.where(span > 0, span, 1), spec)
    shift = np.clip(np.rint(mean / scales), 1 - spec.middle, spec.middle - 1)
    codes = weights / scales - shift
    projected = project(codes, budget) if plus else _by_tile(codes, budget, lambda tiles: project_l1_ball(tiles, budget.l1_any))
    rounded = np.clip(np.trunc(projected), -spec.middle, spec.top - spec.middle) + spec.middle
    return Grid(scales, (spec.middle - shift).astype(np.float32), spec, k).weight(rounded)


def run(problem: Problem, options: Options, plus: bool = False) -> Solution:
    """Run A2Q, or A2Q+ with ``plus``."""
    assert problem.budget is not None
    return Solution(quantize(problem.weights, problem.spec, problem.budget, plus))


A2Q = Quantizer("a2q", "projection on the accumulator's l1 ball", run, "only")
A2Q_PLUS = Quantizer("a2q+", "the same, centred", partial(run, plus=True), "only")
