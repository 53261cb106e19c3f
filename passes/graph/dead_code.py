"""Nodes whose results nobody reads: converters of opsets drop them, so they must not be looked for afterwards."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def remove(model: ir.Model) -> list[str]:
    """Remove them from ``model``; a sentence for the report where there were any."""
    before = [n.name or n.op_type for n in model.graph]
    if all(any(v.uses() or v.is_graph_output() for v in n.outputs) for n in model.graph):
        return []
    RemoveUnusedNodesPass()(model)
    kept = {n.name or n.op_type for n in model.graph}
    gone = [name for name in before if name not in kept]
    return [f"nodes whose results nobody reads are left out: {', '.join(gone[:3])}" + (f" and {len(gone) - 3} more" if gone[3:] else "")]
