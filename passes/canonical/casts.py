"""Layers of double or bfloat16: they are computed in float32, with casts before and after.

No format has kernels for these types. Double layers lose a relative 6e-8, far less than their quantized weights do; the report notes it.
"""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern, weight

KINDS = (ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


def rewrite(rewriter: NodeRewriter) -> bool | None:
    x, right = rewriter.input(0), rewriter.input(1)
    view = weight(right)
    if view is None or x is None or weight(x) is not None or view.dtype not in KINDS or len(view.shape) != 2:
        return None
    inputs = [rewriter.cast(v, ir.DataType.FLOAT) for v in rewriter.node.inputs if v is not None]
    product = rewriter.product(rewriter.node.op_type, inputs, rewriter.shape(rewriter.node.outputs[0]), rewriter.node.attributes)
    return rewriter.finish(rewriter.cast(product, view.dtype))


PATTERN = Pattern("a layer of double or bfloat16, now computed in float32", ("MatMul", "Gemm"), rewrite)
