"""Selection of layers by shell patterns on their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from magr_onnx.passes.graph.subgraphs import NAMES
from magr_onnx.passes.graph.torch_names import modules_of, owner_of
from magr_onnx.report.reasons import Reason


@dataclass(frozen=True, slots=True)
class Selection:
    """Shell patterns on the names of a layer's node, weight or torch module, including those before a rewrite.

    Attributes:
        include: Layers to convert; empty for all.
        exclude: Layers to skip; takes precedence over ``include``.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def leaves_out(self, node: ir.Node, name: str, weight: str) -> Reason | None:
        """Return the reason why the layer of a node is not selected; None if it is."""
        names = names_of(node, name, weight)
        if matches(names, self.exclude):
            return Reason.EXCLUDED
        return None if not self.include or matches(names, self.include) else Reason.NOT_INCLUDED


ALL = Selection()
"""Every layer."""


def names_of(node: ir.Node, name: str, weight: str) -> tuple[str, ...]:
    """Return the names patterns match for a node: its torch module, node, weight, the weight's module, and names before a rewrite."""
    names = (*reversed(modules_of(node)), name, weight, owner_of(weight), *node.metadata_props.get(NAMES, "").splitlines())
    return tuple(dict.fromkeys(filter(None, names)))


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether any shell pattern matches any name."""
    return any(name == p or fnmatchcase(name, p) for p in patterns for name in names)
