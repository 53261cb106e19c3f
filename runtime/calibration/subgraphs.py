"""What calibration data reaches in the bodies of If, Loop and Scan, before any of it is measured.

A branch that is never taken, a loop that never turns, and a value whose rows change between the steps of a Scan have no statistics. All
others can be tapped in a copy of the model like values of the main graph (`magr_onnx.passes.instrument.hoist`).
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
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.ort.session import Session

TOO_LARGE = "the model is too large to be run as a whole in the memory there is (max_memory)"
NEVER = "no calibration data reaches it: a branch is never taken, or a loop never turns"


@dataclass(frozen=True, slots=True, eq=False)
class Tapped:
    """A model to tap.

    Attributes:
        model: The model, with what layers in bodies read as values of the main graph; itself where there are none.
        missing: Why a value in a body has no statistics, by its name.
        widths: Names and widths of the values that were brought out of bodies.
        growing: Those that have other rows in every iteration.
    """

    model: ir.Model
    missing: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    growing: Collection[str] = ()

    def on(self, model: ir.Model) -> ir.Model:
        """The same of another model with these values."""
        return hoist(model, self.widths, self.growing) if self.widths else model

    def why(self, layer: LinearLayer) -> str | None:
        """Why a layer has no statistics."""
        return self.missing.get(layer.reads) or self.missing.get(str(layer.node.outputs[0].name))

    def reached(self, layers: Iterable[LinearLayer]) -> list[LinearLayer]:
        """Those with statistics."""
        return [layer for layer in layers if self.why(layer) is None]

    def split(self, layers: Sequence[LinearLayer], needed: bool) -> tuple[list[LinearLayer], list[Skip]]:
        """Layers to convert, and those without statistics, where what was asked for cannot do without (``needed``)."""
        if not needed:
            return list(layers), []
        return self.reached(layers), [Skip(x.name, x.op, Reason.NO_STATISTICS, why) for x in layers if (why := self.why(x)) is not None]


def tapped(model: ir.Model, layers: Sequence[LinearLayer], data: Batches | None, plan: Plan, provider: str, large: bool = False) -> Tapped:
    """Bring out what layers in bodies read, wherever ``data`` reaches it.

    Args:
        model: The float model; it is not changed. Names of values are unique (`magr_onnx.passes.instrument.inline.inline_and_rename`).
        layers: Its layers, or those of a copy.
        data: Batches that fit the model; None for none.
        plan: The plan: some ask for what layers put out, too.
        provider: Where to run.
        large: Whether the model is too large to be run as a whole: nothing is brought out.

    Raises:
        RuntimeFailure: The model itself does not run on the data.
    """
    nested = [layer for layer in layers if layer.nested]
    if data is None or not nested:
        return Tapped(model)
    widths = {layer.reads: layer.k for layer in nested}
    if plan.quantizes_outputs:
        widths |= {str(layer.node.outputs[0].name): layer.n for layer in nested}
    if large:
        return Tapped(model, dict.fromkeys(widths, TOO_LARGE))
    reached: dict[str, int] = {}
    missing: dict[str, str] = {}
    growing: set[str] = set()
    try:
        reached = _count(model, widths, data, provider)
    except RuntimeFailure:
        with Session(model, provider) as session:
            session.run(next(iter(data)))  # the model itself must run
        for name, width in widths.items():
            with contextlib.suppress(RuntimeFailure):
                reached |= _count(model, {name: width}, data, provider)
                continue
            try:
                reached |= _count(model, {name: width}, data, provider, growing={name})
                growing.add(name)
            except RuntimeFailure as error:
                missing[name] = f"onnxruntime cannot bring its rows out of the body: {_reason(error)}"
    missing |= {name: NEVER for name, rows in reached.items() if rows == 0}
    tappable = {name: width for name, width in widths.items() if name not in missing}
    return Tapped(hoist(model, tappable, growing), missing, tappable, growing)


def _count(model: ir.Model, widths: Mapping[str, int], data: Batches, provider: str, growing: Collection[str] = ()) -> dict[str, int]:
    """Rows of every value over all batches."""
    counts = dict.fromkeys(widths, 0)
    with Session(shape_taps(hoist(model, widths, growing), list(widths)), provider) as session:
        for batch in data:
            for name, shape in zip(widths, session.run(batch), strict=True):
                counts[name] += int(shape[0])
    return counts


def _reason(error: RuntimeFailure) -> str:
    """onnxruntime's own words."""
    return str(error).split("Status Message: ")[-1].splitlines()[0][:160]
