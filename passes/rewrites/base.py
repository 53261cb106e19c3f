"""Base of float-to-float rewrites, which change the graph, exactly in real arithmetic, to make layers easier to quantize.

Rewrites come first in a plan. The rewritten model is calibrated and quantized; validation still compares with the user's.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import onnx_ir as ir

from magr_onnx.core.layer import BiasPolicy
from magr_onnx.core.types import Array, LayerStats, WeightSpec
from magr_onnx.passes.base import InputGrids, ModelPass
from magr_onnx.passes.graph import subgraphs
from magr_onnx.passes.graph.nodes import operator_of
from magr_onnx.passes.layer_state import forget, known_stats
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import FLOATS, sharing

OWN_BITS = "onnx_magr.bits"
"""Key of a node's ``metadata_props`` with the bits of its weight, where a rewrite has set them."""

Groups = Iterable[tuple[Sequence[LinearLayer], Mapping[str, LayerStats]]]


def _no_gradients(model: ir.Model, layers: Sequence[LinearLayer]) -> Mapping[str, Array]:
    del model, layers
    return {}


def _data_free(model: ir.Model, layers: Sequence[LinearLayer]) -> Groups:
    del model
    return [(layers, {})]


class Trial(Protocol):
    """Runs of a float model, which candidates to replace it are compared with."""

    def difference(self, candidate: ir.Model) -> float:
        """Measure the largest difference of a float output, relative to its norm."""
        ...

    def loss(self, candidate: ir.Model) -> float:
        """Measure the loss of a model whose weights are rounded: the less the better, 0 for the float model."""
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """Settings of the run that a rewrite is part of.

    Attributes:
        spec: Grid of weights.
        bias: Policy of the bias compensation.
        activations: Whether layer inputs will be rounded to 8 bits, with one grid per tensor.
        selection: The layers that will be converted.
        statistics: Splits layers into groups, each with the statistics of its inputs, by value name (none without data). Computed on
            demand, by one pass over the calibration data per group.
        trial: Runs a model, for candidates to be compared with; None where models cannot be run.
        gradients: Measures the mean square of the gradients of the model's loss by each row of the weights of layers ``(K,)``, of one
            sample each and summed over columns, up to a factor; by layer name, of those that have gradients. None have any without data.
        spill: Takes new weights of a model out of memory, where it is large.
    """

    spec: WeightSpec = field(default_factory=WeightSpec)
    bias: BiasPolicy | None = None
    activations: bool = False
    selection: Selection = ALL
    statistics: Callable[[ir.Model, Sequence[LinearLayer]], Groups] = _data_free
    trial: Callable[[ir.Model], Trial] | None = None
    gradients: Callable[[ir.Model, Sequence[LinearLayer]], Mapping[str, Array]] = _no_gradients
    spill: Callable[[ir.Model], None] = lambda _: None

    def layers(self, model: ir.Model) -> list[LinearLayer]:
        """Select the layers that will be converted, except those in bodies (a rewrite would change values captured elsewhere) and those
        that share their weight (which would be stored once for each).
        """
        layers, _ = find(model, self.selection)
        shared = sharing(layers)
        return [layer for layer in layers if not layer.nested and layer.name not in shared]

    def with_statistics(self, model: ir.Model, layers: Sequence[LinearLayer]) -> Iterator[tuple[LinearLayer, LayerStats]]:
        """Yield layers with the statistics of their inputs, measured in groups that fit memory."""
        for group, stats in self.statistics(model, layers):
            for layer in group:
                yield layer, stats.get(layer.reads) or LayerStats.data_free(layer.k)


@dataclass(frozen=True)
class Rewrite(ModelPass):
    """A pass that changes the float graph once, before layers are quantized."""

    slot: ClassVar[str] = "rewrites"
    equalizes: ClassVar[bool] = False
    """Whether scales move between channels: those between convolutions may, too."""
    input_grids: ClassVar[InputGrids | None] = None
    """Kind of grids of layer inputs that the rewrite needs; None for any, including float inputs."""

    @property
    def silent(self) -> bool:
        """Whether there is nothing to say where it changes nothing, because nobody asked for it."""
        return False

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        """Change ``model`` in place; return notes for the report on the changes, or on why there are none; none without either."""

    def change(self, model: ir.Model) -> bool:
        """Rewrite for the default grid, with the statistics attached to layers.

        Statistics describe the old graph, so a changed graph loses them; collect them again afterwards.
        """
        stats = known_stats(model)
        notes = self.rewrite(model, Context(statistics=lambda _, layers: [(layers, stats)]))
        if notes:
            forget(model)
        return bool(notes)


def remember(layer: LinearLayer) -> None:
    """Store the names of a layer at its node, so that patterns match it after it is renamed."""
    subgraphs.remember(layer.node, layer.name, layer.weight_name)


def add_product(layer: LinearLayer, x: ir.Value, weight: Array, suffix: str, integer: bool, bits: int | None = None) -> None:
    """Replace the output ``y`` of a layer by ``y + x W``, with a new layer of ``weight (K, N)`` that patterns match by the old names.

    The new layer has so many ``bits`` (`own_bits`), or as many as others.

    On two axes onnxruntime merges MatMul and Add, and Gemm and Sum, into one Gemm, a float one with a float addend. The sum therefore uses
    the other operator: Add if both stay Gemm (``integer`` formats only), else Sum.
    """
    remember(layer)
    name, y = layer.output.name, layer.output
    constant = layer.constant(suffix, weight.astype(FLOATS[layer.dtype]))
    product = ir.node(layer.op, [x, constant], name=layer.names.node(f"{layer.name}{suffix}"))
    product.metadata_props.update(layer.node.metadata_props)
    if bits is not None:
        product.metadata_props[OWN_BITS] = str(bits)
    addend = product.outputs[0]
    addend.dtype, addend.shape = layer.dtype, y.shape
    total = layer.add_to_output("Add" if integer and layer.op == "Gemm" else "Sum", addend, f"_before{suffix}", f"{layer.name}{suffix}_sum")
    addend.name = layer.names.value(f"{name}{suffix}")
    layer.graph.insert_before(total, product)


def own_bits(layer: LinearLayer) -> int | None:
    """Return the bits that a rewrite has given a layer; None for those of the run."""
    bits = layer.node.metadata_props.get(OWN_BITS)
    return None if bits is None else int(bits)


def operator(value: ir.Value) -> str:
    """Name the operator that computes a value, as `operator_of` does; empty for none."""
    node = value.producer()
    return "" if node is None else operator_of(node)
