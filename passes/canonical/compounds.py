"""Operators that exporters write as several: layer norms, RMS norms, GELU, HardSwish and HardSigmoid.

Rounded one by one, squares, roots and gates lose most of their bits, and some, such as Erf, are none that an accelerator has. Not patterns
of `magr_onnx.passes.canonical`: only runtimes that round what operators put out gain by it, and each has its own of them
(`magr_onnx.passes.plan.Plan.compounds`). Exact in real arithmetic, but for constants such as 1.4142 in the place of a root.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from magr_onnx.errors import listed
from magr_onnx.passes.canonical import gated, norms
from magr_onnx.passes.canonical.compound import OPSETS, Compound
from magr_onnx.passes.canonical.rewriter import RewriteContext
from magr_onnx.passes.graph.names import add_initializer
from magr_onnx.passes.graph.nodes import layer_name, operator_of
from magr_onnx.passes.graph.opset import raise_opset_if_possible


def rewrite(model: ir.Model, operators: Collection[str]) -> list[str]:
    """Write compounds of the main graph as one operator each; return notes for the report.

    Args:
        model: Changed in place; its opset is raised where that can be.
        operators: Those that may be written, such as ``LayerNormalization``.
    """
    if operators:
        _drop_casts(model)
    found, before = list(_find(model, operators)), _opset(model)
    for target in sorted({OPSETS[each.operator] for each in found}, reverse=True):
        raise_opset_if_possible(model, target)
        if _opset(model) >= target:
            break
    if _opset(model) != before:  # conversion makes other nodes
        found = list(_find(model, operators))
    replaced: dict[ir.Value, ir.Value] = {}
    nodes = [_replace(model.graph, each, replaced) for each in found if OPSETS[each.operator] <= _opset(model)]
    if not nodes:
        return []
    RemoveUnusedNodesPass()(model)
    names: dict[str, list[str]] = {}
    for node in nodes:
        if node.graph is not None:  # a HardSigmoid may be part of a HardSwish
            names.setdefault(node.op_type, []).append(layer_name(node))
    return [f"several operators written as one {kind}: {listed(found)}" for kind, found in names.items()]


def _drop_casts(model: ir.Model) -> None:
    """Remove Casts of the main graph to the type that a value has, which exporters write around norms and Softmax."""
    context = RewriteContext(model)
    for node in [node for node in model.graph if operator_of(node) == "Cast"]:
        x, result = node.inputs[0], node.outputs[0]
        same = x is not None and context.dtype(x) == ir.DataType(node.attributes.get_int("to", 0))
        if x is not None and same and not result.is_graph_output():
            result.replace_all_uses_with(x)
            model.graph.remove(node, safe=True)


def _find(model: ir.Model, operators: Collection[str]) -> Iterator[Compound]:
    context = RewriteContext(model)
    for node in model.graph:
        for find in (norms.ending_at, gated.ending_at):
            if (found := find(node, context, operators)) is not None:
                yield found


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", 0)


def _replace(graph: ir.Graph, found: Compound, replaced: dict[ir.Value, ir.Value]) -> ir.Node:
    """Put an operator in the place of the last of those that it stands for."""
    root, result = found.root, found.root.outputs[0]
    base = layer_name(root)
    constants = [add_initializer(graph, f"{base}_{name}", array.astype(np.float32)) for name, array in found.constants.items()]
    x, value = replaced.get(found.x, found.x), ir.val(None, result.dtype, result.shape)
    node = ir.node(found.operator, [x, *constants], dict(found.attributes), outputs=[value], name=root.name)
    node.metadata_props.update(root.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, root, [root], [node], [result], [value])
    replaced[result] = value
    return node
