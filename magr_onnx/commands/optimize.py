"""`onnx-magr optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from magr_onnx import api, console, reporting
from magr_onnx.arguments import (
    AccumulatorBitsOption,
    AccumulatorTileOption,
    AccuracyLevelOption,
    ActivationRangeOption,
    ActivationTypeOption,
    ActOrderOption,
    AlphaOption,
    BatchSize,
    BetaOption,
    BiasName,
    BiasOption,
    BitsOption,
    BlockSizeOption,
    CacheOption,
    CalibrationOption,
    ConvBits,
    ConvBitsOption,
    ConvFormOption,
    CustomOps,
    DampingOption,
    DecodeSteps,
    EffortOption,
    EmbeddingBitsOption,
    EmbeddingsName,
    EmbeddingsOption,
    EqualizeOption,
    Exclude,
    ExternalDataOption,
    FeedbackOption,
    FormatName,
    FormatOption,
    Include,
    Json,
    LowRankOption,
    Mask,
    MaxLossOption,
    MaxMemoryOption,
    ModelArgument,
    ModelsOption,
    OutputOption,
    OverwriteOption,
    PipelineOption,
    Provider,
    QuantizeOutputsOption,
    QuantizerOption,
    Quiet,
    ReportOption,
    Requantize,
    ResumeOption,
    ShardSizeOption,
    SplitOutliersOption,
    SweepsOption,
    SymmetricOption,
    TargetOption,
    TargetSizeOption,
    TwinRangesOption,
    ValidationOption,
)
from magr_onnx.errors import OptionError
from magr_onnx.folders import OptimizedFolder, optimize_folder
from magr_onnx.options import bytes_of
from magr_onnx.report import Report

EPILOG = """[bold]Examples[/bold]

onnx-magr optimize model.onnx -o model.int4.onnx --calibration inputs.npz

onnx-magr optimize model.onnx --calibration batches/ --bits 2 --effort best --report report.html

onnx-magr optimize model.onnx --bits 3 --block-size channel --calibration inputs.npz --validation heldout.npz

onnx-magr optimize model.onnx --format qdq-int8 --target x86-avx2 --calibration inputs.npz

onnx-magr optimize model.onnx --target-size 25% --calibration inputs.npz

onnx-magr optimize model.onnx --pipeline 'magr{alpha=1e-3}' -o smaller-weights.onnx --calibration inputs.npz

onnx-magr optimize exported-folder/ -o int4-folder/ --calibration texts.txt"""


def optimize(
    context: typer.Context,
    model: ModelArgument,
    output: OutputOption = None,
    calibration: CalibrationOption = None,
    validation: ValidationOption = None,
    bits: BitsOption = None,
    block_size: BlockSizeOption = None,
    effort: EffortOption = None,
    quantizer: QuantizerOption = None,
    format: FormatOption = FormatName.matmulnbits,
    symmetric: SymmetricOption = None,
    alpha: AlphaOption = None,
    beta: BetaOption = None,
    damping: DampingOption = None,
    act_order: ActOrderOption = None,
    sweeps: SweepsOption = 8,
    bias: BiasOption = BiasName.auto,
    accuracy_level: AccuracyLevelOption = 0,
    activation_type: ActivationTypeOption = None,
    activation_range: ActivationRangeOption = None,
    quantize_outputs: QuantizeOutputsOption = False,
    target: TargetOption = None,
    accumulator_bits: AccumulatorBitsOption = None,
    accumulator_tile: AccumulatorTileOption = None,
    feedback: FeedbackOption = None,
    cache: CacheOption = "2GB",
    low_rank: LowRankOption = 0,
    equalize: EqualizeOption = False,
    split_outliers: SplitOutliersOption = False,
    twin_ranges: TwinRangesOption = False,
    target_size: TargetSizeOption = None,
    max_loss: MaxLossOption = None,
    conv_bits: ConvBitsOption = None,
    conv_form: ConvFormOption = None,
    embeddings: EmbeddingsOption = EmbeddingsName.none,
    embedding_bits: EmbeddingBitsOption = None,
    pipeline: PipelineOption = None,
    include: Include = None,
    exclude: Exclude = None,
    requantize: Requantize = False,
    custom_ops: CustomOps = None,
    mask: Mask = "auto",
    batch_size: BatchSize = 16,
    decode_steps: DecodeSteps = 4,
    provider: Provider = "cpu",
    max_memory: MaxMemoryOption = None,
    resume: ResumeOption = None,
    external_data: ExternalDataOption = False,
    shard_size: ShardSizeOption = None,
    models: ModelsOption = None,
    overwrite: OverwriteOption = False,
    report: ReportOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the linear layers and convolutions of a model, and report what happened to every one."""
    options = {
        "bits": None if bits is None else int(bits.value),
        "effort": None if effort is None else effort.value,
        "quantizer": None if quantizer is None else quantizer.value,
        "format": format.value,
        "symmetric": symmetric,
        "alpha": alpha,
        "beta": beta,
        "damping": damping,
        "act_order": act_order,
        "sweeps": sweeps,
        "bias": bias.value,
        "accuracy_level": accuracy_level,
        "feedback": feedback,
        "low_rank": low_rank,
        "equalize": equalize,
        "split_outliers": split_outliers,
        "twin_ranges": twin_ranges,
        "quantize_outputs": quantize_outputs,
        "target": target,
        "accumulator_bits": accumulator_bits,
        "accumulator_tile": accumulator_tile,
        "target_size": target_size,
        "max_loss": max_loss,
        "embeddings": embeddings.value,
        "embedding_bits": None if embedding_bits is None else int(embedding_bits.value),
    }
    if conv_bits is not None:
        options["conv_bits"] = None if conv_bits is ConvBits.none else int(conv_bits.value)
    if conv_form is not None:
        options["conv_form"] = conv_form.value
    if block_size is not None:
        options["block_size"] = _block(block_size)
    if activation_type is not None:
        options["activation_type"] = activation_type.value
    if activation_range is not None:
        options["activation_range"] = activation_range.value
    if not model.is_dir() and (models or overwrite):
        raise OptionError(f"--models and --overwrite are for a folder of models, and {model} is none")
    out = output or _output(model)
    reporting.check(report or (), {model, out})
    with console.progress_bar(not quiet) as progress:
        shared: dict[str, Any] = {
            "output": out,
            "validation_data": validation,
            "pipeline_text": pipeline,
            "provider": provider,
            "mask": mask,
            "batch_size": batch_size,
            "decode_steps": decode_steps,
            "include": include or (),
            "exclude": exclude or (),
            "requantize": requantize,
            "custom_ops": custom_ops or (),
            "cache": _bytes(cache),
            "max_memory": max_memory,
            "resume": resume,
            "external_data": external_data,
            "shard_size": shard_size,
            "progress": progress,
            **_options(context, pipeline, options),
        }
        if model.is_dir():
            result: Report | OptimizedFolder = optimize_folder(model, calibration, models=models or (), overwrite=overwrite, **shared)
        else:
            result = api.optimize(model, calibration, **shared).report
    result = result.asked_by(console.command_line())
    for path in report or ():
        result.save(path)
    console.show(result.to_dict(), result.to_text(), as_json, quiet)


def _output(model: Path) -> Path:
    if model.is_dir():
        folder = model.resolve()  # which has a name, where "." has none
        return folder.with_name(f"{folder.name}.magr")
    return model.with_name(f"{model.stem}.magr{model.suffix or '.onnx'}")


def _options(context: typer.Context, pipeline: str | None, values: dict[str, Any]) -> Any:
    """The options, unless a pipeline replaces them: then options given as well are an error."""
    if pipeline is None:
        return values
    given = [name for name in values if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise OptionError(f"--pipeline replaces {flags}; give one or the other")
    return {}


def _block(text: str) -> int | None:
    if text == "channel":
        return None
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--block-size {text!r}: give a multiple of 16, or 'channel'") from None


def _bytes(text: str) -> int:
    found = bytes_of(text)
    if found is None:
        raise OptionError(f"--cache {text!r}: give a size such as 512MB or 2GB")
    return found
