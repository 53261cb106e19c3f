"""The solution without data, or nearest codes where these are better.

Without data nothing is known of what a layer reads, and the errors that a solution lets cancel need not be those that add up: where a model
has few outputs, or nearly the same for all inputs, one sum of errors is most of its error, and that of the nearest codes is smaller by
chance now and then. So both are made, which is cheap without data, and compared at the outputs of the model on made-up inputs; at the
floats before them where outputs are labels, indices or text, which few errors change.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from magr_onnx.core.quantizers import rtn
from magr_onnx.errors import MagrError
from magr_onnx.model_io.legacy import read
from magr_onnx.passes.instrument.last_floats import last_floats, puts_out_floats, with_outputs
from magr_onnx.runtime.measure import made_up
from magr_onnx.workflow.context import RunContext, Stopwatch
from magr_onnx.workflow.prepare import Prepared
from magr_onnx.workflow.request import OptimizeRequest
from magr_onnx.workflow.solve import Solved, solve

TOLERANCE = 0.3
"""dB that a solution may lose to nearest codes on one kind of made-up inputs."""


def solve_or_round(prepared: Prepared, request: OptimizeRequest, context: RunContext) -> Solved:
    """Solve; without data, return the nearest codes instead where they lose less on made-up inputs.

    That is in dB, on average over the kinds of inputs, or by more than `TOLERANCE` on one of them: the model's own may be of that kind.

    That is where the quantizer is left open and the model can be run as a whole. It takes the time of rounding and `made_up.noises`.

    Raises:
        MagrError: As `solve`.
    """
    solved, quantize = solve(prepared, request, context), prepared.plan.quantize
    named = request.options is None or request.options.get("quantizer") is not None
    if named or solved.data is not None or context.memory.large or quantize is None:
        return solved
    if solved.plan.accumulator is not None:  # nearest codes need not fit it
        return solved
    plan = replace(prepared.plan, rewrites=(), quantize=quantize.by(rtn.QUANTIZER.name))  # the model has been rewritten
    quiet = replace(context, progress=lambda *_: None, on_layer=None, store=None, stopwatch=Stopwatch())
    rounded = solve(replace(prepared, plan=plan), request, quiet)
    try:
        reference, candidates = _with_floats(prepared.reference, [solved.model, rounded.model])
        noise = made_up.noises(reference, candidates, context.provider, context.mask)
    except MagrError as error:
        note = f"nearest codes were not tried: {str(error).splitlines()[0]}"
        return replace(solved, notes=[*solved.notes, note])
    context.lap("compare")
    losses = np.subtract(*10 * np.log10(np.maximum(noise, made_up.EXACT)).T)
    if not (losses.mean() > 0 or losses.max() > TOLERANCE):  # or they are not numbers
        return solved
    note = f"rounded to nearest: on made-up inputs, that is up to {losses.max():.1f} dB better than {quantize.method} without data"
    return replace(rounded, plan=replace(rounded.plan, rewrites=prepared.plan.rewrites), notes=[*solved.notes, note])


def _with_floats(reference: Path | ir.Model, candidates: list[ir.Model]) -> tuple[Path | ir.Model, list[ir.Model]]:
    """Return models to compare: copies that put out `last_floats`, where all of them have these, else the models as they are."""
    if puts_out_floats(candidates[0]):
        return reference, candidates
    model = reference if isinstance(reference, ir.Model) else read(reference)
    if names := last_floats(model):
        copies = [copy for each in (model, *candidates) if (copy := with_outputs(each, names)) is not None]
        if len(copies) > len(candidates):
            return copies[0], copies[1:]
    return reference, candidates
