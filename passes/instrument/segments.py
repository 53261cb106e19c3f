"""Cutting a graph into segments between the stages in which its layers can be quantized.

The *level* of a value is the number of layers on the longest way to it from the model's inputs. Layers whose inputs have level ``s`` form
stage ``s``: all their inputs are known once the layers of the stages before are. Segment ``s`` is what computes the values of level
``s`` from those of lower levels. Nothing but the graph decides: residuals, branches and shared inputs need no names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.passes.graph.names import Names
from magr_onnx.passes.graph.subgraphs import bodies_of
from magr_onnx.passes.layers.linear import LinearLayer, layer_name
from magr_onnx.passes.layers.shared import sharing

_CONTAINERS = ("SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap", "SplitToSequence", "Optional")
_SUMS = {("", "Add"), ("com.microsoft", "SkipLayerNormalization"), ("com.microsoft", "SkipSimplifiedLayerNormalization")}
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


@dataclass(frozen=True, slots=True)
class Segments:
    """What is computed when.

    Attributes:
        stages: Layers by stage, in order.
        live: For every segment, the values that later segments read, from the inputs of the stage on; by name.
    """

    stages: tuple[tuple[LinearLayer, ...], ...]
    live: tuple[tuple[str, ...], ...]


def segments_of(model: ir.Model, layers: Sequence[LinearLayer]) -> Segments:
    """Stages of ``layers`` and what lives between them; layers of one stage may be quantized in any order."""
    own = {id(layer.node) for layer in layers}
    level: dict[str, int] = dict.fromkeys(given_inputs(model), 0)
    last_read: dict[str, int] = {}
    constants: set[str] = set()  # made of constants alone: every segment makes them again, and quantized ones disappear from the model
    for node in model.graph:
        names = [name for name in reads(node) if name in level]
        if constants.issuperset(names) and node.op_type not in _RANDOM:
            constants.update(str(v.name) for v in node.outputs)
        at = max((level[name] for name in names), default=0) + (id(node) in own)
        for name in names:
            last_read[name] = max(last_read.get(name, 0), at)
        level.update({str(v.name): at for v in node.outputs})
    count = 1 + max((level[str(layer.x.name)] for layer in layers), default=-1)
    stages = tuple(tuple(layer for layer in layers if level[str(layer.x.name)] == s) for s in range(count))
    constants -= {str(layer.x.name) for layer in layers}
    kept = [(n, at) for n, at in level.items() if n not in constants]
    live = tuple(tuple(n for n, at in kept if at <= s < last_read.get(n, -1)) for s in range(count))
    return Segments(stages, live)


def depths(model: ir.Model, names: Collection[str]) -> dict[str, int]:
    """How many of the layers called ``names`` are before each of them on the longest way from the inputs; those in bodies as the node
    that holds these."""
    level: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in model.graph:
        at = max((level.get(name, 0) for name in reads(node)), default=0)
        inside = (n for _, body in bodies_of(node) for n in body.all_nodes())
        own = [name for name in map(layer_name, (node, *inside)) if name in names]
        found |= dict.fromkeys(own, at)
        level.update({str(v.name): at + bool(own) for v in node.outputs})
    return found


def apart(layers: Sequence[LinearLayer]) -> list[LinearLayer]:
    """Layers that belong to no one stage: those in bodies, and those that share their weight."""
    shared = sharing(layers)
    return [layer for layer in layers if layer.nested or layer.name in shared]


def made_by(model: ir.Model, layers: Sequence[LinearLayer]) -> set[str]:
    """Names of the outputs of the nodes of the main graph that are ``layers``, or hold them in a body."""
    own = {id(layer.node) for layer in layers}
    found: set[str] = set()
    for node in model.graph:
        if id(node) in own or any(id(n) in own for _, body in bodies_of(node) for n in body.all_nodes()):
            found.update(str(v.name) for v in node.outputs)
    return found


def given_inputs(model: ir.Model) -> list[str]:
    """The inputs that data has: those with an initializer keep its value."""
    return [str(v.name) for v in model.graph.inputs if not v.is_initializer()]


def behind(model: ir.Model, values: Collection[str]) -> set[str]:
    """``values`` and every value that depends on one of them, by name."""
    found = set(values)
    for node in model.graph:
        if any(name in found for name in reads(node)):
            found.update(str(v.name) for v in node.outputs)
    return found


def not_tensors(model: ir.Model, steps: Segments) -> list[str]:
    """Values between stages that are sequences or optionals, which cannot be kept; by name."""
    found: set[str] = set()
    for node in model.graph:
        made = node.op_type in _CONTAINERS or (node.op_type == "Identity" and any(name in found for name in reads(node)))
        found.update(str(v.name) for v in node.outputs if made or isinstance(v.type, ir.SequenceType | ir.OptionalType))
    return sorted({name for live in steps.live for name in live if name in found})


def beside(layer: LinearLayer) -> str | None:
    """The value that is added to the layer's output (a residual, mostly), if nothing else is done with that output; by name.

    An Add adds it, or a norm of onnxruntime that adds its first two inputs.
    """
    output = layer.output
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or (uses[0].node.domain, uses[0].node.op_type) not in _SUMS or uses[0].idx > 1:
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    return None if other is None or other.name is None or other is output else str(other.name)


def reads(node: ir.Node) -> Iterator[str]:
    """Names of the values a node reads, those its subgraphs take from outside included."""
    for value in node.inputs:
        if value is not None and value.name is not None:
            yield value.name
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from _captured(graph)


def _captured(graph: ir.Graph) -> Iterator[str]:
    inner = {v.name for v in graph.inputs} | set(graph.initializers)
    for node in graph:
        yield from (name for name in reads(node) if name not in inner)
        inner.update(v.name for v in node.outputs)


def cut(model: ir.Model, inputs: Mapping[str, npt.NDArray[np.generic]], outputs: Sequence[str]) -> ir.Model:
    """Copy the nodes that compute ``outputs`` from ``inputs`` (arrays, for their types and ranks), and no others, into a model."""
    graph = ir.convenience.extract(model.graph, inputs=list(inputs), outputs=list(outputs))
    values = {str(value.name): value for value in graph.inputs}
    for name, array in inputs.items():
        values[name].type, values[name].shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape([None] * array.ndim)
    for produced in [value for node in graph for value in node.outputs if value.name in values]:  # beside one that is computed
        name = str(produced.name)
        produced.name = Names.of(graph).value(f"{name}__before")
        ir.convenience.replace_all_uses_with(produced, values[name])
    return ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))
