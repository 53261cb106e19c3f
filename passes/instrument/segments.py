"""Segmentation of a graph for staged calibration.

The *level* of a value is the number of layers on the longest path to it from the model's inputs. Layers whose inputs have level ``s`` form
stage ``s``: all their inputs are known once the earlier stages are quantized. Segment ``s`` computes the values of level ``s`` from those
of lower levels. Stages follow from the graph alone, with any residuals, branches and shared inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.nodes import layer_name, only_use
from magr_onnx.passes.graph.subgraphs import bodies_of
from magr_onnx.passes.layers.weighted import Product, WeightedNode, sharing

_CONTAINERS = ("SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap", "SplitToSequence", "Optional")
_SUMS = {("", "Add"), ("com.microsoft", "SkipLayerNormalization"), ("com.microsoft", "SkipSimplifiedLayerNormalization")}
_ROUNDING = ("Identity", "QuantizeLinear", "DequantizeLinear")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")

P = TypeVar("P", bound=WeightedNode)


@dataclass(frozen=True, slots=True)
class Segments(Generic[P]):
    """Stages of layers and the values between them.

    Attributes:
        stages: Layers by stage, in order.
        live: For every segment, the names of the values that later segments read, including the inputs of the stage.
    """

    stages: tuple[tuple[P, ...], ...]
    live: tuple[tuple[str, ...], ...]


def segments_of(model: ir.Model, layers: Sequence[P]) -> Segments[P]:
    """Assign ``layers`` to stages; layers of one stage may be quantized in any order."""
    layer_nodes = {id(layer.node) for layer in layers}
    level: dict[str, int] = dict.fromkeys(fed_inputs(model), 0)
    last_read: dict[str, int] = {}
    constants: set[str] = set()  # computed from constants: every segment recomputes them, and quantized weights leave the model
    for node in model.graph:
        names = [name for name in reads(node) if name in level]
        if constants.issuperset(names) and node.op_type not in _RANDOM:
            constants.update(str(v.name) for v in node.outputs)
        at = max((level[name] for name in names), default=0) + (id(node) in layer_nodes)
        for name in names:
            last_read[name] = max(last_read.get(name, 0), at)
        level.update({str(v.name): at for v in node.outputs})
    count = 1 + max((level[str(layer.x.name)] for layer in layers), default=-1)
    stages = tuple(tuple(layer for layer in layers if level[str(layer.x.name)] == s) for s in range(count))
    constants -= {str(layer.x.name) for layer in layers}
    values = [(n, at) for n, at in level.items() if n not in constants]
    live = tuple(tuple(n for n, at in values if at <= s < last_read.get(n, -1)) for s in range(count))
    return Segments(stages, live)


def depths(model: ir.Model, names: Collection[str]) -> dict[str, int]:
    """Return the number of layers among ``names`` before each of them on the longest path from the inputs.

    Layers in a subgraph have the depth of the node that contains it.
    """
    level: dict[str, int] = {}
    depths: dict[str, int] = {}
    for node in model.graph:
        at = max((level.get(name, 0) for name in reads(node)), default=0)
        inner = (n for _, body in bodies_of(node) for n in body.all_nodes())
        inner_names = [name for name in map(layer_name, (node, *inner)) if name in names]
        depths |= dict.fromkeys(inner_names, at)
        level.update({str(v.name): at + bool(inner_names) for v in node.outputs})
    return depths


def outside_stages(layers: Sequence[P]) -> list[P]:
    """Return the layers that belong to no single stage: those in subgraphs, and those that share their weight."""
    shared = sharing(layers)
    return [layer for layer in layers if layer.nested or layer.name in shared]


def outputs_of(model: ir.Model, layers: Sequence[Product]) -> set[str]:
    """Return the output names of the main graph's nodes that are, or contain, one of ``layers``."""
    layer_nodes = {id(layer.node) for layer in layers}
    outputs: set[str] = set()
    for node in model.graph:
        if id(node) in layer_nodes or any(id(n) in layer_nodes for _, body in bodies_of(node) for n in body.all_nodes()):
            outputs.update(str(v.name) for v in node.outputs)
    return outputs


def fed_inputs(model: ir.Model) -> list[str]:
    """Return the names of inputs without an initializer, which data must provide."""
    return [str(v.name) for v in model.graph.inputs if not v.is_initializer()]


def downstream(model: ir.Model, values: Collection[str]) -> set[str]:
    """Return ``values`` and every value that depends on one of them, by name."""
    dependent = set(values)
    for node in model.graph:
        if any(name in dependent for name in reads(node)):
            dependent.update(str(v.name) for v in node.outputs)
    return dependent


def non_tensors(model: ir.Model, steps: Segments[P]) -> list[str]:
    """Return the names of values between stages that are sequences or optionals, which cannot be cached."""
    containers: set[str] = set()
    for node in model.graph:
        is_container = node.op_type in _CONTAINERS or (node.op_type == "Identity" and any(name in containers for name in reads(node)))
        containers.update(str(v.name) for v in node.outputs if is_container or isinstance(v.type, ir.SequenceType | ir.OptionalType))
    return sorted({name for live in steps.live for name in live if name in containers})


def residual_operand(layer: Product) -> str | None:
    """Return the name of the value added to the layer's output (usually a residual), if that is the output's only use but for rounding.

    It is added by an Add, or by a normalization of onnxruntime that adds its first two inputs.
    """
    value = layer.output
    node, index = only_use(value)
    while node is not None and node.domain == "" and node.op_type in _ROUNDING and index == 0:
        value = node.outputs[0]
        node, index = only_use(value)
    if node is None or (node.domain, node.op_type) not in _SUMS or index > 1:
        return None
    operand = node.inputs[1 - index]
    return None if operand is None or operand.name is None or operand is value else str(operand.name)


def reads(node: ir.Node) -> Iterator[str]:
    """Yield the names of the values a node reads, including those its subgraphs capture."""
    for value in node.inputs:
        if value is not None and value.name is not None:
            yield value.name
    for _, body in bodies_of(node):
        yield from _captured(body)


def _captured(graph: ir.Graph) -> Iterator[str]:
    inner = {v.name for v in graph.inputs} | set(graph.initializers)
    for node in graph:
        yield from (name for name in reads(node) if name not in inner)
        inner.update(v.name for v in node.outputs)


def cut(model: ir.Model, inputs: Mapping[str, npt.NDArray[np.generic]], outputs: Sequence[str]) -> ir.Model:
    """Extract the nodes that compute ``outputs`` from ``inputs`` (arrays, for their types and ranks) into a new model."""
    graph = ir.convenience.extract(model.graph, inputs=list(inputs), outputs=list(outputs))
    values = {str(value.name): value for value in graph.inputs}
    for name, array in inputs.items():
        values[name].type, values[name].shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape([None] * array.ndim)
    for produced in [value for node in graph for value in node.outputs if value.name in values]:  # next to outputs that are computed
        name = str(produced.name)
        produced.name = Names.of(graph).value(f"{name}__before")
        ir.convenience.replace_all_uses_with(produced, values[name])
    return ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))
