"""The Python interface: `optimize`, `forecast`, `inspect`, `validate`, `verify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from magr_onnx.config import schema, selection
from magr_onnx.config.arguments import Metric, Progress
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import Target, find_target
from magr_onnx.errors import OptionError, translate_resource_errors
from magr_onnx.model_io import files
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.layers import conv, experts
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.unconverted import unconverted_weights
from magr_onnx.passes.layers.weighted import split_shared
from magr_onnx.passes.plan import Plan
from magr_onnx.report.data import versions
from magr_onnx.report.reasons import Skip
from magr_onnx.report.validation import Validation
from magr_onnx.report.verification import Verification
from magr_onnx.runtime.calibration.mask import resolve_mask
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.data.sources import Source
from magr_onnx.runtime.measure import metric as metrics
from magr_onnx.runtime.measure import overflow
from magr_onnx.runtime.measure import validate as validation
from magr_onnx.runtime.ort import session
from magr_onnx.runtime.ort.session import Arithmetic, available_provider
from magr_onnx.workflow import non_linear, recurrent
from magr_onnx.workflow.forecast import Forecast, forecast
from magr_onnx.workflow.optimize import Optimized, optimize, skip_rows
from magr_onnx.workflow.progress import reporter
from magr_onnx.workflow.request import reading_of

__all__ = ["Forecast", "Inspection", "Optimized", "Progress", "forecast", "inspect", "optimize", "validate", "verify"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Layers and other properties of a model.

    Attributes:
        name: Name of the file, or of the graph.
        bytes: Size, with external data.
        opset: Version of the standard operators.
        ir_version: Version of the file format.
        layers: A row for every layer to convert: names, the torch module (``scope``), ``k`` and ``n``, type, and the range of its weight.
        skipped: Nodes that would not be converted, and why.
        notes: Further findings, such as unused nodes.
    """

    name: str
    bytes: int
    opset: int
    ir_version: int
    layers: tuple[dict[str, Any], ...]
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...] = ()


@translate_resource_errors()
def inspect(
    model: Any, *, include: Sequence[str] = (), exclude: Sequence[str] = (), requantize: bool = False, keep_overridable: bool = False
) -> Inspection:
    """List the linear layers, convolutions and experts of a model, and what would not be converted and why.

    See `optimize` for the arguments.

    Raises:
        ModelError: The model is not usable.
        OptionError: A value is invalid, or a pattern matches nothing.
    """
    schema.check(include=include, exclude=exclude, requantize=requantize, keep_overridable=keep_overridable)
    patterns = Selection(schema.as_list("include", include), schema.as_list("exclude", exclude))
    loaded = files.load(model, keep_overridable)
    notes = [*loaded.notes, *inline_and_rename(loaded.model), *selection.canonical(loaded.model, patterns, requantize)]
    selection.check(loaded.model, patterns)
    layers, skips = find(loaded.model, patterns)
    if not include:
        layers, shared = split_shared(layers)
        skips += shared
    skips += unconverted_weights(loaded.model.graph.all_nodes())
    convolutions, conv_skips = conv.find(loaded.model, patterns)
    _, table_skips = non_linear.select_tables(loaded.model, Plan(), patterns)
    _, operator_skips = recurrent.select(loaded.model, Plan(), patterns)
    mixtures, mixture_skips = experts.find(loaded.model, patterns)
    converted: list[LinearLayer | conv.ConvLayer | experts.ExpertLayer] = [*layers, *convolutions, *mixtures]
    rows = []
    for layer in converted:
        weight = layer.read()
        magnitude = np.abs(weight)
        mean = float(magnitude.mean())
        rows.append(
            {
                "name": layer.name,
                "scope": scope_of(layer.node),
                "op": layer.op,
                "weight": layer.weight_name,
                "input": str(layer.x.name),
                "k": layer.k,
                "n": layer.n,
                "dtype": layer.dtype.name.lower(),
                "bias": layer.has_bias,
                "min": float(weight.min()),
                "max": float(weight.max()),
                "peak_to_mean": float(magnitude.max()) / mean if mean else 0.0,
                "finite": bool(np.isfinite(weight).all()),
                "groups": layer.groups,
            }
        )
    return Inspection(
        loaded.name,
        loaded.bytes,
        loaded.model.opset_imports.get("", 0),
        loaded.model.ir_version,
        tuple(rows),
        skip_rows([*table_skips, *skips, *conv_skips, *operator_skips, *mixture_skips], loaded.model),
        tuple(notes),
    )


@translate_resource_errors()
def validate(
    float_model: Any,
    quantized_model: Any,
    data: Source,
    *,
    provider: str = "cpu",
    mask: str | None = "auto",
    batch_size: int = 16,
    decode_steps: int = decoders.STEPS,
    tokenizer: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    arithmetics: Sequence[Arithmetic] = tuple(Arithmetic),
    layers: bool = True,
    latency: bool = True,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    metric: Metric | str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = True,
) -> Validation:
    """Compare a float and a quantized model on data; see `magr_onnx.runtime.measure.validate`.

    The quantized model need not be from this package; a folder stands for the model in it. Decoders with a KV cache are fed as in
    `optimize`, and text is read as there, with ``tokenizer`` or the ``tokenizer.json`` in the folder of one of the models. ``custom_ops``
    are shared libraries with custom operators of the models. ``metric`` and ``progress`` are those of `optimize`.

    Raises:
        OptionError: A value is invalid, such as a batch size of 0, or the metric fails.
        MagrError: A model or the data is not usable.
    """
    schema.check(provider=provider, mask=mask, batch_size=batch_size, decode_steps=decode_steps, custom_ops=custom_ops)
    texts = {"tokenizer": tokenizer, "samples": samples, "sequence_length": sequence_length, "seed": seed}
    schema.check(**texts)
    available_provider(provider)
    measure = None if metric is None else metrics.Metric.of(metric)
    models = (float_model, quantized_model)
    reference, quantized = (files.load(files.model_of(Path(m)) if isinstance(m, str | os.PathLike) else m) for m in models)
    with session.custom_ops(schema.as_list("custom_ops", custom_ops)), reporter(progress) as step:
        folders = [loaded.path.parent for loaded in (reference, quantized) if loaded.path is not None]
        float_source, quantized_source = (loaded.path or loaded.model for loaded in (reference, quantized))
        batches = decoders.open_for(
            reference.model,
            data,
            batch_size,
            steps=decode_steps,
            provider=provider,
            runnable=float_source,
            reading=reading_of(texts, folders),
        )
        judge = None if measure is None else metrics.Judge.of(measure, float_source, batches, provider)
        comparison = validation.validate(
            float_source,
            quantized_source,
            batches,
            provider=provider,
            arithmetics=arithmetics,
            mask=resolve_mask(reference.model, mask),
            details=[name for name, enabled in zip(validation.DETAILS, (layers, latency, True), strict=True) if enabled],
            progress=partial(step, "validating"),
        )
        return comparison if judge is None else replace(comparison, metric=judge.compare(quantized_source))


@translate_resource_errors()
def verify(
    model: Any,
    *,
    target: str | Target | None = None,
    accumulator: Accumulator | None = None,
    outer_bits: int | None = None,
    run: bool = True,
) -> Verification:
    """Prove that no integer dot product of a model overflows its accumulators, or show an input that does.

    Args:
        model: A quantized model in any form that `optimize` accepts; it need not be from this package.
        target: A machine of `magr_onnx.core.overflow.targets`, or its name, which determines the registers of onnxruntime's kernels.
        accumulator: Registers to prove for instead.
        outer_bits: Width of the register that tile sums are added in, on ``target`` (an ``accumulator`` has its own).
        run: Whether to run one witness per failing layer in onnxruntime on this machine.

    Raises:
        OptionError: Neither or both of ``target`` and ``accumulator``, an unknown target, or impossible widths.
        ModelError: The model is not usable.
    """
    if (target is None) == (accumulator is None):
        raise OptionError("give a target or an accumulator, and not both")
    if accumulator is not None and outer_bits is not None:
        raise OptionError("an accumulator has outer bits of its own; give outer_bits with a target only")
    if outer_bits is not None and not 2 <= outer_bits <= 64:
        raise OptionError(f"accumulators have 2 to 64 bits; got {outer_bits} outer bits")
    machine = find_target(target) if isinstance(target, str) else target
    description = f"{machine.name}: {machine.summary}" if machine is not None else f"accumulator: {accumulator}"
    if machine is not None and outer_bits is not None:
        description += f"; {outer_bits} outer bits"
    registers: Target | Accumulator | None = machine or accumulator
    assert registers is not None
    loaded = files.load(model, keep_overridable=True)  # a proof is for whatever a caller may feed
    layers, skipped = overflow.verify(loaded.model, registers, outer_bits, run)
    return Verification(loaded.name, description, layers, skipped, overflow.machine_name(), versions())
