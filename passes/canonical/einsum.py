"""Einsum with one constant operand, where it is a product with a matrix or with a stack of them.

The labels of the two operands and of the result say what an axis is:

    in x and w, not in the result:  contracted, K          in x and the result, not in w:  a row
    in w and the result, not in x:  an output, N           in all three:                   one of a stack, E
    in x alone:                     summed before

so that ``x (rows, E, K)``, ``w (E, K, N)`` and the result ``(rows, E, N)`` are Transposes and Reshapes away; those of w are part of the
way to the weight, and are not computed. Rows keep their axes, whatever sizes they have at run time. Without a contracted label there is no
product of matrices, and such nodes are left alone, as are labels that stand twice in one operand, that only the constant sums over, or
whose axis of one is stretched.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from magr_onnx.passes.canonical.batched import stacked
from magr_onnx.passes.canonical.rewriter import MOST_MATRICES, Dims, Edit, Form, Refusal, known, weight
from magr_onnx.report.reasons import Reason


@dataclass(frozen=True, slots=True)
class Labels:
    """An equation of two operands, one letter an axis; those that an ellipsis stands for are digits."""

    operands: tuple[str, str]
    result: str


def parse(equation: str, ranks: tuple[int, int]) -> Labels:
    """The labels of an equation, as `numpy.einsum` reads it: spaces, an ellipsis, or no result.

    Raises:
        ValueError: It is no equation of two operands with these ranks.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        raise ValueError(f"{len(terms)} operands")
    letters = [term.replace("...", "") for term in terms]
    for text in (*letters, result.replace("...", "")):
        if not set(text) <= set(string.ascii_letters):
            raise ValueError(f"{text!r} has more than letters")
    hidden = [rank - len(own) if "..." in term else 0 for term, own, rank in zip(terms, letters, ranks, strict=True)]
    if any(len(own) + h != rank or h < 0 for own, h, rank in zip(letters, hidden, ranks, strict=True)):
        raise ValueError(f"operands have {ranks[0]} and {ranks[1]} axes")
    if max(hidden) > len(string.digits):
        raise ValueError("too many axes")
    dots = string.digits[: max(hidden)]
    operands = [term.replace("...", dots[len(dots) - h :]) for term, h in zip(terms, hidden, strict=True)]
    if arrow:
        result = result.replace("...", dots)
    else:
        result = dots + "".join(sorted(c for c in set("".join(letters)) if "".join(letters).count(c) == 1))
    if len(set(result)) < len(result) or not set(result) <= set("".join(operands)):
        raise ValueError(f"the result {result!r} is not made of the operands' labels")
    return Labels((operands[0], operands[1]), result)


def rewrite(edit: Edit) -> Refusal | bool | None:
    inputs = list(edit.node.inputs)
    constants = [weight(v) for v in inputs]
    if not any(constants):
        return None
    if len(inputs) != 2 or all(constants) or inputs[0] is None or inputs[1] is None:
        return Refusal(Reason.EINSUM, f"{len(inputs)} operands, {sum(c is not None for c in constants)} of them constant")
    side = 0 if constants[0] is not None else 1
    held, right, x = constants[side], inputs[side], inputs[1 - side]
    assert held is not None
    assert right is not None
    assert x is not None
    shape = edit.shape(x)
    equation = edit.node.attributes["equation"].as_string()
    if shape is None:
        return Refusal(Reason.EINSUM, f"{equation}: the rank of the input is unknown")
    ranks = (len(held.shape), len(shape)) if side == 0 else (len(shape), len(held.shape))
    try:
        labels = parse(equation, ranks)
    except ValueError as error:
        return Refusal(Reason.EINSUM, f"{equation}: {error}")
    own, of_x, result = labels.operands[side], labels.operands[1 - side], labels.result
    dims = dict(zip(own, held.shape, strict=True))
    refused = _refused(own, of_x, result, dims, dict(zip(of_x, map(known, shape), strict=True)))
    if refused is not None:
        return Refusal(refused.reason, f"{equation}: {refused.detail}")

    rows = [c for c in result if c in of_x and c not in own]
    batch = [c for c in result if c in of_x and c in own]
    inner = [c for c in own if c in of_x and c not in result]
    outer = [c for c in result if c in own and c not in of_x]
    e, k, n = (math.prod(dims[c] for c in part) for part in (batch, inner, outer))
    x = edit.total(x, [i for i, c in enumerate(of_x) if c not in result and c not in own])
    of_x = "".join(c for c in of_x if c in result or c in own)
    x = edit.transpose(x, [of_x.index(c) for c in (*rows, *batch, *inner)])
    matrices = edit.transpose(right, [own.index(c) for c in (*batch, *inner, *outer)])
    made: Dims = edit.shape(x) or []
    kept, stack = made[: len(rows)], [e] if e > 1 else []
    if not rows and not stack:  # a product of two vectors, or of a vector and a matrix, has one row
        kept = [1]
    if (len(batch), len(inner)) != (len(stack), 1) or len(kept) > len(rows):
        x = edit.reshape(x, [*([0] * len(rows) or [1] * len(kept)), *stack, k])
    shape = [*kept, *stack, k]
    if stack:
        value = stacked(edit, x, shape, len(rows), edit.reshape(matrices, (e, k, n)))
    else:
        value = edit.product("MatMul", [x, edit.reshape(matrices, (k, n))], [*kept, n])
    if (len(batch), len(outer)) != (len(stack), 1) or len(kept) > len(rows):
        value = edit.reshape(value, [*[0] * len(rows), *(dims[c] for c in (*batch, *outer))])
    order = [*rows, *batch, *outer]
    return edit.finish(edit.transpose(value, [order.index(c) for c in result]))


def _refused(own: str, of_x: str, result: str, dims: dict[str, int], sizes: dict[str, int | None]) -> Refusal | None:
    """Why labels are not those of a product with a matrix, or a stack of them."""
    if len(set(own)) < len(own) or len(set(of_x)) < len(of_x):
        return Refusal(Reason.EINSUM, "a label stands twice in one operand")
    alone = [c for c in own if c not in of_x and c not in result]
    if alone:
        return Refusal(Reason.EINSUM, f"{', '.join(alone)} is summed in the constant alone")
    shared = [c for c in own if c in of_x]
    stretched = [c for c in shared if (dims[c] == 1) != (sizes[c] == 1)]
    if stretched:
        return Refusal(Reason.EINSUM, f"the axis {', '.join(stretched)} is one on a side, and may be stretched")
    if not [c for c in shared if c not in result]:
        return Refusal(Reason.EINSUM, "nothing is summed over")
    count = math.prod(dims[c] for c in shared if c in result)
    if count > MOST_MATRICES:
        return Refusal(Reason.EINSUM, f"a stack of {count} matrices; layers are made of {MOST_MATRICES} at most")
    return None


FORM = Form("an Einsum", ("Einsum",), rewrite)
