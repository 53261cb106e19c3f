"""A copy of a model that computes its loss against the outputs of another one, and the gradients of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.passes.instrument.backward import Backward
from magr_onnx.passes.instrument.gradients import judged_outputs, seed_of
from magr_onnx.passes.instrument.taps import Extension


@dataclass(frozen=True, slots=True, eq=False)
class Distillation:
    """A model that compares its outputs with those of another one, and differentiates by some of its values.

    Attributes:
        model: Its outputs are the loss of every judged output, and then the gradients of their sum by ``reached``.
        outputs: The outputs judged, each with the names of the inputs that take the other model's output, and weights of its rows.
        reached: The values that have a gradient, in order.
        blocked: Operators that cannot be differentiated.
    """

    model: ir.Model
    outputs: dict[str, tuple[str, str]]
    reached: list[str]
    blocked: set[str]


def distillation_taps(
    model: ir.Model, values: Iterable[str], shapes: Mapping[str, Sequence[int]], logits: Callable[[str, int], bool]
) -> Distillation:
    """Copy the model to output its loss against the outputs of another model, and the gradients of the loss.

    The loss is, of logits, the Kullback-Leibler divergence from the other model's, of other outputs the squared error; of every row
    (vector along the last axis) times its weight, an input ``(..., 1)``, and summed.

    Args:
        model: The model, of opset 13 at least.
        values: Values to differentiate by.
        shapes: Shapes of `magr_onnx.passes.instrument.gradients.shaped_values` on one batch.
        logits: Whether an output of a given name and rank is logits.
    """
    copy = Extension(model)
    backward = Backward(copy, shapes)
    seeds, losses, outputs = {}, [], {}
    for i, (name, out, rank) in enumerate(judged_outputs(backward, shapes)):
        goal, weights = (
            ir.val(copy.names.value(f"__{what}_{i}"), ir.DataType.FLOAT, ir.Shape([None] * rank)) for what in ("goal", "weights")
        )
        copy.model.graph.inputs.extend([goal, weights])
        outputs[name] = str(goal.name), str(weights.name)
        if logits(name, rank):
            expected, actual = (backward.op("LogSoftmax", v, axis=-1) for v in (goal, out))
            p, q = (backward.op("Exp", v) for v in (expected, actual))
            loss, gradient = backward.op("Mul", p, backward.op("Sub", expected, actual)), backward.op("Sub", q, p)
        else:
            difference = backward.op("Sub", out, goal)
            loss, gradient = backward.op("Mul", difference, difference), backward.op("Add", difference, difference)
        losses.append(backward.op("ReduceSum", backward.op("Mul", loss, weights), keepdims=0))
        seeds[name] = seed_of(backward, name, backward.op("Mul", gradient, weights))
    gradients = backward.run(seeds, values)
    for loss in losses:
        copy.output(loss, shape=[])
    for gradient in gradients.values():
        copy.output(backward.op("Cast", gradient, to=ir.DataType.FLOAT))
    return Distillation(copy.finish(), outputs, list(gradients), backward.blocked)
