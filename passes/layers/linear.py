"""Finding linear layers in a graph, and the only way to write them back.

A `LinearLayer` is a view of a MatMul or Gemm whose right side is constant: always ``Y = X W + b`` with ``W (K, N)``, whatever the
graph says (Gemm's transB, alpha and beta, a bias in a following Add, and whatever `magr_onnx.passes.graph.constants` sees through). A
view is
made only when every rewrite through it is safe; otherwise the node yields a `Skip` with its reason. Other forms become these two first
(`magr_onnx.passes.canonical`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.model_io.writing import release_mmap
from magr_onnx.passes.graph.constants import Held, dequantized, drop_if_unused, held
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.subgraphs import Place, opaque, root_of, seen_as, walk
from magr_onnx.passes.layers.selection import ALL, Selection
from magr_onnx.report.reasons import Reason, Skip

OPERATORS = ("MatMul", "Gemm")
"""Operators of ONNX that are looked at as linear layers."""

REFUSED = "onnx_magr.refused"
"""Key of a node's ``meta`` store under which a canonical form keeps why it could not be made: a `Reason` and details."""

FLOATS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer:
    """A safe view of one linear layer.

    Attributes:
        name: Node name, or a name made from its output: stable between runs, unique in the graph.
        node: The MatMul or Gemm.
        weight: Where the constant is kept, and the way from it to ``tensor``.
        tensor: The constant ``(K, N)``, or ``(N, K)`` when ``transposed``; computed when read where it is not kept in this form.
        transposed: See ``tensor``.
        factor: Gemm's alpha, part of the effective weight.
        add: The Add that holds the bias of a MatMul, if there is one.
        bias: The constant bias as the graph has it, if there is one.
        bias_factor: Gemm's beta, part of the effective bias.
        k: Input width.
        n: Output width.
        place: The nodes whose bodies the layer is in; empty for layers of the main graph.
    """

    name: str
    node: ir.Node
    weight: Held
    tensor: ir.TensorProtocol
    transposed: bool
    factor: float
    add: ir.Node | None
    bias: ir.TensorProtocol | None
    bias_factor: float
    k: int
    n: int
    place: Place = ()

    @property
    def nested(self) -> bool:
        """Whether the layer is in the body of an If, Loop or Scan."""
        return bool(self.place)

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def x(self) -> ir.Value:
        """The input value, ``(..., K)``, as it is now: a rewrite of the layer before replaces it."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def reads(self) -> str:
        """The name of what the layer reads, as calibration knows it: the same for all layers that read it equally often."""
        return seen_as(self.x, self.node, self.place)

    @property
    def dtype(self) -> ir.DataType:
        return self.tensor.dtype

    @property
    def output(self) -> ir.Value:
        """The layer's result, bias included."""
        return (self.add or self.node).outputs[0]

    @property
    def weight_name(self) -> str:
        """The name of the initializer (or Constant output) that holds the weight."""
        return self.weight.name

    @property
    def weight_key(self) -> Hashable:
        """Equal for layers that multiply by the very same matrix."""
        return (*self.weight.key, self.transposed, self.factor)

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    def read(self) -> Array:
        """The effective weight ``(K, N)`` float32, contiguous."""
        stored = self.tensor.numpy()
        array: Array = np.array(stored.T if self.transposed else stored, dtype=np.float32, order="C")
        del stored
        release_mmap(self.tensor)
        if self.factor != 1.0:
            array *= np.float32(self.factor)
        return array

    def read_bias(self) -> Array | None:
        """The effective bias ``(N,)`` float64, or None."""
        if self.bias is None:
            return None
        flat = self.bias.numpy().astype(np.float64).reshape(-1) * self.bias_factor
        result: Array = np.broadcast_to(flat, (self.n,)).copy()
        return result

    def constant(
        self, suffix: str, array: npt.NDArray[Any] | np.generic | ir.TensorProtocol, base: str | None = None, inside: bool = False
    ) -> ir.Value:
        """Register a new initializer, named after the weight, or after ``base``.

        It is in the main graph, which bodies can read, or ``inside`` the layer's own.
        """
        name = f"{self.weight_name if base is None else base}{suffix}"
        return add_initializer(self.root, name, array, self.graph if inside and self.nested else None)

    @property
    def root(self) -> ir.Graph:
        """The main graph."""
        return root_of(self.node, self.place)

    @property
    def names(self) -> Names:
        """The names taken in the model."""
        return Names.of(self.root)

    @property
    def graph(self) -> ir.Graph:
        """The graph the layer's nodes are in."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        return graph

    def replace(self, nodes: Sequence[ir.Node]) -> None:
        """Put ``nodes`` in the place of the layer; the last one's output takes the name, type and users of the layer's."""
        graph = self.graph
        old = [self.node] if self.add is None else [self.add, self.node]
        sources = [v for n in old for v in n.inputs if v is not None]
        result, value = self.output, nodes[-1].outputs[0]
        value.type, value.shape = result.type, result.shape
        value.metadata_props.update(result.metadata_props)
        value.meta.update(result.meta)
        value.doc_string = result.doc_string
        nodes[-1].metadata_props.update(self.node.metadata_props)
        nodes[-1].doc_string = self.node.doc_string
        value.name = None  # it inherits that of the result
        self.names.adopt(nodes, old, result)
        ir.convenience.replace_nodes_and_values(graph, old[0], old, list(nodes), [result], [value])
        for source in sources:
            drop_if_unused(source)

    def write(self, weight: Array | None, bias: Array | None, constant: Callable[[str, Any], ir.Value] | None = None) -> None:
        """Write an effective float weight and bias back in the layer's own form and type; None leaves one as it is.

        ``constant`` makes the weight's initializer where it is not the layer's own.
        """
        kind = FLOATS[self.dtype]
        if weight is not None:
            array = (weight / np.float32(self.factor)) if self.factor != 1.0 else weight
            stored = array.T if self.op == "Gemm" and _int_attribute(self.node, "transB") else array
            old = self.node.inputs[1]
            self.node.replace_input_with(1, (constant or self.constant)("_magr", np.ascontiguousarray(stored).astype(kind)))
            if old is not None:
                drop_if_unused(old)
        if bias is not None and self.bias is not None:
            holder, index = self._bias_slot()
            old = holder.inputs[index]
            assert old is not None
            array = (bias / self.bias_factor).astype(kind).reshape(_bias_shape(self.bias, self.n))
            holder.replace_input_with(index, self.constant("_bias", array))
            drop_if_unused(old)

    def _bias_slot(self) -> tuple[ir.Node, int]:
        if self.add is None:
            return self.node, 2
        return self.add, 1 if self.add.inputs[0] is self.node.outputs[0] else 0


def _bias_shape(bias: ir.TensorProtocol, n: int) -> tuple[int, ...]:
    rank = max(len(bias.shape), 1)
    return (*(1,) * (rank - 1), n)


def layer_name(node: ir.Node) -> str:
    return node.name or f"{node.op_type}:{node.outputs[0].name}"


def _float_attribute(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 1.0 if attribute is None else float(attribute.as_float())


def _int_attribute(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else int(attribute.as_int())


def view(node: ir.Node) -> LinearLayer | Skip:
    """The layer at a MatMul or Gemm, or why there is none."""
    name = layer_name(node)

    def skip(reason: Reason, detail: str = "") -> Skip:
        return Skip(name, node.op_type, reason, detail)

    x, weight = (*node.inputs, None, None)[:2]  # a function may be called with fewer inputs than it has
    if x is None or weight is None:
        return skip(Reason.DYNAMIC_WEIGHT)
    right, left = held(weight), held(x)
    if right is None:
        if dequantized(weight) is not None:
            return skip(Reason.QUANTIZED)
        return skip(Reason.DYNAMIC_WEIGHT if left is None else Reason.CONSTANT_LEFT)
    if right.overridable:
        return skip(Reason.OVERRIDABLE)
    if right.dtype not in FLOATS:
        return skip(Reason.WEIGHT_DTYPE, str(right.dtype))
    if len(right.shape) != 2:
        return skip(Reason.WEIGHT_RANK, f"shape {list(right.shape)}")
    if right.exposed:
        return skip(Reason.GRAPH_OUTPUT)
    if 0 in right.shape:
        return skip(Reason.EMPTY)
    if left is not None:
        return skip(Reason.CONSTANT, "a caller may override the input" if left.overridable else "")
    right, transposed = right.before_transposes()
    rows, columns = right.shape
    factor, beta = 1.0, 1.0
    if node.op_type == "Gemm":
        if _int_attribute(node, "transA"):
            return skip(Reason.TRANS_A)
        transposed ^= bool(_int_attribute(node, "transB"))
        factor, beta = _float_attribute(node, "alpha"), _float_attribute(node, "beta")
        if factor == 0 or not math.isfinite(factor):
            return skip(Reason.ALPHA, f"alpha={factor}")
    k, n = (columns, rows) if transposed else (rows, columns)
    add: ir.Node | None = None
    bias: ir.TensorProtocol | None = None
    if node.op_type == "MatMul":
        add, bias = _bias_add(node, n)
    elif len(node.inputs) > 2 and node.inputs[2] is not None and beta != 0:
        bias = _bias(node.inputs[2], n)
        if bias is None:
            return skip(Reason.BIAS)
    return LinearLayer(name, node, right, right.tensor(), transposed, factor, add, bias, beta, k, n)


def _bias(value: ir.Value | None, n: int) -> ir.TensorProtocol | None:
    """The constant vector behind a value, if it is one that fits ``n`` outputs."""
    found = held(value)
    if found is None or found.overridable or found.dtype not in FLOATS:
        return None
    shape = found.shape
    return found.tensor() if all(d == 1 for d in shape[:-1]) and (not shape or shape[-1] in (1, n)) else None


def _bias_add(node: ir.Node, n: int) -> tuple[ir.Node | None, ir.TensorProtocol | None]:
    """The Add of a constant vector that is the only reader of a MatMul, and its constant."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or out.is_graph_output():
        return None, None
    add = uses[0].node
    if add.op_type != "Add" or add.domain != "" or add.graph is not node.graph:
        return None, None
    other = add.inputs[1 - uses[0].idx]
    tensor = _bias(other, n)
    if tensor is None:
        return None, None
    x = node.inputs[0]
    rank = None if x is None or x.shape is None else len(x.shape)
    if len(tensor.shape) > 1 and (rank is None or len(tensor.shape) > rank):
        return None, None  # a bias of higher rank would raise the rank of the result
    return add, tensor


def find(model: ir.Model, selection: Selection = ALL) -> tuple[list[LinearLayer], list[Skip]]:
    """Every linear layer of the main graph and of the bodies in it, in graph order, and every MatMul or Gemm that is not one.

    Args:
        model: The model; nothing in it is changed.
        selection: The layers to convert; others are left as they are.
    """
    layers, skips = find_views(model, OPERATORS, _placed, selection)
    return layers, skips + in_functions(model, OPERATORS)


def _placed(node: ir.Node, place: Place) -> LinearLayer | Skip:
    if (closed := opaque(place)) is not None:
        return Skip(layer_name(node), node.op_type, Reason.SUBGRAPH, f"body of {closed}")
    layer = view(node)
    if isinstance(layer, LinearLayer):
        return replace(layer, place=place)
    return Skip(layer.name, layer.op, *node.meta[REFUSED]) if REFUSED in node.meta else layer


class View(Protocol):
    """A view of a node that reads a constant weight."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    @property
    def op(self) -> str: ...

    @property
    def weight_name(self) -> str: ...

    @property
    def k(self) -> int: ...

    @property
    def n(self) -> int: ...

    @property
    def node(self) -> ir.Node: ...

    @property
    def output(self) -> ir.Value: ...


V = TypeVar("V", bound=View)


def find_views(
    model: ir.Model,
    operators: Collection[str],
    view: Callable[[ir.Node, Place], V | Skip | None],
    selection: Selection,
) -> tuple[list[V], list[Skip]]:
    """Every view of nodes of ONNX's ``operators`` in the main graph and the bodies in it, under unique names, and what is skipped.

    Args:
        model: The model; nothing in it is changed.
        operators: Types of the nodes to look at.
        view: Makes the view of a node at a place, or says why there is none; None for nodes of no interest.
        selection: The layers to view; others are skipped.
    """
    views: dict[str, V] = {}
    skips: list[Skip] = []
    for node, place in walk(model.graph):
        if node.domain != "" or node.op_type not in operators:
            continue
        found = view(node, place)
        if found is None or isinstance(found, Skip):
            skips += [] if found is None else [found]
        elif (why := selection.leaves_out(node, found.name, found.weight_name)) is not None:
            skips.append(Skip(found.name, found.op, why))
        else:
            while found.name in views:  # ONNX asks for unique value names only
                found = replace(found, name=f"{found.name}:{node.outputs[0].name}")
            views[found.name] = found
    return list(views.values()), skips


def in_functions(model: ir.Model, operators: Collection[str]) -> list[Skip]:
    """Nodes of ONNX's ``operators`` in functions, which stay as they are."""
    nodes = [(node, function.name) for function in model.functions.values() for node in function.all_nodes()]
    nodes = [(node, name) for node, name in nodes if node.domain == "" and node.op_type in operators]
    return [Skip(layer_name(node), node.op_type, Reason.SUBGRAPH, f"function {name}") for node, name in nodes]
