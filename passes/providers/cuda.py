"""NVIDIA GPUs.

Measured with onnxruntime 1.31.1: its kernel of MatMulNBits takes 4 and 8 bits only, and one row times 4-bit blocks of 256 fails.
"""

from __future__ import annotations

import contextlib
import io
from types import ModuleType

from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.providers.provider import Provider


def _refuses(spec: WeightSpec) -> list[str]:
    if spec.bits != 2:  # 3-bit codes are stored in 4 bits
        return []
    return ["2 bits on cuda: onnxruntime's CUDA kernel of MatMulNBits takes 4 and 8 bits only; use 4 bits, or provider cpu"]


def _preload(onnxruntime: ModuleType) -> None:
    """Load CUDA's libraries from NVIDIA's Python packages, where there are: by itself onnxruntime finds those of the system only."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session says whether it starts
            onnxruntime.preload_dlls()


PROVIDER = Provider("cuda", "CUDAExecutionProvider", _refuses, largest_block=128, preload=_preload)
