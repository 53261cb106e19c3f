"""The last stage before a model is done: scales of its linear layers tuned by the loss at the model's outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_ir as ir

from magr_onnx.errors import MagrError, listed
from magr_onnx.passes.instrument.scale_inputs import with_scale_inputs
from magr_onnx.passes.layer_passes.scale_tuning import TuneScales
from magr_onnx.passes.layers.linear import LinearLayer
from magr_onnx.passes.layers.weighted import sharing
from magr_onnx.runtime.calibration import scale_tuning
from magr_onnx.runtime.data.sources import Batches
from magr_onnx.runtime.measure.layer_errors import output_elements
from magr_onnx.workflow import mixed_precision
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.layer_round import Round, Setup, begin, write_again
from magr_onnx.workflow.prepare import Prepared
from magr_onnx.workflow.solutions import Solutions

BESIDE = 3
"""Times the size of the float model that is in memory beside what tuning allocates: files mapped by both models, and what the run holds."""


def tuned(
    done: Round, setup: Setup, search: mixed_precision.Search | None, prepared: Prepared, context: RunContext, notes: list[str]
) -> Round:
    """Return the layers of a round written with tuned scales, or the round as it is; what came of it is noted."""
    stage, solutions = setup.plan.tuning, done.solutions
    if stage is None or solutions is None:
        return done
    calibration = setup.calibration
    if calibration is None:
        if not stage.bounded:  # it was asked for
            notes.append("scales were not tuned: there are no calibration data")
        return done
    needed = memory(prepared, calibration.data)
    if not _fits(stage, needed, prepared, context):
        notes.append(f"scales were not tuned: the run would take about {needed / 1e9:.1f} GB; a higher max_memory allows it")
        return done
    base = begin(setup, search, context)
    names = tunable(base.layers, solutions, setup.tied)
    if not names:
        notes.append("scales were not tuned: no layer has float32 scales of its own in the main graph")
        return done
    try:
        model, inputs = with_scale_inputs(base.model, solutions.restore, names)
        result = scale_tuning.tune(
            prepared.reference,
            model,
            list(inputs.values()),
            calibration.data,
            epochs=stage.epochs,
            rate=stage.rate,
            mask=context.mask,
            provider=context.provider,
            progress=context.stage("tuning"),
        )
    except MagrError as error:  # the model itself runs: this is about the gradients
        notes.append(f"scales were not tuned: {str(error).splitlines()[0]}")
        return done
    finally:
        context.lap("tune")
    notes.append(_note(result))
    if not result.values:
        return done
    for name, factors in inputs.items():
        if factors in result.values:
            solutions.scale(name, result.values[factors])
    return write_again(done, solutions, setup, search, context)


def tunable(layers: Sequence[LinearLayer], solutions: Solutions, tied: Collection[str]) -> set[str]:
    """Return the names of layers whose scales are float32, their own, and where gradients reach: in the main graph."""
    shared = sharing(layers)
    own = [layer for layer in layers if not layer.nested and layer.name not in shared and layer.weight_name not in tied]
    return {layer.name for layer in own if layer.dtype == ir.DataType.FLOAT and solutions.has_scales(layer.name)}


def memory(prepared: Prepared, data: Batches) -> int:
    """Estimate the memory of the run while it tunes, bytes."""
    return scale_tuning.memory(prepared.bytes, data, output_elements(prepared.model, data)) + _beside(prepared)


def _beside(prepared: Prepared) -> int:
    """Estimate what of it tuning does not allocate itself, bytes."""
    return BESIDE * prepared.bytes


def planned(prepared: Prepared, context: RunContext) -> Prepared:
    """Return a prepared run without tuning in its plan where there will be none."""
    stage, data = prepared.plan.tuning, prepared.data
    if stage is None or (data is not None and _fits(stage, memory(prepared, data), prepared, context)):
        return prepared
    return replace(prepared, plan=replace(prepared.plan, tuning=None))


def _fits(stage: TuneScales, needed: int, prepared: Prepared, context: RunContext) -> bool:
    """Whether a run may take the memory, bytes, it needs while it tunes; for what was not asked for, without a limit, the usual one holds
    for what tuning allocates."""
    if context.memory.large:
        return False
    if context.memory.asked is not None:
        return needed <= context.memory.asked
    return not stage.bounded or needed - _beside(prepared) <= context.memory.limit


def _note(result: scale_tuning.Tuned) -> str:
    if result.why_not:
        return f"scales were not tuned: {result.why_not}"
    reached = f"; not before {listed(sorted(result.blocked))}, which cannot be differentiated" if result.blocked else ""
    if not result.values:
        return f"tuned scales were no better on {result.held_out} held-out batches: they stay as they were{reached}"
    loss = f"{result.before:.4g} -> {result.after:.4g} on {result.held_out} held-out batches"
    return f"scales of {len(result.values)} layers were tuned by the loss at the outputs: {loss}{reached}"
