"""What a model loses by a convolution in 4 or 8 bits, measured for a budget (`magr_onnx.workflow.conv_choices`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from magr_onnx.core.layer import LayerSolution
from magr_onnx.core.types import Array
from magr_onnx.passes import Plan
from magr_onnx.passes.emit.channel_codes import opset_of
from magr_onnx.passes.graph.constants import replace_input
from magr_onnx.passes.layers import conv
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.weighted import FLOATS, by_weight
from magr_onnx.runtime.calibration import conv_patches
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.loss import Reference, Run
from magr_onnx.runtime.measure.sensitivity import Split
from magr_onnx.runtime.ort.session import Batch, Session
from magr_onnx.workflow import conv_statistics, non_linear
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.conv_choices import ConvChoices
from magr_onnx.workflow.request import OptimizeRequest

BITS = (4, 8)
SAMPLES = 64  # that losses are measured on, about


def choosable(model: ir.Model, plan: Plan, request: OptimizeRequest, selection: Selection) -> list[ConvLayer]:
    """List the convolutions whose bits a budget chooses: those that will compute in float, where no bits were asked for."""
    options = request.options
    if request.budget is None or request.calibration is None or options is None or "conv_bits" in options:
        return []
    if plan.convolutions is None or non_linear.computes_integers(model, plan):
        return []
    layers, _ = non_linear.select_convolutions(model, plan, selection)
    return [] if any(layer.nested for layer in layers) else layers


def raise_opset(model: ir.Model, plan: Plan) -> None:
    """Raise the opset of a model, in place, as far as the fewest bits need, if that is possible."""
    if plan.convolutions is not None:
        replace(plan.convolutions, bits=min(BITS)).prepare(model, None)


def measure(model: ir.Model, layers: Sequence[ConvLayer], plan: Plan, split: Split, context: RunContext) -> ConvChoices:
    """Solve convolutions of a float model at every width, and measure what each costs alone.

    Raises:
        NonFiniteError: Activations are NaN or infinite.
        ModelError: The model has no float output.
    """
    stage, ordered = plan.convolutions, [layer for readers in by_weight(layers) for layer in readers]
    assert stage is not None
    opset = model.opset_imports.get("", 0)
    widths = [bits for bits in BITS if opset_of(stage.form, bits, (layer.dtype for layer in layers)) <= opset]
    items: list[list[str]] = []
    solutions: dict[tuple[str, int], Sequence[LayerSolution]] = {}
    losses: dict[tuple[str, int], float] = {}
    copy, inputs, free = _with_inputs(model, ordered)
    unmeasured = conv_patches.unmeasured(model, ordered, split.rest, context.provider, conv_patches.PATCH_LIMIT)
    with Session(copy, context.provider) as session:
        reference = Reference(session, _some(split.effects), context.mask)
        for readers, stats in conv_statistics.patch_moments(model, ordered, split.rest, context, unmeasured):
            names = [layer.name for layer in readers]
            items.append(names)
            for bits in widths:
                solved = non_linear.solve_weight(readers, stats, replace(plan, convolutions=replace(stage, bits=bits)), False)
                solutions[names[0], bits] = [_noted(solution, unmeasured.get(name)) for name, solution in zip(names, solved, strict=True)]
                assert solved[0].quantized is not None
                matrices = conv.split_groups(solved[0].quantized.dequantize(), readers[0].group)
                weight = conv.from_matrices(matrices, readers[0].op, readers[0].kernel).astype(FLOATS[readers[0].dtype])
                biases = {
                    free[name]: _bias(layer, solution.bias)
                    for name, layer, solution in zip(names, readers, solved, strict=True)
                    if name in free
                }
                losses[names[0], bits] = reference.loss(_with(session, {inputs[names[0]]: weight, **biases}))
            context.stage("convolutions")(sum(map(len, items)), len(ordered))
    context.lap("convolutions")
    return ConvChoices(items, widths, solutions, losses, reference.metric, stage.form)


def _with(session: Session, weights: Batch) -> Run:
    """Return what runs a session with some weights replaced."""
    return lambda batch: session.run({**batch, **weights})


def _noted(solution: LayerSolution, note: str | None) -> LayerSolution:
    return solution if note is None else replace(solution, record=solution.record.noting(note))


def _some(data: Batches) -> Batches:
    """Return the batches of about `SAMPLES` samples."""
    return data.limit(max(1, round(len(data) * SAMPLES / max(data.samples or SAMPLES, 1))))


def _bias(layer: ConvLayer, added: Array | None) -> npt.NDArray[Any]:
    """Return the bias ``(M,)`` of a convolution with what is added to it."""
    stored = layer.read_bias()
    bias = np.zeros(layer.group * layer.n) if stored is None else stored
    return (bias if added is None else bias + added).astype(FLOATS[layer.dtype])


def _with_inputs(model: ir.Model, layers: Sequence[ConvLayer]) -> tuple[ir.Model, dict[str, str], dict[str, str]]:
    """Copy a model with weights and biases of convolutions as inputs that may be left out.

    Returns:
        The copy; the inputs of weights, by the name of the first convolution that reads each; those of biases, where these can be written.
    """
    copy, weights, biases = model.clone(), dict[str, str](), dict[str, str]()
    names = {layer.name for layer in layers}
    for readers in by_weight([layer for layer in conv.find(copy)[0] if layer.name in names]):
        weight = readers[0].constant("_free", np.ascontiguousarray(readers[0].weight.tensor().numpy()))
        values = [weight]
        weights[readers[0].name] = str(weight.name)
        for layer in readers:
            replace_input(layer.node, 1, weight)
            if layer.takes_bias:
                bias = layer.constant("_free_bias", _bias(layer, None))
                replace_input(layer.node, 2, bias)
                biases[layer.name] = str(bias.name)
                values.append(bias)
        layer.root.inputs.extend(values)
    return copy, weights, biases
