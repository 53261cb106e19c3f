"""Emit com.microsoft::MatMulNBits.

1. ``MatMul(X, W)``, ``Add(MatMul(X, W), b)`` and ``Gemm(X, W, b)`` become one ``MatMulNBits(X, B, scales, zero_points?, "", bias?)``.
2. The bias, compensated or not, is fused: the CPU kernel adds it in its epilogue.
3. A group size that is not a kernel block, and one grid a channel over more than 256 rows, become repeated block scales.
4. 3-bit codes use the 4-bit container. Zero points equal to the operator's default are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.overflow.accumulator import Accumulator, data_type_bits
from magr_onnx.core.packing import MATMULNBITS_BLOCKS, kernel_block, pack_matmulnbits, stored_shift
from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.base import Emitted, Emitter
from magr_onnx.passes.emit.linear import emitted_blocks, replace_layer
from magr_onnx.passes.layers.linear import FLOATS, LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants

DOMAIN = "com.microsoft"
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
INT8_LEVEL = 4
INT8_ACTIVATION = 127  # the kernels quantize activations to -127..127


def block_problems(name: str, spec: WeightSpec | None) -> list[str]:
    """What an emitter needs of the quantize pass before it."""
    if spec is None:
        return [f"{name} needs a quantize pass before it"]
    if spec.group_size is not None and kernel_block(spec.group_size, 1 << 30, spec.bits) is None:
        return [f"block size {spec.group_size} cannot be cut into blocks that onnxruntime has; give a multiple of 16, or 'channel'"]
    return []


@dataclass(frozen=True)
class EmitMatMulNBits(Emitter):
    """Replace quantized layers by MatMulNBits nodes.

    Attributes:
        accuracy_level: 0 lets the kernel decide, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations.
        accumulator_bits: Width of the accumulator that must hold the sum of any block at level 4; none for no such demand.
        largest_block: Most rows in a block, a power of two from 16 to 256; larger groups repeat their scale. A provider may
            have a smaller one (`magr_onnx.passes.providers`).
    """

    name: ClassVar[str] = "emit-matmulnbits"
    summary: ClassVar[str] = "write quantized layers as com.microsoft MatMulNBits nodes"

    accuracy_level: int = 0
    accumulator_bits: int | None = None
    largest_block: int = 256

    def problems(self, spec: WeightSpec | None) -> list[str]:
        found = block_problems(self.name, spec)
        if self.accuracy_level not in ACCURACY_LEVELS:
            found.append(f"accuracy level {self.accuracy_level} is not known; choose one of {', '.join(map(str, ACCURACY_LEVELS))}")
        if self.largest_block not in MATMULNBITS_BLOCKS:
            found.append(f"largest_block={self.largest_block} is no block; choose one of {', '.join(map(str, MATMULNBITS_BLOCKS))}")
        if self.accumulator_bits is not None and not found:
            found += self._accumulator_problems(spec)
        return found

    def _accumulator_problems(self, spec: WeightSpec | None) -> list[str]:
        if self.accuracy_level != INT8_LEVEL:
            return [f"accumulator_bits with accuracy_level={self.accuracy_level}: only level {INT8_LEVEL} computes in integers"]
        if spec is None or spec.group_size is None:
            return [f"{self.name}: accumulator_bits needs a block size: what the kernel sums in integers is a block"]
        block = kernel_block(spec.group_size, 1 << 30, spec.bits)
        assert block is not None
        largest = spec.top + (stored_shift(spec.bits) if spec.symmetric else 0)
        least = data_type_bits(block, -INT8_ACTIVATION, INT8_ACTIVATION, 0, largest)
        if least > (self.accumulator_bits or 0):
            sums = f"sums of {block} products of int8 activations and {spec.bits}-bit codes"
            return [f"accumulator_bits={self.accumulator_bits}: {sums} need {least}"]
        return []

    def accumulator(self) -> Accumulator | None:
        return None if self.accumulator_bits is None else Accumulator(self.accumulator_bits, None, max(32, self.accumulator_bits))

    def suited(self, largest_block: int) -> Self:
        return replace(self, largest_block=min(self.largest_block, largest_block))

    def emit(self, layer: LinearLayer, problem: LayerProblem, solution: LayerSolution, constants: WeightConstants) -> Emitted | None:
        quantized = solution.quantized
        if quantized is None:
            return None
        packed = pack_matmulnbits(quantized, self.largest_block)
        kind = FLOATS[layer.dtype]
        suffix = f"_q{packed.bits}"
        inputs: list[ir.Value | None] = [
            layer.x,
            constants.add(layer, suffix, packed.weight),
            constants.add(layer, f"{suffix}_scales", packed.scales.astype(kind)),
        ]
        if packed.zero_points is not None:
            inputs.append(constants.add(layer, f"{suffix}_zero_points", packed.zero_points))
        if solution.bias is not None:
            inputs += [None] * (5 - len(inputs))
            inputs.append(layer.constant("_bias", solution.bias.astype(kind)))
        attributes = {"K": packed.k, "N": packed.n, "bits": packed.bits, "block_size": packed.block_size}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        node = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, version=1, name=f"{layer.name}_q{quantized.spec.bits}")
        layer.root.opset_imports.setdefault(DOMAIN, 1)
        replace_layer(layer, [node], solution.factors, constants)
        return emitted_blocks(node, quantized, packed.block_size or layer.k, constants)
