"""MatMul with a vector: a weight ``(K,)`` becomes ``(K, 1)``, an input ``(K,)`` becomes ``(1, K)``; the axis is removed afterwards."""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern, Refusal, weight
from magr_onnx.report.reasons import Reason


def rewrite(rewriter: NodeRewriter) -> Refusal | bool | None:
    x, right = rewriter.input(0), rewriter.input(1)
    view = weight(right)
    if view is None or x is None or right is None or weight(x) is not None or not view.shape:
        return None
    shape, column = rewriter.shape(x), len(view.shape) == 1
    if shape is None:
        return Refusal(Reason.WEIGHT_RANK, "a vector, and the rank of the input is unknown") if column else None
    if not shape or (len(shape) > 1 and not column):
        return None
    row = len(shape) == 1
    if row:
        x, shape = rewriter.reshape(x, (1, view.shape[-2 if len(view.shape) > 1 else 0])), [1, *shape]
    if column:
        right = rewriter.reshape(right, (view.shape[0], 1))
    n = 1 if column else view.shape[-1]
    product = rewriter.product("MatMul", [x, right], [*view.shape[:-2], *shape[:-1], n])
    if not row:
        return rewriter.finish(rewriter.reshape(product, [0] * (len(shape) - 1)))
    return rewriter.finish(rewriter.reshape(product, () if column else (*view.shape[:-2], n)))


PATTERN = Pattern("a product with a vector", ("MatMul",), rewrite)
