"""FusedMatMul of onnxruntime (formerly TransposeMatMul), ``alpha op(A) op(B)``: Transposes, a MatMul, and a Mul by alpha."""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern, Refusal, weight
from magr_onnx.report.reasons import Reason


def rewrite(rewriter: NodeRewriter) -> Refusal | bool | None:
    values = [rewriter.input(0), rewriter.input(1)]
    if values[0] is None or values[1] is None or all(weight(v) is None for v in values):
        return None
    if rewriter.node.attributes.get_int("transBatchA", 0) or rewriter.node.attributes.get_int("transBatchB", 0):
        return Refusal(Reason.FUSED, "batch axes are transposed")
    operands = []
    for value, flag in zip(values, ("transA", "transB"), strict=True):
        assert value is not None
        if rewriter.node.attributes.get_int(flag, 0):
            shape = rewriter.shape(value)
            if shape is None:
                return Refusal(Reason.FUSED, "the rank of the input is unknown")
            rank = len(shape)
            if rank > 1:  # a vector has no transpose
                value = rewriter.transpose(value, [*range(rank - 2), rank - 1, rank - 2])
        operands.append(value)
    product = rewriter.product("MatMul", operands, rewriter.shape(rewriter.node.outputs[0]))
    return rewriter.finish(rewriter.times(product, rewriter.node.attributes.get_float("alpha", 1.0)))


PATTERN = Pattern("a FusedMatMul", ("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"), rewrite)
