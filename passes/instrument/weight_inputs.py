"""Copies of a model with weights and biases as inputs: one session for any weights.

Every layer becomes ``MatMul(X, W) -> Add(b)`` with ``W (K, N)`` and ``b (N,)`` initializers that are graph inputs too, so onnxruntime
falls back to the model's values. Layers that share a weight get separate inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.weighted import FLOATS


@dataclass(frozen=True, slots=True)
class WeightInputs:
    """The inputs that replace one layer's weight and bias."""

    weight: str
    bias: str
    dtype: ir.DataType

    def feeds(self, weight: Array, bias: Array | None) -> Mapping[str, Array]:
        """Return the feeds for an effective weight ``(K, N)`` and bias ``(N,)``; None for a zero bias."""
        kind = FLOATS[self.dtype]
        values = np.zeros(weight.shape[1]) if bias is None else bias
        return {self.weight: weight.astype(kind), self.bias: np.asarray(values).astype(kind)}


def with_weight_inputs(model: ir.Model, names: Iterable[str]) -> tuple[ir.Model, dict[str, WeightInputs]]:
    """Copy the model; return the copy and the inputs of the layers called ``names``."""
    copy = model.clone()
    selected = set(names)
    inputs = {}
    for layer in find(copy)[0]:
        if layer.name in selected:
            inputs[layer.name] = _expose(layer)
    return copy, inputs


def _expose(layer: LinearLayer) -> WeightInputs:
    kind = FLOATS[layer.dtype]
    stored = layer.read_bias()
    bias = layer.constant("_free_bias", (np.zeros(layer.n) if stored is None else stored).astype(kind))
    weight = layer.constant("_free", layer.read().astype(kind))
    product = ir.node("MatMul", [layer.x, weight], name=f"{layer.name}_free")
    inner = product.outputs[0]
    inner.name, inner.dtype, inner.shape = f"{layer.output.name}_product", layer.dtype, layer.output.shape
    root = layer.root
    layer.replace([product, ir.node("Add", [inner, bias], name=f"{layer.name}_free_bias")])
    root.inputs.extend([weight, bias])
    return WeightInputs(str(weight.name), str(bias.name), layer.dtype)
