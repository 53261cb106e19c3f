"""Round to nearest: every weight to the closest point of its grid, independently of the others."""

from __future__ import annotations

from magr_onnx.core.grid import choose
from magr_onnx.core.quantizers.interface import Options, Problem, Quantizer, Solution
from magr_onnx.core.types import Array, QuantizedWeight, WeightSpec


def quantize(weights: Array, diagonal: Array, spec: WeightSpec, *, beta: float | None = None) -> QuantizedWeight:
    """Round ``weights (K, N)`` to the nearest codes on a min-max grid times ``beta``, or on a searched grid (``beta=None``).

    ``diagonal (K,)`` is ``diag(H)``, the weight of every input row in the search.
    """
    grid = choose(weights, spec, diagonal, beta)
    return grid.weight(grid.codes(weights))


def run(problem: Problem, options: Options) -> Solution:
    """Quantize a layer."""
    weights = problem.stats.backend.array(problem.weights)
    return Solution(quantize(weights, problem.gram.diagonal(), problem.spec, beta=options.beta).host())


QUANTIZER = Quantizer("rtn", "round to nearest", run, batched="diagonal", on_device=True, quick="rtn")
