"""Emit weight-only QDQ: ``DequantizeLinear(W) -> MatMul (-> Add)``, in the forms onnxruntime fuses into MatMulNBits.

1. The weight is always ``(K, N)`` and the product always a MatMul: ``DQ -> Gemm(transB=1)`` and a shared DQ would not fuse.
2. One grid per channel: DequantizeLinear on axis 1. Blocks: axis 0 with ``block_size``. The opset is raised only as far as needed.
3. 8 bits: int8 or uint8. 4 bits: int4 or uint4. 3 bits use the 4-bit types. Symmetric grids use the signed type and no zero point.
4. The codes of a layer in the body of an If, Loop or Scan are in that body: onnxruntime's fusion looks for them only there, and fails to
   load a model that has them outside [measured, 1.31]. If layers elsewhere share them, they and the DequantizeLinear are in the main
   graph, and the product in the body is a float one.
5. An input that is itself dequantized (in a model quantized before) passes through a Sum of one value before 8-bit blocks: onnxruntime
   would otherwise fuse an integer product, which does not support blocks and fails [measured, 1.31].
6. A product that goes into a Relu or Clip, or with two axes into an Add that onnxruntime merges into a Gemm, passes through a Sum of one
   value: onnxruntime would not fuse it, and dequantize the weight in every run [measured, 1.32]. The Add of a bias is fused unless a
   Relu or Clip follows; it comes before the Sum.
7. 2 bits are refused: onnxruntime's fusion of blockwise int2 returns wrong results unless N is a multiple of 4.

At the default optimization level onnxruntime runs the fused node with int8 activations; the session option
``session.qdq_matmulnbits_accuracy_level=0`` selects float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.packing import MATMULNBITS_BLOCKS, QdqTensors, container_bits, dequantize_qdq, pack_qdq
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.format import Format, Reader, stored_array
from magr_onnx.passes.emit.linear import BlockEmitter, derived_name, emitted_blocks, replace_layer
from magr_onnx.passes.graph.constants import source_of
from magr_onnx.passes.graph.nodes import attribute_of, operator_of
from magr_onnx.passes.graph.opset import raise_opset
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.layers.weighted import FLOATS


@dataclass(frozen=True)
class EmitQDQ(BlockEmitter):
    """Replace quantized layers by DequantizeLinear and MatMul.

    Attributes:
        largest_block: Most rows in a block.
    """

    name: ClassVar[str] = "emit-qdq"
    summary: ClassVar[str] = "write quantized layers as weight-only DequantizeLinear + MatMul"

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = super().problems(spec)
        if spec is not None and spec.bits == 2:
            problems.append("2 bits with format qdq: onnxruntime's int2 fusion returns wrong results; use format matmulnbits")
        return problems

    def ends_short(self, spec: WeightSpec, k: int) -> bool:
        return k % min(spec.rows(k), self.largest_block) != 0

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        return spec is not None and raise_opset(model, opset_for(model, spec), "DequantizeLinear of this grid")

    def emit(self, layer: LinearLayer, problem: LayerProblem, solution: LayerSolution, constants: WeightConstants) -> Emitted | None:
        quantized = solution.quantized
        if quantized is None:
            return None
        packed = pack_qdq(quantized, self.largest_block)
        suffix = f"_q{packed.bits}"
        float_kind = FLOATS[layer.dtype]
        # Fused in a body, onnxruntime 1.31 returns zeros for half-precision inputs; a weight dequantized outside is not fused.
        inside = not constants.shared and layer.dtype != ir.DataType.FLOAT16
        codes = constants.add(layer, suffix, packed.codes.astype(packed.stored_dtype), inside)
        inputs: list[ir.Value | None] = [codes, constants.add(layer, f"{suffix}_scales", packed.scales.astype(float_kind), inside)]
        if packed.zero_points is not None:
            inputs.append(constants.add(layer, f"{suffix}_zero_points", packed.zero_points.astype(packed.stored_dtype), inside))
        attributes = {"axis": packed.axis, "block_size": packed.block_size} if packed.block_size else {"axis": packed.axis}
        weight = ir.val(None, layer.dtype, [layer.k, layer.n])
        dequantize = ir.node("DequantizeLinear", inputs, attributes, outputs=[weight], name=f"{layer.name}_dequantize")
        weight.name = derived_name(layer, codes, "_dequantized")  # counts this node among the readers of the codes
        nodes: list[ir.Node] = []
        x = layer.x
        if packed.bits == 8 and packed.block_size and _is_dequantized(x):
            x = ir.val(f"{layer.name}_input_out", layer.dtype, layer.x.shape)
            nodes.append(ir.node("Sum", [layer.x], outputs=[x], name=f"{layer.name}_input"))
        product = ir.node("MatMul", [x, weight], name=f"{layer.name}_q{quantized.spec.bits}")
        nodes.append(product)
        if layer.nested and not inside:
            layer.names.adopt([dequantize])
            layer.root.insert_before(layer.root[0], dequantize)
        else:
            nodes.insert(0, dequantize)
        if solution.bias is not None:
            bias = layer.constant("_bias", solution.bias.astype(float_kind))
            nodes.append(ir.node("Add", [_inner(layer, product, "product"), bias], name=f"{layer.name}_bias"))
        if solution.factors is None and _is_hidden(layer.output, solution.bias is not None):
            nodes.append(ir.node("Sum", [_inner(layer, nodes[-1], "summed")], name=f"{layer.name}_sum"))
        replace_layer(layer, nodes, solution.factors, constants)
        return emitted_blocks(product, quantized, packed.block_size or layer.k, constants)


def _inner(layer: LinearLayer, node: ir.Node, suffix: str) -> ir.Value:
    """Name the result of a node, of the type of the layer's output, for another node of the layer to read."""
    value = node.outputs[0]
    value.name, value.dtype, value.shape = f"{layer.output.name}_{suffix}", layer.dtype, layer.output.shape
    return value


def _is_hidden(output: ir.Value, biased: bool) -> bool:
    """Whether what reads a layer keeps onnxruntime from fusing it: see 6."""
    flat = output.shape is None or len(output.shape) <= 2
    hiding = [*(("Relu", "Clip") if flat or not biased else ()), *(("Add",) if flat and not biased else ())]
    return any(operator_of(reader) in hiding for reader, _ in output.uses())


def _is_dequantized(value: ir.Value) -> bool:
    """Whether a value comes from a DequantizeLinear, possibly through a Reshape or the like."""
    node = source_of(value).producer()
    return node is not None and node.op_type == "DequantizeLinear"


def opset_for(model: ir.Model, spec: WeightSpec) -> int:
    """Return the opset whose DequantizeLinear supports the grid: 13 for int8 on an axis, 19 for float16, 21 for blocks and int4."""
    if spec.group_size is not None or container_bits(spec.bits) == 4:
        return 21
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs)]
    return 19 if any(value.dtype == ir.DataType.FLOAT16 for value in values) else 13


def read_dequantized(node: ir.Node) -> Array | None:
    """Dequantize the weight ``(K, N)`` that a product reads from a DequantizeLinear; None if this package does not write its form."""
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    stored = producer.inputs[0]
    cast = None if stored is None else stored.producer()
    codes, scales = stored_array(stored if cast is None or cast.op_type != "Cast" else cast.inputs[0]), stored_array(producer.inputs[1])
    zeros = stored_array(producer.inputs[2]) if len(producer.inputs) > 2 else None
    if codes is None or scales is None or codes.ndim != 2:
        return None
    axis, block = attribute_of(producer, "axis", 1), attribute_of(producer, "block_size", 0)
    if scales.ndim > 0 and (axis, block > 0) not in ((1, False), (0, True)):
        return None
    grid = (codes.shape[1],) if block == 0 else (-(-len(codes) // block), codes.shape[1])
    if scales.shape != grid or (zeros is not None and zeros.shape != grid):  # an invalid node, or one scale per tensor of one column
        return None
    zero_points = None if zeros is None else zeros.astype(np.int16)
    if scales.ndim == 0:  # one grid per tensor, written by other tools
        scales, axis = np.broadcast_to(scales, codes.shape[1:]), 1
        zero_points = None if zero_points is None else np.broadcast_to(zero_points, codes.shape[1:])
    return dequantize_qdq(QdqTensors(codes.astype(np.int16), scales, zero_points, 0, axis, block))


READERS = dict.fromkeys((("", "MatMul"), ("", "Gemm")), Reader(read_dequantized, ("QuantizeLinear", "DequantizeLinear")))
FORMAT = Format(
    "qdq",
    "DequantizeLinear of the codes and MatMul",
    EmitQDQ,
    READERS,
    dict.fromkeys((4, 8), MATMULNBITS_BLOCKS),  # the kernels onnxruntime fuses it into
)
