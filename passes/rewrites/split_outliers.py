"""Coarse-fine weight splitting: a layer with outliers becomes the sum of two layers (CFWS; Yang et al., arXiv 2312.10588).

    x W + b = (x F + b) + x C,      F = clip(W, -t, t),      C = W - F,      one t per group and column.

F has a range of 2 t, and so small steps. C has the excess ``|w| - t`` of the few outliers, and zeros, which are exact on every grid: only
the outliers are rounded with its coarse steps. Both are quantized like any layer, each on its own grids.

The t of a group is the fraction of its largest magnitude, among `FRACTIONS` (1 means no cut), with the least squared error when both parts
are rounded to nearest on their min-max grids. A layer is split if, with searched grids, this reduces the error to less than an eighth
(``factor``). Weights without outliers do not reach that: normal weights gain a factor of 2 at 2 bits and 5 at 8.

The cost is a second product and a second weight of the same size, as much as twice the bits, which are more precise. So this is for
formats without more bits (8), and for a few layers.

Deviations from the paper: thresholds per group and column, by rounding error, not one per tensor; C is stored dense, since onnxruntime
has no sparse integer product. Rejected: C as the rounded weights and F as the rounding error. In theory it is more precise, but only if
the coarse layer's quantizer finds exactly the same grid again, which it does not after MagR or error feedback.
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
    """Choose the t of every group of ``weights (K, N)``, ``(G, N)`` float32; the largest magnitude where a cut does not help."""
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
    """Split weights at ``t (G, N)`` into a fine and a coarse part ``(K, N)``; their sum is exact where a part is zero."""
    limit = t[spec.group_of_row(len(weights))]
    fine: Array = np.clip(weights, -limit, limit)
    return fine, weights - fine


def gain(weights: Array, fine: Array, coarse: Array, spec: WeightSpec) -> float:
    """Compute the ratio of the squared rounding error of the weights to that of the two parts, on searched grids."""
    before, *parts = (float(_group_errors(w, spec, None).sum()) for w in (weights, fine, coarse))
    after = sum(parts)
    return before / after if after > 0 else (np.inf if before > 0 else 1.0)


def _group_errors(weights: Array, spec: WeightSpec, beta: float | None) -> Array:
    """Compute the squared round-to-nearest error of every group, ``(G, N)``."""
    rounded = rtn.quantize(weights, np.ones(len(weights)), spec, beta=beta).dequantize()
    result: Array = np.square(blocks(weights - rounded, spec), dtype=np.float64).sum(axis=1)
    return result


@dataclass(frozen=True)
class SplitOutliers(Rewrite):
    """Split layers with outliers into a fine and a coarse one.

    Attributes:
        factor: Factor by which the squared rounding error must fall for a layer to be split.
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
        names: list[str] = []
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
            names.append(layer.name)
            gains.append(factor)
        if not names:
            return []
        count = f"{len(names)} of {len(layers)}"
        return [f"split-outliers: {count} layers became two ({listed(names)}); rounding error falls {min(gains):.1f} times or more"]
