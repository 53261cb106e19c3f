"""Names for the nodes and values that are added to a model: free in its main graph and in every body.

ONNX forbids a body to define a value that a graph around it already has, and onnxruntime refuses two nodes of one name. Callers and
calibration refer to values by name, so what is in a model keeps its name and what is new takes another: ``base``, else ``base_1``,
``base_2`` and so on. Values and nodes are named independently of each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


class Names:
    """The names taken in one model.

    `of` scans a graph once and remembers the result beside it, and every name handed out counts as taken, so a new name costs a look-up.
    Changes made by other code are not seen: whoever takes over a graph from elsewhere (a pass that starts, code that has run a pass of
    another library) calls `rescan` first. A clone of a graph is another graph.
    """

    def __init__(self, values: Iterable[str | None] = (), nodes: Iterable[str | None] = ()) -> None:
        self._values, self._nodes = _Taken(values), _Taken(nodes)

    @staticmethod
    def of(graph: ir.Graph) -> Names:
        """The names of a main graph and its bodies, as of the last scan."""
        return _KNOWN.get(graph) or Names.rescan(graph)

    @staticmethod
    def rescan(graph: ir.Graph) -> Names:
        """Read the names of a main graph and its bodies anew."""
        graphs, nodes = [graph, *graph.subgraphs()], list(graph.all_nodes())
        values = {v for g in graphs for v in (*g.inputs, *g.initializers.values(), *g.outputs)}
        values.update(v for node in nodes for v in node.outputs)
        names = _KNOWN[graph] = Names((v.name for v in values), (node.name for node in nodes))
        return names

    def value(self, base: str) -> str:
        """Take a name for a value: ``base`` if it is free, else the first numbered one that is."""
        return self._values.take(base)

    def node(self, base: str) -> str:
        """Take a name for a node: ``base`` if it is free, else the first numbered one that is."""
        return self._nodes.take(base)

    def adopt(self, nodes: Iterable[ir.Node], replaced: Iterable[ir.Node] = (), result: ir.Value | None = None) -> None:
        """Give nodes that are about to be inserted, and what they put out, free names: those they have, or variants of them.

        Outputs without a name stay without.

        Args:
            nodes: The new nodes.
            replaced: Nodes that are about to be removed, whose names become free.
            result: What of theirs is replaced by an output of the new nodes, which inherits its name.
        """
        for node in replaced:
            self._nodes.release(node.name)
            for output in node.outputs:
                if output is not result:
                    self._values.release(output.name)
        for node in nodes:
            node.name = None if node.name is None else self._nodes.take(node.name)
            for output in node.outputs:
                output.name = None if output.name is None else self._values.take(output.name)


class _Taken:
    """Names that are taken, and for every base the number of its last variant, so that the next one is found at once."""

    def __init__(self, names: Iterable[str | None]) -> None:
        self._holders = Counter(names)
        self._last: dict[str, int] = {}

    def take(self, base: str) -> str:
        name, count = base, self._last.get(base, 0)
        while self._holders[name] > 0:
            count += 1
            name = f"{base}_{count}"
        self._last[base] = count
        self._holders[name] = 1
        return name

    def release(self, name: str | None) -> None:
        self._holders[name] -= 1


_KNOWN: WeakKeyDictionary[ir.Graph, Names] = WeakKeyDictionary()


def add_initializer(
    graph: ir.Graph, base: str, data: npt.NDArray[Any] | np.generic | ir.TensorProtocol, body: ir.Graph | None = None
) -> ir.Value:
    """Register a constant, named ``base`` or a free variant of it.

    Args:
        graph: The main graph, where the constant is unless there is a ``body``; bodies can read it there.
        base: The name, if it is free.
        data: An array, a scalar, or a tensor, which is renamed.
        body: A body of ``graph`` that gets the constant instead.
    """
    is_array = isinstance(data, np.ndarray | np.generic)  # `ir.tensor` asks for protocols, which takes far longer than the rest
    tensor = ir.Tensor(np.asarray(data)) if is_array else ir.tensor(data)
    tensor.name = Names.of(graph).value(base)
    value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    (graph if body is None else body).register_initializer(value)
    return value
