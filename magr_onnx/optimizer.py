"""The main job: a model in, its layers through a pipeline one by one, a model out that is proved to hold what was chosen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import onnx_ir as ir

from magr_onnx import beginnings, files, mixed
from magr_onnx.boundary import explained
from magr_onnx.checks import check_weights, prove, stamp, verify_codes, verify_file
from magr_onnx.errors import ModelError, OptionError, OutputError, raise_all
from magr_onnx.options import Options, build_pipeline
from magr_onnx.packing import container_bits
from magr_onnx.passes import (
    ErrorFeedback,
    Job,
    LayerPass,
    LinearLayer,
    Skip,
    pipeline,
    shared,
    unused,
)
from magr_onnx.passes.canonical import canonicalize
from magr_onnx.passes.functions import open_up
from magr_onnx.passes.holders import holders
from magr_onnx.passes.linear import find
from magr_onnx.passes.readback import digest
from magr_onnx.report import LayerRow, Report, SkipRow, megabytes, versions
from magr_onnx.run import Run, Size, with_run
from magr_onnx.runtime import bodies, calibrate, conversion, ranges, rewriting, stages
from magr_onnx.runtime import validate as validation
from magr_onnx.runtime.data import Batches, Source, open_data
from magr_onnx.runtime.sensitivity import Inputs
from magr_onnx.runtime.session import inputs_of, provider_name
from magr_onnx.statistics import beginning, gather, held_out_for, output_hessian, without_stages
from magr_onnx.types import LayerStats
from magr_onnx.writing import save

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in total."""


class Optimized(NamedTuple):
    """What `optimize` returns."""

    model: ir.Model
    report: Report


@explained
@with_run
def optimize(
    run: Run,
    model: Any,
    calibration: Source | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    validation_data: Source | None = None,
    pipeline_text: str | Sequence[LayerPass] | None = None,
    provider: str = "cpu",
    mask: str | None = "auto",
    batch_size: int = 16,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    requantize: bool = False,
    gram_budget: int = calibrate.DEFAULT_BUDGET,
    cache: int = stages.DEFAULT_CACHE,
    progress: Progress | None = None,
    max_memory: Size | None = None,
    shard_size: Size | None = None,
    external_data: bool = False,
    resume: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Optimized:
    """Quantize the linear layers of a model, its convolutions, and if asked for its tables of embeddings.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a ``torch.onnx.ONNXProgram``; it is not changed.
        calibration: Sample inputs, in any form of `magr_onnx.runtime.data`; None works data-free (H = I: no MagR, rounding
            without error feedback, no bias compensation), and the report says so.
        output: Where to write the result; None keeps it in memory.
        validation_data: Held-out inputs to compare the float and the quantized model on.
        pipeline_text: Passes, or their text, instead of ``options``.
        provider: ``cpu``, ``cuda``, or an onnxruntime provider name, for calibration and validation.
        mask: Input that marks rows to count; ``"auto"`` takes ``attention_mask`` if there is one, None none.
        batch_size: Samples per batch when stacked inputs are cut up.
        include: Shell patterns of layers (by node or weight name) to convert; empty for all.
        exclude: Patterns of layers to leave alone.
        requantize: Take weights that are quantized already for the floats they stand for.
        gram_budget: Bytes of Gram matrices held at a time; a smaller one costs more passes over the data.
        cache: Bytes of values between stages held in memory under error feedback; more go to a temporary folder.
        progress: Called during long work.
        max_memory: Bytes, or text such as ``"3 GB"``, that decide whether the model is ever run as a whole (three times its size must
            fit) or in stages only, with finished layers on disk; default 4 GB. See docs/large.md for what a layer needs at least.
        shard_size: Most bytes of a data file of the output, which then has as many as it needs.
        external_data: Write tensors beside the output even where they would fit into it.
        resume: A job directory: finished layers are kept there, and the same call after a kill goes on with those that are not.
        **options: See `Options`.

    Returns:
        The model and the report.

    Raises:
        MagrError: One of its subclasses; before the long work starts wherever the trouble can be known by then.
    """
    clock = _Clock()
    asked = dict(options)
    goal: mixed.Goal | None = None
    if pipeline_text is not None and options:
        raise OptionError(f"give a pipeline or options, not both (options: {', '.join(options)})")
    if pipeline_text is None:
        goal = mixed.goal_of(options)
        if calibration is None and options.get("effort") is None and options.get("quantizer") is None:  # nothing to choose by
            options["effort"] = "fast"
        passes = build_pipeline(**options)
    else:
        passes = pipeline.parse(pipeline_text) if isinstance(pipeline_text, str) else tuple(pipeline_text)
    pipeline.check(passes, provider)
    passes = pipeline.suited(passes, provider)
    provider_name(provider)
    activations = pipeline.activations_of(passes)
    if calibration is None and activations is not None and activations.type != "dynamic":
        raise OptionError("static 8-bit activations need calibration data for their ranges; give some, or use format dynamic-int8")
    if calibration is None and any(isinstance(p, ErrorFeedback) for p in passes):
        raise OptionError("error feedback needs calibration data; give some, or take effort fast")
    if calibration is None and goal is not None:
        raise OptionError(f"{goal.text} needs calibration data to measure what each layer can bear; give some, or give bits instead")
    loaded = files.load(model)
    out = None if output is None else Path(output)
    if out is not None:
        raise_all(OutputError, files.check_output(out, loaded.path, loaded.external))
    mask_input = calibrate.resolve_mask(loaded.model, mask)
    original = loaded.model
    opset, given = original.opset_imports.get(""), original.clone()
    inlined = open_up(original)
    passes = beginnings.complete(passes, original, None if pipeline_text is not None else options)
    pipeline.prepare(passes, original)
    raised = original.opset_imports.get("") != opset
    rewrites = rewriting.rewrites_of(passes)
    reference = loaded.path or given
    notes = [*loaded.notes, *inlined, *unused.remove(original), *canonicalize(original, include, exclude, again=requantize)]
    work = original.clone()
    layers, skips = find(work, include, exclude)
    elsewhere = list(holders(original.graph.all_nodes()))
    others, unconverted = beginnings.look(work, passes, include, exclude)
    if not layers and not others:
        reasons = "; ".join(map(str, (skips + elsewhere + unconverted)[:5])) or "it has no MatMul, Gemm or convolution"
        raise ModelError(f"{loaded.name}: no layer can be converted: {reasons}")
    run.open(loaded, layers, out, max_memory, gram_budget, cache, shard_size, external_data)
    run.sweep(original)
    check_weights([*layers, *others])
    clock.lap("load")

    data = held = None
    if calibration is not None or validation_data is not None:
        inputs = inputs_of(original)
        if calibration is not None:
            data = open_data(calibration, inputs, batch_size)
        if validation_data is not None:
            held = open_data(validation_data, inputs, batch_size)
    if data is None:
        notes.append("data-free: no calibration data was given, so inputs were taken as uncorrelated (H = I); expect lower accuracy")
    elif len(data) < calibrate.HELD_OUT and (chosen := held_out_for(passes)):
        notes.append(
            f"{len(data)} calibration batches are too few to hold some out ({calibrate.HELD_OUT} are needed), so there is no {chosen}; "
            "give more samples, or cut them into smaller batches"
        )

    settings = {"include": include, "exclude": exclude, "mask": mask_input, "batch_size": batch_size, "provider": provider}
    run.resume(resume, loaded, data, passes, {**asked, **settings, "requantize": requantize})
    if raised:
        notes += conversion.check(reference, original, data, provider)
    if rewrites:
        notes += rewriting.rewrite(
            original, passes, data, include=include, exclude=exclude, mask=mask_input, provider=provider, gram_budget=run.gram_budget
        )
        run.sweep(original)
        clock.lap("rewrite")
    base = original.clone()
    report = stage(progress, "convolutions")
    budget = (run.gram_budget, run.large)
    begun = beginnings.convert(original, base, passes, data, goal, include, exclude, mask_input, provider, *budget, report)
    run.sweep(base)
    work = base.clone()
    layers, skips = find(work, include, exclude)
    skips += [*elsewhere, *begun.skips]
    notes += begun.notes
    if begun.rows:
        clock.lap("convolutions")

    source = bodies.tapped(original, layers, data, passes, provider, run.large)
    layers, lost = source.split(layers, needed=goal is not None or (activations is not None and activations.type != "dynamic"))
    skips += lost
    if not layers and not begun.rows:
        raise ModelError(f"{loaded.name}: no layer can be converted: {'; '.join(map(str, skips[:5]))}")
    passes, missing = without_stages(work, layers, passes)
    notes += missing
    rows: dict[str, LayerRow] = {}
    digests: dict[str, str] = {}

    def finished(job: Job) -> None:
        rows[job.layer.name] = _layer_row(job)
        if job.emitted and job.quantized is not None:
            digests[str(job.layer.output.name)] = digest(job.quantized.dequantize())
        run.sweep(work)
        if progress is not None:
            progress("quantizing", len(rows), len(layers))

    grids = ranges.Grids()
    if activations is not None and data is not None and layers:
        report = stage(progress, "ranges")
        grids = ranges.choose_grids(source.model, source.reached(layers), data, passes, activations, mask_input, provider, report)
        notes += grids.notes
        clock.lap("ranges")
    search = None
    if goal is not None and data is not None and layers:
        room = len(pipeline.text_of(passes)) + mixed.STAMP
        floats = mixed.Source(base, layers, loaded.bytes, out is not None, room, original, source.on(base))
        integer = None if activations is None else Inputs(grids.inputs, grids.bounds, grids.products)
        report = stage(progress, "sensitivities")
        search = mixed.Search(goal, options, floats, data, integer, mask_input, provider, gram_budget, report)
        data = search.data
        clock.lap("sensitivities")
    with output_hessian(original, layers, data, passes, provider, stage(progress, "differentiating"), notes) as hessian:
        if hessian is not None:
            clock.lap("differentiate")
        while True:
            left: list[Skip] = []
            assigned: Mapping[str, Sequence[LayerPass]] = {}
            if search is not None:
                assigned = search.plan.assigned()
                layers, left = search.plan.select(layers)
            run.plan(passes, assigned)
            unmasked: list[str] = []
            spilled = 0
            report = stage(progress, "calibrating")
            budgets, changed = (run.gram_budget, run.cache), begun.digests
            for group, result in gather(
                original, work, source, layers, data, passes, grids, mask_input, provider, *budgets, report, changed, run.large, run.left
            ):
                unmasked += result.unmasked
                spilled = max(spilled, result.spilled)
                clock.lap("calibrate")
                stats, begin = result.stats, beginning(result, source, grids, hessian, data)
                known = partial(_known, stats)
                pipeline.run_layers(passes, group, known, finished, begin, assigned, run.store)
                stats.clear()  # the next ones are made while this loop still holds these
                result.goals.clear()
                clock.lap("quantize")
            if search is None or search.accepts(work):
                break
            work = base.clone()
            layers, _ = source.split(find(work, include, exclude)[0], bool(lost))
            rows.clear()
            digests.clear()
    skips += left
    notes += run.notes(work)
    if spilled:
        notes.append(f"{megabytes(spilled)} of values between stages went through a temporary folder (cache {megabytes(run.cache)})")
    if unmasked:
        some = ", ".join(unmasked[:3])
        notes.append(f"mask {mask_input!r} does not fit the rows of {len(unmasked)} inputs ({some}); all their rows count")

    digests |= begun.digests
    said = shared.remarks(layers, run.large)
    demand = pipeline.accumulator_of(passes)
    emitted = {row.emitted for row in rows.values() if row.emitted}
    proof = None if demand is None else prove(work, demand, emitted)
    stamp(work, passes, proof)
    if search is not None:
        search.stamp(work)
    if out is None:
        verified = verify_codes(work, digests)
        written = files.initializer_bytes(work)
    else:
        verified = len(digests)
        written = save(work, out, lambda path: verify_file(path, digests, provider, demand, emitted, reference), run.layout)
    clock.lap("write")
    comparison = None
    if held is not None:
        report = stage(progress, "validating")
        comparison = validation.validate(reference, out or work, held, provider=provider, mask=mask_input, progress=report)
        clock.lap("validate")
    return Optimized(
        work,
        Report(
            loaded.name,
            None if out is None else str(out),
            pipeline.text_of(passes),
            _describe(data, [*begun.rows, *rows.values()], mask_input),
            (*begun.rows, *(replace(rows[layer.name], notes=(*rows[layer.name].notes, *said[layer.name])) for layer in layers)),
            tuple(map(skip_row, skips)),
            loaded.bytes,
            written,
            verified,
            clock.laps,
            versions(),
            tuple(notes),
            comparison,
            proof,
            assignment=None if search is None else search.report(),
        ),
    )


def _known(stats: Mapping[str, LayerStats], layer: LinearLayer) -> LayerStats | None:
    """The statistics of what a layer reads, where they were gathered."""
    return stats.get(calibrate.input_name(layer))


class _Clock:
    """Seconds by stage, in order of first appearance."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """Progress of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)


def _layer_row(job: Job) -> LayerRow:
    layer, facts = job.layer, job.facts
    spec = None if job.quantized is None else job.quantized.spec
    stored = None if spec is None else facts.get("stored_bits", container_bits(spec.bits))
    if spec is not None and stored != spec.bits:
        job.notes.append(f"{spec.bits}-bit codes are stored in {stored} bits")
    return LayerRow(
        layer.name,
        layer.op,
        layer.weight_name,
        layer.k,
        layer.n,
        None if spec is None else spec.bits,
        facts.get("block_size"),
        job.stats.rows,
        facts.get("error"),
        facts.get("magr"),
        facts.get("solver"),
        bool(facts.get("bias_compensated")),
        facts.get("emitted"),
        tuple(job.notes),
        facts.get("activation"),
        facts.get("feedback"),
        facts.get("low_rank"),
    )


def skip_row(skip: Skip) -> SkipRow:
    return SkipRow(skip.name, skip.op, skip.reason.value, skip.detail)


def _describe(data: Batches | None, rows: Sequence[LayerRow], mask: str | None) -> str:
    if data is None:
        return "none (data-free)"
    most = max((r.rows for r in rows), default=0)
    return f"{data.describe}: {len(data)} batches, {most} rows" + (f", mask {mask}" if mask else "")
