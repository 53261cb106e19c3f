"""Half-quadratic quantization (HQQ, Badri and Shaji 2023): a grid robust to outliers, without calibration data.

Per group of weights ``w``, with ``w_hat = s (q - z)`` and ``q = clip(round(w / s) + z)``, HQQ minimises

    sum |w - w_hat|^p,      p = 0.7,

which, unlike a squared error, lets a few outliers be clipped for the sake of the many. It is split in two by an auxiliary error ``e``,

    min over s, z, e of   |e|^p + (beta / 2) (e - (w - w_hat))^2,

and the halves are solved in turn: ``e`` by shrinkage, ``sign(x) max(|x| - |x|^(p - 1) / beta, 0)`` of ``x = w - w_hat`` (the generalised
soft threshold), the grid as the one closest to ``w - e``; beta grows by the factor kappa every time.

Deviations from the authors' code:

- Zero points are integers, as the formats store them, and so move in whole steps. The authors keep them real and fix the scale; here the
  scale is refitted too (least squares on ``w - e``), the only free parameter of a symmetric grid.
- Errors are measured in steps of the starting grid, so that nothing depends on the units of the weights.
- The iteration starts from the min-max grid (theirs) and from the searched one of `magr_onnx.core.grid`, and every group keeps
  the grid of least ``sum |w - w_hat|^p`` over all iterations, so it is never worse than either.
"""

from __future__ import annotations

import numpy as np

from magr_onnx.core.grid import Grid, blocks, minmax, round_codes, search, stored
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight, WeightSpec

P = 0.7
BETA, KAPPA = 10.0, 1.01
ITERATIONS = 20
_COLUMN_VALUES = 1 << 18  # weights processed at a time, so that temporaries stay in cache


def objective(weights: Array, quantized: Array, spec: WeightSpec, p: float = P) -> Array:
    """Return ``sum |w - w_hat|^p`` of every group, ``(G, N)``."""
    result: Array = (np.abs(blocks(weights - quantized, spec)) ** p).sum(axis=1)
    return result


def quantize(weights: Array, spec: WeightSpec) -> QuantizedWeight:
    """Quantize ``weights (K, N)`` on the grid of least ``sum |w - w_hat|^p`` of every group."""
    k, n = weights.shape
    start = search(weights, spec, np.ones(k)), minmax(weights, spec)
    scales, zeros = np.empty_like(start[0].scales), np.empty_like(start[0].zeros)
    step = max(1, _COLUMN_VALUES // k)
    for at in range(0, n, step):
        columns = np.arange(at, min(at + step, n))
        best = np.full((spec.groups(k), len(columns)), np.inf)
        for grid in start:
            _descend(weights[:, columns], grid.columns(columns), best, scales[:, columns[0] : at + step], zeros[:, columns[0] : at + step])
    grid = Grid(scales, zeros, spec, k)
    return grid.weight(grid.codes(weights))


def _descend(weights: Array, grid: Grid, best: Array, scales: Array, zeros: Array) -> None:
    """Update ``scales``, ``zeros`` and their objective ``best``, all ``(G, N)``, in place where iterating from ``grid`` is better."""
    spec = grid.spec
    w = blocks(weights, spec)
    valid = blocks(np.ones((len(weights), 1), np.float32), spec)  # the padding of a short last group does not count
    s, z, unit, beta = grid.scales, grid.zeros, grid.scales, BETA
    for _ in range(ITERATIONS + 1):
        q = round_codes(w, s[:, None], z[:, None], spec.top)
        x = (w - s[:, None] * (q - z[:, None])) * valid
        value = (np.abs(x) ** P).sum(axis=1)
        better = value < best
        best[better], scales[better], zeros[better] = value[better], s[better], z[better]
        e = _shrink(x / unit[:, None], beta) * unit[:, None]
        s, z = _refit((w - e) * valid, q, s, z, valid, spec)
        beta *= KAPPA


def _shrink(x: Array, beta: float) -> Array:
    """Apply the generalised soft threshold of ``|.|^p``; zero stays zero."""
    size = np.abs(x)
    return np.sign(x) * np.maximum(size - np.maximum(size, 1e-12) ** (P - 1) / beta, 0)


def _refit(w: Array, q: Array, s: Array, z: Array, valid: Array, spec: WeightSpec) -> tuple[Array, Array]:
    """Refit the integer zero point closest to ``mean(q - w / s)``, then the least-squares scale, of ``w`` and codes ``q (G, g, N)``."""
    if not spec.symmetric:
        mean = ((q - w / s[:, None]) * valid).sum(axis=1) / valid.sum(axis=1)
        z = np.clip(np.rint(mean), 0, spec.top).astype(np.float32)
    levels = (q - z[:, None]) * valid
    power = (levels * levels).sum(axis=1)
    fitted = (levels * w).sum(axis=1) / np.where(power > 0, power, 1)
    return stored(np.where(fitted > 0, fitted, s), spec), z


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer. Ignores calibration data and options."""
    del options
    weight = quantize(problem.weights, problem.spec)
    return Solution(weight, figures={"lp_error": float(objective(problem.weights, weight.dequantize(), problem.spec).sum())})


QUANTIZER = Quantizer("hqq", "half-quadratic, needs no data", run)
