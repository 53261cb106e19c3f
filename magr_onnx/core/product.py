"""Products of matrices of which columns are computed as they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from magr_onnx.core.gram import Array, added


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


@dataclass(frozen=True, slots=True, eq=False)
class RowProduct:
    """A product ``X^T diag(w) Y (K, N)`` of few rows, of which columns are computed as they are needed.

    Attributes:
        pieces: Rows ``X (n, K)`` and ``Y (n, N)`` float32, and the weight of all of them; sums share the rows.
    """

    pieces: tuple[tuple[tuple[Array, Array], float], ...]

    @staticmethod
    def of(x: Array, y: Array, weight: float = 1.0) -> RowProduct:
        """Return the product of rows ``(n, K)`` and ``(n, N)``."""
        return RowProduct((((x, y), weight),))

    @staticmethod
    def zeros(k: int, n: int) -> RowProduct:
        """Return the product of no rows."""
        return RowProduct.of(np.zeros((0, k), np.float32), np.zeros((0, n), np.float32), 0.0)

    def __getitem__(self, index: tuple[slice, slice | npt.NDArray[np.intp]]) -> Array:
        rows, columns = index
        first, *others = (w * (x[:, rows].T @ y[:, columns]).astype(np.float64) for (x, y), w in self.pieces)
        for other in others:
            first += other
        return first

    def __rmul__(self, scale: float) -> RowProduct:
        return RowProduct(tuple((rows, scale * w) for rows, w in self.pieces))

    def __add__(self, other: RowProduct) -> RowProduct:
        """Add the weights of the same rows; those of which nothing is left go."""
        (x, y), _ = self.pieces[0]
        left = added((*self.pieces, *other.pieces))
        return RowProduct(tuple(left)) if left else RowProduct.zeros(x.shape[1], y.shape[1])
