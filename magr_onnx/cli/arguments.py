"""Options of the command line: those that several commands have, and those of optimize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magr_onnx.cli import console
from magr_onnx.cli.choices import Activation, Bias, Bits, ConvBits, ConvForm, Effort, EmbeddingBits, Embeddings, Format, Quantizer, Range
from magr_onnx.config.presets import PRESETS
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.passes.registry import stages

DATA, RECIPES, LAYERS, WEIGHTS = "Data and output", "Recipes and presets", "Which layers", "Bits, formats and accuracy"
FINE, OTHERS, INTEGERS = "Fine tuning of the solvers", "Convolutions and embeddings", "Integer layers and accumulators"
LARGE = "Large models and where it runs"
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Say everything: stages, memory, layers as they are finished, whole lists, where unexpected errors come from.",
        callback=console.be_verbose,
    ),
]
Provider = Annotated[str, typer.Option("--provider", help="cpu, cuda, or an onnxruntime provider name.", rich_help_panel=LARGE)]
Mask = Annotated[
    str,
    typer.Option("--mask", help="Input that marks the rows to count; auto: attention_mask if there is one; none.", rich_help_panel=DATA),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples a batch when a stacked .npz is cut up.", rich_help_panel=DATA)]
DecodeSteps = Annotated[
    int,
    typer.Option(
        "--decode-steps",
        min=0,
        help="Decoders with a cache: last tokens of each sample that are fed once more, one by one.",
        rich_help_panel=DATA,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", help="Only layers whose node, weight or module matches; repeatable.", rich_help_panel=LAYERS),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Leave matching layers as they are; repeatable.", rich_help_panel=LAYERS)
]

CustomOps = Annotated[
    list[Path] | None,
    typer.Option(
        "--custom-ops", metavar="FILE", help="Shared library with custom operators of the model; may be given again.", rich_help_panel=LARGE
    ),
]
Requantize = Annotated[
    bool,
    typer.Option(
        "--requantize",
        help="Take weights behind DequantizeLinear (QDQ) for the floats they stand for, and quantize those; other forms are left alone.",
        rich_help_panel=LAYERS,
    ),
]


def target_names() -> list[tuple[str, str]]:
    """Targets for the shell to complete, with a line about each."""
    return [(name, target.summary) for name, target in TARGETS.items()]


def _passes(incomplete: str) -> list[str]:
    """Pipelines that go on with one more pass."""
    before, comma, start = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in stages() if name.startswith(start)]


# Of optimize.
ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="ONNX model to read, or a folder of models; a recipe may name it instead.", show_default=False),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe", "-r", metavar="FILE", help="TOML file that describes the run; options given here win over it.", rich_help_panel=RECIPES
    ),
]
SaveRecipeOption = Annotated[
    Path | None,
    typer.Option("--save-recipe", metavar="FILE", help="Write the recipe of this run, with comments.", rich_help_panel=RECIPES),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        metavar="NAME",
        help=f"Options to start from: {', '.join(PRESETS)}; see 'onnx-magr presets'.",
        rich_help_panel=RECIPES,
        autocompletion=lambda: [(name, preset.summary.partition(":")[0]) for name, preset in PRESETS.items()],
    ),
]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="PATTERN:OPTIONS",
        help="Options of matching layers, as '*lm_head*:bits=8,block_size=32'; repeatable, later ones win.",
        rich_help_panel=RECIPES,
    ),
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--models", metavar="PATTERN", help="Of a folder: only these models, the others are copied; repeatable.", rich_help_panel=DATA
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Of a folder: replace an earlier result; files of yours in it are kept.", rich_help_panel=DATA)
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="File to write, or folder for a folder; default: MODEL with .magr before its suffix.", rich_help_panel=DATA
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        "-c",
        help=".npz of stacked inputs, folder of .npz batches, or folder of test_data_set folders; with tokenizer.json beside the "
        "model also .txt, a sample a line. Without it: data-free.",
        rich_help_panel=DATA,
    ),
]
ValidationOption = Annotated[
    Path | None,
    typer.Option("--validation", help="Held-out inputs to compare both models on, in the same forms.", rich_help_panel=DATA),
]
BitsOption = Annotated[
    Bits | None,
    typer.Option("--bits", "-b", help="Bits a weight, 2 to 8. (default: 4; integer formats 8)", metavar="N", rich_help_panel=WEIGHTS),
]
BlockSizeOption = Annotated[
    str | None,
    typer.Option(
        "--block-size",
        help="Rows that share a scale: a multiple of 16, or 'channel'. (default: 32; integer formats channel)",
        metavar="N",
        rich_help_panel=WEIGHTS,
    ),
]
EffortOption = Annotated[
    Effort | None,
    typer.Option(
        "--effort",
        "-e",
        help="fast: one pass over the data; balanced: staged, options chosen per layer, 2 to 2.5 times as long; best: gradients too, "
        "4 to 6 times as long. (default: balanced; integer formats and without calibration: fast)",
        metavar="NAME",
        rich_help_panel=WEIGHTS,
    ),
]
QuantizerOption = Annotated[
    Quantizer | None,
    typer.Option(
        "--quantizer",
        help="Instead of an effort: auto, rtn, gptq, comq (GPTQ refined by coordinate descent), hqq; a2q, a2q+ under an accumulator.",
        metavar="NAME",
        rich_help_panel=WEIGHTS,
    ),
]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        help="Nodes to write: matmulnbits, qdq; with 8-bit layer inputs qdq-int8, dynamic-int8.",
        metavar="NAME",
        rich_help_panel=WEIGHTS,
    ),
]
SymmetricOption = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Fix the zero point in the middle. (default: asymmetric; integer formats symmetric)",
        rich_help_panel=WEIGHTS,
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        min=0,
        help="Strength of MagR, relative to the layer; 0: off. "
        "(default: chosen per layer; fast: 1e-3 per channel, 1e-4 per block, 0 above 4 bits)",
        metavar="X",
        rich_help_panel=FINE,
    ),
]
BetaOption = Annotated[
    float | None,
    typer.Option("--beta", help="Shrink of the min-max grid, up to 1. (default: searched per group)", metavar="X", rich_help_panel=FINE),
]
DampingOption = Annotated[
    float | None,
    typer.Option(
        "--damping",
        min=0,
        help="Added to the Gram matrix, in units of its diagonal. (default: about 2 K / rows)",
        metavar="X",
        rich_help_panel=FINE,
    ),
]
ActOrderOption = Annotated[
    bool | None,
    typer.Option(
        "--act-order/--no-act-order", help="Round strong inputs first. (default: chosen per layer; fast: yes)", rich_help_panel=FINE
    ),
]
SweepsOption = Annotated[
    int, typer.Option("--sweeps", min=0, help="Most coordinate-descent sweeps (comq).", metavar="N", rich_help_panel=FINE)
]
BiasOption = Annotated[
    Bias,
    typer.Option(
        "--bias",
        help="Bias compensation: existing, any, none; auto: wherever it adds no node.",
        metavar="NAME",
        rich_help_panel=FINE,
    ),
]
AccuracyLevelOption = Annotated[
    int,
    typer.Option("--accuracy-level", help="MatMulNBits compute type: 0 unset, 1 float32, 4 int8.", metavar="N", rich_help_panel=WEIGHTS),
]
ActivationTypeOption = Annotated[
    Activation | None,
    typer.Option(
        "--activation-type", help="Layer inputs of qdq-int8: uint8, int8. (default: uint8)", metavar="TYPE", rich_help_panel=INTEGERS
    ),
]
ActivationRangeOption = Annotated[
    Range | None,
    typer.Option(
        "--activation-range",
        help="Ranges of layer inputs: min-max, percentile, min-error; auto: the least measured error. (default: auto)",
        metavar="NAME",
        rich_help_panel=INTEGERS,
    ),
]
QuantizeOutputsOption = Annotated[
    bool,
    typer.Option("--quantize-outputs", help="qdq-int8: quantize what layers put out too (QLinearMatMul).", rich_help_panel=INTEGERS),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help=f"Machine on which no accumulator may overflow: {', '.join(TARGETS)}.",
        show_default=False,
        metavar="NAME",
        autocompletion=target_names,
        rich_help_panel=INTEGERS,
    ),
]
AccumulatorBitsOption = Annotated[
    int | None,
    typer.Option(
        "--accumulator-bits",
        help="Accumulator that may not overflow; sizes the blocks of matmulnbits.",
        metavar="P",
        rich_help_panel=INTEGERS,
    ),
]
AccumulatorTileOption = Annotated[
    int | None,
    typer.Option(
        "--accumulator-tile",
        help="Terms along K that share the accumulator. (default: all of them)",
        metavar="T",
        rich_help_panel=INTEGERS,
    ),
]
FeedbackOption = Annotated[
    bool | None,
    typer.Option(
        "--feedback/--no-feedback",
        help="Quantize in stages, each layer towards the float output from its quantized inputs. (default: as the effort says)",
        rich_help_panel=FINE,
    ),
]
CacheOption = Annotated[
    str,
    typer.Option(
        "--cache",
        help="Memory for values between stages, as 512MB or 2GB; more go to a temporary folder.",
        metavar="SIZE",
        rich_help_panel=LARGE,
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Run models of more than a third of this in stages only, with finished layers on disk. (default: 4GB; docs/large.md)",
        metavar="SIZE",
        show_default=False,
        rich_help_panel=LARGE,
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        help="Keep finished layers in this folder; after a kill the same command goes on from there, to the same file.",
        metavar="DIR",
        show_default=False,
        rich_help_panel=LARGE,
    ),
]
ShardSizeOption = Annotated[
    str | None,
    typer.Option(
        "--shard-size",
        help="Put the weights into data files of at most this size, as 2GB.",
        metavar="SIZE",
        show_default=False,
        rich_help_panel=LARGE,
    ),
]
ExternalDataOption = Annotated[
    bool,
    typer.Option(
        "--external-data", help="Put the weights into a data file beside the model, as is done above 1.9 GB.", rich_help_panel=LARGE
    ),
]
LowRankOption = Annotated[
    int,
    typer.Option(
        "--low-rank", min=0, help="Rank of a float branch a layer that gives back error; 0: none.", metavar="N", rich_help_panel=FINE
    ),
]
EqualizeOption = Annotated[
    bool,
    typer.Option("--equalize", help="Move scales between channels into norms and layers before, at no cost.", rich_help_panel=FINE),
]
SplitOutliersOption = Annotated[
    bool,
    typer.Option("--split-outliers", help="Make two layers of one with outliers, at twice its cost.", rich_help_panel=FINE),
]
TwinRangesOption = Annotated[
    bool,
    typer.Option(
        "--twin-ranges", help="qdq-int8: two ranges for inputs from GELU and Softmax, at twice the cost.", rich_help_panel=INTEGERS
    ),
]
TargetSizeOption = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        help="Mixed precision, least loss in a file of this size: 25% of the source, 4bit (as all layers at 4), 30MB.",
        show_default=False,
        metavar="SIZE",
        rich_help_panel=WEIGHTS,
    ),
]
MaxLossOption = Annotated[
    str | None,
    typer.Option(
        "--max-loss",
        help="Mixed precision, smallest file of this loss on held-out calibration data. 1% is 0.01 of the mean KL divergence in nats "
        "(logits) or of 1 - mean cosine (other outputs), not of the size or the perplexity; at most 100%.",
        show_default=False,
        metavar="LOSS",
        rich_help_panel=WEIGHTS,
    ),
]
ConvBitsOption = Annotated[
    ConvBits | None,
    typer.Option(
        "--conv-bits",
        help="Bits of the weights of convolutions in every format, 3 to 8; none leaves them float. (default: 8)",
        metavar="N",
        rich_help_panel=OTHERS,
    ),
]
ConvFormOption = Annotated[
    ConvForm | None,
    typer.Option(
        "--conv-form",
        help="Quantized convolutions: dequantize (DequantizeLinear, in every run) or fold (floats again when the file is loaded, full "
        "speed). (default: dequantize in formats qdq and qdq-int8, else fold)",
        metavar="NAME",
        rich_help_panel=OTHERS,
    ),
]
EmbeddingsOption = Annotated[
    Embeddings,
    typer.Option(
        "--embeddings",
        help="Tables of embeddings: gather-block-quantized (one contrib operator), dequantize (standard operators, 8 bits), none.",
        metavar="NAME",
        rich_help_panel=OTHERS,
    ),
]
EmbeddingBitsOption = Annotated[
    EmbeddingBits | None,
    typer.Option("--embedding-bits", help="Bits of a table, 4 or 8. (default: 8)", metavar="N", rich_help_panel=OTHERS),
]
PipelineOption = Annotated[
    str | None,
    typer.Option(
        "--pipeline",
        help="Passes as text, instead of the options above; see 'onnx-magr passes'.",
        metavar="TEXT",
        rich_help_panel=FINE,
        autocompletion=_passes,
    ),
]
ReportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        help="Also write the report to this file, a page (.html) or data (.json); can be repeated.",
        metavar="FILE",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
