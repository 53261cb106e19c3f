"""Activation-aware equalization: channels that matter are scaled up before rounding, at no cost at inference.

For a value ``x`` and positive ``s (K,)``, ``x W = (x / s) (diag(s) W)``. Where what makes ``x`` can take ``1 / s`` into its constants,
scaling between the channels is free. It moves rounding error away from the rows of W that strong inputs multiply (AWQ, Lin et al., arXiv
2306.00978), and outliers out of inputs that will be rounded with one range a tensor (SmoothQuant, Xiao et al., arXiv 2211.10438).

The scales are those AWQ searches, of one exponent ``a`` from 0 to 1, with and without the magnitude of the weights:

    s_k = rms(x_k)^a        or        s_k = rms(x_k)^a / mean_n(|W_kn|)^(1 - a),

normalised to a geometric mean of 1. The ones of least error are taken, of all readers together, rounded to nearest on the asked grid,

    sum over readers of   tr(D^T H D) (+ Delta^2 / 12 ||diag(s) W||^2),      D = diag(s)^-1 RTN(diag(s) W) - W,

and nothing is changed where none saves 2%. The second term is there for 8-bit inputs only: the noise of a grid over four standard
deviations of the strongest channel, ``Delta = 8 max_k(rms(x_k) / s_k) / 255``.

1. Every reader of ``x`` must be a linear layer that will be converted, and ``x`` no output of the graph: a reader left alone would see
   ``x / s``.
2. ``1 / s`` goes into: scale and bias of LayerNormalization, scale of RMSNormalization and SimplifiedLayerNormalization; a constant vector
   that is multiplied or added last (decomposed norms); columns and bias of a linear layer. It passes through Relu and LeakyRelu, and
   through a product of two activations (the gate of a gated unit) on one side, as long as nothing else reads what is between.
3. A linear layer that takes ``1 / s`` rounds no worse for it: its grids are a column's own.
4. A layer whose result is an output of the graph is left as it is, and so is what it reads (AWQ, too, leaves the head of a language model
   alone): the squared error is not what counts there. A softmax behind it is blind to a shift of all logits; on the bundled model, 40% less
   error of the logits came with 4% more perplexity.

Deviations from AWQ: root mean squares instead of mean magnitudes (they are what H holds), the whole H instead of sampled inputs, at most
`COLUMNS` columns of a layer in the search, no clipping search (the grid is searched anyway).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import absorbs_mean
from magr_onnx.core.linalg import layer_error
from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import Array, LayerStats, WeightSpec
from magr_onnx.passes.graph.constants import drop_if_unused
from magr_onnx.passes.graph.names import add_initializer
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer, view
from magr_onnx.passes.rewrites.base import Context, Rewrite, operator, remember

EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
GAIN = 0.98
COLUMNS = 256
LARGEST = 1000.0  # of s and 1 / s, so that half precision keeps its digits

_SCALED_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "com.microsoft.SimplifiedLayerNormalization": (1,),
}


@dataclass(frozen=True, slots=True)
class Fold:
    """A place that can take a factor a channel: a constant input of a node, or a linear layer."""

    node: ir.Node
    index: int | None = None

    def divide(self, s: Array) -> None:
        """Take ``1 / s``."""
        if self.index is None:
            layer = view(self.node)  # a fresh view: the layer's own input may have been scaled before
            assert isinstance(layer, LinearLayer)
            remember(layer)
            bias = layer.read_bias()
            layer.write((layer.read() / s).astype(np.float32), None if bias is None else bias / s)
            return
        old = self.node.inputs[self.index]
        assert old is not None
        assert old.const_value is not None
        graph, array = self.node.graph, old.const_value.numpy()
        assert isinstance(graph, ir.Graph)
        new = add_initializer(graph, f"{old.name}_equalized", (array.astype(np.float64) / s).astype(array.dtype))
        self.node.replace_input_with(self.index, new)
        drop_if_unused(old)


def folds(value: ir.Value, k: int, layers: dict[int, LinearLayer]) -> list[Fold] | None:
    """Where ``value (..., K)`` can be divided by a positive vector, or None where it cannot.

    ``layers`` are the linear layers of the graph, by the identity of the value they put out.
    """
    node, kind = value.producer(), operator(value)
    if node is None or node.outputs[0] is not value:
        return None
    if id(value) in layers:
        return [Fold(layers[id(value)].node)] if layers[id(value)].n == k else None
    if kind in _SCALED_NORMS:
        places = [i for i in _SCALED_NORMS[kind] if i < len(node.inputs) and node.inputs[i] is not None]
        return [Fold(node, i) for i in places] if all(_is_vector(node.inputs[i], k) for i in places) else None
    if kind in ("Relu", "LeakyRelu"):
        return _behind(node.inputs[0], k, layers)
    if kind in ("Mul", "Add") and len(node.inputs) == 2:
        left, right = node.inputs
        for constant, i, other in ((right, 1, left), (left, 0, right)):
            if _is_vector(constant, k):
                if kind == "Mul":
                    return [Fold(node, i)]
                rest = _behind(other, k, layers)
                return None if rest is None else [Fold(node, i), *rest]
        if kind == "Mul":
            return _behind(right, k, layers) or _behind(left, k, layers)
    return None


def _behind(value: ir.Value | None, k: int, layers: dict[int, LinearLayer]) -> list[Fold] | None:
    """`folds` of a value that nothing but the node in front of it may read."""
    if value is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    return folds(value, k, layers)


def _is_vector(value: ir.Value | None, k: int) -> bool:
    """Whether a value is a constant of one element a channel, in a type that is written back."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    shape = [int(d) for d in value.const_value.shape.numpy()]
    return bool(shape) and shape[-1] == k and all(d == 1 for d in shape[:-1]) and value.const_value.dtype in FLOATS


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scales ``(K,)`` of a value (None for none that help), and the error with them over that without."""

    scales: Array | None
    ratio: float


def search(weights: Sequence[Array], stats: LayerStats, centred: Sequence[bool], spec: WeightSpec, activations: bool = False) -> Scaling:
    """The best scales for all ``weights (K, N_i)`` that one value is multiplied by; see the module.

    Args:
        weights: Of every reader.
        stats: Of the value.
        centred: For every reader, whether a bias will absorb its mean error.
        spec: The grid.
        activations: Whether the value will be rounded to 8 bits.
    """
    power = np.sqrt(np.maximum(stats.gram.diagonal(), 0))
    strength = _normalised(power)
    size = _normalised(np.concatenate([np.abs(w).mean(axis=1, keepdims=True, dtype=np.float64) * w.shape[1] for w in weights], 1).sum(1))
    tried = [np.ones(len(power)), 1 / size, *(strength**a for a in EXPONENTS), *(strength**a / size ** (1 - a) for a in EXPONENTS)]
    tried = [np.clip(s, 1 / LARGEST, LARGEST).astype(np.float32) for s in tried]
    sampled = [w[:, np.unique(np.linspace(0, w.shape[1] - 1, COLUMNS).astype(int))] for w in weights]
    errors = np.zeros(len(tried))
    for i, s in enumerate(tried):
        step = 8 * float((power / s).max()) / 255 if activations else 0.0
        for whole, w, c in zip(weights, sampled, centred, strict=True):
            gram, scaled = stats.objective_gram(c), w * s[:, None]
            rounded = rtn.quantize(scaled, gram.diagonal() / np.square(s, dtype=np.float64), spec).dequantize() / s[:, None]
            noise = step**2 / 12 * float(np.square(scaled, dtype=np.float64).sum())
            errors[i] += (layer_error(rounded.astype(np.float64) - w, gram) + noise) * whole.shape[1] / w.shape[1]
    best = int(np.argmin(errors))
    if errors[best] >= GAIN * errors[0]:
        return Scaling(None, 1.0)
    return Scaling(tried[best], float(errors[best] / errors[0]))


def _normalised(magnitudes: Array) -> Array:
    """Magnitudes with a geometric mean of 1; zeros (dead inputs, empty rows) count as 1 first."""
    positive = np.where(magnitudes > 0, magnitudes, 1.0)
    result: Array = positive / np.exp(np.log(positive).mean())
    return result


@dataclass(frozen=True)
class Equalize(Rewrite):
    """Scale the channels of values that only layers read, and take the scales back where the values are made."""

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "move scales between channels from layers into what makes their inputs (AWQ, SmoothQuant), where that is free"

    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        found = list(candidates(model, context))
        folded = {id(readers[0].x): places for readers, places in found}
        together = {id(readers[0].x): readers for readers, _ in found}
        ratios: list[float] = []
        for layer, stats in context.measured(model, [layer for readers, _ in found for layer in readers]):
            readers = together.pop(id(layer.x), None)
            if readers is None or stats.is_data_free:  # treated with the reader before, or nothing is known
                continue
            fresh = [v for r in readers if isinstance(v := view(r.node), LinearLayer)]
            centred = [absorbs_mean(context.bias, r.has_bias) for r in fresh]
            best = search([r.read() for r in fresh], stats, centred, context.spec, context.activations)
            if best.scales is None:
                continue
            ratios.append(best.ratio)
            for place in folded[id(layer.x)]:
                place.divide(best.scales)
            for reader in fresh:
                remember(reader)
                reader.write(reader.read() * best.scales[:, None], None)
        if not ratios:
            return []
        left = f"{np.mean(ratios):.0%} of its error when rounded to nearest is left on average, {min(ratios):.0%} at best"
        return [f"equalize: scaled {len(ratios)} of {len(found)} values; {left}"]


def candidates(model: ir.Model, context: Context) -> Iterator[tuple[list[LinearLayer], list[Fold]]]:
    """Readers of every value that can be scaled, and where."""
    converted = context.layers(model)
    layers = {id(layer.output): layer for layer in Context().layers(model)}
    seen: set[int] = set()
    for layer in converted:
        x = layer.x
        readers = [other for other in converted if other.x is x]
        whole = len(list(x.uses())) == len(readers) and not x.is_graph_output() and not x.is_graph_input()
        if id(x) in seen or not whole or any(reader.output.is_graph_output() for reader in readers):
            continue
        seen.add(id(x))
        places = folds(x, layer.k, layers)
        if places is not None:
            yield readers, places
