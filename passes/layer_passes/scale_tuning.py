"""Tuning of scales as a setting: all layers' scales follow the loss at the model's outputs once codes are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from magr_onnx.core.types import WeightSpec
from magr_onnx.passes.base import Stage


@dataclass(frozen=True)
class TuneScales(Stage):
    """Have a run lower the loss at the model's outputs by scales (`magr_onnx.runtime.calibration.scale_tuning`).

    Attributes:
        epochs: Passes over the calibration data.
        rate: By how much a scale changes in a step at most, as a part of it.
        bounded: Leave it out of runs in which it takes more memory than they may, 4 GB if no limit was given.
    """

    name: ClassVar[str] = "tune-scales"
    summary: ClassVar[str] = "tune the scales of all layers by the loss at the model's outputs (EfficientQAT's second phase)"
    slot: ClassVar[str] = "tuning"

    epochs: int = 3
    rate: float = 3e-3
    bounded: bool = False

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = [f"{self.name} needs a quantize pass before it: it tunes the scales of codes"] if spec is None else []
        if self.epochs < 1:
            problems.append(f"{self.name}: epochs={self.epochs} must be 1 or more")
        if not 0 < self.rate < 1:
            problems.append(f"{self.name}: rate={self.rate:g} must be between 0 and 1")
        return problems
