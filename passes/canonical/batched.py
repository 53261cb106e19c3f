"""MatMul with a stack of matrices ``(E, K, N)``: it becomes E layers, each quantized separately (experts, heads).

The input is split along the axis of the stack, or shared where that axis is 1, and the products are concatenated. Leading axes of 1 only
set the rank of the result.
"""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import MOST_MATRICES, Dims, NodeRewriter, Pattern, Refusal, known, weight
from magr_onnx.report.reasons import Reason


def rewrite(rewriter: NodeRewriter) -> Refusal | bool | None:
    x, right = rewriter.input(0), rewriter.input(1)
    view = weight(right)
    if view is None or x is None or right is None or weight(x) is not None or len(view.shape) < 3:
        return None
    rank = len(view.shape)
    axes = [a for a in range(rank - 2) if view.shape[a] > 1]
    text = f"shape {list(view.shape)}"
    if len(axes) > 1:
        return Refusal(Reason.WEIGHT_RANK, text)
    shape = rewriter.shape(x)
    if shape is None:
        return Refusal(Reason.WEIGHT_RANK, f"{text}, and the rank of the input is unknown")
    if len(shape) < 2:
        return None
    missing = max(rank - len(shape), 0)
    if not axes:
        product = rewriter.product("MatMul", [rewriter.unsqueeze(x, missing), rewriter.reshape(right, view.shape[-2:])], None)
        return rewriter.finish(product)
    count = view.shape[axes[0]]
    if count > MOST_MATRICES:
        return Refusal(Reason.WEIGHT_RANK, f"{text}: more than {MOST_MATRICES} matrices")
    shape = [*[1] * missing, *shape]
    from_end = rank - axes[0]  # position of the axis, counted from the end
    axis = len(shape) - from_end
    unknown = known(shape[axis]) is None
    if unknown and rewriter.context.opset < 8:
        return Refusal(Reason.WEIGHT_RANK, f"{text}, the input has as many or one, and opset {rewriter.context.opset} has no Expand")
    x = rewriter.unsqueeze(x, missing)
    if unknown:
        x = rewriter.expand(x, [count, *[1] * (from_end - 1)])
    matrices = rewriter.reshape(right, (count, *view.shape[-2:]))
    return rewriter.finish(
        stacked(rewriter, x, [*shape[:axis], count if known(shape[axis]) != 1 else 1, *shape[axis + 1 :]], axis, matrices)
    )


def stacked(rewriter: NodeRewriter, x: ir.Value, shape: Dims, axis: int, matrices: ir.Value) -> ir.Value:
    """Multiply ``x (..., K)`` by ``matrices (E, K, N)``, one per index of ``axis``, or all of x by each where that axis is 1."""
    view = weight(matrices)
    assert view is not None
    count, _, n = view.shape
    slices = [x] * count if shape[axis] == 1 else rewriter.split(x, axis, count)
    out: Dims = [*shape[:axis], 1, *shape[axis + 1 : -1], n]
    products = [
        rewriter.product("MatMul", [x_slice, matrix], out, None, index, view.name)
        for index, (x_slice, matrix) in enumerate(zip(slices, rewriter.matrices(matrices), strict=True))
    ]
    return rewriter.concat(products, axis)


PATTERN = Pattern("a product with a stack of matrices", ("MatMul",), rewrite)
