"""Canonicalization: rewrites of equivalent patterns to MatMul and Gemm with a constant matrix on the right, the form of linear layers.

Every pattern is a file here with a `Pattern`, and a line in `PATTERNS`; each may leave the rest to later ones. Rewrites are exact in real
arithmetic and keep the name, type and shape of a node's output; the layer gets the node's name (``name[0]``, ``name[1]`` ... where there
are several). Weights are not computed: transformations of them are nodes, which `magr_onnx.passes.graph.constants` folds and which are
removed when the layer is converted. A layer that is not converted remains correct in its new form.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from magr_onnx.errors import listed
from magr_onnx.passes.canonical import batch_norm, batched, casts, constant_lhs, einsum, fused, gemm_bias, matvec, requantize, trans_a
from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern, Refusal, RewriteContext, weight
from magr_onnx.passes.graph.nodes import operator_of
from magr_onnx.passes.layers.linear import REFUSED
from magr_onnx.passes.layers.selection import ALL, Selection

PATTERNS: tuple[Pattern, ...] = (
    fused.PATTERN,
    einsum.PATTERN,
    gemm_bias.PATTERN,
    trans_a.PATTERN,
    constant_lhs.PATTERN,
    matvec.PATTERN,
    batched.PATTERN,
    casts.PATTERN,
)


def canonicalize(model: ir.Model, selection: Selection = ALL, *, requantized: bool = False) -> list[str]:
    """Rewrite the layers of the main graph and its subgraphs to canonical form; return notes for the report.

    Args:
        model: Changed in place.
        selection: The layers to convert; others are not changed.
        requantized: Treat quantized weights as the floats they dequantize to.
    """
    context, notes = RewriteContext(model), []
    stacks = replace(selection, include=[name.partition("[")[0] for name in selection.include])  # one matrix of a stack, by its future name
    for pattern in (requantize.PATTERN, *PATTERNS) if requantized else PATTERNS:
        rewritten = []
        for node in list(model.graph.all_nodes()):
            if operator_of(node) not in pattern.operators:
                continue
            rewriter = NodeRewriter(context, node)
            constant = next((view.name for v in node.inputs[:2] if (view := weight(v)) is not None), "")
            reason = selection.leaves_out(node, rewriter.name, constant)
            if reason is not None and stacks.leaves_out(node, rewriter.name, constant) is not None:
                if constant:
                    node.meta[REFUSED] = Refusal(reason)
                continue
            result = pattern.rewrite(rewriter)
            if isinstance(result, Refusal):
                node.meta[REFUSED] = result
            elif result:
                rewritten.append(rewriter.name)
        if rewritten:
            notes.append(f"{pattern.summary}: {listed(rewritten)}")
    if notes:
        model.graph.sort()
    if folded := batch_norm.fold(model, selection):
        notes.append(f"BatchNormalization folded into the convolution before it: {listed(folded)}")
    return notes


__all__ = ["PATTERNS", "Pattern", "canonicalize"]
