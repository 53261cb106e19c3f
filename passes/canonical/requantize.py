"""Quantized weights as the floats they dequantize to: the DequantizeLinear of a constant becomes a step of the weight's view.

Only on request: the error of the first quantization remains.
"""

from __future__ import annotations

from magr_onnx.passes.canonical import fused
from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern
from magr_onnx.passes.graph.constants import FOLLOW, constant_view, dequantized, source_of


def rewrite(rewriter: NodeRewriter) -> bool | None:
    done = None
    for value in rewriter.node.inputs[:2]:
        if value is None or dequantized(value) is None:
            continue
        nodes = []
        while (node := source_of(value).producer()) is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            node.meta[FOLLOW] = True
            nodes.append(node)
        if constant_view(value) is not None:
            done = True
            continue
        for node in nodes:  # scales are computed
            del node.meta[FOLLOW]
    return done


PATTERN = Pattern(
    "a weight quantized before, now taken for the floats it stands for", ("MatMul", "Gemm", "Einsum", *fused.PATTERN.operators), rewrite
)
