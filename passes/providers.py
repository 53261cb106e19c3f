"""Execution providers: where onnxruntime runs a model, and what its kernels there take.

To add one: write a `Provider` with the functions it needs, and add it to `PROVIDERS`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from magr_onnx.core.types import WeightSpec


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of onnxruntime.

    Attributes:
        name: What users call it.
        onnxruntime: What onnxruntime calls it.
        refuses: Say why its kernels cannot have weights on a grid; nothing where they can.
        largest_block: Most rows that share a scale in a kernel; None for no limit but the kernel's own.
        whole_blocks: Whether blocks behind DequantizeLinear must divide the rows of a weight.
        preload: Load its libraries, given the module ``onnxruntime``; None where there is nothing to load.
        host_memory: Whether it computes in the memory of the process, so that limits of that hold for a run.
        experts: Whether its kernel of QMoE takes codes as they are written here.
    """

    name: str
    onnxruntime: str
    refuses: Callable[[WeightSpec], list[str]] = lambda _: []
    largest_block: int | None = None
    whole_blocks: bool = False
    preload: Callable[[ModuleType], None] | None = None
    host_memory: bool = False
    experts: bool = False


def _cuda_refuses(spec: WeightSpec) -> list[str]:
    if spec.bits != 2:  # 3-bit codes are stored in 4 bits
        return []
    return ["2 bits on cuda: onnxruntime's CUDA kernel of MatMulNBits takes 4 and 8 bits only; use 4 bits, or provider cpu"]


def _openvino_refuses(spec: WeightSpec) -> list[str]:
    if spec.bits != 2 or spec.symmetric:
        return []
    return ["2 bits with zero points on openvino: it does not load MatMulNBits with these; use symmetric grids, or 4 bits"]


def _preload_cuda(onnxruntime: ModuleType) -> None:
    """Load CUDA's libraries from NVIDIA's Python packages, where there are: by itself onnxruntime finds those of the system only."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session says whether it starts
            onnxruntime.preload_dlls()


CPU = Provider("cpu", "CPUExecutionProvider", host_memory=True, experts=True)
"""The processor: what every onnxruntime has, and what it falls back to."""
CUDA = Provider("cuda", "CUDAExecutionProvider", _cuda_refuses, largest_block=128, preload=_preload_cuda)
"""NVIDIA GPUs. Measured with onnxruntime 1.31.1: MatMulNBits takes 4 and 8 bits only, and one row times 4-bit blocks of 256 fails."""
OPENVINO = Provider("openvino", "OpenVINOExecutionProvider", _openvino_refuses, whole_blocks=True)
"""CPUs, GPUs and NPUs of Intel. Measured with onnxruntime-openvino 1.24.1 on a CPU."""
WEBGPU = Provider("webgpu", "WebGpuExecutionProvider")
"""GPUs. Measured with onnxruntime-webgpu 1.27.0 on SwiftShader: MatMulNBits takes all bits; sums of integers and QuantizeLinear stay on the
CPU."""

PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in (CPU, CUDA, OPENVINO, WEBGPU)}


def find_provider(name: str) -> Provider:
    """Look a provider up by its name here or in onnxruntime; one that is not registered takes whatever a plan writes."""
    lower = name.lower()
    known = (provider for provider in PROVIDERS.values() if lower in (provider.name, provider.onnxruntime.lower()))
    return next(known, Provider(name, name))
