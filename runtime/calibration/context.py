"""Settings of a calibration: data, mask, provider, and the grids of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from magr_onnx.core.backends import HOST, Backend
from magr_onnx.core.types import Activation
from magr_onnx.runtime.data.hold_out import NONE, HoldOut
from magr_onnx.runtime.data.sources import Batches


@dataclass(frozen=True, slots=True)
class GridChoice:
    """The grid chosen for a layer input or product.

    Attributes:
        grid: The grid.
        method: Name of the candidate range.
        errors: Mean squared output error of every candidate, by name.
        noise: Squared error of the output that the grid causes, over the variance of the output.
        sentinels: The observed range, if it has sentinel values such as -1e9, which are excluded; else None.
        bounds: The range without them, which values are clipped to in statistics; else None.
    """

    grid: Activation
    method: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.0
    sentinels: tuple[float, float] | None = None
    bounds: tuple[float, float] | None = None


Grids = Mapping[str, GridChoice]  # of layer inputs and, if those are quantized too, of layer products, by value name


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationContext:
    """Settings shared by all groups and stages of layers.

    Attributes:
        data: Batches that fit the model.
        mask: Input whose zero elements mark rows to leave out (see `magr_onnx.runtime.calibration.mask`); None for none.
        provider: Where to run.
        hold_out: Which batches are held out.
        grids: Quantization of layer inputs; moments are of the quantized values.
        followers: Whether a value follows the mask, by name, as far as `magr_onnx.runtime.calibration.mask.masked_values` has found out.
        backend: Where layers are solved.
    """

    data: Batches
    mask: str | None = None
    provider: str = "cpu"
    hold_out: HoldOut = NONE
    grids: Grids = field(default_factory=dict)
    followers: dict[str, bool] = field(default_factory=dict)
    backend: Backend = HOST
