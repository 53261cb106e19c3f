"""Removal of dead nodes, which opset converters would drop anyway."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from magr_onnx.errors import listed


def remove(model: ir.Model) -> list[str]:
    """Remove dead nodes from ``model``; return a note for the report if there were any."""
    before = [n.name or n.op_type for n in model.graph]
    if all(any(v.uses() or v.is_graph_output() for v in n.outputs) for n in model.graph):
        return []
    RemoveUnusedNodesPass()(model)
    remaining = {n.name or n.op_type for n in model.graph}
    removed = [name for name in before if name not in remaining]
    return [f"unused nodes are removed: {listed(removed)}"]
