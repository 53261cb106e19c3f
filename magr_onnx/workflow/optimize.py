"""The main job: a model in, its layers through a pipeline, a model out that is proved to hold what was chosen."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack, cast

import onnx_ir as ir

from magr_onnx.config import invocation, layer_options, schema
from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.options import Options, pipeline_of
from magr_onnx.config.presets import find_preset
from magr_onnx.config.recipe import Recipe, with_recipe
from magr_onnx.errors import OptionError, OutputError, raise_all
from magr_onnx.model_io import files
from magr_onnx.model_io.writing import save
from magr_onnx.passes import Plan, Skip, Stage
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.layers.linear import layer_name
from magr_onnx.report.data import LayerRow, ProofSummary, Report, SkipRow, versions
from magr_onnx.report.reasons import TableReason
from magr_onnx.report.validation import amount
from magr_onnx.runtime.calibration import moments, staged
from magr_onnx.runtime.calibration.mask import resolve_mask
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.data.hold_out import HELD_OUT
from magr_onnx.runtime.data.sources import Batches, Source
from magr_onnx.runtime.measure import validate as validation
from magr_onnx.runtime.ort import opset_check, worker
from magr_onnx.runtime.ort.session import provider_name
from magr_onnx.workflow import mixed_precision
from magr_onnx.workflow.calibrate import held_out_for
from magr_onnx.workflow.context import Run, Size, with_run
from magr_onnx.workflow.prepare import prepare
from magr_onnx.workflow.progress import watched
from magr_onnx.workflow.resource_errors import explained
from magr_onnx.workflow.setting import OnLayer, Progress, Setting
from magr_onnx.workflow.solve import Solved, solve
from magr_onnx.workflow.verify_output import check_weights, prove, stamp, verify_codes, verify_file


class Optimized(NamedTuple):
    """What `optimize` returns.

    Attributes:
        model: The quantized model, in memory.
        report: What happened to every layer.
    """

    model: ir.Model
    report: Report

    def asked_by(self, command: str, recipe: str) -> Optimized:
        """The same with another ``command`` and ``recipe`` in the report."""
        return self._replace(report=self.report.asked_by(command, recipe))

    def noted(self, notes: Sequence[str]) -> Optimized:
        """The same with more ``notes`` in the report."""
        return self._replace(report=self.report.noted(notes))


@explained
@invocation.recorded
@watched
@with_recipe
@with_run
def optimize(
    run: Run,
    model: Any = None,
    calibration: Source | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    preset: str | None = None,
    layers: Sequence[LayerOptions | Mapping[str, Any]] = (),
    output: str | os.PathLike[str] | None = None,
    validation_data: Source | None = None,
    pipeline_text: str | Plan | Sequence[Stage] | None = None,
    provider: str = "cpu",
    mask: str | None = "auto",
    batch_size: int = 16,
    decode_steps: int = decoders.STEPS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    requantize: bool = False,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    gram_budget: Size = moments.DEFAULT_BUDGET,
    cache: Size = staged.DEFAULT_CACHE,
    progress: Progress | bool | None = True,
    on_layer: OnLayer | None = None,
    max_memory: Size | None = None,
    shard_size: Size | None = None,
    external_data: bool = False,
    resume: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Optimized:
    """Quantize the linear layers of a model, its convolutions, and if asked for its tables of embeddings.

    Args:
        model: A path, an ``onnx.ModelProto``, an ``onnx_ir.Model`` or a ``torch.onnx.ONNXProgram``; it is not changed. None takes
            the recipe's.
        calibration: Sample inputs, in any form of `magr_onnx.runtime.data.sources`, or a ``.txt`` file, a sample a line, where
            ``tokenizer.json`` lies beside the model; None works data-free (H = I: no MagR, rounding
            without error feedback, no bias compensation), and the report says so.
        recipe: A `magr_onnx.Recipe`, its file, or its values as a dict; every argument given beside it wins.
        preset: A name of `magr_onnx.config.presets.PRESETS`: options to start from, under those of the recipe and those given.
        layers: Options of single layers, as ``{"match": "*lm_head*", "bits": 8}`` (`magr_onnx.config.layer_options`), after those of the
            recipe; of several that match a layer, later ones win.
        output: Where to write the result; None keeps it in memory, its codes verified, but not loaded by onnxruntime.
        validation_data: Held-out inputs to compare the float and the quantized model on.
        pipeline_text: A `magr_onnx.passes.Plan`, its text, or its passes, instead of ``options``.
        provider: ``cpu``, ``cuda``, or an onnxruntime provider name, for calibration and validation.
        mask: Input that marks rows to count; ``"auto"`` takes ``attention_mask`` if there is one, None none.
        batch_size: Samples per batch when stacked inputs are cut up.
        decode_steps: Decoders with a cache: tokens at the end of each sample that are fed once more, one by one (see
            `magr_onnx.runtime.data.decoders`), where the data has no past values.
        include: Shell patterns of layers (by the name of the node, the weight, or the torch module of either) to convert; empty for all.
        exclude: Patterns of layers to leave alone.
        requantize: Take weights that are quantized already for the floats they stand for.
        custom_ops: Shared libraries with the custom operators of the model, for onnxruntime.
        gram_budget: Bytes, or text such as ``"2 GB"``, of Gram matrices held at a time; a smaller one costs more passes over the data.
        cache: Bytes, or such text, of values between stages held in memory under error feedback; more go to a temporary folder.
        progress: True draws bars on standard error where that is a terminal or a notebook, and False does not. A callable gets a stage's
            name, steps done and steps in total instead. The logger ``magr_onnx`` has a line as a stage begins and ends, at level INFO.
        on_layer: Called with the report's row of every layer as it is finished; again where a budget has it solved again.
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
    if model is None:
        raise OptionError('no model; give one, or name it in the recipe: model = "model.onnx"')
    tables, asked = cast(tuple[LayerOptions, ...], tuple(layers)), dict(options)
    gram_budget, cache = schema.size("gram_budget", gram_budget), schema.size("cache", cache)
    goal: mixed_precision.Goal | None = None
    if pipeline_text is not None and options:
        raise OptionError(f"give a pipeline or options, not both (options: {', '.join(options)})")
    if pipeline_text is None:
        goal = mixed_precision.goal_of(options)
        if calibration is None and options.get("effort") is None and options.get("quantizer") is None:  # nothing to choose by
            options["effort"] = "fast"
        plan = pipeline_of(options, _arguments())
    else:
        plan = Plan.read(pipeline_text)
    plan.check(provider)
    plan = plan.suited(provider)
    provider_name(provider)
    special = layer_options.pipelines(tables, options, plan, provider)
    run.register(custom_ops)
    if calibration is None:
        _check_data_free(plan, goal)
    out = None if output is None else Path(output)
    if out is not None:
        raise_all(OutputError, files.check_output(out, None, frozenset()))  # before a model that is yet to be exported
    loaded = files.load(model)
    if out is not None:
        raise_all(OutputError, files.check_output(out, loaded.path, loaded.external))
        worker.start()
    setting = Setting(provider, include, exclude, resolve_mask(loaded.model, mask), cast(Progress, progress), on_layer, tables)
    prepared = prepare(loaded, plan, options if pipeline_text is None else None, setting, requantize, special)
    layer_options.assign(tables, prepared.layers, options, plan, provider)  # what is wrong with it is known before any work
    run.open(loaded, prepared.layers, out, max_memory, gram_budget, cache, shard_size, external_data)
    run.sweep(prepared.model)
    check_weights(prepared.readable)
    run.lap("load")

    def opened(source: Source) -> Batches:
        runs, folders = None if run.large else prepared.reference, [] if loaded.path is None else [loaded.path.parent]
        return decoders.open_for(prepared.model, source, batch_size, steps=decode_steps, provider=provider, runs=runs, folders=folders)

    data = held = None
    if calibration is not None:
        data = opened(calibration)
    if validation_data is not None:
        held = opened(validation_data)
    notes = [*prepared.notes, *_data_notes(data, plan)]
    if preset is not None:
        notes.insert(0, f"preset {preset} sets {find_preset(preset)}, where nothing else was given")
    choices = {"include": include, "exclude": exclude, "requantize": requantize, "custom_ops": list(map(str, custom_ops))}
    choices |= {"mask": setting.mask, "batch_size": batch_size, "decode_steps": decode_steps, "provider": provider}
    choices |= {"layers": "; ".join(map(str, tables)) or "none"}
    run.resume(resume, loaded, data, prepared.plan, {**asked, **choices})
    if prepared.raised:
        notes += opset_check.check(prepared.reference, prepared.model, data, provider)
    solved = solve(prepared, data, goal, options, setting, run, gram_budget)
    if tables:
        solved.model.metadata_props["onnx_magr.layers"] = "; ".join(map(str, tables))
    written, proof = _write(solved, out, prepared.reference, provider, run)
    notes += _large_table(solved.skips, written) if pipeline_text is None else []  # where the option can be given
    comparison = None
    if held is not None:
        comparison = validation.validate(
            prepared.reference,
            out or solved.model,
            held,
            provider=provider,
            mask=setting.mask,
            progress=setting.stage("validating"),
        )
        run.lap("validate")
    return Optimized(
        solved.model,
        Report(
            loaded.name,
            None if out is None else str(out),
            str(solved.plan),
            _describe(solved.data, solved.rows, setting.mask),
            tuple(solved.rows),
            skip_rows(solved.skips, prepared.model),
            loaded.bytes,
            written,
            len(solved.digests),
            run.seconds,
            versions(),
            (*notes, *solved.notes),
            comparison,
            proof,
            assignment=None if solved.search is None else solved.search.report(),
            options=invocation.options(run.given),
        ),
    )


def _arguments() -> list[str]:
    """What `optimize` takes beside the options."""
    return [name for name in inspect.signature(optimize).parameters if name not in ("run", "options")]


def _check_data_free(plan: Plan, goal: mixed_precision.Goal | None) -> None:
    """Refuse what cannot be done without calibration data."""
    if plan.input_grids == "static":
        raise OptionError("static 8-bit activations need calibration data for their ranges; give some, or use format dynamic-int8")
    if plan.error_feedback is not None:
        raise OptionError("error feedback needs calibration data; give some, or take effort fast")
    if goal is not None:
        raise OptionError(f"{goal.text} needs calibration data to measure what each layer can bear; give some, or give bits instead")


def _data_notes(data: Batches | None, plan: Plan) -> list[str]:
    """What the report says of the amount of data."""
    if data is None:
        return ["data-free: no calibration data was given, so inputs were taken as uncorrelated (H = I); expect lower accuracy"]
    if len(data) < HELD_OUT and (chosen := held_out_for(plan)):
        return [
            *data.notes,
            f"{len(data)} calibration batches are too few to hold some out ({HELD_OUT} are needed), so there is no {chosen}; "
            "give more samples, or cut them into smaller batches",
        ]
    return list(data.notes)


def _large_table(skips: Sequence[Skip], written: int) -> list[str]:
    """Say of the largest table that stayed float for want of an option, where it is a tenth of the result or more."""
    tables = [skip for skip in skips if skip.reason == TableReason.UNASKED]
    most = max(tables, key=lambda skip: skip.bytes, default=None)
    if most is None or 10 * most.bytes < written:
        return []
    return [
        f"table of embeddings {most.name} stays float and is {most.bytes / written:.0%} of the result ({most.detail}): "
        "--embeddings gather-block-quantized quantizes it to 8 bits (--embedding-bits 4: to 4)"
    ]


def _write(solved: Solved, out: Path | None, reference: Path | ir.Model, provider: str, run: Run) -> tuple[int, ProofSummary | None]:
    """Prove, stamp, write and read back; the bytes written and the proof, if one was asked for."""
    work, demand = solved.model, solved.plan.accumulator
    proof = None if demand is None else prove(work, demand, solved.emitted)
    stamp(work, solved.plan, proof)
    if solved.search is not None:
        solved.search.stamp(work)
    if out is None:
        verify_codes(work, solved.digests)
        written = files.model_bytes(work)
    else:
        written = save(work, out, lambda path: verify_file(path, solved.digests, provider, demand, solved.emitted, reference), run.layout)
    run.lap("write")
    return written, proof


def skip_rows(skips: Sequence[Skip], model: ir.Model) -> tuple[SkipRow, ...]:
    """For the report: nodes of ``model`` that were left alone."""
    scopes = {layer_name(node): scope_of(node) for node in model.graph.all_nodes()}
    return tuple(SkipRow(s.name, s.op, s.reason.value, s.detail, s.bytes, scopes.get(s.name, "")) for s in skips)


def _describe(data: Batches | None, rows: Sequence[LayerRow], mask: str | None) -> str:
    if data is None:
        return "none (data-free)"
    most = max((r.rows for r in rows), default=0)
    return f"{data.describe}: {amount(data.samples, len(data))}, {most} rows" + (f", mask {mask}" if mask else "")
