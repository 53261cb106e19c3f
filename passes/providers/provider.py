"""What is to be known of an execution provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from magr_onnx.core.types import WeightSpec


def _takes_all(spec: WeightSpec) -> list[str]:
    del spec
    return []


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of onnxruntime.

    Attributes:
        name: What users call it.
        onnxruntime: What onnxruntime calls it.
        refuses: Say why its kernels cannot have weights on a grid; nothing where they can.
        largest_block: Most rows that share a scale in a kernel; None for no limit but the kernel's own.
        preload: Load its libraries, given the module ``onnxruntime``; None where there is nothing to load.
        host_memory: Whether it computes in the memory of the process, so that limits of that hold for a run.
    """

    name: str
    onnxruntime: str
    refuses: Callable[[WeightSpec], list[str]] = _takes_all
    largest_block: int | None = None
    preload: Callable[[ModuleType], None] | None = None
    host_memory: bool = False
