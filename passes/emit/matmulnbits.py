"""Emit com.microsoft::MatMulNBits.

1. ``MatMul(X, W)``, ``Add(MatMul(X, W), b)`` and ``Gemm(X, W, b)`` become one ``MatMulNBits(X, B, scales, zero_points?, "", bias?)``.
2. The bias, compensated or not, is fused: the CPU kernel adds it in its epilogue.
3. A group size that is not a kernel block, and one grid per channel over more than 256 rows, become repeated block scales.
4. 3-bit codes use the 4-bit container. Zero points equal to the operator's default are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.overflow.accumulator import Accumulator, data_type_bits, largest_block
from magr_onnx.core.packing import (
    MATMULNBITS_BLOCKS,
    MatMulNBitsTensors,
    dequantize_matmulnbits,
    kernel_block,
    pack_matmulnbits,
    packed_shape,
    stored_shift,
)
from magr_onnx.core.types import Array, WeightSpec
from magr_onnx.errors import OptionError
from magr_onnx.passes.base import Emitted
from magr_onnx.passes.emit.format import Format, Reader, stored_array
from magr_onnx.passes.emit.linear import BlockEmitter, emitted_blocks, replace_layer
from magr_onnx.passes.graph.nodes import attribute_of
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weight_constants import WeightConstants
from magr_onnx.passes.layers.weighted import FLOATS

DOMAIN = "com.microsoft"
LEVEL = "accuracy_level"
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
INT8_LEVEL = 4
INT8_ACTIVATION = 127  # the kernels quantize activations to -127..127


def _sum_bits(block: int, bits: int, shift: int) -> int:
    """Return the accumulator bits for the sum of any block: int8 activations times codes, each raised by ``shift``."""
    return data_type_bits(block, -INT8_ACTIVATION, INT8_ACTIVATION, 0, 2**bits - 1 + shift)


def _too_narrow(accumulator_bits: int, block: int, bits: int, needed: int) -> str:
    return f"accumulator_bits={accumulator_bits}: sums of {block} products of int8 activations and {bits}-bit codes need {needed}"


@dataclass(frozen=True)
class EmitMatMulNBits(BlockEmitter):
    """Replace quantized layers by MatMulNBits nodes.

    Attributes:
        accuracy_level: 0 for the kernel's default, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations; None leaves it undecided, which
            is the kernel's default until `decide` chooses.
        accumulator_bits: Width of the accumulator that must hold the sum of any block at level 4; None for no constraint.
        largest_block: Most rows in a block.
    """

    name: ClassVar[str] = "emit-matmulnbits"
    summary: ClassVar[str] = "write quantized layers as com.microsoft MatMulNBits nodes"
    shares_codes: ClassVar[bool] = True
    experts: ClassVar[bool] = True

    accuracy_level: int | None = None
    accumulator_bits: int | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = super().problems(spec)
        if self.accuracy_level not in (None, *ACCURACY_LEVELS):
            problems.append(f"accuracy level {self.accuracy_level} is not known; choose one of {', '.join(map(str, ACCURACY_LEVELS))}")
        if self.accumulator_bits is not None and not problems:
            problems += self._accumulator_problems(spec, self.accumulator_bits)
        return problems

    def _accumulator_problems(self, spec: WeightSpec | None, accumulator_bits: int) -> list[str]:
        if self.accuracy_level != INT8_LEVEL:
            return [f"accumulator_bits with accuracy_level={self.accuracy_level}: only level {INT8_LEVEL} computes in integers"]
        if spec is None or spec.group_size is None:
            return [f"{self.name}: accumulator_bits needs a block size: the kernel sums one block in integers"]
        block = kernel_block(spec.group_size, 1 << 30, spec.bits)
        assert block is not None
        needed = _sum_bits(block, spec.bits, stored_shift(spec.bits) if spec.symmetric else 0)
        return [_too_narrow(accumulator_bits, block, spec.bits, needed)] if needed > accumulator_bits else []

    @property
    def expert_attributes(self) -> dict[str, int]:
        return {LEVEL: INT8_LEVEL} if self.accuracy_level == INT8_LEVEL else {}

    def accumulator(self) -> Accumulator | None:
        return None if self.accumulator_bits is None else Accumulator(self.accumulator_bits, None, max(32, self.accumulator_bits))

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
        if self.accuracy_level is not None:
            attributes[LEVEL] = self.accuracy_level
        node = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, version=1, name=f"{layer.name}_q{quantized.spec.bits}")
        layer.root.opset_imports.setdefault(DOMAIN, 1)
        replace_layer(layer, [node], solution.factors, constants)
        return emitted_blocks(node, quantized, packed.block_size or layer.k, constants)

    def undecided(self, model: ir.Model, names: Collection[str]) -> list[ir.Node]:
        return [n for n in model.graph.all_nodes() if n.name in names and n.op_type == "MatMulNBits" and LEVEL not in n.attributes]

    def decide(self, nodes: Iterable[ir.Node], int8: bool) -> Self:
        for node in nodes:
            if int8:
                node.attributes.add(ir.AttrInt64(LEVEL, INT8_LEVEL))
            else:
                node.attributes.pop(LEVEL, None)
        return replace(self, accuracy_level=INT8_LEVEL) if int8 else self


def _read(node: ir.Node) -> Array | None:
    """Dequantize the weight ``(K, N)`` of a MatMulNBits; None if it has inputs that this package does not write."""
    weight, scales = stored_array(node.inputs[1]), stored_array(node.inputs[2])
    zeros = stored_array(node.inputs[3]) if len(node.inputs) > 3 else None
    if weight is None or scales is None or (zeros is not None and zeros.dtype != np.uint8):
        return None
    bits, block = attribute_of(node, "bits", 4), attribute_of(node, "block_size", 0)
    k, n = attribute_of(node, "K", 0), attribute_of(node, "N", 0)
    if block <= 0 or weight.shape != packed_shape(k, n, bits, block) or scales.size != n * -(-k // block):
        return None
    return dequantize_matmulnbits(MatMulNBitsTensors(weight, scales, zeros, bits, block, k, n))


def _fit_accumulator(options: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the largest block, or else the most bits, whose sums fit ``accumulator_bits`` for any codes and input.

    The int8 kernel (accuracy level 4) sums one block in integers and blocks in float, so the tile is the block.
    """
    width, tile, bits = options["accumulator_bits"], options.get("accumulator_tile"), options.get("bits")
    _check_accumulator(options)
    block = tile if tile is not None else options.get("block_size")
    needs: list[tuple[int, int, int]] = []
    for b in (bits,) if bits is not None else (4, 3, 2) if block is None else (8, 4, 3, 2):
        kernel = KERNEL_BLOCKS.get(b, MATMULNBITS_BLOCKS)
        blocks = kernel if block is None else (block,) if b != 2 or block in kernel else ()
        shift = stored_shift(b) if options.get("symmetric") else 0
        fitting = largest_block(b, width, blocks, INT8_ACTIVATION, shift)
        if fitting is not None:
            return {**options, "bits": b, "block_size": fitting, "accuracy_level": INT8_LEVEL}
        needs += [(_sum_bits(size, b, shift), -b, size) for size in blocks]
    if not needs:
        raise OptionError(
            f"accumulator_bits={width}: the int8 kernel of 2 bits sums blocks of 32, 64 or 128; give one of these, or other bits"
        )
    needed, negative_bits, block = min(needs)
    raise OptionError(f"{_too_narrow(width, block, -negative_bits, needed)}; that is the smallest that works here")


def _check_accumulator(options: Mapping[str, Any]) -> None:
    """Raise an `OptionError` where options leave no block sizes to choose from."""
    tile = options.get("accumulator_tile")
    level = options.get("accuracy_level") or INT8_LEVEL
    if level != INT8_LEVEL:
        raise OptionError(f"accumulator_bits with accuracy_level={level}: only level 4 computes in integers; leave the level out")
    if tile is not None and tile not in MATMULNBITS_BLOCKS:
        kernel = ", ".join(map(str, MATMULNBITS_BLOCKS))
        raise OptionError(f"accumulator_tile={tile}: MatMulNBits sums whole blocks of {kernel}; give one of these, or leave the tile out")
    if options.get("block_size", 0) is None:
        raise OptionError("accumulator_bits with one scale a channel: MatMulNBits sums its blocks; leave the block size out, or give one")
    if tile is not None and options.get("block_size") not in (None, tile):
        raise OptionError(
            f"accumulator_tile={tile} and block_size={options['block_size']}: MatMulNBits' tile is its block; give one of them"
        )


INT2_BLOCKS = (32, 64, 128)  # supported by the int8 kernel
KERNEL_BLOCKS: dict[int, tuple[int, ...]] = {2: INT2_BLOCKS, **dict.fromkeys((3, 4, 8), MATMULNBITS_BLOCKS)}
FORMAT = Format(
    "matmulnbits",
    "one com.microsoft MatMulNBits node a layer, with its bias",
    EmitMatMulNBits,
    {(DOMAIN, "MatMulNBits"): Reader(_read, bias=False)},
    KERNEL_BLOCKS,
    bias="any",
    emitter_options={"accuracy_level": "accuracy_level", "accumulator_bits": "accumulator_bits"},
    exclusive_options=("accuracy_level",),
    fit_accumulator=_fit_accumulator,
)
