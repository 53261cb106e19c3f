"""Gemm whose addend is not a constant vector: ``alpha A B + beta C`` becomes a Gemm without C, a Mul by beta, and an Add.

C may be a matrix ``(M, N)``, a column ``(M, 1)``, or computed at run time; the product is a layer in any case.
"""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern, weight
from magr_onnx.passes.graph.constants import constant_view


def rewrite(rewriter: NodeRewriter) -> bool | None:
    a, b, c = (rewriter.input(i) for i in range(3))
    right = weight(b)
    if a is None or b is None or c is None or right is None or weight(a) is not None or _is_vector(rewriter, right.shape):
        return None
    attributes = {name: attribute for name, attribute in rewriter.node.attributes.items() if name != "beta"}
    product = rewriter.product("Gemm", [a, b], rewriter.shape(rewriter.node.outputs[0]), attributes)
    return rewriter.finish(rewriter.plus(product, c, rewriter.node.attributes.get_float("beta", 1.0)))


def _is_vector(rewriter: NodeRewriter, shape: tuple[int, ...]) -> bool:
    """Return whether the addend is a constant that fits the layer's bias."""
    addend = constant_view(rewriter.input(2))
    if len(shape) != 2:
        return True  # an invalid Gemm, which `find` skips
    n = shape[0 if rewriter.node.attributes.get_int("transB", 0) else -1]
    if addend is None or addend.overridable:
        return False
    return all(d == 1 for d in addend.shape[:-1]) and addend.shape[-1:] in ((), (1,), (n,))


PATTERN = Pattern("a Gemm that adds a matrix", ("Gemm",), rewrite)
