"""Bits of convolutions under a budget, where they compute in float: 4 or 8, or none, solved and measured before the choice.

Their solutions depend on the float model alone, and so not on the choice for other layers: each is made once at every width, written for
the sizes and the results of all attempts, and put into a running session of the float model to measure what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.model_io.writing import tensor_bytes
from magr_onnx.passes import Skip
from magr_onnx.passes.emit import conv as conv_emitter
from magr_onnx.passes.layers import conv
from magr_onnx.passes.layers.conv import Form
from magr_onnx.report.reasons import Reason
from magr_onnx.workflow.converted import Converted


@dataclass(frozen=True, slots=True, eq=False)
class ConvChoices:
    """What the convolutions of a model may become.

    Attributes:
        items: Names of convolutions, those of one weight together.
        bits: Widths, beside float.
        solutions: By the first name of an item and the bits: for each of its convolutions.
        losses: Of the model with one item at these bits, by the same.
        metric: What losses are of.
        form: How codes become floats.
    """

    items: list[list[str]]
    bits: Sequence[int]
    solutions: Mapping[tuple[str, int], Sequence[LayerSolution]]
    losses: Mapping[tuple[str, int], float]
    metric: str
    form: Form

    def write(self, model: ir.Model, bits_of: Mapping[str, int]) -> Converted:
        """Write convolutions into ``model``, in place, with bits by the first name of an item; others stay float."""
        result, layers = Converted(), {layer.name: layer for layer in conv.find(model)[0]}
        for names in self.items:
            readers, bits = [layers[name] for name in names], bits_of.get(names[0])
            if bits is None:
                result.skips += [Skip(layer.name, layer.op, Reason.BUDGET) for layer in readers]
                continue
            solutions = self.solutions[names[0], bits]
            assert solutions[0].quantized is not None
            weight = conv.split_groups(solutions[0].quantized.dequantize(), readers[0].group)
            for layer, solution, emitted in zip(readers, solutions, conv_emitter.emit(readers, solutions, self.form, False), strict=True):
                result.add(layer, solution, emitted, weight, layer.group)
        return result

    def changes(self, model: ir.Model, names: Sequence[str]) -> list[float]:
        """Return by how many bytes the tensors of a model grow with an item at each of the bits."""
        before, sizes = tensor_bytes(model), list[float]()
        for bits in self.bits:
            copy = model.clone()
            self.write(copy, {names[0]: bits})
            sizes.append(float(tensor_bytes(copy) - before))
        return sizes
