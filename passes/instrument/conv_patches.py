"""Gram matrices of convolution patches, computed in the graph.

The patches of ``Conv(X, W)`` are themselves a convolution of X: depthwise, with a one-hot kernel per tap, so that strides, dilations, pads
and auto_pad are handled by the same operator. The same holds for ConvTranspose, whose output is

    Y[m] = sum over c, t of W[c, m, t] P[c, t],   P[c, t] = ConvTranspose(X[c], one-hot at t).

Patches are larger than the input by the number of taps, so a Scan runs over the batch: only those of one sample are in memory.

In a subgraph of an If, Loop or Scan the sums are computed in the subgraph and reduced to the main graph
(`magr_onnx.passes.instrument.hoist.carry_out`): branches not taken add nothing, and iterations may have different numbers of patches.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.passes.graph.subgraphs import SubgraphPath, graph_of, walk
from magr_onnx.passes.instrument.hoist import carry_out
from magr_onnx.passes.instrument.taps import Extension
from magr_onnx.passes.layers.conv import OPS, ConvLayer

OPSET = 9  # Scan


def geometry(layer: ConvLayer) -> tuple[object, ...]:
    """Return everything the patches depend on: layers with equal geometry share them."""
    attributes = {name: str(a.value) for name, a in layer.node.attributes.items() if name != "kernel_shape"}
    return (layer.op, layer.reads, layer.channels, layer.kernel, layer.group, *sorted(attributes.items()))


def _placed(copy: Extension) -> dict[str, tuple[ir.Node, SubgraphPath]]:
    """Map the copy's convolutions and their paths by output name."""
    return {str(node.outputs[0].name): (node, path) for node, path in walk(copy.model.graph) if node.op_type in OPS}


def extent_taps(model: ir.Model, layers: Sequence[ConvLayer]) -> ir.Model:
    """Copy the model to output the shape of every layer's output, in order, as floats.

    In a subgraph this is the maximum over iterations, and zero if it does not run.
    """
    copy = Extension(model, opset=OPSET if any(layer.path for layer in layers) else 0)
    placed = _placed(copy)
    for i, layer in enumerate(layers):
        node, path = placed[str(layer.output.name)]
        name, graph, rank = f"__extent_{i}", graph_of(node), 2 + len(layer.kernel)
        shape = copy.add("Shape", [node.outputs[0]], f"{name}_shape", graph)
        extent = copy.add("Cast", [shape], f"{name}_real", graph, to=ir.DataType.FLOAT)
        if path:
            extent = carry_out(extent, path, copy.constant(f"{name}_zero", np.zeros(rank, np.float32)), "Max", name)
        copy.output(extent, shape=[rank])
    return copy.finish()


def patch_taps(model: ir.Model, layers: Sequence[ConvLayer], few: Collection[str] = ()) -> ir.Model:
    """Copy the model with three outputs per layer, in order: ``P^T P (G, K, K)``, sums ``(G, K)`` and ``G K n`` for ``n`` rows.

    Of layers in ``few``, by name, which are in the main graph, the first one is the rows ``P (G, n, K)``.
    """
    copy = Extension(model, opset=OPSET)
    placed = _placed(copy)
    for i, layer in enumerate(layers):
        name = f"__patches_{i}"
        node, path = placed[str(layer.output.name)]
        graph = graph_of(node)
        real = copy.add("Cast", [node.inputs[0]], f"{name}_x", graph, to=ir.DataType.FLOAT)
        g, k = layer.group, layer.k
        if layer.name in few:
            _few_patches(copy, layer, real, name)
            continue
        shapes: dict[str, list[int]] = {"gram": [g, k, k], "sum": [g, k], "count": []}
        starts = [copy.constant(f"{name}_zero_{j}", np.zeros(shape, np.float32)) for j, shape in enumerate(shapes.values())]
        outputs = [ir.val(f"{name}_{suffix}", ir.DataType.FLOAT, shape) for suffix, shape in shapes.items()]
        scan = ir.node("Scan", [*starts, real], {"body": _body(copy, layer, name), "num_scan_inputs": 1}, outputs=outputs, name=name)
        for output, start, shape in zip(copy.append(graph, scan), starts, shapes.values(), strict=True):
            result = carry_out(output, path, start, "Add", f"{output.name}_of_all") if path else output
            copy.output(result, shape=shape)
    return copy.finish()


def pair_taps(layer: ConvLayer) -> ir.Model:
    """Make a model that reads the input of a convolution twice, from two models.

    It puts out the patches of the second one ``(n, C taps, ...)`` and the convolution of the first one ``(n, M, ...)``, without a bias.
    """
    rank = 2 + len(layer.kernel)
    first, second = (ir.val(name, layer.dtype, [None] * rank) for name in ("first", "second"))
    weight = ir.val("weight", const_value=layer.weight.tensor())
    node = ir.node(layer.op, [first, weight], dict(layer.node.attributes), outputs=[ir.val("product", layer.dtype)], name="convolution")
    graph = ir.Graph([first, second], node.outputs, nodes=[node], initializers=[weight], opset_imports=dict(layer.root.opset_imports))
    copy = Extension(ir.Model(graph, ir_version=10))
    real = copy.add("Cast", [copy.values["second"]], "real", to=ir.DataType.FLOAT)
    for name, value in (("patches", _gathered(copy, layer, real, "gathered")), ("target", copy.values["product"])):
        copy.output(copy.add("Cast", [value], name, to=ir.DataType.FLOAT), shape=[None] * rank)
    return copy.finish()


def _body(copy: Extension, layer: ConvLayer, name: str) -> ir.Graph:
    """Build the body for one sample ``(C, ...)``, which adds its patches to the running sums."""
    g, k = layer.group, layer.k
    rows = copy.constant(f"{name}_rows", np.array([g, k, -1]))
    shapes: list[list[int | None]] = [[g, k, k], [g, k], [], [None] * (1 + len(layer.kernel))]
    inputs = [ir.val(copy.names.value(f"{name}_in_{j}"), ir.DataType.FLOAT, s) for j, s in enumerate(shapes)]
    body = ir.Graph(inputs, [], nodes=[], name=f"{name}_body", opset_imports={"": copy.opset})
    sample = copy.along("Unsqueeze", inputs[3], [0], f"{name}_sample", body)
    gathered = _gathered(copy, layer, sample, name, body)
    patches = copy.add("Reshape", [gathered, rows], f"{name}_patches", body)
    turned = copy.add("Transpose", [patches], f"{name}_turned", body, perm=[0, 2, 1])
    gram = copy.add("MatMul", [patches, turned], f"{name}_gram_of_one", body)
    total = copy.along("ReduceSum", patches, [2], f"{name}_sum_of_one", body, keepdims=0)
    count = copy.add("Cast", [copy.add("Size", [patches], f"{name}_size", body)], f"{name}_count_of_one", body, to=ir.DataType.FLOAT)
    for j, (before, added) in enumerate(zip(inputs[:3], (gram, total, count), strict=True)):
        output = copy.add("Add", [before, added], f"{name}_out_{j}", body)
        output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape(shapes[j])
        body.outputs.append(output)
    return body


def _gathered(copy: Extension, layer: ConvLayer, x: ir.Value, name: str, graph: ir.Graph | None = None) -> ir.Value:
    """Gather the patches of samples ``(n, C, ...)``: ``(n, C taps, ...)``."""
    taps = math.prod(layer.kernel)
    hot = np.tile(np.eye(taps, dtype=np.float32), (layer.channels, 1, 1))
    shape = (layer.channels, taps) if layer.op == "ConvTranspose" else (layer.channels * taps, 1)
    kernel = copy.constant(f"{name}_one_hot", hot.reshape(*shape, *layer.kernel))
    same = {key: value for key, value in layer.node.attributes.items() if key not in ("group", "kernel_shape")}
    return copy.add(layer.op, [x, kernel], f"{name}_gather", graph, **same, group=layer.channels)


def _few_patches(copy: Extension, layer: ConvLayer, x: ir.Value, name: str) -> None:
    """Put out the patches of all samples, their sums, and how many numbers they are."""
    g, k = layer.group, layer.k
    by_sample = copy.constant(f"{name}_by_sample", np.array([0, g, k, -1]))
    patches = copy.add("Reshape", [_gathered(copy, layer, x, name), by_sample], f"{name}_patches")
    turned = copy.add("Transpose", [patches], f"{name}_turned", perm=[1, 0, 3, 2])
    rows = copy.add("Reshape", [turned, copy.constant(f"{name}_rows", np.array([g, -1, k]))], f"{name}_few")
    copy.output(rows, shape=[g, None, k])
    copy.output(copy.along("ReduceSum", rows, [1], f"{name}_sum", keepdims=0), shape=[g, k])
    copy.output(copy.add("Cast", [copy.add("Size", [rows], f"{name}_size")], f"{name}_count", to=ir.DataType.FLOAT), shape=[])
