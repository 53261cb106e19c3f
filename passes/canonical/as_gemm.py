"""A MatMul with a bias in an Add: it becomes a Gemm of two axes between Reshapes, one operator whose result is rounded once.

Not a pattern of `magr_onnx.passes.canonical`: only runtimes that round every operator's output gain by it, and int8 files need it
(`magr_onnx.passes.plan.Plan.needs_gemm`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.canonical.rewriter import RewriteContext, known
from magr_onnx.passes.graph.nodes import insert_behind
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weighted import FLOATS


def rewrite(model: ir.Model, layers: Sequence[LinearLayer]) -> None:
    """Rewrite layers of the main graph whose input has a known shape; others stay."""
    context, rows = RewriteContext(model), dict[ir.Value, ir.Value]()
    for layer in layers:
        shape = context.shape(layer.x)
        sizes = None if shape is None else [known(dim) for dim in shape]
        if layer.nested or layer.op != "MatMul" or layer.add is None or sizes is None or None in sizes or len(sizes) < 2:
            continue
        if layer.x not in rows and len(sizes) > 2:
            rows[layer.x] = _rows(layer)
        bias = layer.read_bias()
        assert bias is not None
        x, weight = rows.get(layer.x, layer.x), layer.node.inputs[1]
        vector = layer.constant("_bias", bias.astype(FLOATS[layer.dtype]), layer.name)
        product = ir.node("Gemm", [x, weight, vector], name=layer.name)
        product.metadata_props.update(layer.node.metadata_props)
        if len(sizes) == 2:
            layer.replace([product])
            continue
        result = product.outputs[0]
        result.name, result.dtype, result.shape = (
            f"{layer.output.name}_rows",
            layer.dtype,
            ir.Shape([math.prod(size or 0 for size in sizes[:-1]), layer.n]),
        )
        target = layer.constant("_shape", np.array([*sizes[:-1], layer.n]), layer.name)
        layer.replace([product, ir.node("Reshape", [result, target], name=f"{layer.name}_reshape")])


def _rows(layer: LinearLayer) -> ir.Value:
    """Reshape the input of a layer to two axes, right behind where it comes from."""
    value = ir.val(layer.names.value(f"{layer.x.name}_rows"), layer.dtype)
    target = layer.constant("_rows_shape", np.array([-1, layer.k]), str(layer.x.name))
    node = ir.node("Reshape", [layer.x, target], outputs=[value], name=layer.names.node(f"{layer.x.name}_to_rows"))
    insert_behind(layer.graph, layer.x, node)
    return value
