"""Salient inputs in 8 bits: a layer becomes the sum of one in few bits and a narrow one in 8, for the inputs that matter most.

    x W + b = (x W' + b) + x[S] W[S],      W' = W with zeros in the rows S.

GWQ (arXiv 2411.00850) keeps the weights with the largest gradients in more bits. Scattered weights have no kernel in onnxruntime; whole
rows of W, which are inputs of the layer, do: a Gather and a second product. The rows chosen are those that cost the most to round,

    s_k = E[sum_n G_kn^2] sum_n (W - round(W))_kn^2,

with G the gradient of the loss by the weight in one sample (the diagonal of `magr_onnx.core.adaptive_hessian.AdaptiveHessian`) and rounding
to nearest on the grid of the run. Both products are then solved like any layer.

Deviations from the paper: rows, not single weights; the rounding error of a row counts too, not its gradients alone; 8 bits, not 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.errors import listed
from magr_onnx.passes.rewrites.base import Context, Rewrite, add_product

BITS = 8
STEP = 16  # inputs: the shortest block that kernels have


def saliency(weights: Array, gradients: Array, spec: WeightSpec) -> Array:
    """Return what rounding each row of ``weights (K, N)`` would cost, ``(K,)``; ``gradients (K,)`` are their mean squares by row."""
    rounded = rtn.quantize(weights, np.ones(len(weights)), spec).dequantize()
    result: Array = gradients * np.square(weights - rounded, dtype=np.float64).sum(axis=1)
    return result


def count_of(k: int, fraction: float) -> int:
    """Return how many of ``k`` inputs a fraction stands for: a multiple of `STEP`, 0 where that is nearest."""
    return STEP * round(fraction * k / STEP)


def most_salient(scores: Array, count: int) -> npt.NDArray[np.int64]:
    """Return the positions of the ``count`` largest scores, in rising order."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


@dataclass(frozen=True)
class SplitSalient(Rewrite):
    """Multiply the most salient inputs of every layer by weights of 8 bits.

    Gradients are those of a whole run: the pass by itself changes nothing.

    Attributes:
        fraction: Of a layer's inputs, above 0 and at most 0.5; rounded to multiples of `STEP` inputs, which may be none.
    """

    name: ClassVar[str] = "split-salient"
    summary: ClassVar[str] = "multiply the inputs with the largest gradients by weights of 8 bits, in a second product (GWQ)"

    fraction: float = 0.05

    def problems(self, spec: WeightSpec | None) -> list[str]:
        del spec
        return [] if 0 < self.fraction <= 0.5 else [f"{self.name}: fraction={self.fraction:g} must be above 0 and at most 0.5"]

    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        layers = context.layers(model)
        if context.spec.bits >= BITS:
            return [f"{self.name} changed nothing: all weights have {context.spec.bits} bits"]
        chosen = [layer for layer in layers if count_of(layer.k, self.fraction)]
        gradients = context.gradients(model, chosen)
        unreached = [layer.name for layer in chosen if layer.name not in gradients]
        names, weights, extra = list[str](), 0, 0
        for layer in chosen:
            if layer.name not in gradients:
                continue
            matrix = layer.read()
            rows = most_salient(saliency(matrix, gradients[layer.name], context.spec), count_of(layer.k, self.fraction))
            salient = matrix[rows]
            matrix[rows] = 0
            index = layer.constant("_salient_inputs", rows)
            gather = ir.node("Gather", [layer.x, index], {"axis": -1}, name=layer.names.node(f"{layer.name}_salient_gather"))
            gather.outputs[0].name = layer.names.value(f"{layer.name}_salient_x")
            gather.outputs[0].dtype = layer.dtype
            layer.graph.insert_before(layer.node, gather)
            add_product(layer, gather.outputs[0], salient, "_salient", context.activations, bits=BITS)
            layer.write(matrix, None)
            names.append(layer.name)
            weights, extra = weights + matrix.size, extra + salient.size
        notes = []
        if names:
            share = extra / weights
            notes.append(
                f"{self.name}: {len(names)} of {len(layers)} layers have a second product of {BITS} bits ({listed(names)}), for "
                f"{share:.1%} of their weights: {share * BITS:.2f} more bits a weight, without scales"
            )
        if unreached:
            notes.append(f"{self.name}: no gradients for {listed(unreached)}, which stay whole")
        return notes
