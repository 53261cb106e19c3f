"""The pass that puts the weights of recurrent operators on a grid; `magr_onnx.workflow.recurrent` runs it with statistics of inputs and
states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from magr_onnx.core.checks import check_weight
from magr_onnx.core.histograms import sketch
from magr_onnx.core.layer import LayerProblem, LayerSolution, join_groups, output_variance, ratio
from magr_onnx.core.types import LayerStats, WeightSpec
from magr_onnx.passes.base import ModelPass
from magr_onnx.passes.emit.channel_codes import opset_of
from magr_onnx.passes.emit.recurrent import emit
from magr_onnx.passes.graph.opset import raise_opset_if_possible
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.layer_state import float_type
from magr_onnx.passes.layers.recurrent import FORMS, RecurrentForm, RecurrentLayer, find
from magr_onnx.passes.layers.weighted import by_weight

ROUNDED = "inputs and states are rounded to 8 bits in every run, which is in the error only where it was measured"


@dataclass(frozen=True)
class Recurrent(ModelPass):
    """Weights of LSTM, GRU and RNN as int8, one scale per direction and row of a gate, by the quantizer of the plan.

    The weights for the input and for the state are solved separately, each direction by itself. Alone, or in a sequence of passes, it has
    no statistics and rounds every row to a grid searched for the least squared error.

    Attributes:
        form: ``dynamic-quantize-lstm``, ``fold`` or ``dequantize``; see `magr_onnx.passes.emit.recurrent`. Where the first has no form
            for an operator, it is written as ``fold``.
    """

    name: ClassVar[str] = "recurrent"
    summary: ClassVar[str] = "write recurrent operators with quantized weights"
    slot: ClassVar[str] = "recurrent"
    bits: ClassVar[int] = 8
    symmetric: ClassVar[bool] = True
    alpha: ClassVar[float | None] = None
    feedback: ClassVar[bool] = False

    form: RecurrentForm = "dynamic-quantize-lstm"

    def problems(self, spec: WeightSpec | None) -> list[str]:
        del spec
        return [] if self.form in FORMS else [f"recurrent={self.form!r} is not known; choose one of {', '.join(FORMS)}, or none"]

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        """Raise the opset, if there are operators to convert and the converter can; where it cannot, they are skipped later."""
        del spec
        return raise_opset_if_possible(model, self.opset(find(model)[0]))

    def opset(self, layers: Sequence[RecurrentLayer]) -> int:
        """The opset that has the form; any for DynamicQuantizeLSTM, and for what it is replaced by."""
        return 0 if self.form == "dynamic-quantize-lstm" else opset_of(self.form, self.bits, (layer.dtype for layer in layers))

    def form_of(self, readers: Sequence[RecurrentLayer], provider: str = "cpu") -> tuple[RecurrentForm, str]:
        """The form that operators of one weight are written in, and what the report says of it."""
        if self.form != "dynamic-quantize-lstm":
            return self.form, ""
        faults = (
            (provider != "cpu", "DynamicQuantizeLSTM is for CPUs"),
            (any(layer.op != "LSTM" for layer in readers), "onnxruntime has integer products for LSTM only"),
            (any(layer.dtype != ir.DataType.FLOAT for layer in readers), "DynamicQuantizeLSTM is for float32"),
        )
        why = next((why for fault, why in faults if fault), "")
        return ("fold", f"{why}: computed in float") if why else (self.form, ROUNDED)

    def change(self, model: ir.Model) -> bool:
        modified = self.prepare(model, None)
        layers, _ = find(model)
        if self.opset(layers) > model.opset_imports.get("", 0):
            return modified
        rounding = Quantize("rtn", self.bits, None, self.symmetric)
        for readers in by_weight(layers):
            parts = problems_of(readers[0])
            solutions = [[rounding.solve(problem, LayerSolution.unsolved(problem)) for problem in part] for part in parts]
            emit(readers, [join_groups(*pair, False) for pair in zip(parts, solutions, strict=True)], self.form_of(readers)[0])
        return modified or bool(layers)


def problems_of(layer: RecurrentLayer, stats: Sequence[Sequence[LayerStats]] = ()) -> list[list[LayerProblem]]:
    """Read a recurrent operator as two lists of problems, of the input and of the state, each with one for every direction.

    Args:
        layer: The operator.
        stats: Second moments of inputs and of states, in every direction; none for data-free problems.

    Raises:
        NonFiniteError: A weight holds NaN or infinity.
    """
    check_weight(f"weight of {layer.name}", layer.read())
    kind = float_type(layer.dtype)
    widths = (layer.width, layer.hidden)
    moments = stats or [[LayerStats.data_free(width)] * layer.directions for width in widths]
    return [
        [LayerProblem(matrix, None, s, kind) for matrix, s in zip(matrices, part, strict=True)]
        for matrices, part in zip(layer.matrices(), moments, strict=True)
    ]


def join(problems: Sequence[Sequence[LayerProblem]], solutions: Sequence[LayerSolution]) -> LayerSolution:
    """Join the solutions of input and state, ``(I, D G H)`` and ``(H, D G H)``, to one of ``(I + H, D G H)`` for the report.

    Its codes are those of the input only.
    """
    weight, target = (np.vstack([getattr(solution, name) for solution in solutions]) for name in ("weight", "target"))
    before = np.vstack([np.hstack([p.weight for p in part]) for part in problems])
    powers = [sum(output_variance(p.weight, p.stats) for p in part) for part in problems]
    squares = sum(power * (solution.record.error or 0.0) ** 2 for power, solution in zip(powers, solutions, strict=True))
    notes = dict.fromkeys(note for solution in solutions for note in solution.record.notes)
    record = replace(
        solutions[0].record, error=ratio(squares, sum(powers)), weights=sketch(before, None, None), errors=(), notes=tuple(notes)
    )
    return LayerSolution(weight, None, target, quantized=solutions[0].quantized, changed=True, record=record)
