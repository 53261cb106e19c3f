"""Einsum with one constant operand, where it is a product with a matrix or with a stack of them.

The labels of the two operands and of the result determine the role of an axis:

    in x and w, not in the result:  contracted, K          in x and the result, not in w:  a row
    in w and the result, not in x:  an output, N           in all three:                   a stack, E
    in x alone:                     summed first

so ``x (rows, E, K)``, ``w (E, K, N)`` and the result ``(rows, E, N)`` follow by Transposes and Reshapes; those of w are folded into the
view of the weight. Rows keep their axes, with any run-time sizes. Equations without a contracted label are no matrix products and are not
rewritten, nor are labels repeated in one operand, labels summed only in the constant, or broadcast axes of 1.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from magr_onnx.passes.canonical.batched import stacked
from magr_onnx.passes.canonical.rewriter import MOST_MATRICES, Dims, NodeRewriter, Pattern, Refusal, known, weight
from magr_onnx.report.reasons import Reason


@dataclass(frozen=True, slots=True)
class Labels:
    """An equation of two operands, one letter per axis; axes of an ellipsis are digits."""

    operands: tuple[str, str]
    result: str


def parse(equation: str, ranks: tuple[int, int]) -> Labels:
    """Parse an equation as `numpy.einsum` does, with spaces, an ellipsis, or without a result.

    Raises:
        ValueError: Not an equation of two operands with these ranks.
    """
    terms_text, arrow, result = equation.replace(" ", "").partition("->")
    terms = terms_text.split(",")
    if len(terms) != 2:
        raise ValueError(f"{len(terms)} operands")
    letters = [term.replace("...", "") for term in terms]
    for text in (*letters, result.replace("...", "")):
        if not set(text) <= set(string.ascii_letters):
            raise ValueError(f"{text!r} has more than letters")
    hidden = [rank - len(letters_of) if "..." in term else 0 for term, letters_of, rank in zip(terms, letters, ranks, strict=True)]
    if any(len(letters_of) + h != rank or h < 0 for letters_of, h, rank in zip(letters, hidden, ranks, strict=True)):
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


def rewrite(rewriter: NodeRewriter) -> Refusal | bool | None:
    inputs = list(rewriter.node.inputs)
    constants = [weight(v) for v in inputs]
    if not any(constants):
        return None
    if len(inputs) != 2 or all(constants) or inputs[0] is None or inputs[1] is None:
        return Refusal(Reason.EINSUM, f"{len(inputs)} operands, {sum(c is not None for c in constants)} of them constant")
    side = 0 if constants[0] is not None else 1
    view, right, x = constants[side], inputs[side], inputs[1 - side]
    assert view is not None
    assert right is not None
    assert x is not None
    shape = rewriter.shape(x)
    equation = rewriter.node.attributes["equation"].as_string()
    if shape is None:
        return Refusal(Reason.EINSUM, f"{equation}: the rank of the input is unknown")
    ranks = (len(view.shape), len(shape)) if side == 0 else (len(shape), len(view.shape))
    try:
        labels = parse(equation, ranks)
    except ValueError as error:
        return Refusal(Reason.EINSUM, f"{equation}: {error}")
    of_weight, of_x, result = labels.operands[side], labels.operands[1 - side], labels.result
    dims = dict(zip(of_weight, view.shape, strict=True))
    refused = _refused(of_weight, of_x, result, dims, dict(zip(of_x, map(known, shape), strict=True)))
    if refused is not None:
        return Refusal(refused.reason, f"{equation}: {refused.detail}")

    rows = [c for c in result if c in of_x and c not in of_weight]
    batch = [c for c in result if c in of_x and c in of_weight]
    inner = [c for c in of_weight if c in of_x and c not in result]
    outer = [c for c in result if c in of_weight and c not in of_x]
    e, k, n = (math.prod(dims[c] for c in labels_of) for labels_of in (batch, inner, outer))
    x = rewriter.sum(x, [i for i, c in enumerate(of_x) if c not in result and c not in of_weight])
    of_x = "".join(c for c in of_x if c in result or c in of_weight)
    x = rewriter.transpose(x, [of_x.index(c) for c in (*rows, *batch, *inner)])
    matrices = rewriter.transpose(right, [of_weight.index(c) for c in (*batch, *inner, *outer)])
    x_shape: Dims = rewriter.shape(x) or []
    row_dims, stack = x_shape[: len(rows)], [e] if e > 1 else []
    if not rows and not stack:  # a product of two vectors, or of a vector and a matrix, has one row
        row_dims = [1]
    if (len(batch), len(inner)) != (len(stack), 1) or len(row_dims) > len(rows):
        x = rewriter.reshape(x, [*([0] * len(rows) or [1] * len(row_dims)), *stack, k])
    shape = [*row_dims, *stack, k]
    if stack:
        value = stacked(rewriter, x, shape, len(rows), rewriter.reshape(matrices, (e, k, n)))
    else:
        value = rewriter.product("MatMul", [x, rewriter.reshape(matrices, (k, n))], [*row_dims, n])
    if (len(batch), len(outer)) != (len(stack), 1) or len(row_dims) > len(rows):
        value = rewriter.reshape(value, [*[0] * len(rows), *(dims[c] for c in (*batch, *outer))])
    order = [*rows, *batch, *outer]
    return rewriter.finish(rewriter.transpose(value, [order.index(c) for c in result]))


def _refused(of_weight: str, of_x: str, result: str, dims: dict[str, int], sizes: dict[str, int | None]) -> Refusal | None:
    """Return the reason why labels are not a product with a matrix or a stack of matrices, if so."""
    if len(set(of_weight)) < len(of_weight) or len(set(of_x)) < len(of_x):
        return Refusal(Reason.EINSUM, "a label stands twice in one operand")
    unmatched = [c for c in of_weight if c not in of_x and c not in result]
    if unmatched:
        return Refusal(Reason.EINSUM, f"{', '.join(unmatched)} is summed in the constant alone")
    shared = [c for c in of_weight if c in of_x]
    stretched = [c for c in shared if (dims[c] == 1) != (sizes[c] == 1)]
    if stretched:
        return Refusal(Reason.EINSUM, f"the axis {', '.join(stretched)} is one on a side, and may be stretched")
    if not [c for c in shared if c not in result]:
        return Refusal(Reason.EINSUM, "nothing is summed over")
    count = math.prod(dims[c] for c in shared if c in result)
    if count > MOST_MATRICES:
        return Refusal(Reason.EINSUM, f"a stack of {count} matrices; layers are made of {MOST_MATRICES} at most")
    return None


PATTERN = Pattern("an Einsum", ("Einsum",), rewrite)
