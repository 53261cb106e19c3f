"""A copy of a model whose layers take their weights and biases from the caller: one session, any weights.

Every layer becomes ``MatMul(X, W) -> Add(b)`` with ``W (K, N)`` and ``b (N,)`` initializers that are graph inputs too, so that onnxruntime
uses the model's own values wherever a caller feeds none. Layers that share a weight get one each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer, find


@dataclass(frozen=True, slots=True)
class Slot:
    """The inputs that replace one layer's weight and bias."""

    weight: str
    bias: str
    dtype: ir.DataType

    def feeds(self, weight: Array, bias: Array | None) -> Mapping[str, Array]:
        """What to feed for an effective weight ``(K, N)`` and bias ``(N,)``, None for zero."""
        kind = FLOATS[self.dtype]
        values = np.zeros(weight.shape[1]) if bias is None else bias
        return {self.weight: weight.astype(kind), self.bias: np.asarray(values).astype(kind)}


def overridable(model: ir.Model, names: Iterable[str]) -> tuple[ir.Model, dict[str, Slot]]:
    """The copy, and the slots of the layers called ``names``."""
    copy = model.clone()
    wanted = set(names)
    slots = {}
    for layer in find(copy)[0]:
        if layer.name in wanted:
            slots[layer.name] = _open(layer)
    return copy, slots


def _open(layer: LinearLayer) -> Slot:
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
    return Slot(str(weight.name), str(bias.name), layer.dtype)
