"""A mean over all axes of space, as exporters write global average pooling: it becomes a GlobalAveragePool.

Not a pattern of `magr_onnx.passes.canonical`: only runtimes gain by it that round what operators put out and have no ReduceMean in their
table (`magr_onnx.passes.plan.Plan.needs_pooling`).
"""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import RewriteContext
from magr_onnx.passes.graph.constants import drop_if_unused, ints
from magr_onnx.passes.graph.nodes import operand


def rewrite(model: ir.Model) -> None:
    """Rewrite the means of the main graph that keep their axes, of values of a known rank, in place."""
    context = RewriteContext(model)
    for node in [node for node in model.graph if (node.domain, node.op_type) == ("", "ReduceMean")]:
        x = operand(node, 0)
        shape, axes = None if x is None else context.shape(x), ints(node, "axes", 1)
        if x is None or shape is None or axes is None or not node.attributes.get_int("keepdims", 1):
            continue
        if len(shape) < 3 or sorted(axis % len(shape) for axis in axes) != list(range(2, len(shape))):
            continue
        result, unread = node.outputs[0], operand(node, 1)
        pooled = ir.val(None, result.dtype, result.shape)
        pool = ir.node("GlobalAveragePool", [x], outputs=[pooled], name=node.name)
        pool.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [pool], [result], [pooled])
        if unread is not None:
            drop_if_unused(unread)
