"""Products of matrices of which columns are computed as they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core.gram import Array


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product ``C W (K, N)``, of which columns are computed as they are needed: that of a wide layer may be larger than its model.

    Attributes:
        left: ``C (K, K)`` float64.
        right: ``W (K, N)`` float32.
    """

    left: Array
    right: Array

    def __getitem__(self, index: tuple[slice, slice | npt.NDArray[np.intp]]) -> Array:
        rows, columns = index
        result: Array = self.left[rows] @ self.right[:, columns].astype(np.float64)
        return result

    def __rmul__(self, scale: float) -> Product:
        return Product(scale * self.left, self.right)

    def __add__(self, other: Product) -> Product:
        """Add a product with the same ``right``."""
        return Product(self.left + other.left, self.right)
