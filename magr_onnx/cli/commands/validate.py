"""`onnx-magr validate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from magr_onnx import api
from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Quiet, Verbose, option
from magr_onnx.report.data import validation_text
from magr_onnx.report.validation import severity
from magr_onnx.runtime.data import decoders

EPILOG = """[bold]Examples[/bold]

onnx-magr validate model.onnx model.int4.onnx --data heldout.npz

onnx-magr validate model.onnx model.int4.onnx --data heldout/ --min-cosine 0.98"""


def validate(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The reference model.", show_default=False)],
    quantized_model: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The model to judge.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", "-d", help="Held-out inputs, in the forms 'optimize --calibration' takes.")],
    min_cosine: Annotated[float | None, typer.Option("--min-cosine", help="Exit with 3 if an output's mean cosine is below this.")] = None,
    mask: Annotated[str, option("mask")] = "auto",
    batch_size: Annotated[int, option("batch_size")] = 16,
    decode_steps: Annotated[int, option("decode_steps")] = decoders.STEPS,
    provider: Annotated[str, option("provider")] = "cpu",
    custom_ops: Annotated[list[Path] | None, option("custom_ops")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a float and a quantized model on real inputs, at each arithmetic onnxruntime may use."""
    settings: dict[str, Any] = {"provider": provider, "mask": mask, "batch_size": batch_size, "decode_steps": decode_steps}
    with console.watch(quiet) as (progress, _):
        result = api.validate(float_model, quantized_model, data, progress=progress, custom_ops=custom_ops or (), **settings)
    console.show(dataclasses.asdict(result), "\n".join(validation_text(result, width=console.columns())), as_json, quiet)
    if min_cosine is not None:
        cosines = [m.cosine for outputs in result.arithmetics.values() for m in outputs]
        lowest = min(cosines, key=lambda cosine: -severity(-cosine), default=1.0)
        if not lowest >= min_cosine:  # also for NaN
            console.errors.print(f"error: mean cosine {lowest:.5f} is below {min_cosine}", style="red")
            raise typer.Exit(3)
