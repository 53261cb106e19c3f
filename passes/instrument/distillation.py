"""A copy of a model that computes its loss against the outputs of another one, and the gradients of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from magr_onnx.passes.instrument.backward import Backward
from magr_onnx.passes.instrument.gradients import judged_outputs, seed_of
from magr_onnx.passes.instrument.taps import Extension


@dataclass(frozen=True, slots=True)
class Target:
    """Inputs of a copied model that tell what one of its outputs is compared with.

    Attributes:
        goal: Probabilities, for logits; else the other model's output.
        weights: Weights of rows ``(..., 1)``.
        entropy: Entropies of the probabilities ``(..., 1)``, nats; empty where the output is not logits.
    """

    goal: str
    weights: str
    entropy: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Distillation:
    """A model that compares its outputs with those of another one, and differentiates by some of its values.

    Attributes:
        model: Its outputs are the loss of every judged output, and then the gradients of their sum by ``reached``.
        targets: The outputs judged, each with what it is compared with.
        reached: The values that have a gradient, in order.
        blocked: Operators that cannot be differentiated.
    """

    model: ir.Model
    targets: dict[str, Target]
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
    seeds, losses, targets = {}, [], {}
    for i, (name, out, rank) in enumerate(judged_outputs(backward, shapes)):
        of_logits = logits(name, rank)
        added = [
            ir.val(copy.names.value(f"__{what}_{i}"), ir.DataType.FLOAT, ir.Shape([None] * rank))
            for what in ("goal", "weights", *(["entropy"] if of_logits else []))
        ]
        copy.model.graph.inputs.extend(added)
        targets[name] = Target(*(str(value.name) for value in added))
        loss, gradient = (_divergence if of_logits else _squares)(backward, out, *added)
        losses.append(loss)
        seeds[name] = seed_of(backward, name, gradient)
    gradients = backward.run(seeds, values)
    for loss in losses:
        copy.output(loss, shape=[])
    for gradient in gradients.values():
        copy.output(backward.op("Cast", gradient, to=ir.DataType.FLOAT))
    return Distillation(copy.finish(), targets, list(gradients), backward.blocked)


def _divergence(b: Backward, out: ir.Value, goal: ir.Value, weights: ir.Value, entropy: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the weighted divergence of the logits ``out`` from probabilities, and its gradient.

    Rows of 262,144 logits are what takes the memory here: three arrays of their size are alive at a time. The sum of exponentials is
    that of Softmax, whose largest element is ``1 / sum(exp(out - max))``; ReduceLogSumExp adds them up one by one, in float32.
    """
    agreement = b.sum(b.op("Mul", goal, out), [-1])
    q = b.op("Softmax", out, axis=-1)
    log_sum = b.op("Sub", b.maximum(out), b.op("Log", b.maximum(q)))
    rows = b.op("Sub", b.op("Sub", log_sum, agreement), entropy)
    return b.op("ReduceSum", b.op("Mul", rows, weights), keepdims=0), b.op("Mul", b.op("Sub", q, goal), weights)


def _squares(b: Backward, out: ir.Value, goal: ir.Value, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the weighted sum of squared differences, and its gradient."""
    difference = b.op("Sub", out, goal)
    loss = b.op("ReduceSum", b.op("Mul", b.op("Mul", difference, difference), weights), keepdims=0)
    return loss, b.op("Mul", b.op("Add", difference, difference), weights)
