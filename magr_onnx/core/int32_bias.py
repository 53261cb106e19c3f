"""Biases of integer products: int32 codes in units of the product of both scales.

A channel whose weights are tiny has a tiny scale, and a bias of usual size does not fit into int32 in units of it (onnxruntime issue
11415 is such a MobileNet). A larger scale for that channel costs nothing that could be seen beside its bias.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import ActivationGrid, Array, QuantizedWeight

LARGEST = 2**30
"""Largest absolute bias code after `with_room`; as much again is left for the products."""


def bias_scales(scales: npt.NDArray[np.floating], grid: ActivationGrid) -> npt.NDArray[np.float32]:
    """Return the scales ``(N,)`` float32 of biases, of weights with ``scales (N,)`` and inputs on ``grid``."""
    return (np.float64(grid.scale) * scales).astype(np.float32)


def bias_codes(bias: Array, scales: npt.NDArray[np.float32]) -> Array:
    """Round a bias ``(N,)`` to whole multiples of ``scales (N,)``, as float64; those that do not fit into int32 too."""
    codes: Array = np.rint(bias / np.maximum(scales, np.finfo(np.float32).tiny))
    return codes


def with_room(weight: QuantizedWeight, bias: Array, grid: ActivationGrid) -> QuantizedWeight:
    """Raise the scales of channels ``(K, N)`` where the codes of ``bias (N,)`` would exceed `LARGEST`, and round their codes anew."""
    scales = weight.scales[0].astype(np.float64)
    least = np.abs(bias) / (LARGEST * grid.scale)
    tiny = np.flatnonzero(least > scales)
    if not len(tiny):
        return weight
    raised = np.nextafter(least[tiny].astype(np.float32), np.float32(np.inf))
    zeros = weight.zero_points[:, tiny].astype(np.float64)
    codes, all_scales = weight.codes.copy(), weight.scales.copy()
    codes[:, tiny] = np.clip(np.rint((codes[:, tiny] - zeros) * (scales[tiny] / raised)) + zeros, 0, weight.spec.top)
    all_scales[0, tiny] = raised
    return replace(weight, codes=codes, scales=all_scales)
