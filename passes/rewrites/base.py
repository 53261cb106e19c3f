"""The base of float-to-float rewrites: graphs changed before layers are looked for, exactly in real arithmetic.

A rewrite makes layers easier to quantize. The rewritten model is the one that is calibrated and quantized; validation still compares with
the user's. Rewrites come first in a plan.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import BiasPolicy
from magr_onnx.core.types import Array, LayerStats, WeightSpec
from magr_onnx.passes.base import InputGrids, ModelPass
from magr_onnx.passes.graph import subgraphs
from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.layer_state import forget, known_stats
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer, find
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.shared import sharing

Groups = Iterable[tuple[Sequence[LinearLayer], Mapping[str, LayerStats]]]


def _data_free(model: ir.Model, layers: Sequence[LinearLayer]) -> Groups:
    del model
    return [(layers, {})]


@dataclass(frozen=True, slots=True)
class Context:
    """What a rewrite may ask of the run it is part of.

    Attributes:
        spec: The grid weights will be put on.
        bias: Policy of the bias compensation that will follow.
        activations: Whether layer inputs will be rounded to 8 bits, one grid a tensor.
        selection: The layers that will be converted.
        statistics: Groups of layers, each with the statistics of what its layers read, by value name (none without data). Gathered only
            when asked for: a pass over the calibration data a group.
    """

    spec: WeightSpec = field(default_factory=WeightSpec)
    bias: BiasPolicy | None = None
    activations: bool = False
    selection: Selection = ALL
    statistics: Callable[[ir.Model, Sequence[LinearLayer]], Groups] = _data_free

    def layers(self, model: ir.Model) -> list[LinearLayer]:
        """The layers of ``model`` that will be converted, but for those in bodies (a rewrite would change what is captured elsewhere) and
        those that share their weight (it would be stored once for each).
        """
        layers, _ = find(model, self.selection)
        shared = sharing(layers)
        return [layer for layer in layers if not layer.nested and layer.name not in shared]

    def measured(self, model: ir.Model, layers: Sequence[LinearLayer]) -> Iterator[tuple[LinearLayer, LayerStats]]:
        """``layers`` with the statistics of what they read, gathered in groups that fit memory."""
        for group, stats in self.statistics(model, layers):
            for layer in group:
                yield layer, stats.get(layer.reads) or LayerStats.data_free(layer.k)


@dataclass(frozen=True)
class Rewrite(ModelPass):
    """A pass that changes the float graph once, before layers are treated."""

    slot: ClassVar[str] = "rewrites"
    input_grids: ClassVar[InputGrids | None] = None
    """The only grids of layer inputs that the rewrite is for; None where it is for any, and for float inputs."""

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: Context) -> list[str]:
        """Change ``model`` in place; sentences for the report on what was changed, none if nothing was."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Alone, or in a sequence of passes: for the default grid, with the statistics layers have.

        Statistics describe the graph as it was, so a graph that changed loses them: rewrite first, then gather them again.
        """
        Names.rescan(model.graph)
        known = known_stats(model)
        notes = self.rewrite(model, Context(statistics=lambda _, layers: [(layers, known)]))
        if notes:
            forget(model)
        return ir.passes.PassResult(model, bool(notes))


def remember(layer: LinearLayer) -> None:
    """Keep the names of a layer at its node, so that patterns find it under new ones."""
    subgraphs.remember(layer.node, layer.name, layer.weight_name)


def add_product(layer: LinearLayer, x: ir.Value, weight: Array, suffix: str, integer: bool) -> None:
    """Make ``y`` of a layer ``y + x W``, with a new layer of ``weight (K, N)`` that is named after it and found by its names.

    On two axes onnxruntime makes one Gemm of MatMul and Add, and of Gemm and Sum. With a float addend that would be a Gemm of floats, so
    the two are added by the other operator: by Add where both stay Gemm (``integer`` formats only), else by Sum.
    """
    remember(layer)
    graph, last, y = layer.graph, layer.add or layer.node, layer.output
    constant = layer.constant(suffix, weight.astype(FLOATS[layer.dtype]))
    product = ir.node(layer.op, [x, constant])
    product.metadata_props.update(layer.node.metadata_props)
    total = ir.node("Add" if integer and layer.op == "Gemm" else "Sum", [y, product.outputs[0]])
    result = total.outputs[0]
    result.dtype, result.shape = product.outputs[0].dtype, product.outputs[0].shape = layer.dtype, y.shape
    for user, index in [(use.node, use.idx) for use in y.uses() if use.node is not total]:
        user.replace_input_with(index, result)
    for i, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[i] = result
    result.name, y.name = y.name, layer.names.value(f"{y.name}_before{suffix}")
    product.outputs[0].name = layer.names.value(f"{result.name}{suffix}")
    product.name, total.name = layer.names.node(f"{layer.name}{suffix}"), layer.names.node(f"{layer.name}{suffix}_sum")
    graph.insert_after(last, [product, total])


def scalar(layer: LinearLayer, name: str, value: float) -> ir.Value:
    """A constant of the layer's type."""
    return layer.constant("", np.asarray(value, FLOATS[layer.dtype]), base=name)


def operator(value: ir.Value) -> str:
    """The operator that makes a value, with its domain where that is not ONNX's: ``Mul``, ``com.microsoft.Gelu``; empty for none."""
    node = value.producer()
    return "" if node is None else f"{node.domain}.{node.op_type}".removeprefix(".").removeprefix("ai.onnx.")
