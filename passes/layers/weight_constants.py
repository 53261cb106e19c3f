"""Constants derived from one weight, each written once for all layers that share the weight."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.layers.linear import LinearLayer


class WeightConstants:
    """Constants derived from one weight.

    Attributes:
        shared: Whether several layers share the weight, so that its constants must be in the main graph.
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self._values: dict[str, list[ir.Value]] = {}

    def add(self, layer: LinearLayer, suffix: str, array: npt.NDArray[Any], inside: bool = False) -> ir.Value:
        """Return an existing constant of the same elements, or add one named after the weight and ``suffix``.

        It is in the main graph, or ``inside`` the layer's subgraph where no other layer needs it.
        """
        values = self._values.setdefault(suffix, [])
        for value in values:
            if value.const_value is not None and _same(value.const_value.numpy(), array):
                return value
        values.append(layer.constant(suffix, array, inside=inside and not self.shared))
        return values[-1]

    @property
    def bytes(self) -> int:
        """Return the total size in bytes."""
        return sum(v.const_value.nbytes for values in self._values.values() for v in values if v.const_value is not None)


def _same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
