"""The registry of weight quantizers.

To add one: write its file in this folder, with a ``run(problem, options) -> Solution``, and add its line to `QUANTIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from magr_onnx.core.quantizers import a2q, auto, comq, gptq, hqq, rtn
from magr_onnx.core.quantizers.interface import Options, Problem, Solution

Quantizer = Callable[[Problem, Options], Solution]

QUANTIZERS: dict[str, Quantizer] = {
    "auto": auto.run,
    "rtn": rtn.run,
    "gptq": gptq.run,
    "comq": comq.run,
    "hqq": hqq.run,
    "a2q": a2q.run,
    "a2q+": a2q.run_plus,
}

UNDER_A_BUDGET = ("auto", "gptq", "comq", "a2q", "a2q+")
"""Those that know accumulator constraints; the last two know nothing else."""

BATCHED = ("auto", "gptq", "comq", "rtn")
"""Those that `magr_onnx.core.quantizers.batched` is a form of, for the many small groups of a convolution."""


__all__ = ["BATCHED", "QUANTIZERS", "UNDER_A_BUDGET", "Options", "Problem", "Quantizer", "Solution"]
