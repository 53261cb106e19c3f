"""`onnx-magr validate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from magr_onnx import api
from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Quiet, Verbose, option
from magr_onnx.errors import ModelError, OptionError
from magr_onnx.report.data import validation_text
from magr_onnx.report.validation import severity
from magr_onnx.runtime.data import decoders
from magr_onnx.runtime.ort.session import Arithmetic

EPILOG = """[bold]Examples[/bold]

onnx-magr validate model.onnx model.int4.onnx --data heldout.npz

onnx-magr validate model.onnx model.int4.onnx --data heldout/ --min-cosine 0.98

onnx-magr validate model.onnx model.int4.onnx --data heldout.npz --metric accuracy.py

onnx-magr validate model.onnx model.int4.onnx --text wikitext.txt --tokenizer tokenizer.json --samples 64 --sequence-length 512"""


def validate(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The reference model, or its folder.", show_default=False)],
    quantized_model: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The model to judge, or its folder.", show_default=False)],
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Held-out inputs, in the forms 'optimize --calibration' takes.")] = None,
    text: Annotated[
        Path | None, typer.Option("--text", "-t", help="Held-out text of a language model: its perplexity, and no errors of layers.")
    ] = None,
    min_cosine: Annotated[float | None, typer.Option("--min-cosine", help="Exit with 3 if an output's mean cosine is below this.")] = None,
    mask: Annotated[str, option("mask")] = "auto",
    batch_size: Annotated[int, option("batch_size")] = 16,
    decode_steps: Annotated[int, option("decode_steps")] = decoders.STEPS,
    tokenizer: Annotated[Path | None, option("tokenizer")] = None,
    samples: Annotated[int | None, option("samples")] = None,
    sequence_length: Annotated[int | None, option("sequence_length")] = None,
    seed: Annotated[int, option("seed")] = 0,
    provider: Annotated[str, option("provider")] = "cpu",
    custom_ops: Annotated[list[Path] | None, option("custom_ops")] = None,
    metric: Annotated[
        Path | None, typer.Option("--metric", metavar="SCRIPT", help="Your own measure, SCRIPT.py or SCRIPT.py:FUNCTION.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a float and a quantized model on real inputs, at each arithmetic onnxruntime may use."""
    source = data or text
    if source is None or (data and text):
        raise OptionError("give --data or --text, and not both")
    settings: dict[str, Any] = {"provider": provider, "mask": mask, "batch_size": batch_size, "decode_steps": decode_steps}
    settings |= {"tokenizer": tokenizer, "samples": samples, "sequence_length": sequence_length, "seed": seed, "metric": metric}
    if text is not None:
        settings |= {"arithmetics": [Arithmetic.DEFAULT], "layers": False, "decode_steps": 0}
    with console.watch(quiet) as (progress, _):
        result = api.validate(float_model, quantized_model, source, progress=progress, custom_ops=custom_ops or (), **settings)
    if text is not None and not any(m.perplexity for m in result.arithmetics[Arithmetic.DEFAULT]):
        outputs = ", ".join(m.output for m in result.arithmetics[Arithmetic.DEFAULT])
        raise ModelError(f"{float_model}: no output has the logits of a token at every position ({outputs}), so there is no perplexity")
    console.show(dataclasses.asdict(result), "\n".join(validation_text(result, width=console.columns())), as_json, quiet)
    if min_cosine is not None:
        cosines = [m.cosine for outputs in result.arithmetics.values() for m in outputs]
        lowest = min(cosines, key=lambda cosine: -severity(-cosine), default=1.0)
        if not lowest >= min_cosine:  # also for NaN
            console.errors.print(f"error: mean cosine {lowest:.5f} is below {min_cosine}", style="red")
            raise typer.Exit(3)
