"""Products with the constant on the left, ``Y = W X``, as ``Y^T = X^T W^T``.

MatMul: the last two axes of X, W and Y are swapped; a vector on either side becomes a matrix of one row or column first, and the axis is
removed at the end. Gemm: ``op(A) op(B)`` becomes ``op(B)^T op(A)^T`` with alpha, and the addend is added afterwards.
"""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import Dims, NodeRewriter, Pattern, Refusal, weight
from magr_onnx.report.reasons import Reason


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _swapped_shape(shape: Dims | None) -> Dims | None:
    return None if shape is None or len(shape) < 2 else [shape[i] for i in _swapped(len(shape))]


def rewrite(rewriter: NodeRewriter) -> Refusal | bool | None:
    left, x = rewriter.input(0), rewriter.input(1)
    view = weight(left)
    if view is None or left is None or x is None or weight(x) is not None:
        return None
    if rewriter.node.op_type == "Gemm":
        gemm = rewriter.node.attributes
        attributes = {"alpha": gemm.get_float("alpha", 1.0), "transB": 1 - gemm.get_int("transA", 0)}
        shape = _swapped_shape(rewriter.shape(rewriter.node.outputs[0]))
        transposed = x if gemm.get_int("transB", 0) else rewriter.transpose(x, (1, 0))
        product = rewriter.product("Gemm", [transposed, left], shape, attributes)
        return rewriter.finish(rewriter.plus(rewriter.transpose(product, (1, 0)), rewriter.input(2), gemm.get_float("beta", 1.0)))
    shape = rewriter.shape(x)
    if shape is None:
        return Refusal(Reason.CONSTANT_LEFT, "the rank of the right side is unknown")
    if not shape or not view.shape:
        return None
    if len(shape) == 1:  # W (..., M, K) x = x W^T
        transposed = rewriter.transpose(left, _swapped(len(view.shape))) if len(view.shape) > 1 else left
        return rewriter.finish(rewriter.product("MatMul", [x, transposed], rewriter.shape(rewriter.node.outputs[0])))
    flat = len(view.shape) == 1
    rows = rewriter.reshape(left, (view.shape[0], 1)) if flat else rewriter.transpose(left, _swapped(len(view.shape)))
    rank = max(len(shape), len(view.shape))
    lead = view.shape[:-2]
    before = [*[1] * (rank - len(shape)), *shape[:-2]]
    for i, d in enumerate(lead, start=rank - 2 - len(lead)):
        before[i] = d if d > 1 else before[i]
    out: Dims = [*before, shape[-1], 1 if flat else view.shape[-2]]
    transposed = rewriter.transpose(x, _swapped(len(shape)))
    product = rewriter.product("MatMul", [transposed, rows], out)
    if flat:
        return rewriter.finish(rewriter.reshape(product, [0] * (rank - 1)))
    return rewriter.finish(rewriter.transpose(product, _swapped(rank)))


PATTERN = Pattern("a product with the constant on the left", ("MatMul", "Gemm"), rewrite)
