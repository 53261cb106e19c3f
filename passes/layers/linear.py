"""Views of the linear layers of a graph, and the only way to write them back.

A `LinearLayer` is a view of a MatMul or Gemm whose right operand is constant: always ``Y = X W + b`` with ``W (K, N)``, however the graph
expresses it (Gemm's transB, alpha and beta, a bias in a following Add, and nodes folded by `magr_onnx.passes.graph.constants`). A view
exists only when every rewrite through it is safe; otherwise the node yields a `Skip` with its reason. Equivalent patterns are rewritten to
these two first (`magr_onnx.passes.canonical`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.model_io.writing import release_mmap
from magr_onnx.passes.graph.constants import constant_view, dequantized, replace_input
from magr_onnx.passes.graph.nodes import layer_name, only_use
from magr_onnx.passes.graph.subgraphs import SubgraphPath
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.passes.layers.weighted import FLOATS, Product, find_views, in_closed_body, in_functions, refusal, skip_of
from magr_onnx.report.reasons import Reason, Skip

OPERATORS = ("MatMul", "Gemm")
"""Operators that are viewed as linear layers."""

REFUSED = "onnx_magr.refused"
"""Key of a node's ``meta`` store with the `Reason` and details why it could not be canonicalized."""


KEPT_FLOAT = "onnx_magr.kept_float"
"""Key of a node's ``meta`` store with the `Reason` why a product that a rewrite added is no layer."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer(Product):
    """A safe view of one MatMul or Gemm.

    Attributes:
        transposed: Whether the constant is ``(N, K)`` rather than ``(K, N)``.
        factor: Gemm's alpha, part of the effective weight.
        add: The Add that holds the bias of a MatMul, if there is one.
        bias_factor: Gemm's beta, part of the effective bias.
        embeds: Whether its columns are the rows of a table of embeddings, too, that is to have the same codes.
    """

    transposed: bool
    factor: float
    add: ir.Node | None
    bias_factor: float
    embeds: bool = False

    @property
    def k(self) -> int:
        """Return the input width."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def n(self) -> int:
        """Return the output width."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def last(self) -> ir.Node:
        return self.add or self.node

    @property
    def weight_key(self) -> Hashable:
        """Return a key that is equal for layers that multiply by the same matrix."""
        return (*self.weight.key, self.transposed, self.factor)

    def read(self) -> Array:
        """Read the effective weight ``(K, N)`` float32, contiguous."""
        tensor = self.weight.tensor()
        stored = tensor.numpy()
        array: Array = np.array(stored.T if self.transposed else stored, dtype=np.float32, order="C")
        del stored
        release_mmap(tensor)
        if self.factor != 1.0:
            array *= np.float32(self.factor)
        return array

    def read_bias(self) -> Array | None:
        """Read the effective bias ``(N,)`` float64, or None."""
        if self.bias is None:
            return None
        flat = self.bias.numpy().astype(np.float64).reshape(-1) * self.bias_factor
        result: Array = np.broadcast_to(flat, (self.n,)).copy()
        return result

    def write(self, weight: Array | None, bias: Array | None, constant: Callable[[str, Any], ir.Value] | None = None) -> None:
        """Write an effective float weight and bias back in the layer's form and type; None keeps one unchanged.

        A layer without a bias gets the addend of its Gemm, or an Add after its MatMul. ``constant`` creates the weight's initializer where
        layers share it.
        """
        kind = FLOATS[self.dtype]
        if weight is not None:
            array = (weight / np.float32(self.factor)) if self.factor != 1.0 else weight
            transposed = self.op == "Gemm" and bool(self.node.attributes.get_int("transB", 0))
            stored = array.T if transposed else array
            replace_input(self.node, 1, (constant or self.constant)("_magr", np.ascontiguousarray(stored).astype(kind)))
        if bias is not None and self.bias is None:
            value = self.constant("_bias", bias.astype(kind))
            if self.op == "MatMul":
                self.add_to_output("Add", value, "_before_bias", f"{self.name}_bias")
            else:
                replace_input(self.node, 2, value)
                self.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        elif bias is not None and self.bias is not None:
            index = 2 if self.add is None else int(self.add.inputs[0] is self.node.outputs[0])
            array = (bias / self.bias_factor).astype(kind).reshape([*[1] * (len(self.bias.shape) - 1), self.n])
            replace_input(self.last, index, self.constant("_bias", array))

    def add_to_output(self, op: str, addend: ir.Value, suffix: str, name: str) -> ir.Node:
        """Add a value to the layer's output ``y``, which becomes ``y`` and the suffix; the sum, a node ``op``, inherits name and users."""
        y = self.output
        total = ir.node(op, [addend, addend], name=self.names.node(name))
        result = total.outputs[0]
        result.dtype, result.shape = self.dtype, y.shape
        ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
        total.replace_input_with(0, y)
        result.name, y.name = y.name, self.names.value(f"{y.name}{suffix}")
        self.graph.insert_after(self.last, total)
        return total


def view(node: ir.Node) -> LinearLayer | Skip:
    """View a MatMul or Gemm as a layer, or return the reason why it is none."""
    x, weight = (*node.inputs, None, None)[:2]  # a function may be called with fewer inputs than it declares
    if x is None or weight is None:
        return skip_of(node, Reason.DYNAMIC_WEIGHT)
    right, left = constant_view(weight), constant_view(x)
    if right is None:
        if dequantized(weight) is not None:
            return skip_of(node, Reason.QUANTIZED)
        return skip_of(node, Reason.DYNAMIC_WEIGHT if left is None else Reason.CONSTANT_LEFT)
    if (refused := refusal(node, right, 2)) is not None:
        return refused
    if left is not None:
        return skip_of(node, Reason.CONSTANT, "a caller may override the input" if left.overridable else "")
    right, transposed = right.before_transposes()
    rows, columns = right.shape
    factor, beta = 1.0, 1.0
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return skip_of(node, Reason.TRANS_A)
        transposed ^= bool(node.attributes.get_int("transB", 0))
        factor, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        if factor == 0 or not math.isfinite(factor):
            return skip_of(node, Reason.ALPHA, f"alpha={factor}")
    n = rows if transposed else columns
    add: ir.Node | None = None
    bias: ir.TensorProtocol | None = None
    if node.op_type == "MatMul":
        add, bias = _bias_add(node, n)
    elif len(node.inputs) > 2 and node.inputs[2] is not None and beta != 0:
        bias = _bias(node.inputs[2], n)
        if bias is None:
            return skip_of(node, Reason.BIAS)
    return LinearLayer(layer_name(node), node, right, bias, transposed, factor, add, beta)


def _bias(value: ir.Value | None, n: int) -> ir.TensorProtocol | None:
    """Return the constant vector of a value, if it is one that fits ``n`` outputs."""
    vector = constant_view(value)
    if vector is None or vector.overridable or vector.dtype not in FLOATS:
        return None
    shape = vector.shape
    return vector.tensor() if all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, n)) else None


def _bias_add(node: ir.Node, n: int) -> tuple[ir.Node | None, ir.TensorProtocol | None]:
    """Return the Add of a constant vector that is the only reader of a MatMul, and its constant."""
    add, index = only_use(node.outputs[0])
    if add is None or (add.domain, add.op_type) != ("", "Add") or add.graph is not node.graph:
        return None, None
    tensor = _bias(add.inputs[1 - index], n)
    if tensor is None or _masks(tensor):
        return None, None
    x = node.inputs[0]
    rank = None if x is None or x.shape is None else len(x.shape)
    if len(tensor.shape) > 1 and (rank is None or len(tensor.shape) > rank):
        return None, None  # a bias of higher rank would raise the rank of the result
    return add, tensor


def _masks(addend: ir.TensorProtocol) -> bool:
    """Whether minus infinity leaves outputs out; NaN and infinity are faults of a bias, which are refused."""
    array = addend.numpy().astype(np.float64)
    return bool(np.isneginf(array).any() and (array < np.inf).all())


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[LinearLayer], list[Skip]]:
    """Find every linear layer, in graph order, and the reason for every other MatMul or Gemm; see `find_views`."""
    layers, skips = find_views(model, OPERATORS, _placed, selection)
    return layers, skips + in_functions(model, OPERATORS)


def _placed(node: ir.Node, path: SubgraphPath) -> LinearLayer | Skip:
    if (refused := in_closed_body(node, path)) is not None:
        return refused
    if KEPT_FLOAT in node.meta:
        return skip_of(node, node.meta[KEPT_FLOAT])
    layer = view(node)
    if isinstance(layer, LinearLayer):
        return replace(layer, path=path)
    return skip_of(node, *node.meta[REFUSED]) if REFUSED in node.meta else layer
