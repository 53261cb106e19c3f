"""Solutions of layers in memory, once they are written: their codes, and no more floats than needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from magr_onnx.core.grid import stored
from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.types import Array
from magr_onnx.passes import LinearLayer

_NONE: Array = np.empty((0, 0), np.float32)


class Solutions:
    """Solutions by layer name; a store (`magr_onnx.passes.layerwise.Store`) that has all of its layers."""

    def __init__(self) -> None:
        self._kept: dict[str, LayerSolution] = {}

    def keep(self, layer: LinearLayer, solution: LayerSolution) -> None:
        """Keep a solution; the floats that its codes stand for are not kept."""
        if solution.quantized is not None and solution.factors is None:
            solution = replace(solution, weight=_NONE)
        self._kept[layer.name] = replace(solution, target=_NONE, fit_targets=())

    def restore(self, layer: LinearLayer) -> LayerSolution | None:
        """Return the solution of a layer, whose ``target`` is its weight: it is not solved again."""
        solution = self._kept.get(layer.name)
        if solution is None:
            return None
        weight = solution.weight
        if solution.quantized is not None and solution.factors is None:
            weight = solution.quantized.dequantize()
        return replace(solution, weight=weight, target=weight)

    def has_scales(self, name: str) -> bool:
        """Return whether the weight of a layer is on a grid, with nothing beside it."""
        solution = self._kept.get(name)
        return solution is not None and solution.quantized is not None and solution.factors is None

    def scale(self, name: str, factors: Array) -> None:
        """Multiply the scales of a layer by ``factors (G, N)``."""
        solution = self._kept[name]
        quantized = solution.quantized
        assert quantized is not None
        scales = stored(quantized.scales * factors, quantized.spec)
        self._kept[name] = replace(solution, quantized=replace(quantized, scales=scales), changed=True)
