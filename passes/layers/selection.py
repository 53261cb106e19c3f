"""Which layers to convert: shell patterns on the names a layer goes by."""

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
    """Shell patterns on the name of a layer's node, weight or torch module, those before a rewrite included.

    Attributes:
        include: Layers to convert; empty for all.
        exclude: Layers to leave as they are; wins over ``include``.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def leaves_out(self, node: ir.Node, name: str, weight: str) -> Reason | None:
        """Why the layer of a node is not chosen; None where it is."""
        names = names_of(node, name, weight)
        if matches(names, self.exclude):
            return Reason.EXCLUDED
        return None if not self.include or matches(names, self.include) else Reason.NOT_INCLUDED


ALL = Selection()
"""Every layer."""


def names_of(node: ir.Node, name: str, weight: str) -> tuple[str, ...]:
    """The names patterns may find the layer of a node by: its torch module's, its own, its weight's, that of the module which has the
    weight, and those before a rewrite."""
    names = (*reversed(modules_of(node)), name, weight, owner_of(weight), *node.metadata_props.get(NAMES, "").splitlines())
    return tuple(dict.fromkeys(filter(None, names)))


def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether one of the shell patterns fits one of the names."""
    return any(name == p or fnmatchcase(name, p) for p in patterns for name in names)
