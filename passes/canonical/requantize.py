"""Weights that are quantized already, as the floats they stand for: the DequantizeLinear of a constant becomes a step to the weight.

Only where the caller asks for it: what the first rounding lost does not come back.
"""

from __future__ import annotations

from magr_onnx.passes.canonical import fused
from magr_onnx.passes.canonical.edit import Edit, Form
from magr_onnx.passes.constants import FOLLOW, behind, dequantized, held


def rewrite(edit: Edit) -> bool | None:
    done = None
    for value in edit.node.inputs[:2]:
        if value is None or dequantized(value) is None:
            continue
        node = behind(value).producer()
        assert node is not None
        node.meta[FOLLOW] = True
        if held(value) is None:  # quantized in the graph, or with scales that are computed
            del node.meta[FOLLOW]
        else:
            done = True
    return done


FORM = Form(
    "a weight quantized before, now taken for the floats it stands for", ("MatMul", "Gemm", "Einsum", *fused.FORM.operators), rewrite
)
