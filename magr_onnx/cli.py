"""The command line. Each command parses, calls the Python interface and prints; no work of its own.

Exit codes: 0 success, 1 an error that is explained (a bad model, bad data, an impossible option), 2 wrong usage, 130
interrupted. ``validate`` also returns 3 when a threshold given by the user is missed, ``verify`` 1 when an accumulator overflows.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

import magr_onnx
from magr_onnx import api, console
from magr_onnx import demo as demonstration
from magr_onnx.accumulator import Accumulator
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
    OutputOption,
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
from magr_onnx.errors import MagrError, OptionError, OutputError
from magr_onnx.options import bytes_of
from magr_onnx.passes.pipeline import PASSES, options_of
from magr_onnx.report import validation_text
from magr_onnx.targets import TARGETS

app = typer.Typer(
    name="onnx-magr",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        console.say(f"onnx-magr {magr_onnx.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Quantize ONNX models to 2 to 8 bits with MagR, GPTQ and bias compensation.

    Try [bold]onnx-magr demo[/bold] first: it needs no model and no data.
    """


@app.command(
    epilog="""[bold]Examples[/bold]

onnx-magr optimize model.onnx -o model.int4.onnx --calibration inputs.npz

onnx-magr optimize model.onnx --calibration batches/ --bits 2 --effort best --report report.json

onnx-magr optimize model.onnx --bits 3 --block-size channel --calibration inputs.npz --validation heldout.npz

onnx-magr optimize model.onnx --format qdq-int8 --target x86-avx2 --calibration inputs.npz

onnx-magr optimize model.onnx --target-size 25% --calibration inputs.npz

onnx-magr optimize model.onnx --pipeline 'magr{alpha=1e-3}' -o smaller-weights.onnx --calibration inputs.npz"""
)
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
    provider: Provider = "cpu",
    max_memory: MaxMemoryOption = None,
    resume: ResumeOption = None,
    external_data: ExternalDataOption = False,
    shard_size: ShardSizeOption = None,
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
    out = output or model.with_name(f"{model.stem}.magr{model.suffix or '.onnx'}")
    if report is not None:
        _check_report(report, {model, out})
    with console.progress_bar(not quiet) as progress:
        result = api.optimize(
            model,
            calibration,
            output=out,
            validation_data=validation,
            pipeline_text=pipeline,
            provider=provider,
            mask=mask,
            batch_size=batch_size,
            include=include or (),
            exclude=exclude or (),
            requantize=requantize,
            custom_ops=custom_ops or (),
            cache=_bytes(cache),
            max_memory=max_memory,
            resume=resume,
            external_data=external_data,
            shard_size=shard_size,
            progress=progress,
            **_options(context, pipeline, options),
        )
    if report is not None:
        report.write_text(result.report.to_json() + "\n", encoding="utf-8")
    _show(result.report.to_dict(), result.report.to_text(), as_json, quiet)


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


def _check_report(report: Path, taken: set[Path]) -> None:
    if not report.parent.is_dir():
        raise OutputError(f"report folder {report.parent} does not exist; create it first")
    if report.is_dir() or report.resolve() in {p.resolve() for p in taken}:
        raise OutputError(f"report {report} would overwrite a folder or a model; choose another name")


@app.command(
    epilog="""[bold]Examples[/bold]

onnx-magr inspect model.onnx

onnx-magr inspect model.onnx --exclude '*head*' --json"""
)
def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX model to read.", show_default=False)],
    include: Include = None,
    exclude: Exclude = None,
    requantize: Requantize = False,
    as_json: Json = False,
) -> None:
    """List linear layers with shapes and ranges, and what would be left alone and why."""
    found = api.inspect(model, include=include or (), exclude=exclude or (), requantize=requantize)
    lines = [f"{found.name}: {found.bytes / 1e6:.2f} MB, opset {found.opset}, IR version {found.ir_version}", ""]
    lines.append(f"{'layer':34} {'K x N':>13} {'type':>7} {'bias':>4} {'min':>8} {'max':>8}")
    for row in found.layers:
        name = row["name"] if len(row["name"]) <= 34 else f"...{row['name'][-31:]}"
        bias = "yes" if row["bias"] else "-"
        shape = f"{row['k']} x {row['n']}"
        lines.append(f"{name:34} {shape:>13} {row['dtype']:>7} {bias:>4} {row['min']:8.3f} {row['max']:8.3f}")
    lines += ["", f"{len(found.layers)} layers to convert, {len(found.skipped)} to leave as they are"]
    lines += [f"  {s.name} ({s.op}): {s.reason}{f' ({s.detail})' if s.detail else ''}" for s in found.skipped]
    value = {name: getattr(found, name) for name in ("name", "bytes", "opset", "ir_version", "layers")}
    value["skipped"] = [{"name": s.name, "op": s.op, "reason": s.reason, "detail": s.detail} for s in found.skipped]
    _show(value, "\n".join(lines), as_json)


@app.command(
    epilog="""[bold]Examples[/bold]

onnx-magr validate model.onnx model.int4.onnx --data heldout.npz

onnx-magr validate model.onnx model.int4.onnx --data heldout/ --min-cosine 0.98"""
)
def validate(
    float_model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The reference model.", show_default=False)],
    quantized_model: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The model to judge.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", "-d", help="Held-out inputs, in the forms 'optimize --calibration' takes.")],
    min_cosine: Annotated[float | None, typer.Option("--min-cosine", help="Exit with 3 if an output's mean cosine is below this.")] = None,
    mask: Mask = "auto",
    batch_size: BatchSize = 16,
    provider: Provider = "cpu",
    custom_ops: CustomOps = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a float and a quantized model on real inputs, at each arithmetic onnxruntime may use."""
    options: dict[str, Any] = {"provider": provider, "mask": mask, "batch_size": batch_size, "custom_ops": custom_ops or ()}
    with console.progress_bar(not quiet) as progress:
        result = api.validate(float_model, quantized_model, data, progress=progress, **options)
    _show(_plain(result), "\n".join(validation_text(result)), as_json, quiet)
    if min_cosine is not None:
        low = min((m.cosine for outputs in result.arithmetics.values() for m in outputs), default=1.0)
        if low < min_cosine:
            console.errors.print(f"error: mean cosine {low:.5f} is below {min_cosine}", style="red")
            raise typer.Exit(3)


@app.command(
    epilog="""[bold]Examples[/bold]

onnx-magr verify model.onnx --target x86-avx2

onnx-magr verify model.onnx --accumulator-bits 16 --accumulator-tile 64

onnx-magr verify model.onnx --target generic --outer-bits 24 --json"""
)
def verify(
    model: Annotated[Path, typer.Argument(help="ONNX model to read, whoever quantized it.", show_default=False)],
    target: Annotated[str | None, typer.Option("--target", "-t", help=f"Machine to prove for: {', '.join(TARGETS)}.")] = None,
    accumulator_bits: Annotated[int | None, typer.Option("--accumulator-bits", help="Width P of the register that sums a tile.")] = None,
    accumulator_tile: Annotated[
        int | None, typer.Option("--accumulator-tile", help="Consecutive terms T that share it. (default: the whole dot product)")
    ] = None,
    outer_bits: Annotated[
        int | None, typer.Option("--outer-bits", help="Width of the register the tile sums are added in. (default: 32)")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove that no input of a model overflows an integer accumulator, or show one that does.

    Exits with 0 if nothing overflows and with 1 if something does; nodes that are no integer dot products are listed, not claimed.
    """
    accumulator = None
    if accumulator_bits is not None:
        outer = max(32, accumulator_bits) if outer_bits is None else outer_bits
        accumulator = Accumulator(accumulator_bits, accumulator_tile, outer)
    elif accumulator_tile is not None:
        raise OptionError("--accumulator-tile needs --accumulator-bits")
    if (target is None) == (accumulator is None):
        raise OptionError("give --target or --accumulator-bits, and not both")
    result = api.verify(model, target=target, accumulator=accumulator, outer_bits=None if accumulator is not None else outer_bits)
    _show(result.to_dict(), result.to_text(), as_json, quiet)
    if not result.ok:
        raise typer.Exit(1)


@app.command(epilog="[bold]Example[/bold]\n\nonnx-magr passes --json")
def passes(as_json: Json = False) -> None:
    """List the passes a pipeline may name, with their options and defaults."""
    lines, value = [], []
    for name, kind in PASSES.items():
        known = options_of(kind)
        lines.append(f"{name}: {kind.summary}")
        lines += [f"    {option}={_shown(default)}" for option, (_, default) in known.items()]
        value.append({"name": name, "summary": kind.summary, "options": {o: d for o, (_, d) in known.items()}})
    lines += ["", "example: 'magr{alpha=1e-3},quantize{method=gptq,bits=4},compensate-bias,emit-matmulnbits'"]
    _show(value, "\n".join(lines), as_json)


@app.command(epilog="[bold]Example[/bold]\n\nonnx-magr demo")
def demo(
    folder: Annotated[Path | None, typer.Option("--folder", help="Keep the quantized models here; default: they are removed.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the bundled language model and print its perplexity before and after."""
    if folder is not None and not folder.is_dir():
        raise OutputError(f"folder {folder} does not exist; create it first")
    with tempfile.TemporaryDirectory(prefix="onnx-magr-") as temporary, console.progress_bar(not quiet) as progress:
        result = demonstration.run(folder or Path(temporary), progress)
    _show(_plain(result), demonstration.to_text(result), as_json, quiet)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value)


def _show(value: Any, text: str, as_json: bool, quiet: bool = False) -> None:
    if as_json:
        console.say_json(value)
    elif not quiet:
        console.say(text)


class _Interrupted(BaseException):
    """Ctrl-C, under a name that no library below catches for itself."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; explained errors are one message on standard error and exit code 1."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except MagrError as error:
        console.errors.print("error:", style="bold red", end=" ")
        console.errors.print(str(error), markup=False)
        sys.exit(1)
    except _Interrupted:
        console.errors.print("interrupted; no output was changed")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
