"""What all of a calibration is done with: data, the rows of it that count, and where to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from magr_onnx.core.types import Activation
from magr_onnx.runtime.data.hold_out import NONE, HoldOut
from magr_onnx.runtime.data.sources import Batches

Progress = Callable[[int, int], None]
"""Called with steps done and in total."""


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationContext:
    """The same for every group or stage of layers.

    Attributes:
        data: Batches that fit the model.
        mask: Input whose zero elements mark rows to leave out (see `magr_onnx.runtime.calibration.mask`); None for none.
        provider: Where to run.
        hold_out: Which batches are held out.
        quantize: How values will be quantized before layers read them, by value name; moments are of the quantized values.
        bounds: What values are clipped to first, by value name (see `magr_onnx.passes.instrument.taps.Tap`).
    """

    data: Batches
    mask: str | None = None
    provider: str = "cpu"
    hold_out: HoldOut = NONE
    quantize: Mapping[str, Activation] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
