"""The demand that layer inputs become 8-bit integers: how they are rounded, and where the ranges come from.

The setting changes no graph: calibration reads it to gather the statistics of quantized inputs, the quantizer to know what the kernel
multiplies, the emitter to write the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from magr_onnx.core.activation_ranges import METHODS, Method
from magr_onnx.core.layer import LayerProblem, LayerSolution
from magr_onnx.core.types import ActivationGrid, WeightSpec
from magr_onnx.passes.base import InputGrids, LayerStage

ActivationType = Literal["uint8", "int8", "uint16", "int16", "dynamic"]


@dataclass(frozen=True)
class QuantizeActivations(LayerStage):
    """Layer inputs in 8 or 16 bits, one grid a tensor.

    Attributes:
        type: ``uint8``, ``int8``, ``uint16`` or ``int16`` for a static grid found by calibration, ``dynamic`` for uint8 with the range of
            each tensor at run time, clipped first where calibration finds that this lowers the error.
        ranges: ``min-max``, ``percentile``, ``min-error`` or ``daq`` (see `magr_onnx.core.activation_ranges`), or ``auto`` for the best
            of the first three by measured output error.
        wide: With 8 bits, the share of the work that may be done in 16 (`magr_onnx.passes.tensors.widths`, and
            `magr_onnx.workflow.wide_inputs`).
    """

    name: ClassVar[str] = "quantize-activations"
    summary: ClassVar[str] = "round layer inputs to 8 bits, statically or at run time"
    slot: ClassVar[str] = "activations"

    type: ActivationType = "uint8"
    ranges: Method = "auto"
    wide: float = 0.0

    def problems(self, spec: WeightSpec | None) -> list[str]:
        del spec
        problems = []
        if self.type not in get_args(ActivationType):
            problems.append(f"activation type {self.type!r} is not known; choose one of {', '.join(get_args(ActivationType))}")
        if self.ranges not in METHODS:
            problems.append(f"activation range {self.ranges!r} is not known; choose one of {', '.join(METHODS)}")
        if not 0 <= self.wide <= 1:
            problems.append(f"wide activations {self.wide}: give a share of the work, 0 to 1, such as 0.1")
        return problems

    @property
    def grids(self) -> InputGrids:
        """Where the grids come from."""
        return "dynamic" if self.type == "dynamic" else "static"

    def solve(self, problem: LayerProblem, solution: LayerSolution) -> LayerSolution:
        grid = problem.activation
        figures: dict[str, Any] = {"type": self.type}
        if isinstance(grid, ActivationGrid):
            figures = {
                "type": grid.dtype.name,
                "scale": grid.scale,
                "zero_point": grid.zero_point,
                "low": grid.range[0],
                "high": grid.range[1],
            }
        elif grid is not None and grid.clips:
            figures |= {"low": grid.low, "high": grid.high}
        figures["error"] = float(np.sqrt(problem.input_noise))
        return replace(solution, record=replace(solution.record, activation=figures))
