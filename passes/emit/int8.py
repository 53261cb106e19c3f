"""Emit layers as 8-bit integer products, in the two forms onnxruntime has kernels for.

`EmitQDQInt8`, static: ``QuantizeLinear(x) -> DequantizeLinear`` and ``DequantizeLinear(W)`` before the product.

1. ``MatMul``: the product stays a MatMul, the bias a float Add. Fused to MatMulIntegerToFloat. For an input of two axes, unknown rank or
   static shape, onnxruntime first merges the two into a Gemm, so the bias is int32 there as in 2.
2. ``Gemm``: alpha, beta and transB are folded, the bias becomes int32 with scale ``s_x s_w``. Fused to QGemm. If bias and products
   together may exceed int32, the layer is written as MatMul and Add, with a note in the report.
3. With ``outputs``, the product is quantized too, to its calibrated range. Fused to QLinearMatMul or an all-integer QGemm.
4. An input of 16 bits is the sum of two of 8, coarse and fine, and the layer two products with one weight: kernels have 8 bits.

`EmitDynamicInt8`: ``(Clip ->) DynamicQuantizeLinear(x) -> MatMulInteger(W) -> Cast -> Mul(s_x s_w) (-> Add)``. Fused to
DynamicQuantizeMatMul, or to MatMulIntegerToFloat where layers share the input. With ``rows``, every row has a range of its own, even
about zero: ``Abs -> ReduceMax -> Div -> Mul -> Round -> Add 128 -> Cast(uint8)``, a constant zero point of 128, and ``s_w / (1 / s_x)``
in the place of ``s_x s_w``, which onnxruntime 1.32 would fuse to MatMulIntegerToFloat and read as a scale a column.

Weights are int8 with one scale per column, whatever their bits. Layers with the same input share its quantized form. float16 layers are
cast to float32 and back, since the integer kernels support no other float type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.int32_bias import bias_codes, bias_scales
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.overflow.accumulator import extremes
from magr_onnx.core.packing import QdqTensors, container_bits, dequantize_qdq
from magr_onnx.core.types import Activation, ActivationGrid, Array, DynamicRange, QuantizedWeight, WeightSpec, activation_limits
from magr_onnx.passes.base import Emitted, Emitter, InputGrids
from magr_onnx.passes.emit.format import Format, Reader, only_reader, stored_array
from magr_onnx.passes.emit.linear import derived_name, replace_layer
from magr_onnx.passes.emit.qdq import READERS
from magr_onnx.passes.graph.constants import constant_array
from magr_onnx.passes.graph.nodes import operand
from magr_onnx.passes.graph.opset import raise_opset
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants

FLOAT = ir.DataType.FLOAT
_META = "magr_onnx.input"


class _Nodes:
    """The nodes that replace one layer; those that quantize its input are shared by later layers that read it."""

    def __init__(self, layer: LinearLayer, quantized: QuantizedWeight, constants: WeightConstants, kind: str) -> None:
        self.layer, self.kind, self._constants = layer, kind, constants
        self.nodes: list[ir.Node] = []
        self.half = layer.dtype == ir.DataType.FLOAT16
        self.suffix, self.width = f"_q{quantized.spec.bits}", container_bits(quantized.spec.bits)
        self.codes = quantized.raw().astype(np.int8)
        self.scales = quantized.scales[0]
        self.x_name = f"{layer.name}_x" if layer.nested else str(layer.x.name)  # bodies may read one value from outside
        self.zeros = quantized.zero_points[0].astype(np.int16) - quantized.spec.middle

    def constant(self, suffix: str, array: npt.NDArray[Any]) -> ir.Value:
        """Add a constant derived from the weight."""
        return self._constants.add(self.layer, f"{self.suffix}{suffix}", array)

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: ir.Shape | None = None,
        dtype: ir.DataType = FLOAT,
        **attributes: Any,
    ) -> ir.Value:
        output = ir.val(f"{name}_out", dtype, shape)
        self.nodes.append(ir.node(op, inputs, attributes, outputs=[output], name=name))
        return output

    def shared(self) -> list[ir.Value] | None:
        """Return the quantized form of the input that an earlier layer made; None if there is none."""
        for use in self.layer.x.uses():
            kind, values = use.node.meta.get(_META, (None, ()))
            if kind == self.kind and all(v.graph is self.layer.graph for v in values):  # a clone has the metadata of its original
                return list(values)
        return None

    def share(self, values: list[ir.Value]) -> list[ir.Value]:
        """Insert the nodes made so far before the layer, for all layers that read its input."""
        self.nodes[0].meta[_META] = (self.kind, values)
        self.layer.names.adopt(self.nodes)
        self.layer.graph.insert_before(self.layer.node, self.nodes)
        self.nodes = []
        return values

    def float_input(self) -> ir.Value:
        """Return the input in float32."""
        x = self.layer.x
        return self.add("Cast", [x], f"{self.x_name}_float32", x.shape, to=FLOAT) if self.half else x

    def finish(
        self, value: ir.Value, product: ir.Node, solution: LayerSolution, notes: Sequence[str] = (), stored_bits: int = 8
    ) -> Emitted:
        """Replace the layer by the nodes; ``value`` is its float32 result, and ``product`` multiplies by the weight."""
        if self.half:
            value = self.add("Cast", [value], f"{self.layer.name}_float16", dtype=ir.DataType.FLOAT16, to=ir.DataType.FLOAT16)
        for node in self.nodes[:-1]:
            for output in node.outputs:
                if output.shape is None and node.op_type in ("MatMul", "Gemm", "MatMulInteger", "Cast", "Mul"):
                    output.shape = self.layer.output.shape
        replace_layer(self.layer, self.nodes, solution.factors, self._constants)
        return Emitted(str(product.name), stored_bits, self._constants.bytes, notes=tuple(notes))


class _EmitInt8(Emitter):
    """An emitter of layers as 8-bit integer products."""

    needs: ClassVar[str]
    """The form of an operator that needs opset 13."""

    def problems(self, spec: WeightSpec | None) -> list[str]:
        if spec is None:
            return [f"{self.name} needs a quantize pass before it"]
        return [] if spec.group_size is None else [f"block size {spec.group_size}: integer kernels have one scale a column; use 'channel'"]

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        return raise_opset(model, 13, self.needs)


class EmitStaticProducts(_EmitInt8):
    """An emitter of layers as products of integers with static grids."""

    input_grids: ClassVar[InputGrids | None] = "static"

    def emit(self, layer: LinearLayer, problem: LayerProblem, solution: LayerSolution, constants: WeightConstants) -> Emitted | None:
        grid, addend = problem.activation, solution.bias
        if solution.quantized is None or not isinstance(grid, ActivationGrid):
            return None
        n, notes = _Nodes(layer, solution.quantized, constants, "static"), []
        in_halves = grid.bits == 16 and self.rules is None
        if grid.signed and (in_halves or n.shared() is not None or len(list(layer.x.uses())) > 1):
            notes.append("an int8 input read by several nodes is not fused on x86 and runs as floats there; uint8 is")
        x, rest, grid = _static_halves(n, grid) if in_halves else (_static_input(n, grid), None, grid)
        int4 = "" if self.rules is None else self.rules.int4
        weight = _dequantized(n, int4)
        gemm, output_grid = layer.op == "Gemm", problem.output_grid if self.quantizes_outputs else None
        may_fuse = gemm or (_may_become_gemm(layer) and output_grid is None)
        bias = None if addend is None or not may_fuse else _int32_bias(addend, n, grid)
        overflows = may_fuse and addend is not None and bias is None
        if overflows:
            notes.append("the bias does not fit int32 beside the products; written as MatMul and a float Add, which may run as floats")
        integer = gemm and not overflows
        name = f"{layer.name}{n.suffix}"
        value = n.add("Gemm", [x, weight, *([bias] if bias is not None else [])], name) if integer else n.add("MatMul", [x, weight], name)
        product = n.nodes[-1]
        if output_grid is not None and not overflows:  # the grid is that of the sum of product and bias
            value = _round_trip(n, value, f"{layer.name}_product", output_grid, layer.output.shape)
        if addend is not None and not integer:
            vector = layer.constant("_bias", addend.astype(np.float32)) if bias is None else bias
            value = n.add("Add", [value, vector], f"{layer.name}_bias")
        if rest is not None:  # by a Sum: an Add would make a float Gemm of it
            value = n.add("Sum", [value, n.add("MatMul", [rest, weight], f"{name}_fine")], f"{name}_sum")
        return n.finish(value, product, solution, notes, n.width if int4 else 8)


@dataclass(frozen=True)
class EmitQDQInt8(EmitStaticProducts):
    """Replace quantized layers by static integer QDQ.

    Attributes:
        outputs: Whether to quantize products too (see the module).
    """

    name: ClassVar[str] = "emit-qdq-int8"
    summary: ClassVar[str] = "write layers with static 8-bit inputs as QuantizeLinear/DequantizeLinear around MatMul and Gemm"
    needs: ClassVar[str] = "DequantizeLinear with a scale a column"

    outputs: bool = False

    @property
    def quantizes_outputs(self) -> bool:
        return self.outputs


def _dequantized(n: _Nodes, int4: str) -> ir.Value:
    """Dequantize the weight, as a runtime has codes of 4 bits (`magr_onnx.passes.tensors.rules.Rules.int4`)."""
    layer, shape, small = n.layer, ir.Shape([n.layer.k, n.layer.n]), bool(int4) and n.width == 4
    kind = np.dtype(ml_dtypes.int4 if small else np.int8)
    stored = codes = n.constant("", n.codes.astype(kind))
    if small and int4 == "cast":
        codes, kind = n.add("Cast", [codes], f"{layer.name}_int8", shape, ir.DataType.INT8, to=ir.DataType.INT8), np.dtype(np.int8)
    scales, zeros = n.constant("_scales", n.scales.astype(np.float32)), n.constant("_zero_points", n.zeros.astype(kind))
    weight = n.add("DequantizeLinear", [codes, scales, zeros], f"{layer.name}_dequantize", shape, axis=1)
    weight.name = derived_name(layer, stored, "_dequantized")
    return weight


def _may_become_gemm(layer: LinearLayer) -> bool:
    """Whether onnxruntime may merge MatMul and Add into a Gemm, as for two axes: a float Gemm, if the bias is float."""
    shape = layer.x.shape
    return shape is None or len(shape) == 2 or shape.is_static()


def _static_input(n: _Nodes, grid: ActivationGrid) -> ir.Value:
    shared = n.shared()
    if shared is not None:
        return shared[0]
    if _is_on(n.layer.x, grid):
        return n.layer.x
    value = _round_trip(n, n.float_input(), n.x_name, grid, n.layer.x.shape)
    value.shape = n.layer.x.shape
    return n.share([value])[0]


def _static_halves(n: _Nodes, grid: ActivationGrid) -> tuple[ir.Value, ir.Value, ActivationGrid]:
    """Round the input to the coarse half of a grid of 16 bits, which is returned too, and what that leaves to the fine one."""
    n.kind, shape = "halves", n.layer.x.shape
    values = n.shared()
    if values is None:
        x, names = n.float_input(), (f"{n.x_name}_coarse", f"{n.x_name}_fine")
        coarse = _round_trip(n, x, names[0], grid.halves()[0], shape)
        rest = n.add("Sub", [x, coarse], f"{n.x_name}_rest", shape)
        values = n.share([coarse, _round_trip(n, rest, names[1], grid.halves()[1], shape)])
    coarse, fine = values
    return coarse, fine, grid.halves()[0]


def _is_on(value: ir.Value, grid: ActivationGrid) -> bool:
    """Whether a value is rounded to a grid already."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return False
    scale, zero = (constant_array(operand(node, i)) for i in (1, 2))
    return (
        scale is not None
        and zero is not None
        and (zero.dtype, zero.size, zero.item(0), scale.item(0)) == (grid.dtype, 1, grid.zero_point, np.float32(grid.scale))
    )


def _round_trip(n: _Nodes, value: ir.Value, name: str, grid: ActivationGrid, shape: ir.Shape | None) -> ir.Value:
    """Quantize a value of a shape to a grid, and dequantize it."""
    constants: list[ir.Value | None] = [
        n.layer.constant(f"{name}_scale", np.float32(grid.scale), base=""),
        n.layer.constant(f"{name}_zero_point", np.array(grid.zero_point, grid.dtype), base=""),
    ]
    codes = n.add("QuantizeLinear", [value, *constants], f"{name}_quantize", shape, ir.DataType.from_numpy(grid.dtype))
    return n.add("DequantizeLinear", [codes, *constants], f"{name}_dequantize")


def _int32_bias(bias: Array, n: _Nodes, grid: ActivationGrid) -> ir.Value | None:
    """Quantize the bias in units of ``s_x s_w``; None if it could overflow int32 together with the products."""
    scale = bias_scales(n.scales, grid)
    codes = bias_codes(bias, scale)
    if not (np.abs(codes) < 2**31).all() or (scale == 0).any():
        return None
    sums = (n.codes, n.codes - n.zeros) if n.zeros.any() else (n.codes,)  # kernels may sum codes with or without zero points
    for levels in sums if grid.bits == 8 else ():  # accelerators of 16-bit values have wider accumulators
        low, high = extremes(levels, None, *_widened(grid))
        if (high[0] + codes).max() >= 2**31 or (low[0] + codes).min() < -(2**31):
            return None
    layer = n.layer
    inputs: list[ir.Value | None] = [
        layer.constant("_bias_int32", codes.astype(np.int32)),
        layer.constant("_bias_scales", scale),
        layer.constant("_bias_zero_points", np.zeros(layer.n, np.int32)),
    ]
    return n.add("DequantizeLinear", inputs, f"{layer.name}_bias_dequantize", ir.Shape([layer.n]), axis=0)


def _widened(grid: ActivationGrid) -> tuple[int, int]:
    """Return the range of the activation codes with and without their zero point: kernels may sum either."""
    low, high = activation_limits(grid.signed)
    return min(low, low - grid.zero_point), max(high, high - grid.zero_point)


@dataclass(frozen=True)
class EmitDynamicInt8(_EmitInt8):
    """Replace quantized layers by dynamically quantized integer products.

    Attributes:
        rows: Whether every row of the input has a range of its own, so that no sample depends on others in its batch.
    """

    name: ClassVar[str] = "emit-dynamic-int8"
    summary: ClassVar[str] = "write layers with 8-bit inputs quantized at run time as DynamicQuantizeLinear and MatMulInteger"
    input_grids: ClassVar[InputGrids | None] = "dynamic"
    needs: ClassVar[str] = "DynamicQuantizeLinear"

    rows: bool = False

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        return raise_opset(model, 18, "ReduceMax of given axes") if self.rows else super().prepare(model, spec)

    def emit(self, layer: LinearLayer, problem: LayerProblem, solution: LayerSolution, constants: WeightConstants) -> Emitted | None:
        if solution.quantized is None:
            return None
        n = _Nodes(layer, solution.quantized, constants, "rows" if self.rows else "dynamic")
        codes, scale, zero = _dynamic_input(n, problem.activation, self.rows)
        inputs: list[ir.Value | None] = [codes, n.constant("", n.codes), zero]
        if n.zeros.any():
            inputs.append(n.constant("_zero_points", n.zeros.astype(np.int8)))
        sums = n.add("MatMulInteger", inputs, f"{layer.name}{n.suffix}", dtype=ir.DataType.INT32)
        product = n.nodes[-1]
        float_sums = n.add("Cast", [sums], f"{layer.name}_sums", to=FLOAT)
        scales = n.constant("_scales", n.scales.astype(np.float32))
        if self.rows:
            factors = n.add("Div", [scales, scale], f"{layer.name}_scales", layer.output.shape)
        else:
            factors = n.add("Mul", [scale, scales], f"{layer.name}_scales", ir.Shape([layer.n]))
        value = n.add("Mul", [float_sums, factors], f"{layer.name}_scaled")
        if solution.bias is not None:
            value = n.add("Add", [value, layer.constant("_bias", solution.bias.astype(np.float32))], f"{layer.name}_bias")
        return n.finish(value, product, solution)


def _dynamic_input(n: _Nodes, activation: Activation | None, rows: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return codes, scale and zero point of the input; with ``rows`` the inverse scale of every row."""
    values = n.shared()
    if values is None:
        name = n.x_name
        x = n.float_input()
        if isinstance(activation, DynamicRange) and activation.clips:
            limits = [n.layer.constant(f"{name}_{side}", np.float32(getattr(activation, side)), base="") for side in ("low", "high")]
            x = n.add("Clip", [x, *limits], f"{name}_clip", n.layer.x.shape)
        if rows:
            values = _row_codes(n, x, name)
        else:
            codes = ir.val(f"{name}_codes", ir.DataType.UINT8, n.layer.x.shape)
            values = [codes, ir.val(f"{name}_scale", FLOAT, []), ir.val(f"{name}_zero_point", ir.DataType.UINT8, [])]
            n.nodes.append(ir.node("DynamicQuantizeLinear", [x], outputs=values, name=f"{name}_quantize"))
        n.share(values)
    codes, scale, zero_point = values
    return codes, scale, zero_point


def _row_codes(n: _Nodes, x: ir.Value, name: str) -> list[ir.Value]:
    """Round every row to codes 1 to 255 about 128; return them, the inverse scale of every row ``(..., 1)``, and the zero point."""
    layer, shape = n.layer, n.layer.x.shape

    def constant(suffix: str, value: np.generic | npt.NDArray[Any]) -> ir.Value:
        return layer.constant(f"{name}_{suffix}", value, base="")

    sizes = n.add("Abs", [x], f"{name}_size", shape)
    largest = n.add("ReduceMax", [sizes, constant("last_axis", np.array([-1]))], f"{name}_largest", keepdims=1)
    largest = n.add("Max", [largest, constant("least", np.float32(1e-30))], f"{name}_above_zero")  # of a row of zeros
    inverse = n.add("Div", [constant("most", np.float32(127)), largest], f"{name}_inverse_scale")
    steps = n.add("Round", [n.add("Mul", [x, inverse], f"{name}_steps", shape)], f"{name}_whole", shape)
    shifted = n.add("Add", [steps, constant("middle", np.float32(128))], f"{name}_shifted", shape)
    codes = n.add("Cast", [shifted], f"{name}_codes", shape, ir.DataType.UINT8, to=ir.DataType.UINT8)
    return [codes, inverse, constant("zero_point", np.uint8(128))]


def _read_product(node: ir.Node) -> Array | None:
    """Read the weight ``(K, N)`` of ``MatMulInteger -> Cast -> Mul(scale of x * scales of W)``, or with Div; None for any other node."""
    codes = stored_array(node.inputs[1])
    zeros = stored_array(node.inputs[3]) if len(node.inputs) > 3 else None
    scaled = only_reader(only_reader(node, "Cast"), "Mul")
    if codes is None or codes.ndim != 2 or scaled is None:
        return None
    factors = next((p for v in scaled.inputs if v is not None and (p := v.producer()) is not None and p.op_type in ("Mul", "Div")), None)
    scales = None if factors is None else next((a for v in factors.inputs if (a := stored_array(v)) is not None), None)
    if scales is None:
        return None
    zero_points = None if zeros is None else zeros.astype(np.int16)
    return dequantize_qdq(QdqTensors(codes.astype(np.int16), scales, zero_points, 0, 1, 0))


INTEGER: dict[str, Any] = {"kernel_blocks": {8: (None,)}, "bits": 8, "block_size": None, "symmetric": True, "effort": "fast"}
STATIC = Format(
    "qdq-int8",
    "QuantizeLinear and DequantizeLinear around MatMul and Gemm, 8-bit inputs of static ranges",
    EmitQDQInt8,
    READERS,
    conv_form="integer",
    emitter_options={"quantize_outputs": "outputs"},
    exclusive_options=("activation_type", "activation_range", "quantize_outputs", "wide_activations", "prefer"),
    **INTEGER,
)
DYNAMIC = Format(
    "dynamic-int8",
    "DynamicQuantizeLinear and MatMulInteger, 8-bit inputs of ranges found at run time",
    EmitDynamicInt8,
    {("", "MatMulInteger"): Reader(_read_product, ("Cast", "Mul"))},
    emitter_options={"row_ranges": "rows"},
    exclusive_options=("row_ranges",),
    **INTEGER,
)
