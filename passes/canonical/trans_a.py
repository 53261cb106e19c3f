"""Gemm that transposes its input: a Transpose and a Gemm that does not."""

from __future__ import annotations

from magr_onnx.passes.canonical.rewriter import NodeRewriter, Pattern, weight


def rewrite(rewriter: NodeRewriter) -> bool | None:
    x, right = rewriter.input(0), rewriter.input(1)
    if x is None or right is None or not rewriter.node.attributes.get_int("transA", 0) or weight(right) is None or weight(x) is not None:
        return None
    addend = [v for v in rewriter.node.inputs[2:] if v is not None]
    attributes = {name: attribute for name, attribute in rewriter.node.attributes.items() if name != "transA"}
    transposed = rewriter.transpose(x, (1, 0))
    return rewriter.finish(rewriter.product("Gemm", [transposed, right, *addend], rewriter.shape(rewriter.node.outputs[0]), attributes))


PATTERN = Pattern("a Gemm that transposes its input", ("Gemm",), rewrite)
