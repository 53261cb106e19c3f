"""What the grids of activations have in common, and how one is made of a range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from magr_onnx.core.types import ActivationGrid


@dataclass(frozen=True, slots=True)
class GridType:
    """What the grids of a runtime's activations have in common.

    Attributes:
        signed: As in `ActivationGrid`.
        bits: As in `ActivationGrid`.
        symmetric: Whether the zero point is in the middle.
        power_of_two: Whether scales are powers of two.
    """

    signed: bool = False
    bits: int = 8
    symmetric: bool = False
    power_of_two: bool = False

    @staticmethod
    def named(name: str, symmetric: bool = False, power_of_two: bool = False) -> GridType:
        """Return the grid type with codes of a type such as ``uint8``."""
        return GridType(name.startswith("int"), int(name.rpartition("int")[2]), symmetric, power_of_two)

    @property
    def steps(self) -> int:
        """Steps between the least and the greatest code."""
        return int(2**self.bits) - 1

    def of_range(self, low: float, high: float, limit: float = math.inf) -> ActivationGrid:
        """Return the grid over ``[min(low, 0), max(high, 0)]``; one that ends at or below ``limit``, if that is finite."""
        half = 2 ** (self.bits - 1)
        if self.symmetric:
            largest = max(-low, high, 0.0)
            low, high = -largest * half / (half - 1), largest
        grid = ActivationGrid.of_range(low, high, self.signed, self.bits)
        if self.power_of_two:
            scale = 2.0 ** math.ceil(math.log2(grid.scale) - 1e-6)
            zero = int(np.clip(np.rint(-min(low, 0.0) / scale), 0, self.steps))
            grid = replace(grid, scale=scale, zero_point=zero - half * self.signed)
        while math.isfinite(limit) and np.float32(grid.scale) * np.float32(self.steps) > np.float32(limit) and not self.symmetric:
            scale = grid.scale / 2 if self.power_of_two else float(np.nextafter(np.float32(grid.scale), np.float32(0)))
            grid = replace(grid, scale=scale)
        return replace(grid, zero_point=0 if self.signed else half) if self.symmetric else grid

    def exactly(self, low: float, high: float) -> ActivationGrid:
        """Return the grid whose steps divide ``[low, high)`` evenly, as those of Sigmoid and Softmax are expected."""
        scale = (high - low) / 2**self.bits
        return ActivationGrid(scale, int(np.rint(-low / scale)) - 2 ** (self.bits - 1) * self.signed, self.signed, self.bits)
