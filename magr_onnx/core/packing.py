"""Bit layouts of the output formats, each with its inverse.

MatMulNBits: ``B (N, blocks, block_size * bits / 8)`` uint8, a row per output channel, element ``k`` in the low bits first, the last
block padded; zero points ``(N, ceil(blocks * bits / 8))`` packed the same way along the blocks; scales ``(N, blocks)``.
3-bit codes are stored in 4 bits, 5 to 7 in 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from magr_onnx.core.types import Array, Codes, QuantizedWeight, WeightSpec, dequantize

MATMULNBITS_BLOCKS = (16, 32, 64, 128, 256)


def container_bits(bits: int) -> int:
    """Return the stored width of a code in the block formats: the next of 2, 4 and 8."""
    return next(width for width in (2, 4, 8) if width >= bits)


def stored_shift(bits: int) -> int:
    """Return the offset added to symmetric codes, so that their zero point is the default of the stored width."""
    return int(2 ** (container_bits(bits) - 1) - 2 ** (bits - 1))


def kernel_block(group_size: int | None, k: int, bits: int, largest: int = 256) -> int | None:
    """Return the block size a kernel with blocks of 16 to ``largest`` (powers of two) uses for groups of ``group_size``.

    Other groups are split into smaller blocks that repeat their scale: the largest power of two that divides the group. Where one
    group spans the column, the block that needs the fewest bytes. None if there is no such block.
    """
    blocks = [b for b in MATMULNBITS_BLOCKS if b <= largest]
    if group_size is None or group_size >= k:
        width = container_bits(bits)

        def size(block: int) -> int:
            count = -(-k // block)
            return count * (block * width // 8 + 4) + -(-count * width // 8)

        return min(blocks, key=lambda block: (size(block), -block))
    fitting = [b for b in blocks if group_size % b == 0]
    return max(fitting) if fitting else None


def _blocks(spec: WeightSpec, k: int, largest: int) -> tuple[int, npt.NDArray[np.intp]]:
    """Return the `kernel_block` of a weight, and the index of the group that contains each block."""
    block = kernel_block(spec.group_size, k, spec.bits, largest)
    if block is None:
        raise ValueError(f"group size {spec.group_size} is not a multiple of 16")
    return block, np.arange(-(-k // block)) * block // spec.rows(k)


def pack_bits(codes: Codes, bits: int) -> Codes:
    """Pack the last axis, low bits first; a row is padded with zeros to whole bytes. ``bits`` divides 8."""
    per_byte = 8 // bits
    pad = -codes.shape[-1] % per_byte
    if pad:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], pad), np.uint8)], axis=-1)
    slots = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(slots.shape[:-1], np.uint8)
    for i in range(per_byte):
        packed |= slots[..., i] << np.uint8(i * bits)
    return packed


def unpack_bits(packed: Codes, bits: int, count: int) -> Codes:
    """Invert `pack_bits`: return the first ``count`` codes of the last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


@dataclass(frozen=True, slots=True, eq=False)
class MatMulNBitsTensors:
    """Inputs and attributes of a MatMulNBits node."""

    weight: Codes
    scales: npt.NDArray[Any]
    zero_points: Codes | None
    bits: int
    block_size: int
    k: int
    n: int


def pack_matmulnbits(weight: QuantizedWeight, largest: int = 256) -> MatMulNBitsTensors:
    """Pack a quantized weight for MatMulNBits, in blocks of at most ``largest``.

    Zero points are left out where all equal the operator's default ``2^(bits - 1)``; symmetric 3-bit codes are shifted so
    that this holds for them too.

    Raises:
        ValueError: The group size has no block of 16 to 256 that divides it.
    """
    spec = weight.spec
    k, n = weight.codes.shape
    bits = container_bits(spec.bits)
    block, group_of_block = _blocks(spec, k, largest)
    codes, zeros = weight.codes, weight.zero_points
    if spec.symmetric and bits != spec.bits:
        shift = np.uint8(stored_shift(spec.bits))
        codes, zeros = codes + shift, zeros + shift
    count = len(group_of_block)
    padded = np.zeros((n, count * block), np.uint8)
    padded[:, :k] = codes.T
    block_zeros = np.ascontiguousarray(zeros[group_of_block].T)
    zero_points = None if (block_zeros == 2 ** (bits - 1)).all() else pack_bits(block_zeros, bits)
    scales = np.ascontiguousarray(weight.scales[group_of_block].T).astype(spec.scale_dtype)
    return MatMulNBitsTensors(pack_bits(padded.reshape(n, count, block), bits), scales, zero_points, bits, block, k, n)


def packed_shape(k: int, n: int, bits: int, block_size: int) -> tuple[int, int, int]:
    """Return the shape of the packed weight of MatMulNBits."""
    return n, -(-k // block_size), block_size * bits // 8


def unpack_codes(packed: Codes, bits: int, block_size: int, k: int, n: int) -> Codes:
    """Unpack the codes ``(K, N)`` of a MatMulNBits weight, which may also be ``(N, -1)``."""
    return unpack_bits(packed.reshape(n, -1), bits, -(-k // block_size) * block_size)[:, :k].T


def unpack_matmulnbits(tensors: MatMulNBitsTensors) -> tuple[Codes, Array, Codes]:
    """Unpack codes ``(K, N)``, and scales and zero points per block ``(blocks, N)``."""
    t = tensors
    count = -(-t.k // t.block_size)
    codes = unpack_codes(t.weight, t.bits, t.block_size, t.k, t.n)
    scales = t.scales.reshape(t.n, count).astype(np.float32).T
    if t.zero_points is None:
        zeros = np.full((count, t.n), 2 ** (t.bits - 1), np.uint8)
    else:
        zeros = unpack_bits(t.zero_points.reshape(t.n, -1), t.bits, count).T
    return codes, scales, zeros


def dequantize_matmulnbits(tensors: MatMulNBitsTensors) -> Array:
    """Return the float weight ``(K, N)`` a MatMulNBits node multiplies by."""
    codes, scales, zeros = unpack_matmulnbits(tensors)
    return dequantize(codes, zeros, scales, np.arange(tensors.k) // tensors.block_size)


@dataclass(frozen=True, slots=True, eq=False)
class QdqTensors:
    """Inputs and attributes of a DequantizeLinear of a weight ``(K, N)``.

    ``codes`` and ``zero_points`` are int16 values of the stored type: signed when symmetric, unsigned otherwise.
    """

    codes: npt.NDArray[np.int16]
    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[np.int16] | None
    bits: int
    axis: int
    block_size: int  # 0: per channel

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The type of codes and zero points in the file: int4, uint4, int8 or uint8."""
        name = f"{'int' if self.zero_points is None else 'uint'}{self.bits}"
        return np.dtype(getattr(ml_dtypes, name) if self.bits == 4 else name)


def pack_qdq(weight: QuantizedWeight, largest: int = 256) -> QdqTensors:
    """Pack a quantized weight for DequantizeLinear: per channel on axis 1, or blocks of at most ``largest`` along axis 0.

    Raises:
        ValueError: The group size has no block of 16 to 256 that divides it (onnxruntime would not fuse it).
    """
    spec = weight.spec
    k = len(weight.codes)
    shift = spec.middle if spec.symmetric else 0
    codes = weight.codes.astype(np.int16) - np.int16(shift)
    zeros = None if spec.symmetric else weight.zero_points.astype(np.int16)
    scales = weight.scales.astype(spec.scale_dtype)
    bits = container_bits(spec.bits)
    if spec.groups(k) == 1:
        return QdqTensors(codes, scales[0], None if zeros is None else zeros[0], bits, 1, 0)
    block, group_of_block = _blocks(spec, k, largest)
    return QdqTensors(codes, scales[group_of_block], None if zeros is None else zeros[group_of_block], bits, 0, block)


def broadcast_grid(values: npt.NDArray[Any], shape: tuple[int, ...], axis: int, block_size: int) -> npt.NDArray[Any]:
    """Broadcast scales or zero points of DequantizeLinear to the codes: per tensor, per slice of ``axis``, or per block along it.

    Args:
        values: Of any size, which tells a tensor from slices.
        shape: The shape of the codes.
        axis: An axis of them, not negative.
        block_size: Codes of a block; 0 without blocks.

    Raises:
        ValueError: They do not fit the codes.
    """
    if values.size == 1:
        return np.broadcast_to(values.reshape((1,) * len(shape)), shape)
    if block_size:
        return np.broadcast_to(np.repeat(values, block_size, axis=axis)[(slice(None),) * axis + (slice(shape[axis]),)], shape)
    return np.broadcast_to(values.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def dequantize_qdq(tensors: QdqTensors) -> Array:
    """Return the float weight ``(K, N)`` that DequantizeLinear yields."""
    t = tensors
    rows: Any = slice(None) if t.block_size == 0 else np.arange(len(t.codes)) // t.block_size
    scales = t.scales.astype(np.float32)[rows]
    zeros: Any = 0 if t.zero_points is None else t.zero_points[rows]
    result: Array = (t.codes - zeros).astype(np.float32) * scales
    return result
