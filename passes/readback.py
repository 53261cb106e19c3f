"""Reading quantized weights back out of a graph: the proof that what was chosen is what was written."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.packing import MatMulNBitsTensors, QdqTensors, dequantize_matmulnbits, dequantize_qdq
from magr_onnx.passes.emit_matmulnbits import DOMAIN
from magr_onnx.types import Array


def read_weights(model: ir.Model) -> dict[str, Array]:
    """The dequantized weight ``(K, N)`` of every MatMulNBits and weight-only QDQ MatMul, by the name of the layer's output.

    The layer's output is the Add's where the product's only reader is an Add of an initializer.
    """
    found: dict[str, Array] = {}
    for node in model.graph:
        weight: Array | None = None
        if node.op_type == "MatMulNBits" and node.domain == DOMAIN:
            weight = _matmulnbits(node)
        elif node.op_type == "MatMul" and node.domain == "":
            weight = _qdq(node)
        if weight is not None:
            found[_output_name(node)] = weight
    return found


def digest(weight: Array) -> str:
    """A hash of a dequantized weight, bit for bit."""
    return hashlib.sha256(np.ascontiguousarray(weight, dtype=np.float32).tobytes()).hexdigest()[:16]


def _array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


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
    if (axis, block > 0) not in ((1, False), (0, True)):
        return None
    zero_points = None if zeros is None else zeros.astype(np.int16)
    return dequantize_qdq(QdqTensors(codes.astype(np.int16), scales, zero_points, 0, axis, block))


def _output_name(node: ir.Node) -> str:
    out = node.outputs[0]
    uses = list(out.uses())
    if node.op_type == "MatMul" and len(uses) == 1 and not out.is_graph_output() and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and other.is_initializer():
            out = uses[0].node.outputs[0]
    return str(out.name)
