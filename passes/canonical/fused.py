"""FusedMatMul of onnxruntime (TransposeMatMul, once), ``alpha op(A) op(B)``: Transposes, a MatMul, and a Mul by alpha."""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import Edit, Form, Refusal, weight
from magr_onnx.report.reasons import Reason


def rewrite(edit: Edit) -> Refusal | bool | None:
    values = [edit.input(0), edit.input(1)]
    if values[0] is None or values[1] is None or all(weight(v) is None for v in values):
        return None
    if edit.integer("transBatchA") or edit.integer("transBatchB"):
        return Refusal(Reason.FUSED, "batch axes are transposed")
    operands = []
    for value, turn in zip(values, ("transA", "transB"), strict=True):
        assert value is not None
        if edit.integer(turn):
            shape = edit.shape(value)
            if shape is None:
                return Refusal(Reason.FUSED, "the rank of the input is unknown")
            rank = len(shape)
            if rank > 1:  # a vector is left as it is
                value = edit.transpose(value, [*range(rank - 2), rank - 1, rank - 2])
        operands.append(value)
    product = edit.product("MatMul", operands, edit.shape(edit.node.outputs[0]))
    return edit.finish(edit.scaled(product, edit.real("alpha")))


FORM = Form("a FusedMatMul", ("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"), rewrite)
