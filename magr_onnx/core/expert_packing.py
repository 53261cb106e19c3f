"""The layout of com.microsoft QMoE for CPUs, with its inverse.

Codes ``(E, N, K * bits / 8)`` uint8: a row per output channel of every expert, element ``k`` in the low bits first, as in MatMulNBits.
Scales ``(E, N, K / block)``, or ``(E, N)`` for one a channel. Zero points are packed the same way, along blocks, ``(E, N, ...)``, or along
channels, ``(E, ...)``, and left out where all equal the operator's default ``2^(bits - 1)``. Blocks divide K. 3-bit codes are stored in
4 bits, 5 to 7 in 8. Measured with onnxruntime 1.26 to 1.32; 2 bits from 1.27 on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from magr_onnx.core.packing import MATMULNBITS_BLOCKS, container_bits, pack_bits, stored_shift, unpack_bits
from magr_onnx.core.types import Array, Codes, QuantizedWeight, WeightSpec


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTensors:
    """Inputs of a QMoE node for one of its layers.

    Attributes:
        codes: Packed codes.
        scales: Scales, a third axis for blocks.
        zero_points: Packed zero points; None for the default.
        bits: Stored width of a code.
    """

    codes: Codes
    scales: npt.NDArray[Any]
    zero_points: Codes | None
    bits: int


def expert_block(wanted: int | None, widths: Sequence[int]) -> int | None:
    """Return the largest block, a power of two from 16 to 256, that divides the block size ``wanted`` and is a part of all ``widths``.

    None stands for one scale a channel: where that is wanted, and where no block divides all. A block is never a whole column: onnxruntime
    up to 1.30 rejects such files, or computes something else.
    """
    if wanted is None:
        return None
    fitting = [block for block in MATMULNBITS_BLOCKS if wanted % block == 0 and all(k % block == 0 and k > block for k in widths)]
    return max(fitting, default=None)


def stored_block(spec: WeightSpec, widths: Sequence[int]) -> int | None:
    """Return the block that weights of ``widths`` rows on a grid are stored in; None for one scale a channel.

    One scale a channel of up to 4 bits is repeated in blocks where these divide all widths: without blocks the kernel takes 7 times as long
    as that of floats on one token, and with them half as long. With 8 bits it takes as long, and computes in float, as with blocks it does
    not.
    """
    if spec.group_size is not None or container_bits(spec.bits) == 8:
        return spec.group_size
    return expert_block(MATMULNBITS_BLOCKS[-1], widths)


def pack_experts(weights: Sequence[QuantizedWeight], block: int | None) -> ExpertTensors:
    """Pack the weights ``(K, N)`` of one layer of all experts, on grids of one kind.

    Args:
        weights: One of each expert.
        block: Rows that are stored with a scale, which divides K and the rows that share one; None where a whole channel shares one.
    """
    spec, k = weights[0].spec, len(weights[0].codes)
    bits = container_bits(spec.bits)
    codes = np.stack([w.codes.T for w in weights])
    group = np.arange(k // (block or k)) * (block or k) // spec.rows(k)
    zeros, scales = (np.stack([getattr(w, name)[group].T for w in weights]) for name in ("zero_points", "scales"))  # (E, N, blocks)
    if spec.symmetric and bits != spec.bits:
        shift = np.uint8(stored_shift(spec.bits))
        codes, zeros = codes + shift, zeros + shift
    if block is None:
        scales, zeros = scales[..., 0], zeros[..., 0]
    default = bool((zeros == 2 ** (bits - 1)).all())
    return ExpertTensors(pack_bits(codes, bits), scales.astype(spec.scale_dtype), None if default else pack_bits(zeros, bits), bits)


def dequantize_experts(tensors: ExpertTensors) -> Iterator[Array]:
    """Yield the weight ``(K, N)`` float32 of every expert.

    Raises:
        ValueError: Shapes do not fit each other.
    """
    bits, blocked = tensors.bits, tensors.scales.ndim == 3
    experts, n = tensors.scales.shape[:2]
    blocks, k = tensors.scales.shape[2] if blocked else 1, tensors.codes.shape[2] * 8 // bits
    if k % blocks or tensors.codes.shape[:2] != (experts, n):
        raise ValueError(f"codes {tensors.codes.shape} of {bits} bits do not fit scales {tensors.scales.shape}")
    for number in range(experts):
        codes = unpack_bits(tensors.codes[number], bits, k).reshape(n, blocks, -1).astype(np.float32)
        if tensors.zero_points is None:
            codes -= 2 ** (bits - 1)
        else:
            codes -= unpack_bits(tensors.zero_points[number], bits, blocks if blocked else n).reshape(n, blocks, 1)
        codes *= tensors.scales[number].astype(np.float32).reshape(n, blocks, 1)
        yield codes.reshape(n, k).T
