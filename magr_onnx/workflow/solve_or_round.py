"""The solution, or nearest codes where these are better at the outputs of the model.

Errors of layers do not say all: those that a solution lets cancel need not be those that add up. Where a model has few outputs, or nearly
the same for all inputs, one sum of errors is most of its error, and that of the nearest codes is smaller by chance now and then; and what
lessens the error of a convolution can add to that behind the activations after it. So the nearest codes are made as well, without data,
which is cheap, and both are compared at the outputs of the model: on calibration data, of which the nearest codes have seen nothing, or on
made-up inputs; at the floats before outputs that are labels, indices or text, which few errors change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from magr_onnx.core.quantizers import rtn
from magr_onnx.core.types import Array
from magr_onnx.errors import MagrError
from magr_onnx.model_io.legacy import read
from magr_onnx.passes import Plan
from magr_onnx.passes.instrument.last_floats import last_floats, puts_out_floats, with_outputs
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.report.validation import MADE_UP
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure import made_up
from magr_onnx.runtime.measure.layer_errors import some_for
from magr_onnx.runtime.measure.noise import EXACT, noises
from magr_onnx.workflow.context import RunContext, Stopwatch
from magr_onnx.workflow.prepare import Prepared
from magr_onnx.workflow.request import OptimizeRequest
from magr_onnx.workflow.solve import Solved, solve

TOLERANCE = 0.3
"""dB that a solution may lose to nearest codes on one kind of made-up inputs."""
MOST_WEIGHTS, MOST_LINEAR = 20_000_000, 1_000_000
"""Of a network with data whose nearest codes are tried, with convolutions and without: rounding takes as long as there are weights."""
STEEP = frozenset({"Div", "Log", "Pow", "Reciprocal", "Sqrt"})
"""Operators that make little of a large number, and much of one near zero: errors behind them are not what layers say."""
FEWEST = 4
"""Batches of which a half can be solved from and the other judged by."""


def solve_or_round(prepared: Prepared, request: OptimizeRequest, context: RunContext) -> Solved:
    """Solve, or return the nearest codes where they lose less at the outputs.

    That is in dB: on a few batches of calibration data, those kept back if there are any; or on average over the kinds of made-up inputs,
    or by more than `TOLERANCE` on one of them: the model's own may be of that kind.

    That is where the quantizer is left open and the model can be run as a whole; with data, where no budget limits the loss, and there are
    convolutions, up to `MOST_WEIGHTS`, or `STEEP` operators, up to `MOST_LINEAR`: linear layers are compared with nearest codes one by one.
    It takes the time of rounding, and of a few runs. With `STEEP` operators and few samples, a half of them is judged by, from the other
    half: biases that fit those that they were made from cost 1 dB behind the logarithm of an audio model, and others 28.

    Raises:
        MagrError: As `solve`.
    """
    context = replace(context, known={}) if context.known is None else context  # ranges, and what is slower in integers, are measured once
    solved = solve(prepared, request, context)
    if not _is_open(prepared, request, solved, context):
        return solved
    quiet = replace(context, progress=lambda *_: None, on_layer=None, store=None, stopwatch=Stopwatch(), fits_weights=False)
    try:
        rounded = solve(replace(prepared, plan=_rounding(prepared.plan)), request, quiet)
        judged, on = solved, prepared.kept_back or solved.data
        if on is not None and prepared.kept_back is None and _is_steep(prepared) and len(on) >= FEWEST:
            halves = [on.select(range(start, len(on), 2)) for start in (0, 1)]
            judged, on = solve(replace(prepared, data=halves[0]), request, replace(quiet, fits_weights=context.fits_weights)), halves[1]
        reference, candidates = _with_floats(prepared.reference, [judged.model, rounded.model])
        noise = _noises(reference, candidates, prepared, on, context)
    except MagrError as error:
        note = f"nearest codes were not tried: {str(error).splitlines()[0]}"
        return replace(solved, notes=[*solved.notes, note])
    context.lap("compare")
    losses = np.subtract(*10 * np.log10(np.maximum(noise, EXACT)).T)
    if not (losses.mean() > 0 or losses.max() > TOLERANCE):  # or they are not numbers
        return solved
    where, than = (MADE_UP, "without data") if solved.data is None else ("calibration data", "with it")
    assert prepared.plan.quantize is not None
    better = f"up to {losses.max():.2g} dB better than {prepared.plan.quantize.method} {than}"
    note = f"rounded to nearest: on {where}, that is {better}"
    return replace(rounded, notes=[*solved.notes, note])


def _is_open(prepared: Prepared, request: OptimizeRequest, solved: Solved, context: RunContext) -> bool:
    """Whether nearest codes may be the result, and can be compared."""
    named = request.options is None or request.options.get("quantizer") is not None
    if named or context.memory.large or prepared.plan.quantize is None:
        return False
    if solved.plan.accumulator is not None:  # nearest codes need not fit it
        return False
    if solved.data is None:
        return True
    return solved.search is None and (_is_steep(prepared) or (bool(_convolutions(prepared)) and _weights(prepared) <= MOST_WEIGHTS))


def _convolutions(prepared: Prepared) -> list[ConvLayer]:
    return [other for other in prepared.others if isinstance(other, ConvLayer)]


def _weights(prepared: Prepared) -> int:
    return sum(layer.k * layer.n for layer in prepared.layers) + sum(c.group * c.k * c.n for c in _convolutions(prepared))


def _is_steep(prepared: Prepared) -> bool:
    """Whether a small network has `STEEP` operators behind linear layers; convolutions take too long to be solved twice."""
    if _convolutions(prepared) or _weights(prepared) > MOST_LINEAR:
        return False
    return any(node.op_type in STEEP for node in prepared.model.graph.all_nodes())


def _rounding(plan: Plan) -> Plan:
    """Return the plan that rounds the same layers to nearest, and does nothing else for them."""
    assert plan.quantize is not None
    convolutions = None if plan.convolutions is None else replace(plan.convolutions, feedback=False)
    rounding = plan.quantize.by(rtn.QUANTIZER.name)
    return replace(
        plan, error_feedback=None, output_hessian=None, magr=None, bias=None, tuning=None, quantize=rounding, convolutions=convolutions
    )


def _noises(
    reference: Path | ir.Model, candidates: Sequence[ir.Model], prepared: Prepared, data: Batches | None, context: RunContext
) -> Array:
    """Measure the noise of candidates on a few batches of data ``(1, candidates)``, or on made-up inputs ``(kinds, candidates)``."""
    if data is None:
        return made_up.noises(reference, candidates, context.provider, context.mask)
    few = some_for(prepared.model, data)
    return noises(reference, candidates, few, context.provider, context.mask)[None]


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
