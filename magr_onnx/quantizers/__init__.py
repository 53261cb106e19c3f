"""The registry of weight quantizers.

To add one: write its file in this folder, with a ``run(problem, options) -> Solution``, and add its line to `QUANTIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from magr_onnx.quantizers import comq, gptq, rtn
from magr_onnx.quantizers.problem import Options, Problem, Solution

Quantizer = Callable[[Problem, Options], Solution]

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": rtn.run,
    "gptq": gptq.run,
    "comq": comq.run,
}

__all__ = ["QUANTIZERS", "Options", "Problem", "Quantizer", "Solution"]
