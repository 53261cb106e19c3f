"""Layers of double or bfloat16: the input is cast to float32, the layer is one of float32, and its result is cast back.

No format has kernels for them. Double layers lose what float32 does not hold, a part in 16 million, which their rounded weights lose many
times over; the report says that this was done.
"""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import Edit, Form, weight

KINDS = (ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


def rewrite(edit: Edit) -> bool | None:
    x, right = edit.input(0), edit.input(1)
    held = weight(right)
    if held is None or x is None or weight(x) is not None or held.dtype not in KINDS or len(held.shape) != 2:
        return None
    inputs = [edit.cast(v, ir.DataType.FLOAT) for v in edit.node.inputs if v is not None]
    product = edit.product(edit.node.op_type, inputs, edit.shape(edit.node.outputs[0]), edit.node.attributes)
    return edit.finish(edit.cast(product, held.dtype))


FORM = Form("a layer of double or bfloat16, now computed in float32", ("MatMul", "Gemm"), rewrite)
