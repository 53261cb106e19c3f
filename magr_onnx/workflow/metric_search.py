"""Mixed precision within a loss of the user's own measure: the mixes of least predicted loss are made and measured, by bisection."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from magr_onnx.config.options import Options
from magr_onnx.core import knapsack
from magr_onnx.core.bisection import Bisection
from magr_onnx.report.mixed_precision import Assignment
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.data.sources import Steps
from magr_onnx.runtime.measure.metric import Judge
from magr_onnx.workflow.goal import Goal
from magr_onnx.workflow.mixed_precision import Search, Source

MIXES = 32  # that are considered, at most


class MetricSearch(Search):
    """A search for the smallest model that keeps to a loss of the user's own measure.

    The mixes of least predicted loss at their sizes are tried, from both ends to the middle: a smaller one is assumed to be worse.
    """

    def __init__(
        self,
        goal: Goal,
        options: Options,
        source: Source,
        calibration: CalibrationContext,
        gram_budget: int,
        progress: Steps,
        judge: Judge,
    ) -> None:
        """Measure the sensitivities, and plan; see `Search`.

        Raises:
            OptionError: No choice is possible.
        """
        self._judge = judge
        super().__init__(goal, options, source, calibration, gram_budget, progress)
        least = goal.least(judge.float_value)
        self.measured_on = f"{judge.where}; {judge.metric.name} of the float model is {judge.float_value:.6g}, and {least:.6g} will do"

    def _first(self) -> knapsack.Point:
        curve = knapsack.curve(self._items)
        self._mixes: list[knapsack.Point] = [curve[i] for i in sorted({round(i) for i in np.linspace(0, len(curve) - 1, MIXES)})]
        self._bisection = Bisection(len(self._mixes))
        return self._mixes[self._bisection.next]

    def measure(self, work: ir.Model) -> float:
        """Return the user's measure of a quantized model."""
        return self._judge.value(work)

    def accepts(self, measured: float) -> bool:
        """Take note of a result's measure; unless it is known to be the smallest that keeps to the loss, choose the next to try."""
        self._attempt(measured)
        tried = self._bisection.next
        self._bisection.take(self._meets(measured))
        self._point = self._mixes[self._bisection.next]
        return self._bisection.finished and self._bisection.next == tried

    def _meets(self, measured: float) -> bool:
        return measured >= self.goal.least(self._judge.float_value)  # not for NaN

    def outcome(self) -> Assignment:
        """Return what was decided, for the report."""
        return self.report(self.metric, self.measured_on, self._judge.metric.name)
