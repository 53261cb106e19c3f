"""The Python interface: `optimize`, `inspect`, `validate`, `verify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from magr_onnx.config import schema, selection
from magr_onnx.config.arguments import Progress
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import Target, find_target
from magr_onnx.errors import OptionError, translate_resource_errors
from magr_onnx.model_io import files
from magr_onnx.passes.graph.torch_names import scope_of
from magr_onnx.passes.instrument.inline import inline_and_rename
from magr_onnx.passes.layers import conv
from magr_onnx.passes.layers.linear import LinearLayer, find
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.passes.layers.unconverted import unconverted_weights
from magr_onnx.passes.plan import Plan
from magr_onnx.report.data import SkipRow, versions
from magr_onnx.report.validation import Validation
from magr_onnx.report.verification import Verification
from magr_onnx.runtime.calibration.mask import resolve_mask
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.data.sources import Source
from magr_onnx.runtime.measure import overflow, witness
from magr_onnx.runtime.measure import validate as validation
from magr_onnx.runtime.ort import custom_ops as custom
from magr_onnx.runtime.ort.session import Arithmetic, provider_name
from magr_onnx.workflow import embeddings
from magr_onnx.workflow.optimize import Optimized, optimize, skip_rows
from magr_onnx.workflow.progress import reporter

__all__ = ["Inspection", "Optimized", "Progress", "inspect", "optimize", "validate", "verify"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        name: Of the file, or of the graph.
        bytes: Size, with external data.
        opset: Version of the standard operators.
        ir_version: Of the file format.
        layers: A row for every layer to convert: names, the torch module (``scope``), ``k`` and ``n``, type, and the range of its weight.
        skipped: What would be left alone, and why.
        notes: What else there is to say, such as nodes that nobody reads.
    """

    name: str
    bytes: int
    opset: int
    ir_version: int
    layers: tuple[dict[str, Any], ...]
    skipped: tuple[SkipRow, ...]
    notes: tuple[str, ...] = ()


@translate_resource_errors()
def inspect(model: Any, *, include: Sequence[str] = (), exclude: Sequence[str] = (), requantize: bool = False) -> Inspection:
    """The linear layers and convolutions of a model, with shapes and ranges, and what would be left alone and why.

    See `optimize` for the arguments.

    Raises:
        ModelError: Not a usable model.
        OptionError: A value that is none, or a pattern that matches nothing.
    """
    schema.check(include=include, exclude=exclude, requantize=requantize)
    chosen = Selection(schema.as_list("include", include), schema.as_list("exclude", exclude))
    loaded = files.load(model)
    notes = [*loaded.notes, *inline_and_rename(loaded.model), *selection.canonical(loaded.model, chosen, requantize)]
    selection.check(loaded.model, chosen)
    layers, skips = find(loaded.model, chosen)
    skips += unconverted_weights(loaded.model.graph.all_nodes())
    convolutions, unfit = conv.find(loaded.model, chosen)
    _, tables = embeddings.select(loaded.model, Plan(), chosen)
    units: list[LinearLayer | conv.ConvLayer] = [*layers, *convolutions]
    rows = []
    for layer in units:
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
                "groups": layer.group if isinstance(layer, conv.ConvLayer) else 1,
            }
        )
    return Inspection(
        loaded.name,
        loaded.bytes,
        loaded.model.opset_imports.get("", 0),
        loaded.model.ir_version,
        tuple(rows),
        skip_rows([*tables, *skips, *unfit], loaded.model),
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
    arithmetics: Sequence[Arithmetic] = tuple(Arithmetic),
    layers: bool = True,
    latency: bool = True,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    progress: Progress | bool | None = True,
) -> Validation:
    """Compare a float and a quantized model (anybody's) on data; see `magr_onnx.runtime.measure.validate`.

    A decoder with a cache is fed as `optimize` feeds it. ``data`` may be a ``.txt`` file, a sample a line, where ``tokenizer.json`` lies
    beside one of the models. ``custom_ops`` are shared libraries with custom operators of the two. Bars and
    lines of ``progress`` are those of `optimize`.

    Raises:
        OptionError: A value that is none, such as a batch size of 0.
        MagrError: A model or the data cannot be used.
    """
    schema.check(provider=provider, mask=mask, batch_size=batch_size, decode_steps=decode_steps, custom_ops=custom_ops)
    provider_name(provider)
    a, b = files.load(float_model), files.load(quantized_model)
    with custom.using(schema.as_list("custom_ops", custom_ops)), reporter(progress) as step:
        folders = [loaded.path.parent for loaded in (a, b) if loaded.path is not None]
        batches = decoders.open_for(
            a.model, data, batch_size, steps=decode_steps, provider=provider, runnable=a.path or a.model, folders=folders
        )
        return validation.validate(
            a.path or a.model,
            b.path or b.model,
            batches,
            provider=provider,
            arithmetics=arithmetics,
            mask=resolve_mask(a.model, mask),
            details=[name for name, enabled in zip(validation.DETAILS, (layers, latency), strict=True) if enabled],
            progress=partial(step, "validating"),
        )


@translate_resource_errors()
def verify(
    model: Any,
    *,
    target: str | Target | None = None,
    accumulator: Accumulator | None = None,
    outer_bits: int | None = None,
    run: bool = True,
) -> Verification:
    """Prove that no input of any integer dot product of a model overflows its accumulators, or show one that does.

    Args:
        model: A model in any of the forms `optimize` takes, whoever quantized it.
        target: A machine of `magr_onnx.core.overflow.targets`, or its name: which registers onnxruntime's kernels use there.
        accumulator: Registers to ask about instead.
        outer_bits: Width of the register tile sums are added in on ``target`` (an ``accumulator`` has its own).
        run: Run one witness a failing layer in onnxruntime on this machine.

    Raises:
        OptionError: Neither or both of ``target`` and ``accumulator``, an unknown target, or impossible widths.
        ModelError: Not a usable model.
    """
    if (target is None) == (accumulator is None):
        raise OptionError("give a target or an accumulator, and not both")
    if accumulator is not None and outer_bits is not None:
        raise OptionError("an accumulator has outer bits of its own; give outer_bits with a target only")
    if outer_bits is not None and not 2 <= outer_bits <= 64:
        raise OptionError(f"accumulators have 2 to 64 bits; got {outer_bits} outer bits")
    machine = find_target(target) if isinstance(target, str) else target
    text = f"{machine.name}: {machine.summary}" if machine is not None else f"accumulator: {accumulator}"
    if machine is not None and outer_bits is not None:
        text += f"; {outer_bits} outer bits"
    against: Target | Accumulator | None = machine or accumulator
    assert against is not None
    loaded = files.load(model)
    layers, skipped = overflow.verify(loaded.model, against, outer_bits, run)
    return Verification(loaded.name, text, layers, skipped, witness.machine_name(), versions())
