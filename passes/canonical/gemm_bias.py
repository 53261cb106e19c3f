"""Gemm whose addend is no constant vector: ``alpha A B + beta C`` as a Gemm without it, a Mul by beta, and an Add.

C may be a matrix ``(M, N)``, a column ``(M, 1)``, or computed at run time; the product is a layer either way. Where the constant is on the
left, C comes off in any case: that form has no place for it.
"""

from __future__ import annotations

from magr_onnx.passes.canonical.edit import Edit, Form, weight
from magr_onnx.passes.constants import held


def rewrite(edit: Edit) -> bool | None:
    a, b, c = (edit.input(i) for i in range(3))
    if a is None or b is None or c is None:
        return None
    right = weight(b)
    if right is None and weight(a) is None:
        return None
    if right is not None and _is_vector(edit, right.shape):
        return None
    attributes = {name: attribute for name, attribute in edit.node.attributes.items() if name != "beta"}
    product = edit.product("Gemm", [a, b], edit.shape(edit.node.outputs[0]), attributes)
    beta = edit.real("beta")
    return edit.finish(edit.add(product, edit.scaled(c, beta))) if beta else edit.finish(product)


def _is_vector(edit: Edit, shape: tuple[int, ...]) -> bool:
    """Whether the addend is a constant the layer can have for its bias."""
    found = held(edit.input(2))
    n = shape[0 if edit.integer("transB") else -1]
    return found is not None and not found.overridable and all(d == 1 for d in found.shape[:-1]) and found.shape[-1:] in ((), (1,), (n,))


FORM = Form("a Gemm that adds a matrix", ("Gemm",), rewrite)
