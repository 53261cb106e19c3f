"""Reading quantized weights back out of a graph: the proof that what was chosen is what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.packing import MatMulNBitsTensors, QdqTensors, dequantize_matmulnbits, dequantize_qdq
from magr_onnx.core.types import Array
from magr_onnx.model_io.writing import let_go
from magr_onnx.passes.emit.conv import emitted_matrices
from magr_onnx.passes.emit.embedding import emitted_table
from magr_onnx.passes.emit.matmulnbits import DOMAIN
from magr_onnx.passes.layers.conv import OPS as CONVOLUTIONS


def read_weights(model: ir.Model, outputs: Collection[str] = ()) -> dict[str, Array]:
    """The dequantized weight ``(K, N)`` of every MatMulNBits, QDQ MatMul or Gemm, scaled MatMulInteger and QDQ convolution, by the
    layer's output name; ``(G, K, N)`` of convolutions in several groups, and gathered tables ``(rows, width)``.

    Bodies are read like the main graph. The layer's output is the first one of ``outputs`` behind the product. Where none of them is, it is
    what is left after the Cast and Mul of an integer product, the requantization of a product, an Add of an initializer, a Cast back to
    float16, and a Sum with a low-rank branch, which the weight does not include.
    """
    return dict(iterate(model, outputs))


def iterate(model: ir.Model, outputs: Collection[str] = ()) -> Iterator[tuple[str, Array]]:
    """`read_weights` one by one: only one is in memory at a time."""
    for node in model.graph.all_nodes():
        weight = emitted_weight(node)
        if weight is not None:
            yield _output_name(node, outputs), weight


def emitted_weight(node: ir.Node) -> Array | None:
    """The dequantized weight ``(K, N)`` a product multiplies by, or None where it is not one of the forms above."""
    if node.op_type == "MatMulNBits" and node.domain == DOMAIN:
        return _matmulnbits(node)
    if node.op_type in ("MatMul", "Gemm") and node.domain == "":
        return _qdq(node)
    if node.op_type == "MatMulInteger" and node.domain == "":
        return _integer(node)
    if node.op_type in CONVOLUTIONS and node.domain == "":
        return emitted_matrices(node)
    if (node.domain, node.op_type) in (("", "Gather"), (DOMAIN, "GatherBlockQuantized")):
        return emitted_table(node, _only_reader(_only_reader(node, "Cast"), "Mul"))
    return None


def digest(weight: Array) -> str:
    """A hash of a dequantized weight, bit for bit."""
    return hashlib.sha256(np.ascontiguousarray(weight, dtype=np.float32).tobytes()).hexdigest()[:16]


def _array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    return None if value is None or value.const_value is None else _numpy(value.const_value)


def _numpy(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """The values of a tensor. What was unpacked from a file is not kept: a model has many of them."""
    array = tensor.numpy()
    if isinstance(tensor, ir.ExternalTensor):
        array = array.copy()
        let_go(tensor)
    return array


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _matmulnbits(node: ir.Node) -> Array | None:
    weight, scales = _array(node.inputs[1]), _array(node.inputs[2])
    zeros = _array(node.inputs[3]) if len(node.inputs) > 3 else None
    if weight is None or scales is None or (zeros is not None and zeros.dtype != np.uint8):
        return None
    bits, block = _attribute(node, "bits", 4), _attribute(node, "block_size", 0)
    k, n = _attribute(node, "K", 0), _attribute(node, "N", 0)
    if block <= 0 or weight.shape != (n, -(-k // block), block * bits // 8) or scales.size != n * -(-k // block):
        return None
    return dequantize_matmulnbits(MatMulNBitsTensors(weight, scales, zeros, bits, block, k, n))


def _qdq(node: ir.Node) -> Array | None:
    right = node.inputs[1]
    producer = None if right is None else right.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    codes, scales = _array(producer.inputs[0]), _array(producer.inputs[1])
    zeros = _array(producer.inputs[2]) if len(producer.inputs) > 2 else None
    if codes is None or scales is None or codes.ndim != 2:
        return None
    axis, block = _attribute(producer, "axis", 1), _attribute(producer, "block_size", 0)
    if scales.ndim > 0 and (axis, block > 0) not in ((1, False), (0, True)):
        return None
    grid = (codes.shape[1],) if block == 0 else (-(-len(codes) // block), codes.shape[1])
    if scales.shape != grid or (zeros is not None and zeros.shape != grid):  # one scale for all, or no valid node: not written here
        return None
    zero_points = None if zeros is None else zeros.astype(np.int16)
    if scales.ndim == 0:  # one grid a tensor, which others write
        scales, axis = np.broadcast_to(scales, codes.shape[1:]), 1
        zero_points = None if zero_points is None else np.broadcast_to(zero_points, codes.shape[1:])
    return dequantize_qdq(QdqTensors(codes.astype(np.int16), scales, zero_points, 0, axis, block))


def _integer(node: ir.Node) -> Array | None:
    """``MatMulInteger -> Cast -> Mul(scale of x * scales of W)``."""
    codes = _array(node.inputs[1])
    zeros = _array(node.inputs[3]) if len(node.inputs) > 3 else None
    scaled = _only_reader(_only_reader(node, "Cast"), "Mul")
    if codes is None or codes.ndim != 2 or scaled is None:
        return None
    factors = next((p for v in scaled.inputs if v is not None and (p := v.producer()) is not None and p.op_type == "Mul"), None)
    scales = None if factors is None else next((a for v in factors.inputs if (a := _array(v)) is not None), None)
    if scales is None:
        return None
    zero_points = None if zeros is None else zeros.astype(np.int16)
    return dequantize_qdq(QdqTensors(codes.astype(np.int16), scales, zero_points, 0, 1, 0))


def _only_reader(node: ir.Node | None, op: str) -> ir.Node | None:
    """The only node that reads ``node``'s output, if it is an ``op``."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op and uses[0].node.domain == "" else None


def _output_name(node: ir.Node, outputs: Collection[str]) -> str:
    names = [str(n.outputs[0].name) for n in _behind(node)]
    return next((name for name in names if name in outputs), names[-1])


def _is_constant(value: ir.Value) -> bool:
    """An initializer, or one that is dequantized."""
    node = value.producer()
    held = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value
    return held is not None and held.is_initializer()


def _behind(node: ir.Node) -> Iterator[ir.Node]:
    """The product, and the nodes behind it that an emitter may have written."""
    last = node
    yield last
    if node.op_type in (*CONVOLUTIONS, "GatherBlockQuantized"):
        return
    if node.op_type != "MatMulNBits":
        for last in _behind_product(node):
            yield last
    total = _only_reader(last, "Sum")
    if total is not None and any(_is_branch(v, node.inputs[0]) for v in total.inputs):
        yield total


def _is_branch(value: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether ``value`` is ``(x A) B`` with constants A and B."""
    for _ in range(2):
        node = None if value is None else value.producer()
        if node is None or node.op_type != "MatMul" or node.inputs[1] is None or not node.inputs[1].is_initializer():
            return False
        value = node.inputs[0]
    return value is x


def _behind_product(node: ir.Node) -> Iterator[ir.Node]:
    last = node
    for op in ("Cast", "Mul") if node.op_type in ("MatMulInteger", "Gather") else ("QuantizeLinear", "DequantizeLinear"):
        if (found := _only_reader(last, op)) is not None:
            yield (last := found)
    add = _only_reader(last, "Add")
    if add is not None and any(v is not None and _is_constant(v) for v in add.inputs):
        yield (last := add)
    cast = _only_reader(last, "Cast")
    if cast is not None and cast.attributes["to"].as_int() == ir.DataType.FLOAT16:
        yield cast
