"""Gemm that transposes its input: a Transpose and a Gemm that does not."""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import Edit, Form, weight


def rewrite(edit: Edit) -> bool | None:
    x, right = edit.input(0), edit.input(1)
    if x is None or right is None or not edit.integer("transA") or weight(right) is None or weight(x) is not None:
        return None
    rest = [v for v in edit.node.inputs[2:] if v is not None]
    attributes = {name: attribute for name, attribute in edit.node.attributes.items() if name != "transA"}
    turned = edit.transpose(x, (1, 0))
    return edit.finish(edit.product("Gemm", [turned, right, *rest], edit.shape(edit.node.outputs[0]), attributes))


FORM = Form("a Gemm that transposes its input", ("Gemm",), rewrite)
