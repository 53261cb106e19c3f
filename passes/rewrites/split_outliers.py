"""Coarse and fine: a layer whose outliers spoil its grid becomes two that are summed (CFWS; Yang et al., arXiv 2312.10588).

    x W + b = (x F + b) + x C,      F = clip(W, -t, t),      C = W - F,      one t a group and column.

F is what is left of the weights with the outliers cut off: its range is 2 t, and so its steps are small. C holds what was cut off, the
``|w| - t`` of the few outliers, and zeros, which every grid holds exactly: however coarse its steps are, only the outliers are rounded with
them. Both are quantized like any layer, each on its own grids.

The t of a group is the fraction of its largest magnitude, among `FRACTIONS`, that leaves least squared error when both parts are rounded to
nearest on their min-max grids; 1, no cut, is among them. A layer is split where, with searched grids, the error falls to less than an
eighth (``factor``) of that of the layer in one piece. Weights without outliers do not reach that: two parts are always finer than one, and
normal weights gain a factor of 2 at 2 bits and 5 at 8.

The cost is a second product and a second weight of the same size: as much as a layer of twice the bits, which keeps more precision. So this
is for the formats that have no more bits to give (8), and for a few layers.

Deviations from the paper: thresholds a group and column, by rounding error, where the paper takes one a tensor; C is stored dense, since
onnxruntime has no sparse product of integers. Not taken: C as the rounded weights and F as all that rounding left. On paper it is finer
yet, but it holds only if the coarse layer's quantizer finds the very grid again, which it does not behind MagR or error feedback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.grid import blocks
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.errors import listed
from magr_onnx.passes.rewrites.base import Context, Rewrite, add_product

FRACTIONS = tuple(2.0 ** (-i / 2) for i in range(9))  # 1 to 1/16


def thresholds(weights: Array, spec: WeightSpec) -> Array:
    """The t of every group of ``weights (K, N)``, ``(G, N)`` float32: the largest magnitude where cutting does not pay."""
    largest = np.abs(blocks(weights, spec)).max(axis=1)
    best = np.full(largest.shape, np.inf)
    chosen = largest.copy()
    for fraction in FRACTIONS:
        t = (largest * np.float32(fraction)).astype(np.float32)
        fine, coarse = split(weights, t, spec)
        error = _group_errors(fine, spec, 1.0) + _group_errors(coarse, spec, 1.0)
        better = error < best
        best[better], chosen[better] = error[better], t[better]
    result: Array = chosen
    return result


def split(weights: Array, t: Array, spec: WeightSpec) -> tuple[Array, Array]:
    """Fine and coarse part ``(K, N)`` of ``weights``, cut at ``t (G, N)``; their sum is exact wherever a part is zero."""
    limit = t[spec.group_of_row(len(weights))]
    fine: Array = np.clip(weights, -limit, limit)
    return fine, weights - fine


def gain(weights: Array, fine: Array, coarse: Array, spec: WeightSpec) -> float:
    """How many times smaller the squared rounding error of the two parts is than that of the weights in one piece, on searched grids."""
    before, *parts = (float(_group_errors(w, spec, None).sum()) for w in (weights, fine, coarse))
    after = sum(parts)
    return before / after if after > 0 else (np.inf if before > 0 else 1.0)


def _group_errors(weights: Array, spec: WeightSpec, beta: float | None) -> Array:
    """Squared error of every group when rounded to nearest, ``(G, N)``."""
    rounded = rtn.quantize(weights, np.ones(len(weights)), spec, beta=beta).dequantize()
    result: Array = np.square(blocks(weights - rounded, spec), dtype=np.float64).sum(axis=1)
    return result


@dataclass(frozen=True)
class SplitOutliers(Rewrite):
    """Split layers whose few outliers spoil their grids into a fine and a coarse one.

    Attributes:
        factor: How many times the squared rounding error must fall for a layer to be split.
    """

    name: ClassVar[str] = "split-outliers"
    summary: ClassVar[str] = "split layers with outliers into a fine and a coarse one, twice the cost of those layers (CFWS)"

    factor: float = 8.0

    def problems(self, spec: WeightSpec | None) -> list[str]:
        del spec
        if self.factor > 1:
            return []
        return [f"{self.name}: factor={self.factor:g} must be above 1: a split that does not lower the error only costs"]

    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        done: list[str] = []
        gains: list[float] = []
        layers = context.layers(model)
        for layer in layers:
            weights = layer.read()
            fine, coarse = split(weights, thresholds(weights, context.spec), context.spec)
            factor = gain(weights, fine, coarse, context.spec)
            if factor < self.factor:
                continue
            add_product(layer, layer.x, coarse, "_coarse", context.activations)
            layer.write(fine, None)
            done.append(layer.name)
            gains.append(factor)
        if not done:
            return []
        count = f"{len(done)} of {len(layers)}"
        return [f"split-outliers: {count} layers became two ({listed(done)}); rounding error falls {min(gains):.1f} times or more"]
