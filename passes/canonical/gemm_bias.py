"""Gemm whose addend is no constant vector: ``alpha A B + beta C`` as a Gemm without it, a Mul by beta, and an Add.

C may be a matrix ``(M, N)``, a column ``(M, 1)``, or computed at run time; the product is a layer either way.
"""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import Edit, Form, weight
from magr_onnx.passes.graph.constants import constant_view


def rewrite(edit: Edit) -> bool | None:
    a, b, c = (edit.input(i) for i in range(3))
    right = weight(b)
    if a is None or b is None or c is None or right is None or weight(a) is not None or _is_vector(edit, right.shape):
        return None
    attributes = {name: attribute for name, attribute in edit.node.attributes.items() if name != "beta"}
    product = edit.product("Gemm", [a, b], edit.shape(edit.node.outputs[0]), attributes)
    return edit.finish(edit.plus(product, c, edit.real("beta")))


def _is_vector(edit: Edit, shape: tuple[int, ...]) -> bool:
    """Whether the addend is a constant the layer can have for its bias."""
    found = constant_view(edit.input(2))
    if len(shape) != 2:
        return True  # no Gemm: `find` says so
    n = shape[0 if edit.integer("transB") else -1]
    return found is not None and not found.overridable and all(d == 1 for d in found.shape[:-1]) and found.shape[-1:] in ((), (1,), (n,))


FORM = Form("a Gemm that adds a matrix", ("Gemm",), rewrite)
