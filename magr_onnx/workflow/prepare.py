"""From a file to a float model whose layers can be converted, and everything that can be said against it before the long work."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from magr_onnx.config import layer_options, selection
from magr_onnx.config.presets import find_preset
from magr_onnx.errors import ModelError, OptionError, OutputError, raise_all
from magr_onnx.model_io import files
from magr_onnx.model_io.files import Loaded
from magr_onnx.passes import LinearLayer, Plan, Skip
from magr_onnx.passes.canonical import as_gemm, as_pooling, compounds, requantize
from magr_onnx.passes.graph.fixed_shapes import fix_batch, fold_shapes
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.layers import conv
from magr_onnx.passes.layers.conv import ConvLayer
from magr_onnx.passes.layers.embedding import EmbeddingTable
from magr_onnx.passes.layers.experts import ExpertLayer
from magr_onnx.passes.layers.linear import find
from magr_onnx.passes.layers.recurrent import RecurrentLayer
from magr_onnx.passes.layers.unconverted import unconverted_weights
from magr_onnx.report.reasons import Reason
from magr_onnx.runtime.calibration import moments
from magr_onnx.runtime.calibration.context import CalibrationContext
from magr_onnx.runtime.calibration.mask import resolve_mask
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.data.hold_out import HELD_OUT
from magr_onnx.runtime.data.sources import Batches, Source, keep_back
from magr_onnx.runtime.measure.metric import Judge
from magr_onnx.runtime.ort import opset_check, session, worker
from magr_onnx.workflow import conv_sensitivity, experts, mixed_precision, non_linear, recurrent, wide_inputs
from magr_onnx.workflow.calibrate import held_out_for
from magr_onnx.workflow.checkpoint import job_directory, manifest_of
from magr_onnx.workflow.cluster import cluster
from magr_onnx.workflow.context import Memory, RunContext, Stopwatch, open_spool
from magr_onnx.workflow.integer_convolutions import may_be_integer
from magr_onnx.workflow.progress import reporter
from magr_onnx.workflow.request import OptimizeRequest
from magr_onnx.workflow.verify_output import check_weights


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A float model to convert.

    Attributes:
        name: Of the file, for messages.
        bytes: Size of the source.
        reference: The model as the caller gave it.
        model: The same with its functions opened, in canonical form, at the opset the plan needs.
        plan: The plan, with what the model needs beside what was asked for.
        layers: Its linear layers.
        others: Convolutions, recurrent operators, experts and tables that will be converted.
        unconverted: Nodes that hold weights and are no layers of any kind.
        notes: Sentences for the report.
        data: What to calibrate on; None for data-free.
        kept_back: Calibration data that is left out of ``data``, to compare the models on; None where it is too little.
        validation: What to compare the models on, if they are to be compared.
        judge: The user's own measure of models, if there is one.
        float_share: Share of the work between convolutions that may stay float for accuracy.
    """

    name: str
    bytes: int
    reference: Path | ir.Model
    model: ir.Model
    plan: Plan
    layers: list[LinearLayer]
    others: Sequence[EmbeddingTable | ConvLayer | RecurrentLayer | ExpertLayer]
    unconverted: list[Skip]
    notes: list[str]
    data: Batches | None = None
    kept_back: Batches | None = None
    validation: Batches | None = None
    judge: Judge | None = None
    float_share: float = 0.0

    def no_layer(self, skips: Sequence[Skip]) -> ModelError:
        """The error to raise where nothing is converted."""
        by_reason: dict[str, list[Skip]] = {}
        for skip in sorted(skips, key=lambda skip: skip.reason != Reason.QUANTIZED):
            by_reason.setdefault(skip.reason, []).append(skip)
        texts = [str(nodes[0]) if len(nodes) == 1 else f"{len(nodes)} nodes such as {nodes[0]}" for nodes in by_reason.values()]
        reasons = "; ".join(texts[:5]) or "it has no MatMul, Gemm or convolution"
        return ModelError(f"{self.name}: no layer can be converted: {reasons}{_remedy(by_reason.get(Reason.QUANTIZED, []))}")


def _remedy(quantized: Sequence[Skip]) -> str:
    """What to do about weights that are quantized already, as the end of a message."""
    if any(skip.op in requantize.PATTERN.operators for skip in quantized):
        return "; requantize (--requantize) takes quantized weights for the floats they stand for"
    remedy = "; give the float model that this one was made of; --requantize reads weights behind DequantizeLinear, and no other form"
    return remedy if quantized else ""


def prepare(request: OptimizeRequest, stack: contextlib.ExitStack) -> tuple[Prepared, RunContext]:
    """Load a model, bring it into the form that layers are looked for in, and open its data.

    Everything that can be said against the run is said here, before the long work.

    Args:
        request: What is asked for.
        stack: Closes what the run opens.

    Raises:
        MagrError: One of its subclasses.
    """
    stopwatch = Stopwatch()
    progress = stack.enter_context(reporter(request.progress))
    stack.enter_context(session.custom_ops(request.custom_ops))
    stack.enter_context(request.device.exact())
    workers = None if request.workers is None else stack.enter_context(cluster(request.workers))
    loaded = _load(request)
    mask, opset = resolve_mask(loaded.model, request.mask), loaded.model.opset_imports.get("")
    prepared = _canonical(loaded, request)
    alone = Memory.of(request, loaded.bytes, 0)
    data, validation = (_open_data(source, prepared, request, alone.large) for source in (request.calibration, request.validation))
    memory = alone if alone.large or data is None else Memory.of(request, loaded.bytes, _widest(prepared, data, request))
    spool = open_spool(request.output, memory.large, stack)
    if spool is not None:
        spool.spill(prepared.model)
    check_weights([*prepared.layers, *prepared.others])
    stopwatch.lap("load")
    judge = None
    if request.metric is not None and validation is not None:
        judge = Judge.of(request.metric, prepared.reference, validation, request.provider)
        stopwatch.lap("metric")
    _check_ranges(prepared, memory.large)
    store = None
    if request.resume is not None:
        decided = {"mask": mask, "large": memory.large, "gram_budget": memory.gram_budget}
        manifest = manifest_of(loaded, data, prepared.plan, {**request.result_options, **decided})
        store = stack.enter_context(job_directory(request.resume, manifest))
    notes = [*prepared.notes, *_data_notes(data, request.plan)]
    if request.preset is not None:
        notes.insert(0, f"preset {request.preset} sets {find_preset(request.preset)}, where nothing else was given")
    if prepared.model.opset_imports.get("") != opset:
        notes += opset_check.check(prepared.reference, prepared.model, data, request.provider)
    context = RunContext(
        provider=request.provider,
        selection=request.patterns.selection,
        mask=mask,
        memory=memory,
        progress=progress,
        on_layer=request.on_layer,
        spool=spool,
        store=store,
        workers=workers,
        backend=request.device,
        stopwatch=stopwatch,
    )
    data, kept_back = (data, None) if data is None or memory.large else keep_back(data)
    return replace(prepared, data=data, kept_back=kept_back, validation=validation, judge=judge, notes=notes), context


def _load(request: OptimizeRequest) -> Loaded:
    """The model, once it is known that the output can be written."""
    if request.output is None:
        return files.load(request.model, request.keep_overridable)
    raise_all(OutputError, files.check_output(request.output, None, frozenset()))  # before a model that is yet to be exported
    loaded = files.load(request.model, request.keep_overridable)
    raise_all(OutputError, files.check_output(request.output, loaded.path, loaded.external))
    worker.start()
    return loaded


def _canonical(loaded: Loaded, request: OptimizeRequest) -> Prepared:
    """The model, changed in place, in the form that layers are looked for in.

    Raises:
        ModelError: No layer can be converted, or the opset cannot be raised as far as the plan needs.
        OptionError: Options are for layers that there are not, or do not go together.
    """
    model, chosen = loaded.model, request.patterns.selection
    reference = model.clone() if loaded.path is None else loaded.path
    notes = [*loaded.notes, *inline_and_rename(model)]
    plan = non_linear.with_convolutions(request.plan, model, request.options)
    for each in (plan, *request.layer_plans):
        each.prepare(model)
    choosable = conv_sensitivity.choosable(model, plan, request, chosen)
    if choosable:
        conv_sensitivity.raise_opset(model, plan)
    if plan.rules is not None and plan.rules.fixed_shapes:
        notes += fix_batch(model, plan.rules.name)
        fold_shapes(model)
    notes += compounds.rewrite(model, plan.compounds)
    notes += selection.canonical(model, chosen, request.requantize)
    if plan.needs_gemm:
        as_gemm.rewrite(model, find(model, chosen)[0])
    if plan.needs_pooling and conv.find(model, chosen)[0]:
        as_pooling.rewrite(model)
    selection.check(model, chosen)
    layers, skips = find(model, chosen)
    unconverted = list(unconverted_weights(model.graph.all_nodes()))
    tables, table_skips = non_linear.select_tables(model, plan, chosen)
    convolutions, conv_skips = non_linear.select_convolutions(model, plan, chosen)
    operators, operator_skips = recurrent.select(model, plan, chosen)
    mixtures, mixture_skips = experts.select(model, plan, chosen, request.provider)
    notes += layer_options.check_matches(request.patterns.tables, [*mixtures, *layers], convolutions)
    others: list[EmbeddingTable | ConvLayer | RecurrentLayer | ExpertLayer] = [*tables, *convolutions, *operators, *mixtures]
    prepared = Prepared(loaded.name, loaded.bytes, reference, model, plan, layers, others, unconverted, notes)
    if not layers and not others:
        raise prepared.no_layer([*skips, *unconverted, *table_skips, *conv_skips, *operator_skips, *mixture_skips])
    if not choosable and not _is_spent_on_activations(request, plan, convolutions):
        mixed_precision.check_layers(request.budget, layers)
    # raises errors early
    layer_options.assign(request.patterns.tables, mixtures, request.options or {}, request.plan, request.provider)
    assigned = layer_options.assign(request.patterns.tables, layers, request.options or {}, request.plan, request.provider)
    plans = {layer.name: assigned[layer.name][1] if layer.name in assigned else plan for layer in layers}
    raise_all(OptionError, [text for layer in layers for text in plans[layer.name].layer_problems(layer, request.provider)])
    return prepared


def _is_spent_on_activations(request: OptimizeRequest, plan: Plan, convolutions: Sequence[ConvLayer]) -> bool:
    """Whether a budget needs no linear layers, since it is spent on the values between convolutions."""
    if plan.rules is not None and wide_inputs.is_spent_on_activations(request.budget, plan, request.provider):
        return True
    some = any(may_be_integer(layer, plan.rules) for layer in convolutions)
    return some and wide_inputs.may_be_float(request.budget, plan, request.provider)


def _open_data(source: Source | None, prepared: Prepared, request: OptimizeRequest, large: bool) -> Batches | None:
    """Batches that fit the model; None where there is no source."""
    if source is None:
        return None
    runs = None if large else prepared.reference
    reading = replace(request.reading, folders=[prepared.reference.parent] if isinstance(prepared.reference, Path) else [])
    return decoders.open_for(
        prepared.model, source, request.batch_size, steps=request.decode_steps, provider=request.provider, runnable=runs, reading=reading
    )


def _widest(prepared: Prepared, data: Batches, request: OptimizeRequest) -> int:
    """Find the inputs of the widest layer whose Gram matrix is needed: those of few rows are kept by these.

    The model runs on the first batch where a wide layer could make it too large for the memory there is.
    """
    widths = {layer.reads: layer.k for layer in prepared.layers}
    widest = max(widths.values(), default=0)
    if not Memory.of(request, prepared.bytes, widest).large:
        return widest
    of_main = {layer.reads: layer.k for layer in prepared.layers if not layer.nested}
    few = moments.few_rows(prepared.model, of_main, CalibrationContext(data, provider=request.provider))
    return max((k for name, k in widths.items() if name not in few), default=0)


def _check_ranges(prepared: Prepared, large: bool) -> None:
    """Refuse to round a whole graph without the ranges of its values."""
    if large and prepared.plan.rules is not None:
        raise ModelError(f"{prepared.name}: format qdq-full runs the float model as a whole, which is too large for max_memory; raise it")


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
