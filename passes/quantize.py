"""Choosing integer codes. Alone, it leaves a float model that computes what the quantized one will (fake quantization)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.linalg import layer_error
from magr_onnx.passes.job import BiasPolicy, Job, LayerPass
from magr_onnx.quantizers import QUANTIZERS, Options, Problem
from magr_onnx.types import BITS, WeightSpec


@dataclass(frozen=True)
class Quantize(LayerPass):
    """Quantize every layer with a method of `magr_onnx.quantizers.QUANTIZERS`.

    Attributes:
        method: A name in the registry.
        bits: 2, 3, 4 or 8.
        block_size: Rows that share a scale; none for one grid a column.
        symmetric: Fix the zero point in the middle of the grid.
        beta: Shrink of the min-max grid; none searches it per group.
        damping: Multiple of the diagonal added to the Gram matrix; none for one that follows from the number of rows.
        act_order: Round inputs in descending power.
        sweeps: Most coordinate-descent sweeps (comq).
        rescale: Refit scales between sweeps (comq).
        bias: Policy of the bias compensation that will follow: where a bias will absorb the mean error, the centred Gram
            matrix is the objective. A pipeline fills it in from its compensate-bias pass; none where there is none.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "choose integer codes: rtn, gptq or comq"

    method: str = "gptq"
    bits: int = 4
    block_size: int | None = 32
    symmetric: bool = False
    beta: float | None = None
    damping: float | None = None
    act_order: bool = True
    sweeps: int = 8
    rescale: bool = True
    bias: BiasPolicy | None = None

    def problems(self, spec: WeightSpec | None) -> list[str]:
        found = []
        if spec is not None:
            found.append("quantize appears twice")
        if self.method not in QUANTIZERS:
            found.append(f"quantizer {self.method!r} is not known; choose one of {', '.join(QUANTIZERS)}")
        if self.bits not in BITS:
            found.append(f"bits={self.bits} is not supported; choose one of {', '.join(map(str, BITS))}")
        if self.block_size is not None and self.block_size < 1:
            found.append(f"block size {self.block_size} must be at least 1, or 'channel'")
        if self.beta is not None and not 0 < self.beta <= 1:
            found.append(f"beta={self.beta} must be above 0 and at most 1")
        if self.damping is not None and not self.damping >= 0:
            found.append(f"damping={self.damping} must be 0 or more")
        if self.sweeps < 0:
            found.append(f"sweeps={self.sweeps} must be 0 or more")
        return found

    def spec(self, dtype: ir.DataType = ir.DataType.FLOAT) -> WeightSpec:
        """The grid for weights of a type: half-precision weights store half-precision scales."""
        half = dtype == ir.DataType.FLOAT16
        return WeightSpec(self.bits, self.block_size, self.symmetric, "float16" if half else "float32")

    def apply(self, job: Job) -> bool:
        centred = job.centred(self.bias)
        problem = Problem(job.weight, job.reference, job.stats, centred, self.spec(job.layer.dtype))
        options = Options(self.beta, self.damping, self.act_order, self.sweeps, self.rescale)
        solution = QUANTIZERS[self.method](problem, options)
        job.quantized = solution.weight
        job.weight = solution.weight.dequantize()
        job.changed = True
        job.notes.extend(solution.notes)
        if solution.facts:
            job.facts["solver"] = solution.facts
        power = layer_error(job.reference, job.stats.gram)
        left = layer_error(job.weight - job.reference, problem.gram)
        job.facts["error"] = float(np.sqrt(max(left, 0) / power)) if power > 0 else 0.0
        return True
