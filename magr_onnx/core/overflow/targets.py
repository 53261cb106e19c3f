"""Target machines, by the accumulators of onnxruntime's CPU kernels.

Measured with onnxruntime 1.31.1: on an AVX2 machine without VNNI (emulated Haswell), on ARM without dot product (emulated Cortex-A53)
and with it (emulated Cortex-A76), on a machine with VNNI, with codes at and around every boundary.

- AVX2 without VNNI: uint8 times int8 (U8S8) goes through `vpmaddubsw`, which adds two adjacent products in 16 bits and SATURATES.
  S8S8, S8U8 and U8U8 are widened first and exact. But a graph of QuantizeLinear and DequantizeLinear nodes with int8 activations is
  rewritten to uint8 (zero point and codes + 128) before it is fused, so it is U8S8 as well. AVX without AVX2 is exact.
  (`session.x64quantprecision=1` moves such graphs to U8U8.)
- ARM64 without dot product: S8S8 adds the products of rows ``k`` and ``k + 8`` of every 16 in 16 bits, and U8S8 is S8S8 of the codes
  minus 128. Only ``(-128)(-128) + (-128)(-128)`` is too large, and wraps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from magr_onnx.core.overflow.accumulator import Accumulator, Budget
from magr_onnx.errors import OptionError

INT32 = Accumulator(32, None, 32)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Kernel of one combination of types.

    Attributes:
        accumulator: The registers.
        shift: Added to every activation code before it is multiplied (a flipped sign bit: 128 or -128); the kernel takes it out
            of the result again.
        stride: Rows ``k`` and ``k + stride`` of every ``2 stride`` share a tile of two; 1: adjacent rows, in the order of K.
    """

    accumulator: Accumulator = INT32
    shift: int = 0
    stride: int = 1

    def order(self, k: int) -> npt.NDArray[np.intp]:
        """Return the rows of K in the order of consecutive tiles, -1 for a zero row of padding."""
        if self.stride == 1:
            return np.arange(k)
        padded = -(-k // (2 * self.stride)) * 2 * self.stride
        rows = np.arange(padded).reshape(-1, 2, self.stride).transpose(0, 2, 1).reshape(-1)
        return np.where(rows < k, rows, -1)


@dataclass(frozen=True, slots=True)
class Target:
    """A machine.

    Attributes:
        name: Its name.
        summary: One line about it.
        kernels: By the types ``u8s8`` (activation, weight) and so on; other combinations are exact up to 32 bits.
        qdq_unsigned: Whether int8 activations of QuantizeLinear/DequantizeLinear graphs are computed as uint8.
        blockwise: The registers of MatMulNBits with int8 activations and codes of up to 4 bits; 8-bit codes do not share a tile.
        depthwise_pairs: Whether depthwise convolutions add two products in the inner register; False: they are exact.
    """

    name: str
    summary: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    qdq_unsigned: bool = False
    blockwise: Accumulator = INT32
    depthwise_pairs: bool = False

    def kernel(self, activation_signed: bool, weight_signed: bool, *, qdq: bool = False) -> Kernel:
        """Return the kernel of these types; ``qdq`` for DequantizeLinear nodes that onnxruntime fuses."""
        types = f"{'s' if activation_signed else 'u'}8{'s' if weight_signed else 'u'}8"
        if qdq and activation_signed and self.qdq_unsigned:
            inner = self.kernels.get("u8" + types[2:], Kernel())
            return Kernel(inner.accumulator, inner.shift + 128, inner.stride)
        return self.kernels.get(types, Kernel())

    def budget(self, activation_signed: bool, weight_signed: bool, *, qdq: bool = False) -> Budget:
        """Return the bound on sums of codes: the registers, and the range of activation codes in the kernel."""
        kernel = self.kernel(activation_signed, weight_signed, qdq=qdq)
        low, high = (-128, 127) if activation_signed else (0, 255)
        return Budget(kernel.accumulator, low + kernel.shift, high + kernel.shift)

    def weight_budget(
        self, activation_signed: bool, weight_signed: bool, *, qdq: bool = False, taps: int = 1, depthwise: bool = False
    ) -> Budget:
        """Return a budget that is sufficient whatever rows the kernel pairs, for solvers; ``taps`` are those of a convolution."""
        budget = self.budget(activation_signed, weight_signed, qdq=qdq)
        if depthwise and not self.depthwise_pairs:
            return replace(budget, accumulator=Accumulator(32, None, budget.accumulator.outer_bits))
        if self.kernel(activation_signed, weight_signed, qdq=qdq).stride == 1:
            return replace(budget, taps=(taps,))
        return replace(budget, accumulator=replace(budget.accumulator, bits=budget.accumulator.bits - 1, tile=1))


_NEON = Accumulator(16, 2, 32)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "x86-avx2",
            "x86 without VNNI: uint8 x int8 pairs saturate in 16 bits",
            {"u8s8": Kernel(Accumulator(16, 2, 32, saturating=True))},
            qdq_unsigned=True,
            blockwise=Accumulator(16, 2, 32, saturating=True),
        ),
        Target("x86-vnni", "x86 with AVX-VNNI or AVX512-VNNI: 32 bits", qdq_unsigned=True),
        Target("arm64-dotprod", "ARM64 with dot product instructions: 32 bits"),
        Target(
            "arm64-neon",
            "ARM64 without dot product: int8 pairs (k, k + 8) wrap in 16 bits",
            {"s8s8": Kernel(_NEON, 0, 8), "u8s8": Kernel(_NEON, -128, 8)},
            depthwise_pairs=True,
        ),
        Target("wasm", "WebAssembly SIMD: widened to 16 bits, 32-bit sums"),
        Target("generic", "any machine with 32-bit sums"),
    )
}


def find_target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        OptionError: No such target; the message lists them.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
