"""Checks of a model's weights before they are solved."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array
from magr_onnx.errors import NonFiniteError

LARGEST = 1e15
"""Largest absolute weight: sums of squares of larger ones overflow float32."""


def check_finite(name: str, array: npt.NDArray[Any]) -> None:
    """Raise `NonFiniteError` naming the layer when ``array`` holds NaN or infinity."""
    if not np.isfinite(array).all():
        indices = np.argwhere(~np.isfinite(array))
        raise NonFiniteError(
            f"{name}: {len(indices)} of {array.size} values are NaN or infinite (first at index {tuple(map(int, indices[0]))}); "
            "repair the export or exclude the layer"
        )


def check_weight(name: str, weight: Array) -> None:
    """Raise `NonFiniteError` where a weight or its square is not finite."""
    check_finite(name, weight)
    if (largest := max(float(weight.max(initial=0)), -float(weight.min(initial=0)))) > LARGEST:
        raise NonFiniteError(f"{name}: values up to {largest:.3g}, and {LARGEST:g} is the most that can be squared; exclude the layer")
