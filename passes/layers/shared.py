"""Groups of layers, convolutions and tables that share a weight."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol, TypeVar

import onnx_ir as ir

from magr_onnx.passes.layers.linear import LinearLayer

Key = Hashable


class Weighted(Protocol):
    """An object with a weight that others may share."""

    @property
    def weight_key(self) -> Key:
        """Return a key that is equal for the same weight."""


L = TypeVar("L", bound=Weighted)


def sharing(layers: Iterable[LinearLayer]) -> set[str]:
    """Return the names of layers that share their weight with another layer."""
    return {layer.name for group in by_weight(layers) if len(group) > 1 for layer in group}


def by_weight(layers: Iterable[L]) -> list[list[L]]:
    """Group layers, convolutions or tables by weight, in order."""
    groups: dict[Key, list[L]] = {}
    for layer in layers:
        groups.setdefault(layer.weight_key, []).append(layer)
    return list(groups.values())


def readers(layer: LinearLayer) -> list[ir.Node]:
    """Return the nodes that still read the float weight of a converted layer."""
    return [use.node for use in layer.weight.source.uses()]
