"""Reading of quantized weights from a graph, to verify that a file has the weights that were chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from magr_onnx.core.types import Array
from magr_onnx.passes.emit import FORMATS, experts, recurrent
from magr_onnx.passes.emit.conv import emitted_matrices
from magr_onnx.passes.emit.embedding import emitted_table
from magr_onnx.passes.emit.format import Operator, Reader, only_reader
from magr_onnx.passes.emit.matmulnbits import DOMAIN
from magr_onnx.passes.graph.nodes import result_of
from magr_onnx.passes.layers.conv import OPS
from magr_onnx.passes.layers.experts import QUANTIZED
from magr_onnx.passes.layers.recurrent import GATES

NON_LINEAR: dict[Operator, Reader] = {
    **{("", op): Reader(emitted_matrices, bias=False, branch=False) for op in OPS},
    **{("", op): Reader(recurrent.emitted_matrices, bias=False, branch=False) for op in GATES},
    (DOMAIN, "DynamicQuantizeLSTM"): Reader(recurrent.emitted_matrices, bias=False, branch=False),
    (DOMAIN, QUANTIZED): Reader(experts.emitted_matrices, bias=False, branch=False),
    ("", "Gather"): Reader(emitted_table, ("Cast", "Mul"), bias=False, branch=False),
    (DOMAIN, "GatherBlockQuantized"): Reader(emitted_table, bias=False, branch=False),
}
"""Readers of convolutions, recurrent operators, experts and embedding tables, which are written in the same forms in every format."""


def read_weights(model: ir.Model, outputs: Collection[str] = ()) -> dict[str, Array]:
    """Read every quantized weight of a model, by the layer's output name.

    These are dequantized weights ``(K, N)`` of MatMulNBits, QDQ MatMul and Gemm, and scaled MatMulInteger, ``(G, K, N)`` of convolutions in
    several groups, ``(D, K, N)`` of recurrent operators, ``(E, K, N)`` of experts, and tables ``(rows, width)``, in bodies too. The layer's
    output is the first of ``outputs`` behind the product, else the
    last value after the Cast and Mul of an integer product, the requantization of a product, an Add of an initializer, a Cast back to
    float16, and a Sum with a low-rank branch (which the weight does not include).
    """
    return dict(iterate_weights(model, outputs))


def iterate_weights(model: ir.Model, outputs: Collection[str] = ()) -> Iterator[tuple[str, Array]]:
    """Yield the weights of `read_weights` one by one, so that only one is in memory."""
    for node in model.graph.all_nodes():
        for reader in readers_of(node):
            weight = reader.weight(node)
            if weight is not None:
                names = [str(result_of(n).name) for n in _behind(node, reader)]
                yield next((name for name in names if name in outputs), names[-1]), weight
                break


def readers_of(node: ir.Node) -> Iterator[Reader]:
    """List the readers of a node's operator; formats may share a reader."""
    operator = (node.domain, node.op_type)
    sources = [NON_LINEAR, *(form.readers for form in FORMATS.values())]
    return iter(dict.fromkeys(readers[operator] for readers in sources if operator in readers))


def digest(weight: Array | Iterator[Array]) -> str:
    """Hash the bits of a dequantized weight, given as a whole or in parts along its first axis."""
    hashed = hashlib.sha256()
    for part in (weight,) if isinstance(weight, np.ndarray) else weight:
        hashed.update(np.ascontiguousarray(part, dtype=np.float32).data)
    return hashed.hexdigest()[:16]


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer, possibly dequantized."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value
    return source is not None and source.is_initializer()


def _behind(node: ir.Node, reader: Reader) -> Iterator[ir.Node]:
    """Yield the product and the nodes behind it that an emitter may have written."""
    last = node
    yield last
    for op in reader.behind:
        if (reading := only_reader(last, op)) is not None:
            yield (last := reading)
    if reader.bias:
        add = only_reader(last, "Add")
        if add is not None and any(v is not None and _is_constant(v) for v in add.inputs):
            yield (last := add)
        both = only_reader(last, "Sum")
        if both is not None and any(_is_other_half(value, node) for value in both.inputs):
            yield (last := both)
        cast = only_reader(last, "Cast")
        if cast is not None and cast.attributes["to"].as_int() == ir.DataType.FLOAT16:
            yield (last := cast)
    total = only_reader(last, "Sum") if reader.branch else None
    if total is not None and (len(total.inputs) == 1 or any(_is_branch(v, node.inputs[0]) for v in total.inputs)):
        yield total


def _is_other_half(value: ir.Value | None, product: ir.Node) -> bool:
    """Whether ``value`` is another product with the same weight, as of an input of 16 bits in two of 8."""
    node = None if value is None else value.producer()
    return node is not None and node is not product and node.op_type == "MatMul" and node.inputs[1] is product.inputs[1]


def _is_branch(value: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether ``value`` is ``(x A) B`` with constants A and B."""
    for _ in range(2):
        node = None if value is None else value.producer()
        if node is None or node.op_type != "MatMul" or node.inputs[1] is None or not node.inputs[1].is_initializer():
            return False
        value = node.inputs[0]
    return value is x
