"""The constants that are made of one weight, each written once for all layers that multiply by the weight."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.layers.linear import LinearLayer


class WeightConstants:
    """Constants made of one weight.

    Attributes:
        shared: Whether several layers multiply by the weight, so that its constants have to be in the main graph.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self._values: dict[str, list[ir.Value]] = {}

    def add(self, layer: LinearLayer, suffix: str, array: npt.NDArray[Any], inside: bool = False) -> ir.Value:
        """The constant of these elements that was made before, or a new one named after the weight and ``suffix``.

        It is in the main graph, or ``inside`` the layer's own where no other layer needs it.
        """
        known = self._values.setdefault(suffix, [])
        for value in known:
            if value.const_value is not None and _same(value.const_value.numpy(), array):
                return value
        known.append(layer.constant(suffix, array, inside=inside and not self.shared))
        return known[-1]

    @property
    def bytes(self) -> int:
        """The size of all of them."""
        return sum(v.const_value.nbytes for values in self._values.values() for v in values if v.const_value is not None)


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
