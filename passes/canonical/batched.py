"""MatMul with more than one matrix: a stack ``(E, K, N)`` becomes E layers, of which every one is quantized by itself (experts, heads).

The input is split along the axis that belongs to the stack, or shared where that axis is one, and the products are concatenated. Axes of
one before the matrices only say of what rank the result is.
"""

from __future__ import annotations

import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import MOST_MATRICES, Dims, Edit, Form, Refusal, known, weight
from magr_onnx.report.reasons import Reason


def rewrite(edit: Edit) -> Refusal | bool | None:
    x, right = edit.input(0), edit.input(1)
    held = weight(right)
    if held is None or x is None or right is None or weight(x) is not None or len(held.shape) < 3:
        return None
    rank = len(held.shape)
    axes = [a for a in range(rank - 2) if held.shape[a] > 1]
    text = f"shape {list(held.shape)}"
    if len(axes) > 1:
        return Refusal(Reason.WEIGHT_RANK, text)
    shape = edit.shape(x)
    if shape is None:
        return Refusal(Reason.WEIGHT_RANK, f"{text}, and the rank of the input is unknown")
    if len(shape) < 2:
        return None
    more = max(rank - len(shape), 0)
    if not axes:
        product = edit.product("MatMul", [edit.unsqueeze(x, more), edit.reshape(right, held.shape[-2:])], None)
        return edit.finish(product)
    count = held.shape[axes[0]]
    if count > MOST_MATRICES:
        return Refusal(Reason.WEIGHT_RANK, f"{text}: more than {MOST_MATRICES} matrices")
    shape = [*[1] * more, *shape]
    back = rank - axes[0]  # the axis, counted from the last
    axis = len(shape) - back
    unknown = known(shape[axis]) is None
    if unknown and edit.canvas.opset < 8:
        return Refusal(Reason.WEIGHT_RANK, f"{text}, the input has as many or one, and opset {edit.canvas.opset} has no Expand")
    x = edit.unsqueeze(x, more)
    if unknown:
        x = edit.expand(x, [count, *[1] * (back - 1)])
    matrices = edit.reshape(right, (count, *held.shape[-2:]))
    return edit.finish(stacked(edit, x, [*shape[:axis], count if known(shape[axis]) != 1 else 1, *shape[axis + 1 :]], axis, matrices))


def stacked(edit: Edit, x: ir.Value, shape: Dims, axis: int, matrices: ir.Value) -> ir.Value:
    """``x (..., K)`` times ``matrices (E, K, N)``, one for every index of ``axis``, or each times all of x where that axis is one."""
    held = weight(matrices)
    assert held is not None
    count, _, n = held.shape
    parts = [x] * count if shape[axis] == 1 else edit.split(x, axis, count)
    out: Dims = [*shape[:axis], 1, *shape[axis + 1 : -1], n]
    products = [
        edit.product("MatMul", [part, matrix], out, None, index, held.name)
        for index, (part, matrix) in enumerate(zip(parts, edit.matrices(matrices), strict=True))
    ]
    return edit.concat(products, axis)


FORM = Form("a product with a stack of matrices", ("MatMul",), rewrite)
