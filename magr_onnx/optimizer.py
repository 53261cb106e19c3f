"""The main job: a model in, its layers through a pipeline one by one, a model out that is proved to hold what was chosen."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import onnx_ir as ir

from magr_onnx import files
from magr_onnx.accumulator import Accumulator
from magr_onnx.errors import MagrError, ModelError, NonFiniteError, OptionError, OutputError, raise_all
from magr_onnx.options import Options, build_pipeline
from magr_onnx.packing import container_bits
from magr_onnx.passes import (
    ErrorFeedback,
    Job,
    LayerPass,
    LinearLayer,
    OutputHessian,
    Quantize,
    Skip,
    pipeline,
)
from magr_onnx.passes.linear import find
from magr_onnx.passes.operands import Reason
from magr_onnx.passes.readback import digest, read_weights
from magr_onnx.report import LayerRow, ProofSummary, Report, SkipRow, versions
from magr_onnx.runtime import calibrate, fisher, overflow, ranges, rewriting, stages
from magr_onnx.runtime import validate as validation
from magr_onnx.runtime.data import Batches, Source, open_data
from magr_onnx.runtime.session import Session, provider_name
from magr_onnx.targets import Target
from magr_onnx.types import check_finite
from magr_onnx.verification import LayerVerdict

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in total."""


class Optimized(NamedTuple):
    """What `optimize` returns."""

    model: ir.Model
    report: Report


def optimize(
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
    gram_budget: int = calibrate.DEFAULT_BUDGET,
    cache: int = stages.DEFAULT_CACHE,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Optimized:
    """Quantize the linear layers of a model.

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
        gram_budget: Bytes of Gram matrices held at a time; a smaller one costs more passes over the data.
        cache: Bytes of values between stages held in memory under error feedback; more go to a temporary folder.
        progress: Called during long work.
        **options: See `Options`.

    Returns:
        The model and the report.

    Raises:
        MagrError: One of its subclasses; before the long work starts wherever the trouble can be known by then.
    """
    clock = _Clock()
    if pipeline_text is not None and options:
        raise OptionError(f"give a pipeline or options, not both (options: {', '.join(options)})")
    if pipeline_text is None:
        if calibration is None and options.get("effort") is None and options.get("quantizer") is None:  # nothing to choose by
            options["effort"] = "fast"
        passes = build_pipeline(**options)
    else:
        passes = pipeline.parse(pipeline_text) if isinstance(pipeline_text, str) else tuple(pipeline_text)
    pipeline.check(passes, provider)
    provider_name(provider)
    activations = pipeline.activations_of(passes)
    if calibration is None and activations is not None and activations.type != "dynamic":
        raise OptionError("static 8-bit activations need calibration data for their ranges; give some, or use format dynamic-int8")
    if calibration is None and any(isinstance(p, ErrorFeedback) for p in passes):
        raise OptionError("error feedback needs calibration data; give some, or take effort fast")
    loaded = files.load(model)
    out = None if output is None else Path(output)
    if out is not None:
        raise_all(OutputError, files.check_output(out, loaded.path, loaded.external))
    mask_input = calibrate.resolve_mask(loaded.model, mask)
    original = loaded.model
    pipeline.prepare(passes, original)
    rewrites = rewriting.rewrites_of(passes)
    reference = loaded.path or (original.clone() if rewrites else original)
    work = original.clone()
    layers, skips = find(work, include, exclude)
    if not layers:
        reasons = "; ".join(map(str, skips[:5])) or "it has no MatMul or Gemm"
        raise ModelError(f"{loaded.name}: no layer can be converted: {reasons}")
    _check_weights(layers)
    clock.lap("load")

    notes: list[str] = []
    data = held = None
    if calibration is not None or validation_data is not None:
        with Session(reference, provider) as session:
            inputs = session.inputs
        if calibration is not None:
            data = open_data(calibration, inputs, batch_size)
        if validation_data is not None:
            held = open_data(validation_data, inputs, batch_size)
    if data is None:
        notes.append("data-free: no calibration data was given, so inputs were taken as uncorrelated (H = I); expect lower accuracy")
    elif len(data) < calibrate.HELD_OUT and (chosen := _held_out_for(passes)):
        notes.append(
            f"{len(data)} calibration batches are too few to hold some out ({calibrate.HELD_OUT} are needed), so there is no {chosen}; "
            "give more samples, or cut them into smaller batches"
        )

    if rewrites:
        notes += rewriting.rewrite(
            original, passes, data, include=include, exclude=exclude, mask=mask_input, provider=provider, gram_budget=gram_budget
        )
        work = original.clone()
        layers, skips = find(work, include, exclude)
        clock.lap("rewrite")

    rows: dict[str, LayerRow] = {}
    digests: dict[str, str] = {}

    def finished(job: Job) -> None:
        rows[job.layer.name] = _layer_row(job)
        if job.emitted and job.quantized is not None:
            digests[str(job.layer.output.name)] = digest(job.quantized.dequantize())
        if progress is not None:
            progress("quantizing", len(rows), len(layers))

    grids = ranges.Grids()
    if activations is not None and data is not None:
        report = stage(progress, "ranges")
        grids = ranges.choose_grids(original, layers, data, passes, activations, mask_input, provider, report)
        notes += grids.notes
        clock.lap("ranges")
    unmasked: list[str] = []
    with _output_hessian(original, layers, data, passes, provider, stage(progress, "differentiating")) as hessian:
        if hessian is not None:
            notes += _what_is_missing(hessian, layers)
            clock.lap("differentiate")
        report = stage(progress, "calibrating")
        for group, result in _statistics(original, work, layers, data, passes, grids, mask_input, provider, gram_budget, cache, report):
            unmasked += result.unmasked
            clock.lap("calibrate")
            begin = _beginning(result, grids, hessian)
            pipeline.run_layers(passes, group, lambda layer: result.stats.get(calibrate.input_name(layer)), finished, begin)  # noqa: B023
            clock.lap("quantize")
    if unmasked:
        some = ", ".join(unmasked[:3])
        notes.append(f"mask {mask_input!r} does not fit the rows of {len(unmasked)} inputs ({some}); all their rows count")

    demand = pipeline.accumulator_of(passes)
    emitted = {row.emitted for row in rows.values() if row.emitted}
    proof = None if demand is None else _prove(work, demand, emitted)
    _stamp(work, passes, proof)
    if out is None:
        verified = _verify(work, digests)
        written = files.initializer_bytes(work)
    else:
        verified = len(digests)
        written = files.save(work, out, lambda path: _verify_file(path, digests, provider, demand, emitted))
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
            _describe(data, rows, mask_input),
            tuple(rows[layer.name] for layer in layers),
            tuple(map(skip_row, skips)),
            loaded.bytes,
            written,
            verified,
            clock.laps,
            versions(),
            tuple(notes),
            comparison,
            proof,
        ),
    )


def _statistics(
    original: ir.Model,
    work: ir.Model,
    layers: Sequence[LinearLayer],
    data: Batches | None,
    passes: Sequence[LayerPass],
    grids: ranges.Grids,
    mask: str | None,
    provider: str,
    gram_budget: int,
    cache: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Sequence[LinearLayer], calibrate.Calibration]]:
    """Groups of layers with the statistics of what they read: in stages behind quantized layers, or all of the float model's."""
    if data is None:
        yield layers, calibrate.Calibration({}, ())
    elif any(isinstance(p, ErrorFeedback) for p in passes):
        yield from stages.staged(
            original,
            work,
            layers,
            data,
            mask=mask,
            provider=provider,
            quantize=grids.inputs,
            bounds=grids.bounds,
            cache=cache,
            progress=progress,
        )
    else:
        hold_out = any(isinstance(p, Quantize) and p.method == "auto" for p in passes)
        groups = calibrate.plan(layers, gram_budget, hold_out)
        for index, group in enumerate(groups):
            part = None if progress is None else _part(progress, index, len(groups))
            yield (
                group,
                calibrate.collect(
                    original,
                    group,
                    data,
                    mask=mask,
                    provider=provider,
                    progress=part,
                    quantize=grids.inputs,
                    bounds=grids.bounds,
                    hold_out=hold_out,
                ),
            )


def _held_out_for(passes: Sequence[LayerPass]) -> str:
    """What needs a part of the rows held out."""
    wants = ["choice of options per layer"] if any(isinstance(p, Quantize) and p.method == "auto" for p in passes) else []
    return " and no ".join(["error feedback"] * any(isinstance(p, ErrorFeedback) for p in passes) + wants)


@contextlib.contextmanager
def _output_hessian(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    data: Batches | None,
    passes: Sequence[LayerPass],
    provider: str,
    progress: Callable[[int, int], None] | None,
) -> Iterator[fisher.Fisher | None]:
    """Second moments of gradients at layer outputs, if the pipeline asks for them."""
    if data is None or not any(isinstance(p, OutputHessian) for p in passes):
        yield None
        return
    with fisher.collect(model, layers, data, provider=provider, progress=progress) as found:
        yield found


def _what_is_missing(hessian: fisher.Fisher, layers: Sequence[LinearLayer]) -> list[str]:
    if not hessian.blocked:
        return []
    without = sum(hessian.get(str(layer.output.name)) is None for layer in layers)
    blocked = ", ".join(sorted(hessian.blocked))
    return [f"no gradients for {without} layers: {blocked} cannot be differentiated; their outputs weigh the same"]


def _beginning(result: calibrate.Calibration, grids: ranges.Grids, hessian: fisher.Fisher | None) -> Callable[[Job], None]:
    """What a job should know before its passes run."""

    def begin(job: Job) -> None:
        job.output_grid = grids.products.get(str(job.layer.node.outputs[0].name))
        job.goal = result.goals.get(job.layer.name)
        job.outputs = None if hessian is None else hessian.get(str(job.layer.output.name))

    return begin


def _part(progress: Callable[[int, int], None], index: int, count: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(index * total + done, count * total)


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


def _check_weights(layers: Sequence[LinearLayer]) -> None:
    """Name every layer with NaN or infinite weights or bias, before any work."""
    problems = []
    for layer in layers:
        for what, array in (("weight", layer.read()), ("bias", layer.read_bias())):
            try:
                if array is not None:
                    check_finite(f"{what} of {layer.name}", array)
            except NonFiniteError as error:
                problems.append(str(error))
    raise_all(NonFiniteError, problems)


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


def _describe(data: Batches | None, rows: dict[str, LayerRow], mask: str | None) -> str:
    if data is None:
        return "none (data-free)"
    most = max((r.rows for r in rows.values()), default=0)
    return f"{data.describe}: {len(data)} batches, {most} rows" + (f", mask {mask}" if mask else "")


def _prove(model: ir.Model, demand: Target | Accumulator, emitted: set[str]) -> ProofSummary:
    """Prove that the nodes just written cannot overflow; those that were integers before are counted, not answered for.

    Raises:
        OptionError: A layer does not fit a register (all such layers); most are too long for the outer one.
        MagrError: A node that was written is not among those that were read.
    """
    layers, skipped = overflow.verify(model, demand, run=False)
    against = f"target {demand.name}" if isinstance(demand, Target) else f"accumulator of {demand}"
    failing = [layer for layer in layers if layer.verdict != "proved" and layer.name in emitted]
    if failing:
        raise_all(OptionError, (f"{_overflow(layer)} ({against})" for layer in failing))
    unread = emitted - {layer.name for layer in layers} - {row.name for row in skipped if row.reason == Reason.FLOAT}
    if unread:
        raise MagrError(f"internal error: the proof has not found {', '.join(sorted(unread))}; please report this")
    room = min((layer.headroom for layer in layers), default=math.inf)
    proved = sum(layer.verdict == "proved" for layer in layers)
    return ProofSummary(against, proved, len(layers), None if math.isinf(room) else room, len(skipped))


def _overflow(layer: LayerVerdict) -> str:
    """Which register of a layer is too narrow."""
    claim = next(c for c in (layer.inner, layer.outer, layer.result) if c is not None and not c.holds)
    where = "in a tile" if claim is layer.inner else "where the tiles are summed"
    return f"{layer.name} ({layer.k} x {layer.n}) needs {claim.needed} bits {where}, and there are {claim.bits}; exclude it"


def _stamp(model: ir.Model, passes: Sequence[LayerPass], proof: ProofSummary | None) -> None:
    """Say in the model's metadata what was done to it."""
    if proof is not None:
        model.metadata_props["onnx_magr.accumulator"] = str(proof)
    model.metadata_props["onnx_magr.pipeline"] = pipeline.text_of(passes)
    model.metadata_props["onnx_magr.version"] = versions()["onnx-magr"]


def _verify(model: ir.Model, digests: dict[str, str]) -> int:
    """Read every emitted weight back and compare it with what was chosen."""
    found = {name: digest(weight) for name, weight in read_weights(model, digests).items()}
    wrong = [name for name, expected in digests.items() if found.get(name) != expected]
    if wrong:
        raise MagrError(f"internal error: the emitted weights of {', '.join(wrong)} are not those that were chosen; please report this")
    return len(digests)


def _verify_file(path: Path, digests: dict[str, str], provider: str, demand: Target | Accumulator | None, emitted: set[str]) -> None:
    """The file holds the chosen codes, they cannot overflow if that was asked for, and onnxruntime loads it."""
    model = ir.load(path)
    _verify(model, digests)
    if demand is not None:
        found = _prove(model, demand, emitted)
        if str(found) != model.metadata_props["onnx_magr.accumulator"]:
            raise MagrError(f"internal error: the file says {model.metadata_props['onnx_magr.accumulator']}, but has {found}")
    with Session(path, provider):
        pass
