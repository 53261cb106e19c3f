"""Copies of a model whose quantized layers have factors on their scales as inputs, to differentiate by.

A layer with the dequantized weight ``W (K, N)``, of G groups a column, becomes

    Y = X (W * E r) + b,      E (K, G): which group a row is in,      r (G, N), all ones,

or ``Y = (X W) r + b`` with one group a column. ``r`` is an initializer that is a graph input too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.passes.graph.opset import raise_opset
from magr_onnx.passes.layers.linear import LinearLayer, find

OPSET = 13  # from which Slice and ReduceSum take their axes as inputs


def with_scale_inputs(
    model: ir.Model, solution_of: Callable[[LinearLayer], LayerSolution | None], tuned: Collection[str]
) -> tuple[ir.Model, dict[str, str]]:
    """Copy a float model, with the weights of solutions, and return the inputs with the factors ``(G, N)`` of the layers ``tuned``.

    Args:
        model: The model; the copy has opset 13 at least.
        solution_of: Returns the solution of a linear layer; None for one that stays as it is.
        tuned: Names of float32 layers with quantized weights.
    """
    copy = model.clone()
    raise_opset(copy, OPSET)
    inputs = {}
    for layer in find(copy)[0]:
        solution = solution_of(layer)
        if solution is not None and layer.name in tuned:
            inputs[layer.name] = _expose(layer, solution)
        elif solution is not None:
            layer.write(solution.weight, solution.bias)
    return copy, inputs


def _expose(layer: LinearLayer, solution: LayerSolution) -> str:
    quantized, k = solution.quantized, layer.k
    assert quantized is not None
    groups = len(quantized.scales)
    factors = layer.constant("_factors", np.ones((groups, layer.n), np.float32))
    weight = layer.constant("_dequantized", quantized.dequantize())
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], suffix: str, **attributes: int) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes, name=f"{layer.name}_{suffix}"))
        value = nodes[-1].outputs[0]
        value.name = f"{layer.output.name}_{suffix}"
        return value

    if groups == 1:
        product = add("Mul", [add("MatMul", [layer.x, weight], "product"), factors], "scaled")
    else:
        membership = np.eye(groups, dtype=np.float32)[quantized.spec.group_of_row(k)]
        spread = add("MatMul", [layer.constant("_membership", membership), factors], "spread")
        scaled = add("Mul", [weight, spread], "weight")
        rows = add("Reshape", [layer.x, layer.constant("_rows", np.array([-1, k]))], "rows")  # one product of all samples
        extent = add("Shape", [layer.x], "extent")
        ends = [layer.constant(f"_{name}", np.array([at])) for name, at in (("first", 0), ("last", -1))]
        shape = add("Concat", [add("Slice", [extent, *ends], "outer"), layer.constant("_width", np.array([layer.n]))], "shape", axis=0)
        product = add("Reshape", [add("MatMul", [rows, scaled], "product"), shape], "unflattened")
    root = layer.root
    if solution.bias is not None:
        add("Add", [product, layer.constant("_bias", solution.bias.astype(np.float32))], "sum")
    layer.replace(nodes)
    root.inputs.append(factors)
    return str(factors.name)
