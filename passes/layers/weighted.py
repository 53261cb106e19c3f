"""What the views of layers, convolutions and tables have in common, and the search that finds them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.errors import listed
from magr_onnx.passes.graph.constants import ConstantView, drop_if_unused, is_step
from magr_onnx.passes.graph.names import Names, add_initializer
from magr_onnx.passes.graph.nodes import layer_name, result_of
from magr_onnx.passes.graph.subgraphs import SubgraphPath, calibration_key, graph_of, unsupported_parent, walk
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.report.reasons import Reason, Skip

FLOATS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@dataclass(frozen=True, slots=True, eq=False)
class WeightedNode(abc.ABC):
    """A safe view of a node that reads a constant weight.

    Attributes:
        name: Node name, or a name made from its output: stable between runs, unique among the views of its kind.
        node: The node.
        weight: View of the constant weight.
        path: Path of the subgraph it is in; empty in the main graph.
    """

    name: str
    node: ir.Node
    weight: ConstantView
    path: SubgraphPath = field(default=(), kw_only=True)

    @property
    @abc.abstractmethod
    def k(self) -> int:
        """Return the rows of the weight's matrix."""

    @property
    @abc.abstractmethod
    def n(self) -> int:
        """Return the columns of the weight's matrix."""

    @abc.abstractmethod
    def read(self) -> Array:
        """Read the weight as a matrix, or a stack of them."""

    def parts(self) -> Iterator[Array]:
        """Read the weight in parts, so that a large one is not in memory as a whole."""
        yield self.read()

    @property
    def groups(self) -> int:
        """Return how many matrices of `k` rows and `n` columns the weight is."""
        return 1

    @property
    def nested(self) -> bool:
        """Return whether the node is in a subgraph of an If, Loop or Scan."""
        return bool(self.path)

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def last(self) -> ir.Node:
        """Return the node that puts out the result."""
        return self.node

    @property
    def output(self) -> ir.Value:
        """Return the result, with a bias if there is one."""
        return result_of(self.last)

    @property
    def dtype(self) -> ir.DataType:
        """Return the float type of the weight."""
        return self.weight.dtype

    @property
    def root(self) -> ir.Graph:
        """Return the main graph."""
        return graph_of(self.path[0][0] if self.path else self.node)

    @property
    def graph(self) -> ir.Graph:
        """Return the graph of the node: the main graph or a subgraph."""
        return graph_of(self.node)

    @property
    def names(self) -> Names:
        """Return the names used in the model."""
        return Names.of(self.root)

    @property
    def weight_name(self) -> str:
        """Return the name of the weight's initializer or Constant."""
        return self.weight.name

    @property
    def x(self) -> ir.Value:
        """Return the current first input: rewrites of earlier layers replace it."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight_key(self) -> Hashable:
        """Return a key that is equal for views that use the same weight in the same way."""
        return self.weight.key

    def constant(
        self, suffix: str, array: npt.NDArray[Any] | np.generic | ir.TensorProtocol, base: str | None = None, inside: bool = False
    ) -> ir.Value:
        """Add an initializer, named after the weight, or after ``base``.

        It is in the main graph, which subgraphs can read, or ``inside`` the node's own subgraph.
        """
        name = f"{self.weight_name if base is None else base}{suffix}"
        return add_initializer(self.root, name, array, self.graph if inside and self.nested else None)

    def replace(self, nodes: Sequence[ir.Node]) -> None:
        """Replace the node by ``nodes``; the output of the last one inherits the name, type and users of the result."""
        replaced = list(dict.fromkeys((self.last, self.node)))
        sources = [v for node in replaced for v in node.inputs if v is not None]
        result, value, graph = self.output, nodes[-1].outputs[0], self.graph
        value.type, value.shape = result.type, result.shape
        value.metadata_props.update(result.metadata_props)
        value.meta.update(result.meta)
        value.doc_string = result.doc_string
        nodes[-1].metadata_props.update(self.node.metadata_props)
        nodes[-1].doc_string = self.node.doc_string
        value.name = None  # inherits that of the result
        self.names.adopt(nodes, replaced, result)
        ir.convenience.replace_nodes_and_values(graph, replaced[0], replaced, list(nodes), [result], [value])
        for source in sources:
            drop_if_unused(source)


@dataclass(frozen=True, slots=True, eq=False)
class Product(WeightedNode):
    """A node that multiplies its first input by the weight.

    Attributes:
        bias: The constant in the graph that is, but for a factor, added to the product, if there is one.
    """

    bias: ir.TensorProtocol | None

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    @property
    def reads(self) -> str:
        """Return the calibration key of the input: the same for all nodes that read it equally often."""
        return calibration_key(self.x, self.node, self.path)


V = TypeVar("V", bound=WeightedNode)


def skip_of(node: ir.Node, reason: StrEnum, detail: str = "") -> Skip:
    """Make the row of a node that is not converted."""
    return Skip(layer_name(node), node.op_type, reason, detail)


def refusal(node: ir.Node, weight: ConstantView, rank: int | None = None) -> Skip | None:
    """Say why a constant cannot be the weight of a node that takes those of ``rank``; None if it can."""
    faults = (
        (weight.overridable, Reason.OVERRIDABLE, ""),
        (weight.dtype not in FLOATS, Reason.WEIGHT_DTYPE, str(weight.dtype)),
        (rank is not None and len(weight.shape) != rank, Reason.WEIGHT_RANK, f"shape {list(weight.shape)}"),
        (weight.exposed, Reason.GRAPH_OUTPUT, ""),
        (0 in weight.shape, Reason.EMPTY, ""),
    )
    return next((skip_of(node, reason, detail) for fault, reason, detail in faults if fault), None)


def in_closed_body(node: ir.Node, path: SubgraphPath) -> Skip | None:
    """Skip a node in a body that onnxruntime does not run as a part of the graph around it; None for any other node."""
    closed = unsupported_parent(path)
    return None if closed is None else skip_of(node, Reason.SUBGRAPH, f"body of {closed}")


def find_views(
    model: ir.Model,
    operators: Collection[str],
    view: Callable[[ir.Node, SubgraphPath], V | Skip | None],
    selection: Selection,
    domain: str = "",
) -> tuple[list[V], list[Skip]]:
    """Find every view of nodes of a domain's ``operators`` in the main graph and its subgraphs, under unique names, and the skipped nodes.

    Args:
        model: The model; not changed.
        operators: Types of the nodes to view.
        view: Returns the view of a node at a path, the reason why there is none, or None for irrelevant nodes.
        selection: The layers to view; others are skipped.
        domain: That of the operators; ONNX's own by default.
    """
    views: dict[str, V] = {}
    skips: list[Skip] = []
    for node, path in walk(model.graph):
        if node.domain != domain or node.op_type not in operators:
            continue
        layer = view(node, path)
        if layer is None or isinstance(layer, Skip):
            skips += [] if layer is None else [layer]
        elif (why := selection.leaves_out(node, layer.name, layer.weight_name)) is not None:
            skips.append(Skip(layer.name, layer.op, why))
        else:
            while layer.name in views:  # ONNX requires only value names to be unique
                layer = replace(layer, name=f"{layer.name}:{layer.output.name}")
            views[layer.name] = layer
    return list(views.values()), skips


def in_functions(model: ir.Model, operators: Collection[str], domain: str = "") -> list[Skip]:
    """Return skips for nodes of a domain's ``operators`` in functions, which are not converted."""
    nodes = [(node, function.name) for function in model.functions.values() for node in function.all_nodes()]
    nodes = [(node, name) for node, name in nodes if node.domain == domain and node.op_type in operators]
    return [skip_of(node, Reason.SUBGRAPH, f"function {name}") for node, name in nodes]


def by_weight(layers: Iterable[V]) -> list[list[V]]:
    """Group layers, convolutions or tables by weight, in order."""
    groups: dict[Hashable, list[V]] = {}
    for layer in layers:
        groups.setdefault(layer.weight_key, []).append(layer)
    return list(groups.values())


def sharing(layers: Iterable[WeightedNode]) -> set[str]:
    """Return the names of layers that share their weight with another layer."""
    return {layer.name for group in by_weight(layers) if len(group) > 1 for layer in group}


def float_readers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that read a constant, through the nodes that only view it."""
    for use in value.uses():
        if is_step(use.node):
            for output in use.node.outputs:
                yield from float_readers(output)
        else:
            yield use.node


def split_shared(
    layers: Sequence[V], readers: Callable[[V], Iterable[ir.Node]] | None = None, others: Iterable[ir.Node] = ()
) -> tuple[list[V], list[Skip]]:
    """Leave out layers whose weight others read that are no layers: codes would come on top of the floats.

    Args:
        layers: The layers.
        readers: Returns what reads the weights of a layer; `float_readers` of its only weight by default.
        others: Other nodes that will not read the floats.
    """
    converted, left, skips = {*others, *(layer.node for layer in layers)}, list[V](), list[Skip]()
    for layer in layers:
        staying = [node for node in (readers(layer) if readers else float_readers(layer.weight.source)) if node not in converted]
        if not staying:
            left.append(layer)
            continue
        names = listed([f"{layer_name(node)} ({node.op_type})" for node in staying])
        table = "--embeddings converts the table too, " if any(node.op_type == "Gather" for node in staying) else ""
        detail = f"{names}; {table}--include '*' converts this layer all the same"
        skips.append(Skip(layer.name, layer.op, Reason.SHARED, detail))
    return left, skips


def readers(layer: WeightedNode) -> list[ir.Node]:
    """Return the nodes that still read the float weight of a converted layer."""
    return [use.node for use in layer.weight.source.uses()]
