"""The main job: a model in, its layers through a plan, a model out that is proved to hold what was chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import onnx_ir as ir

from magr_onnx.config.arguments import DEFAULTS, OMITTED, Arguments, explicit, in_order
from magr_onnx.config.invocation import Invocation, python_call
from magr_onnx.core import compiled, threads
from magr_onnx.errors import MagrError, translate_resource_errors
from magr_onnx.model_io import files
from magr_onnx.model_io.writing import save
from magr_onnx.passes import Skip
from magr_onnx.passes.graph.nodes import layer_name
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.report.data import ProofSummary, Report, versions
from magr_onnx.report.layer_row import LayerRow, with_measured
from magr_onnx.report.reasons import TableReason
from magr_onnx.report.validation import Validation, amount
from magr_onnx.runtime.data.sources import Batches, Source
from magr_onnx.runtime.measure import made_up
from magr_onnx.runtime.measure import validate as validation
from magr_onnx.runtime.measure.layer_errors import some_for
from magr_onnx.runtime.ort.session import Arithmetic
from magr_onnx.workflow import arithmetic, wide_search
from magr_onnx.workflow.context import RunContext
from magr_onnx.workflow.prepare import Prepared, prepare
from magr_onnx.workflow.request import OptimizeRequest, resolve
from magr_onnx.workflow.solve import Solved
from magr_onnx.workflow.verify_output import prove, stamp, verify_codes, verify_file


class Optimized(NamedTuple):
    """What `optimize` returns.

    Attributes:
        model: The quantized model, in memory.
        report: What happened to every layer.
    """

    model: ir.Model
    report: Report


def optimize(model: Any = OMITTED, calibration: Source | None = OMITTED, **arguments: Unpack[Arguments]) -> Optimized:
    """Quantize the linear layers of a model, its convolutions, and if asked for its tables of embeddings.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a ``torch.onnx.ONNXProgram``; it is not changed. None, or
            left out, the recipe's.
        calibration: Sample inputs, in any form of `magr_onnx.runtime.data.sources`, or a file of text, read with ``tokenizer`` or the
            ``tokenizer.json`` beside the model; None works data-free (H = I: no MagR, rounding without error feedback, no bias
            correction), and the report says so. Left out, the recipe's.
        **arguments: See `magr_onnx.RunArguments` (files, data, which layers, memory) and `magr_onnx.Options` (what is done to them), and
            ``validation_data``: held-out inputs to compare the float and the quantized model on.

    Returns:
        The model and the report.

    Raises:
        MagrError: One of its subclasses; before the long work starts wherever the trouble can be known by then.
    """
    call = in_order(explicit(model=model, calibration=calibration, **arguments))
    return run(resolve(call, Invocation(python_call("magr_onnx.optimize", call, DEFAULTS))))


MANY_WEIGHTS = 50_000_000  # of calibrated layers: they take minutes


@translate_resource_errors()
def run(request: OptimizeRequest) -> Optimized:
    """Carry out a resolved request; see `optimize`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads.single_threaded_blas())
        prepared, context = prepare(request, stack)
        solved = arithmetic.choose(wide_search.solve_within_loss(prepared, request, context), prepared, context)
        written = write(solved, prepared, request, context)
        return Optimized(solved.model, report(request, prepared, solved, written, context))


@dataclass(frozen=True, slots=True)
class Written:
    """What is known of a result that was written and read back.

    Attributes:
        bytes: Its size.
        proof: That no accumulator overflows, if that was asked for.
        validation: How it compares with the float model, if that was asked for.
        check: How its outputs and its time compare on a few batches of the calibration data, or on made-up inputs, if not.
        notes: Sentences for the report.
    """

    bytes: int
    proof: ProofSummary | None
    validation: Validation | None = None
    check: Validation | None = None
    notes: tuple[str, ...] = ()


def write(solved: Solved, prepared: Prepared, request: OptimizeRequest, context: RunContext) -> Written:
    """Prove, stamp, write, read back, and compare with the float model."""
    model, demand = solved.model, solved.plan.accumulator
    if request.patterns.tables:
        model.metadata_props["onnx_magr.layers"] = "; ".join(map(str, request.patterns.tables))
    proof = None if demand is None else prove(model, demand, solved.emitted)
    stamp(model, solved.plan, proof)
    if solved.search is not None:
        solved.search.stamp(model)
    if request.output is None:
        verify_codes(model, solved.digests)
        size = files.model_bytes(model)
    else:
        size = save(
            model,
            request.output,
            lambda path: verify_file(path, solved.digests, context.provider, demand, solved.emitted, prepared.reference),
            context.memory.layout,
        )
    context.lap("write")
    result, steps = request.output or model, context.stage("validating")
    if prepared.validation is None:
        check, notes = _check(prepared, solved, result, context)
        return Written(size, proof, None, check, notes)
    comparison = validation.validate(
        prepared.reference, result, prepared.validation, provider=context.provider, mask=context.mask, progress=steps
    )
    if prepared.judge is not None:
        comparison = replace(comparison, metric=prepared.judge.compare(result))
    context.lap("validate")
    return Written(size, proof, comparison)


def _check(prepared: Prepared, solved: Solved, result: Path | ir.Model, context: RunContext) -> tuple[Validation | None, tuple[str, ...]]:
    """Run both models on a few calibration batches, or on made-up inputs, and time them; a note says what prevented it.

    It takes about ten passes of each, and 2 s or 12 passes; on made-up inputs 1 s or 12 passes, and at most 30 s and a minute a gigabyte.
    """
    if context.memory.large:
        return None, ()
    provider, mask = context.provider, context.mask
    try:
        if solved.data is None:
            check = made_up.check(prepared.reference, result, provider, mask)
        else:
            data, exact = prepared.kept_back or solved.data, (Arithmetic.DEFAULT,)
            data = some_for(prepared.model, data)
            check = validation.validate(
                prepared.reference, result, data, provider=provider, arithmetics=exact, mask=mask, details=("layers", "latency")
            )
            if prepared.kept_back is None:
                check = replace(check, in_sample=True)
            else:
                check = replace(check, data=f"{check.data}, kept back from calibration")
    except MagrError as error:
        return None, (f"the result was not compared with the float model: {str(error).splitlines()[0]}",)
    context.lap("check")
    return check, ()


def report(request: OptimizeRequest, prepared: Prepared, solved: Solved, written: Written, context: RunContext) -> Report:
    """Describe what was asked for, what was done, and what came of it."""
    invocation, comparison = request.invocation, written.validation
    measured = comparison or written.check
    errors = {} if measured is None else {m.layer: m.relative_error for m in measured.layers}
    notes = [
        *prepared.notes,
        *_large_table(solved.skips, written.bytes, request.options is not None),
        *solved.notes,
        *written.notes,
        *_slow_loops(solved.rows),
        *request.notes,
    ]
    if comparison is not None:  # what calibration said before is said once
        comparison = replace(comparison, notes=tuple(note for note in comparison.notes if note not in notes))
    return Report(
        source=invocation.source or prepared.name,
        output=None if request.output is None else str(request.output),
        pipeline=str(solved.plan),
        calibration=_describe(solved.data, prepared.kept_back, solved.rows, context.mask),
        layers=tuple(with_measured(solved.rows, errors, measured is not None and measured.in_sample)),
        skipped=skip_rows(solved.skips, prepared.model),
        bytes_before=prepared.bytes,
        bytes_after=written.bytes,
        verified=len(solved.digests),
        seconds=context.stopwatch.seconds,
        versions=versions(),
        notes=tuple(notes),
        validation=comparison,
        proof=written.proof,
        assignment=None if solved.search is None else solved.search.outcome(),
        command=invocation.command,
        options=dict(invocation.options or {}),
        recipe=invocation.recipe,
        check=written.check,
    )


def _large_table(skips: Sequence[Skip], written: int, has_options: bool) -> list[str]:
    """Say of the largest table that stayed float for want of an option, where it is a tenth of the result or more."""
    if not has_options:  # a pipeline says all there is to say
        return []
    tables = [skip for skip in skips if skip.reason == TableReason.UNASKED]
    most = max(tables, key=lambda skip: skip.bytes, default=None)
    if most is None or 10 * most.bytes < written:
        return []
    return [
        f"table of embeddings {most.name} stays float and is {most.bytes / written:.0%} of the result ({most.detail}): "
        "--embeddings gather-block-quantized quantizes it to 8 bits (--embedding-bits 4: to 4)"
    ]


def _slow_loops(rows: Sequence[LayerRow]) -> list[str]:
    """Say what would make runs on large models faster."""
    if compiled.available() or sum(row.k * row.n for row in rows if row.rows) < MANY_WEIGHTS:
        return []
    return ["solvers ran without compiled loops: pip install 'onnx-magr[fast]' makes them faster, the more so the more cores there are"]


def skip_rows(skips: Sequence[Skip], model: ir.Model) -> tuple[Skip, ...]:
    """For the report: nodes of ``model`` that were left alone."""
    scopes = {layer_name(node): scope_of(node) for node in model.graph.all_nodes()}
    return tuple(replace(s, reason=str(s.reason), scope=scopes.get(s.name, "")) for s in skips)


def _describe(data: Batches | None, kept_back: Batches | None, rows: Sequence[LayerRow], mask: str | None) -> str:
    if data is None:
        return "none (data-free)"
    most = max((r.rows for r in rows), default=0)
    others = "" if kept_back is None else f", {kept_back.samples} more kept back to compare the models on"
    return f"{data.description}: {amount(data.samples, len(data))}, {most} rows{others}" + (f", mask {mask}" if mask else "")
