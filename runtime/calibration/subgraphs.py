"""Coverage of the bodies of If, Loop and Scan by calibration data.

A branch never taken, a loop without iterations, and a value whose number of rows changes between the steps of a Scan have no statistics.
All others can be tapped in a copy of the model like values of the main graph (`magr_onnx.passes.instrument.hoist`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from magr_onnx.errors import RuntimeFailure
from magr_onnx.passes import LinearLayer, Plan, Reason, Skip
from magr_onnx.passes.instrument.hoist import hoist
from magr_onnx.passes.instrument.taps import shape_taps
from magr_onnx.runtime.data.sources import Batches, run_batches

TOO_LARGE = "the model is too large to be run as a whole in the memory there is (max_memory)"
NEVER = "no calibration data reaches it: a branch is never taken, or a loop never turns"


@dataclass(frozen=True, slots=True, eq=False)
class TappedModel:
    """A model whose layer inputs can all be tapped in the main graph.

    Attributes:
        model: The model, with the inputs of layers in bodies hoisted to the main graph.
        missing: Why a value in a body has no statistics, by its name.
        widths: Names and widths of the hoisted values.
        growing: Hoisted values with a different number of rows in every iteration.
    """

    model: ir.Model
    missing: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    growing: Collection[str] = ()

    def on(self, model: ir.Model) -> ir.Model:
        """Hoist the same values of another model."""
        return hoist(model, self.widths, self.growing) if self.widths else model

    def missing_reason(self, layer: LinearLayer) -> str | None:
        """Tell why a layer has no statistics; None if it has."""
        return self.missing.get(layer.reads) or self.missing.get(str(layer.node.outputs[0].name))

    def reached(self, layers: Iterable[LinearLayer]) -> list[LinearLayer]:
        """Select the layers that have statistics."""
        return [layer for layer in layers if self.missing_reason(layer) is None]

    def split(self, layers: Sequence[LinearLayer], needed: bool) -> tuple[list[LinearLayer], list[Skip]]:
        """Split layers into those to convert and, if statistics are ``needed``, skips of those without."""
        if not needed:
            return list(layers), []
        reasons = [(layer, reason) for layer in layers if (reason := self.missing_reason(layer)) is not None]
        return self.reached(layers), [Skip(layer.name, layer.op, Reason.NO_STATISTICS, reason) for layer, reason in reasons]


def tap_subgraphs(
    model: ir.Model, layers: Sequence[LinearLayer], data: Batches | None, plan: Plan, provider: str, large: bool = False
) -> TappedModel:
    """Hoist the inputs of layers in bodies, and their products if the plan needs them, wherever ``data`` reaches them.

    The layers are those of ``model``, the float model, or of a copy. The model is not changed; its names of values are unique
    (`magr_onnx.passes.instrument.inline.inline_and_rename`). Nothing is hoisted in a ``large`` one, which cannot run as a whole.

    Raises:
        RuntimeFailure: The model itself does not run on the data.
    """
    nested = [layer for layer in layers if layer.nested]
    if data is None or not nested:
        return TappedModel(model)
    widths = {layer.reads: layer.k for layer in nested}
    if plan.quantizes_outputs:
        widths |= {str(layer.node.outputs[0].name): layer.n for layer in nested}
    if large:
        return TappedModel(model, dict.fromkeys(widths, TOO_LARGE))
    reached: dict[str, int] = {}
    missing: dict[str, str] = {}
    growing: set[str] = set()
    try:
        reached = _count(model, widths, data, provider)
    except RuntimeFailure:
        next(run_batches(model, data, provider))  # the model itself must run
        for name, width in widths.items():
            with contextlib.suppress(RuntimeFailure):
                reached |= _count(model, {name: width}, data, provider)
                continue
            try:
                reached |= _count(model, {name: width}, data, provider, growing={name})
                growing.add(name)
            except RuntimeFailure as error:
                reason = str(error).split("Status Message: ")[-1].splitlines()[0][:160]
                missing[name] = f"onnxruntime cannot bring its rows out of the body: {reason}"
    missing |= {name: NEVER for name, rows in reached.items() if rows == 0}
    tappable = {name: width for name, width in widths.items() if name not in missing}
    return TappedModel(hoist(model, tappable, growing), missing, tappable, growing)


def _count(model: ir.Model, widths: Mapping[str, int], data: Batches, provider: str, growing: Collection[str] = ()) -> dict[str, int]:
    """Count the rows of every value over all batches."""
    counts = dict.fromkeys(widths, 0)
    for _, _, shapes in run_batches(shape_taps(hoist(model, widths, growing), list(widths)), data, provider):
        for name, shape in zip(widths, shapes, strict=True):
            counts[name] += int(shape[0])
    return counts
