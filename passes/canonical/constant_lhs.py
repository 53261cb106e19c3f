"""Products with the constant on the left, ``Y = W X``, as ``Y^T = X^T W^T``.

MatMul: the last two axes of X, W and Y change places; a vector on either side becomes a matrix of one row or column first, and the axis
goes at the end. Gemm: ``op(A) op(B)`` becomes ``op(B)^T op(A)^T`` with alpha, and what is added comes after.
"""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import Dims, Edit, Form, Refusal, weight
from magr_onnx.report.reasons import Reason


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _turned(shape: Dims | None) -> Dims | None:
    return None if shape is None or len(shape) < 2 else [shape[i] for i in _swapped(len(shape))]


def rewrite(edit: Edit) -> Refusal | bool | None:
    left, x = edit.input(0), edit.input(1)
    held = weight(left)
    if held is None or left is None or x is None or weight(x) is not None:
        return None
    if edit.node.op_type == "Gemm":
        attributes = {"alpha": edit.real("alpha"), "transB": 1 - edit.integer("transA")}
        shape = _turned(edit.shape(edit.node.outputs[0]))
        turned = x if edit.integer("transB") else edit.transpose(x, (1, 0))
        product = edit.product("Gemm", [turned, left], shape, attributes)
        return edit.finish(edit.plus(edit.transpose(product, (1, 0)), edit.input(2), edit.real("beta")))
    shape = edit.shape(x)
    if shape is None:
        return Refusal(Reason.CONSTANT_LEFT, "the rank of the right side is unknown")
    if not shape or not held.shape:
        return None
    if len(shape) == 1:  # W (..., M, K) x = x W^T
        turned = edit.transpose(left, _swapped(len(held.shape))) if len(held.shape) > 1 else left
        return edit.finish(edit.product("MatMul", [x, turned], edit.shape(edit.node.outputs[0])))
    flat = len(held.shape) == 1
    rows = edit.reshape(left, (held.shape[0], 1)) if flat else edit.transpose(left, _swapped(len(held.shape)))
    rank = max(len(shape), len(held.shape))
    lead = held.shape[:-2]
    before = [*[1] * (rank - len(shape)), *shape[:-2]]
    for i, d in enumerate(lead, start=rank - 2 - len(lead)):
        before[i] = d if d > 1 else before[i]
    out: Dims = [*before, shape[-1], 1 if flat else held.shape[-2]]
    turned = edit.transpose(x, _swapped(len(shape)))
    product = edit.product("MatMul", [turned, rows], out)
    if flat:
        return edit.finish(edit.reshape(product, [0] * (rank - 1)))
    return edit.finish(edit.transpose(product, _swapped(rank)))


FORM = Form("a product with the constant on the left", ("MatMul", "Gemm"), rewrite)
