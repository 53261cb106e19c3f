"""Weights that are quantized already, as the floats they stand for: the DequantizeLinear of a constant becomes a step to the weight.

Only where the caller asks for it: what the first rounding lost does not come back.
"""

from __future__ import annotations

from magr_onnx.passes.canonical import fused
from magr_onnx.passes.canonical.rewriter import Edit, Form
from magr_onnx.passes.graph.constants import FOLLOW, constant_view, dequantized, source_of


def rewrite(edit: Edit) -> bool | None:
    done = None
    for value in edit.node.inputs[:2]:
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


FORM = Form(
    "a weight quantized before, now taken for the floats it stands for", ("MatMul", "Gemm", "Einsum", *fused.FORM.operators), rewrite
)
