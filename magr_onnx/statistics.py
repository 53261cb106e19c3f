"""What calibration gathers for a pipeline: grids of activations, statistics of what layers read, gradients of what they put out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from magr_onnx.passes import (
    CompensateBias,
    EmitQDQInt8,
    ErrorFeedback,
    Job,
    LayerPass,
    LinearLayer,
    OutputHessian,
    Quantize,
    QuantizeActivations,
)
from magr_onnx.runtime import calibrate, fisher, ranges, stages
from magr_onnx.runtime.data import Batches
from magr_onnx.types import Activation, ActivationGrid


@dataclass(frozen=True, slots=True)
class Grids:
    """How activations are quantized, by value name.

    Attributes:
        inputs: Of what layers read.
        products: Of what layers put out, where that is quantized too.
        bounds: What values are clipped to in statistics, where sentinels were found.
        notes: Sentences for the report.
    """

    inputs: dict[str, Activation] = field(default_factory=dict)
    products: dict[str, ActivationGrid] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_grids(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    data: Batches,
    passes: Sequence[LayerPass],
    activations: QuantizeActivations,
    mask: str | None,
    provider: str,
    progress: Callable[[int, int], None] | None,
) -> Grids:
    values = ranges.inputs_of(layers, next((p.bias for p in passes if isinstance(p, CompensateBias)), None))
    products = ranges.products_of(layers) if any(isinstance(p, EmitQDQInt8) and p.outputs for p in passes) else []
    read = {v.name for v in values}
    values += [v for v in products if v.name not in read]
    chosen = ranges.choose(
        model, values, data, method=activations.ranges, kind=activations.type, mask=mask, provider=provider, progress=progress
    )
    found = Grids({name: choice.grid for name, choice in chosen.items()})
    for value in products:
        grid = chosen[value.name].grid
        if isinstance(grid, ActivationGrid):
            found.products[value.name] = grid
    for name, choice in chosen.items():
        if choice.bounds is not None:
            found.bounds[name] = choice.bounds
        if choice.sentinels is not None:
            low, high = choice.sentinels
            found.notes.append(f"{name}: values from {low:g} to {high:g} were taken as masks and left out of the range")
    return found


def gather(
    original: ir.Model,
    work: ir.Model,
    layers: Sequence[LinearLayer],
    data: Batches | None,
    passes: Sequence[LayerPass],
    grids: Grids,
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


@contextlib.contextmanager
def output_hessian(
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


def what_is_missing(hessian: fisher.Fisher, layers: Sequence[LinearLayer]) -> list[str]:
    if not hessian.blocked:
        return []
    without = sum(hessian.get(str(layer.output.name)) is None for layer in layers)
    blocked = ", ".join(sorted(hessian.blocked))
    return [f"no gradients for {without} layers: {blocked} cannot be differentiated; their outputs weigh the same"]


def beginning(result: calibrate.Calibration, grids: Grids, hessian: fisher.Fisher | None) -> Callable[[Job], None]:
    """What a job should know before its passes run."""

    def begin(job: Job) -> None:
        job.output_grid = grids.products.get(str(job.layer.node.outputs[0].name))
        job.goal = result.goals.get(job.layer.name)
        job.outputs = None if hessian is None else hessian.get(str(job.layer.output.name))

    return begin


def _part(progress: Callable[[int, int], None], index: int, count: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(index * total + done, count * total)
