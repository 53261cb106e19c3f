"""Settings of a calibration: data, mask and provider."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from magr_onnx.core.types import Activation
from magr_onnx.runtime.data.hold_out import NONE, HoldOut
from magr_onnx.runtime.data.sources import Batches


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationContext:
    """Settings shared by all groups and stages of layers.

    Attributes:
        data: Batches that fit the model.
        mask: Input whose zero elements mark rows to leave out (see `magr_onnx.runtime.calibration.mask`); None for none.
        provider: Where to run.
        hold_out: Which batches are held out.
        quantize: Quantization of layer inputs, by value name; moments are of the quantized values.
        bounds: Range that values are clipped to first, by value name (see `magr_onnx.passes.instrument.taps.Tap`).
        masked: The values that follow the mask, of all that are measured; None where that is not known yet.
    """

    data: Batches
    mask: str | None = None
    provider: str = "cpu"
    hold_out: HoldOut = NONE
    quantize: Mapping[str, Activation] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    masked: Collection[str] | None = None
