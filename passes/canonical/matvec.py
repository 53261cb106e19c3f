"""MatMul with a vector on either side: a weight ``(K,)`` becomes ``(K, 1)``, an input ``(K,)`` ``(1, K)``, and the axis goes at the end."""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import Edit, Form, Refusal, weight
from magr_onnx.report.reasons import Reason


def rewrite(edit: Edit) -> Refusal | bool | None:
    x, right = edit.input(0), edit.input(1)
    held = weight(right)
    if held is None or x is None or right is None or weight(x) is not None or not held.shape:
        return None
    shape, column = edit.shape(x), len(held.shape) == 1
    if shape is None:
        return Refusal(Reason.WEIGHT_RANK, "a vector, and the rank of the input is unknown") if column else None
    if not shape or (len(shape) > 1 and not column):
        return None
    row = len(shape) == 1
    if row:
        x, shape = edit.reshape(x, (1, held.shape[-2 if len(held.shape) > 1 else 0])), [1, *shape]
    if column:
        right = edit.reshape(right, (held.shape[0], 1))
    n = 1 if column else held.shape[-1]
    product = edit.product("MatMul", [x, right], [*held.shape[:-2], *shape[:-1], n])
    if not row:
        return edit.finish(edit.reshape(product, [0] * (len(shape) - 1)))
    return edit.finish(edit.reshape(product, () if column else (*held.shape[:-2], n)))


FORM = Form("a product with a vector", ("MatMul",), rewrite)
