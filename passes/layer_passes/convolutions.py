"""The pass that puts the weights of convolutions on a grid; `magr_onnx.workflow.non_linear` runs it with statistics of what they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from magr_onnx.core.checks import check_weight
from magr_onnx.core.layer import LayerProblem, LayerSolution, join_groups
from magr_onnx.core.types import LayerStats, TargetMoments, WeightSpec
from magr_onnx.passes.base import ModelPass, negative_or_infinite
from magr_onnx.passes.emit.channel_codes import opset_of
from magr_onnx.passes.emit.conv import emit
from magr_onnx.passes.graph.opset import raise_opset_if_possible
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.layer_state import float_type
from magr_onnx.passes.layers.conv import BITS, FORMS, ConvLayer, Form, find
from magr_onnx.passes.layers.weighted import by_weight


@dataclass(frozen=True)
class Convolutions(ModelPass):
    """Weights of convolutions on an integer grid, one scale an output channel, by the quantizer of the plan.

    Convolutions are solved before the linear layers, each group of channels as a layer of its own. Alone, or in a sequence of passes, it
    has no statistics of patches and rounds every channel to a grid searched for the least squared error.

    Attributes:
        bits: 3 to 8.
        symmetric: Fix the zero point in the middle.
        alpha: Strength of MagR, relative to the layer; none for what is usual for the bits (with method auto: chosen).
        form: ``fold`` or ``dequantize``: how codes become floats; ``integer``: not at all. See `magr_onnx.passes.emit.conv`.
        feedback: Solve each convolution towards its float output, from what the quantized ones before it give.
    """

    name: ClassVar[str] = "convolutions"
    summary: ClassVar[str] = "write convolutions with quantized weights too"
    slot: ClassVar[str] = "convolutions"

    bits: int = 8
    symmetric: bool = True
    alpha: float | None = None
    form: Form = "fold"
    feedback: bool = False

    def problems(self, spec: WeightSpec | None) -> list[str]:
        problems = []
        if self.bits not in BITS:
            known = ", ".join(map(str, BITS))
            problems.append(f"convolutions: bits={self.bits} is not supported; choose one of {known}, or none to leave them float")
        if self.form not in FORMS:
            problems.append(f"convolutions: form={self.form!r} is not known; choose one of {', '.join(FORMS)}")
        return problems + negative_or_infinite("convolutions: alpha", self.alpha)

    def prepare(self, model: ir.Model, spec: WeightSpec | None) -> bool:
        """Raise the opset, if there are convolutions to convert and the converter can; where it cannot, they are skipped later."""
        del spec
        return raise_opset_if_possible(model, self.opset(find(model)[0]))

    def opset(self, layers: Sequence[ConvLayer]) -> int:
        """The opset that has the form."""
        return opset_of(self.form, self.bits, (layer.dtype for layer in layers))

    def change(self, model: ir.Model) -> bool:
        integer = any(node.op_type == "QuantizeLinear" for node in model.graph.all_nodes())
        stage = replace(self, form="dequantize") if integer or self.form == "integer" else self  # integers need ranges of activations
        modified = stage.prepare(model, None)
        layers, _ = find(model)
        if stage.opset(layers) > model.opset_imports.get("", 0):
            return modified
        rounding = Quantize("rtn", self.bits, None, self.symmetric)
        for readers in by_weight(layers):
            problems = problems_of(readers[0])
            solutions = [rounding.solve(problem, LayerSolution.unsolved(problem)) for problem in problems]
            emit(readers, [join_groups(problems, solutions, False)] * len(readers), stage.form, integer)
        return modified or bool(layers)


def problems_of(layer: ConvLayer, stats: Sequence[LayerStats] = (), targets: Sequence[TargetMoments] = ()) -> list[LayerProblem]:
    """Read a convolution as a problem for every group of its channels.

    They have no bias: what a bias correction adds to none is added to the bias of every convolution that shares the weight.

    Args:
        layer: The convolution.
        stats: Second moments of the patches, a group each; none for data-free problems.
        targets: Moments of what each group should put out, where the layers before are quantized; else none.

    Raises:
        NonFiniteError: The weight holds NaN or infinity.
    """
    matrices, kind = layer.read(), float_type(layer.dtype)
    check_weight(f"weight of {layer.name}", matrices)
    moments = stats or [LayerStats.data_free(layer.k, taps=layer.taps)] * len(matrices)
    wanted: Sequence[TargetMoments | None] = targets or [None] * len(matrices)
    depthwise = layer.k == layer.taps and layer.n == 1
    return [
        LayerProblem(matrix, None, s, kind, target_moments=target, taps=layer.taps, depthwise=depthwise)
        for matrix, s, target in zip(matrices, moments, wanted, strict=True)
    ]
