"""Emit embedding tables as codes of their rows (see `magr_onnx.passes.layers.embedding` for the forms)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.packing import pack_bits, pack_qdq, unpack_bits
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.format import only_reader
from magr_onnx.passes.emit.matmulnbits import DOMAIN
from magr_onnx.passes.graph.constants import constant_array
from magr_onnx.passes.graph.nodes import UnsupportedNode, attribute_of, insert_behind, operand
from magr_onnx.passes.layers.embedding import BITS, EmbeddingTable, Form
from magr_onnx.passes.layers.weighted import FLOATS


def emit(tables: Sequence[EmbeddingTable], solution: LayerSolution, form: Form) -> list[Emitted]:
    """Write the solution of a table, with codes ``(width, rows)``, into all Gathers that read it."""
    first, weight = tables[0], solution.quantized
    assert weight is not None
    kind = FLOATS[first.dtype]
    bits = weight.spec.bits
    suffix = f"_q{bits}"
    if form == "dequantize":
        packed = pack_qdq(weight)
        scales = packed.scales.astype(kind)[:, None]
        constants = [
            first.constant(suffix, np.ascontiguousarray(packed.codes.T.astype(np.int8))),
            first.constant(f"{suffix}_scales", scales),
        ]
    else:
        constants = [
            first.constant(suffix, pack_bits(np.ascontiguousarray(weight.codes.T), bits)),
            first.constant(f"{suffix}_scales", np.ascontiguousarray(weight.scales.T).astype(kind)),
            first.constant(f"{suffix}_zero_points", pack_bits(np.ascontiguousarray(weight.zero_points.T), bits)),
        ]
        first.root.opset_imports.setdefault(DOMAIN, 1)
    size = sum(c.const_value.nbytes for c in constants if c.const_value is not None)
    return [Emitted(_replace(table, constants, weight.spec, form), bits, size) for table in tables]


def reads(bits: int, block: int, width: int) -> bool:
    """Return whether a Gather reads the codes of a MatMulNBits of ``width`` inputs."""
    return bits in BITS and width % block == 0


def emit_shared(tables: Sequence[EmbeddingTable], node: ir.Node) -> list[Emitted]:
    """Have the Gathers of a table read the codes of a MatMulNBits of the main graph; nothing where they cannot.

    The layout is that of onnxruntime-genai's models: the codes ``(rows, blocks, bytes)`` of the product pass a Reshape to
    ``(rows, blocks * bytes)``, which onnxruntime does as it loads the file; scales and zero points are the same for both.
    """
    first = tables[0]
    rows, width = first.weight.shape
    bits, block, k, n = (attribute_of(node, name, 0) for name in ("bits", "block_size", "K", "N"))
    codes, scales, zeros = (*node.inputs[1:], None)[:3]
    if (k, n) != (width, rows) or not reads(bits, block, width) or codes is None or scales is None or scales.dtype != first.dtype:
        return []
    flat = ir.node("Reshape", [codes, first.constant("_flat", np.array([rows, -1]))], name=f"{first.name}_codes")
    flat.outputs[0].name = f"{codes.name}_flat"
    first.names.adopt([flat])
    insert_behind(first.root, codes, flat)
    constants = [flat.outputs[0], scales, *([] if zeros is None else [zeros])]
    return [Emitted(_replace(table, constants, WeightSpec(bits, block), "gather-block-quantized"), bits, 0) for table in tables]


def _replace(table: EmbeddingTable, constants: Sequence[ir.Value], spec: WeightSpec, form: Form) -> str:
    index, name = table.node.inputs[1], f"{table.name}_q{spec.bits}"
    if form == "dequantize":
        codes = ir.node("Gather", [constants[0], index], {"axis": 0}, name=name)
        scales = ir.node("Gather", [constants[1], index], {"axis": 0}, name=f"{name}_scales")
        cast = ir.node("Cast", [codes.outputs[0]], {"to": table.dtype}, name=f"{name}_cast")
        nodes = [codes, scales, cast, ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}_scaled")]
        for inner in nodes[:-1]:
            inner.outputs[0].name = f"{table.output.name}_{str(inner.name).removeprefix(table.name)}"
    else:
        attributes = {"bits": spec.bits, "block_size": spec.group_size, "gather_axis": 0, "quantize_axis": 1}
        nodes = [ir.node("GatherBlockQuantized", [constants[0], index, *constants[1:]], attributes, domain=DOMAIN, version=1, name=name)]
    table.replace(nodes)
    return str(nodes[0].name)


def emitted_table(node: ir.Node) -> Array | None:
    """Dequantize the table ``(rows, width)`` that a node gathers codes of; None for any other node."""
    try:
        codes = constant_array(operand(node, 0))
        if codes is None:
            return None
        if node.op_type == "Gather":
            scaled = only_reader(only_reader(node, "Cast"), "Mul")
            producers = [v.producer() for v in scaled.inputs if v is not None] if scaled is not None else []
            scales = next((constant_array(n.inputs[0]) for n in producers if n is not None and n.op_type == "Gather"), None)
            return None if codes.dtype != np.int8 or scales is None else codes.astype(np.float32) * scales.astype(np.float32)
        scales, zeros = constant_array(operand(node, 2)), constant_array(operand(node, 3))
    except UnsupportedNode:
        return None
    bits, block = attribute_of(node, "bits", 4), attribute_of(node, "block_size", 128)
    if scales is None or codes.dtype != np.uint8 or codes.ndim != 2:
        return None
    width = codes.shape[1] * 8 // bits
    column = np.arange(width) // block
    levels = np.full(scales.shape, 2 ** (bits - 1), np.uint8) if zeros is None else unpack_bits(zeros, bits, scales.shape[1])
    difference = unpack_bits(codes, bits, width).astype(np.float32) - levels.astype(np.float32)[:, column]
    result: Array = difference * scales.astype(np.float32)[:, column]
    return result
