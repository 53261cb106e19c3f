"""Layers, convolutions and tables that read the very same weight."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol, TypeVar

import onnx_ir as ir

from magr_onnx.passes.layers.linear import LinearLayer

Key = Hashable


class Weighted(Protocol):
    """What has a weight that others may have too."""

    @property
    def weight_key(self) -> Key:
        """Equal where the weight is the same."""


L = TypeVar("L", bound=Weighted)


def sharing(layers: Iterable[LinearLayer]) -> set[str]:
    """Names of the layers whose weight another one multiplies by as well."""
    return {layer.name for some in by_weight(layers) if len(some) > 1 for layer in some}


def by_weight(layers: Iterable[L]) -> list[list[L]]:
    """Layers, convolutions or tables in order, those of the very same weight together."""
    found: dict[Key, list[L]] = {}
    for layer in layers:
        found.setdefault(layer.weight_key, []).append(layer)
    return list(found.values())


def readers(layer: LinearLayer) -> list[ir.Node]:
    """The nodes for which the float weight of a layer (as it was found, and converted by now) stays in the file."""
    return [use.node for use in layer.weight.source.uses()]
