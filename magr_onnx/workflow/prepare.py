"""From a file to a float model whose layers can be converted, and everything that can be said against it before the long work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import onnx_ir as ir

from magr_onnx.config import layer_options, selection
from magr_onnx.config.options import Options
from magr_onnx.errors import ModelError
from magr_onnx.model_io.files import Loaded
from magr_onnx.passes import LinearLayer, Plan, Skip
from magr_onnx.passes.canonical import requantize
from magr_onnx.passes.instrument.inline import open_up
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.unconverted import holders
from magr_onnx.report.reasons import Reason
from magr_onnx.workflow import non_linear
from magr_onnx.workflow.setting import Setting
from magr_onnx.workflow.verify_output import Readable


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A float model to convert.

    Attributes:
        name: Of the file, for messages.
        bytes: Size of the source.
        reference: The model as the caller gave it.
        model: The same with its functions opened, in canonical form, at the opset the pipeline needs.
        raised: Whether its opset had to be raised.
        plan: The plan, with what the model needs beside what was asked for.
        layers: Its linear layers.
        others: Convolutions and tables that will be converted.
        elsewhere: Nodes that hold weights and are no layers of any kind.
        notes: What was done to it, for the report.
    """

    name: str
    bytes: int
    reference: Path | ir.Model
    model: ir.Model
    raised: bool
    plan: Plan
    layers: list[LinearLayer]
    others: Sequence[Readable]
    elsewhere: list[Skip]
    notes: list[str]

    @property
    def readable(self) -> list[Readable]:
        """Everything with a weight that will be read."""
        return [*self.layers, *self.others]

    def nothing(self, skips: Sequence[Skip]) -> ModelError:
        """The error to raise where nothing is converted."""
        by_reason: dict[StrEnum, list[Skip]] = {}
        for skip in sorted(skips, key=lambda skip: skip.reason != Reason.QUANTIZED):
            by_reason.setdefault(skip.reason, []).append(skip)
        said = [str(some[0]) if len(some) == 1 else f"{len(some)} nodes such as {some[0]}" for some in by_reason.values()]
        reasons = "; ".join(said[:5]) or "it has no MatMul, Gemm or convolution"
        return ModelError(f"{self.name}: no layer can be converted: {reasons}{_remedy(by_reason.get(Reason.QUANTIZED, []))}")


def _remedy(quantized: Sequence[Skip]) -> str:
    """What to do about weights that are quantized already, as the end of a message."""
    if any(skip.op in requantize.FORM.operators for skip in quantized):
        return "; requantize (--requantize) takes quantized weights for the floats they stand for"
    remedy = "; give the float model that this one was made of; --requantize reads weights behind DequantizeLinear, and no other form"
    return remedy if quantized else ""


def prepare(
    loaded: Loaded,
    plan: Plan,
    options: Options | None,
    setting: Setting,
    again: bool,
    layer_plans: Sequence[Plan] = (),
) -> Prepared:
    """Bring a model into the form that layers are looked for in.

    Args:
        loaded: The model; it is changed.
        plan: What will be done to it.
        options: What the plan was made of; None where it was written by hand.
        setting: What else was asked for.
        again: Take quantized weights for the floats they stand for.
        layer_plans: Plans that some layers will have instead; the model is prepared for them too.

    Raises:
        ModelError: No layer can be converted, or the opset cannot be raised as far as the pipeline needs.
        OptionError: Options are for layers that there are not.
    """
    model = loaded.model
    reference = model.clone() if loaded.path is None else loaded.path
    opset = model.opset_imports.get("")
    notes = [*loaded.notes, *open_up(model)]
    plan = non_linear.complete(plan, model, options)
    for each in (plan, *layer_plans):
        each.prepare(model)
    raised = model.opset_imports.get("") != opset
    notes += selection.settle(model, setting.include, setting.exclude, again)
    selection.check(model, setting.include, setting.exclude)
    layers, skips = setting.find(model)
    elsewhere = list(holders(model.graph.all_nodes()))
    others, unconverted = non_linear.look(model, plan, setting.include, setting.exclude)
    notes += layer_options.check_matches(setting.tables, layers, [other for other in others if isinstance(other, ConvLayer)])
    found = Prepared(loaded.name, loaded.bytes, reference, model, raised, plan, layers, others, elsewhere, notes)
    if not layers and not others:
        raise found.nothing([*skips, *elsewhere, *unconverted])
    return found
