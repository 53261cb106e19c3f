"""Every option of a run, declared once: the command line, recipes, options of layers and presets, `magr_onnx.optimize`, how options
displace each other, and the reference page are made from the tables here."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypedDict

from magr_onnx.core.activation_ranges import METHODS
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.core.quantizers import QUANTIZERS, method_options, quantizers_with
from magr_onnx.core.types import BITS
from magr_onnx.passes.emit import FORMATS, Format
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.layers import conv, embedding, recurrent
from magr_onnx.passes.providers import PROVIDERS
from magr_onnx.passes.tensors.backends import BACKENDS
from magr_onnx.runtime.calibration.moments import DEFAULT_BUDGET
from magr_onnx.runtime.data.decoders import STEPS

Effort = Literal["fast", "balanced", "best"]
BIAS = ("auto", "any", "existing", "none")

DATA, RECIPES, LAYERS = "Data and output", "Recipes and presets", "Which layers"
WEIGHTS, FINE = "Bits, formats and accuracy", "Fine tuning of the solvers"
OTHERS, INTEGERS = "Convolutions, recurrent operators and embeddings", "Integer layers and accumulators"
LARGE = "Large models and where it runs"
PANELS = (DATA, RECIPES, LAYERS, WEIGHTS, FINE, INTEGERS, OTHERS, LARGE)
"""Headings that options stand under, in order."""

_INPUTS, _GRAPH = "layers share their inputs", "it changes the model before layers are looked for"
_PROOF, _BUDGET = "a proof is of the whole file", "a budget is of the whole file"
_CONVOLUTIONS, _TABLES = "it is for convolutions, all of them", "it is for tables of embeddings, all of them"
_RECURRENT = "it is for recurrent operators, all of them"


def _by_format(fact: Callable[[Format], object]) -> str:
    """Describe a default that depends on the format: that of the first format, and what others have instead."""
    names: dict[str, list[str]] = {}
    for form in FORMATS.values():
        names.setdefault(str(fact(form)), []).append(form.name)
    (usual, _), *others = names.items()
    return "; ".join([usual, *(f"{value} in {', '.join(forms)}" for value, forms in others)])


# fmt: off
# A paragraph an option: one argument a line would make these tables three times as long.


class Options(TypedDict, total=False):
    """What a plan is made of (`magr_onnx.build_pipeline`); every option has a good default."""

    bits: Annotated[int | None, OptionSpec(
        help="Bits per weight, 2 to 8.", default_text=_by_format(lambda form: form.bits), choices=BITS, panel=WEIGHTS, metavar="N",
        flags=("--bits", "-b"), displaces=("target_size", "max_loss"))]
    block_size: Annotated[int | None, OptionSpec(
        help="Rows that share a scale: a multiple of 16, or 'channel'.", expected="a multiple of 16",
        default_text=_by_format(lambda form: form.block_size or "channel"), none_word="channel", panel=WEIGHTS, metavar="N")]
    effort: Annotated[Effort | None, OptionSpec(
        help="fast: layers in one pass; balanced: staged, options chosen per layer, 2 to 2.5 times as long; best: gradients too, "
        "4 to 6 times as long.", default_text=_by_format(lambda form: form.effort) + "; fast without data", panel=WEIGHTS, metavar="NAME",
        flags=("--effort", "-e"), whole_run="error feedback and gradients belong to the whole run; give the layer a quantizer",
        displaces=("quantizer",))]
    quantizer: Annotated[str | None, OptionSpec(
        help=f"Instead of an effort: {', '.join(q.name for q in QUANTIZERS.values() if q.accumulators != 'only')}; under an "
        f"accumulator also {', '.join(q.name for q in QUANTIZERS.values() if q.accumulators == 'only')}.", choices=QUANTIZERS,
        panel=WEIGHTS, metavar="NAME", displaces=("effort",))]
    format: Annotated[str, OptionSpec(
        help=f"Nodes to write: {'; '.join(f'{form.name} ({form.summary})' for form in FORMATS.values())}.", default=next(iter(FORMATS)),
        choices=FORMATS, panel=WEIGHTS, metavar="NAME", whole_run="a file has one format")]
    symmetric: Annotated[bool | None, OptionSpec(
        help="Fix the zero point in the middle.",
        default_text=_by_format(lambda form: "symmetric" if form.symmetric else "asymmetric"), panel=WEIGHTS,
        flags=("--symmetric/--asymmetric",))]
    alpha: Annotated[float | None, OptionSpec(
        help="Strength of MagR, relative to the layer; 0: off.",
        default_text="chosen per layer; fast: 1e-3 per channel, more below 4 bits with beta; 1e-4 per block; 0 above 4 bits",
        least=0, panel=FINE, metavar="X")]
    beta: Annotated[float | None, OptionSpec(
        help="Shrink of the min-max grid, up to 1.", default_text="searched per group", panel=FINE, metavar="X")]
    damping: Annotated[float | None, OptionSpec(
        help="Added to the Gram matrix, in units of its diagonal.", default_text="about 2 K / rows", least=0, panel=FINE, metavar="X")]
    act_order: Annotated[bool | None, OptionSpec(
        help="Round strong inputs first.", default_text="chosen per layer; fast: yes", panel=FINE, flags=("--act-order/--no-act-order",))]
    sweeps: Annotated[int, OptionSpec(help="Most coordinate-descent sweeps (auto, comq).", default=8, least=0, panel=FINE, metavar="N")]
    bias: Annotated[str, OptionSpec(
        help="Bias correction: existing, any, none; auto: wherever it adds no node.", default="auto", choices=BIAS, panel=FINE,
        metavar="NAME")]
    accuracy_level: Annotated[int | None, OptionSpec(
        help="MatMulNBits compute type: 0 unset, 1 float32, 4 int8 inputs; auto: 4 in layers that are faster so on this machine, as far as "
        "it costs little accuracy.", default_text="auto", none_word="auto", panel=WEIGHTS, metavar="N")]
    activation_type: Annotated[Literal["uint8", "int8", "uint16", "int16"], OptionSpec(
        help="Activations: uint8, int8; in qdq-full also uint16, int16.", default_text="uint8, or what the backend has",
        panel=INTEGERS, metavar="TYPE", whole_run=_INPUTS)]
    activation_range: Annotated[str, OptionSpec(
        help="Ranges of layer inputs of qdq-int8: min-max, percentile, min-error, daq (from means and deviations of channels); "
        "auto: the least measured error of the others.", default_text="auto", choices=METHODS,
        panel=INTEGERS, metavar="NAME", whole_run=_INPUTS)]
    backend: Annotated[str, OptionSpec(
        help=f"Runtime whose rules qdq-full follows: {', '.join(BACKENDS)}.", default=next(iter(BACKENDS)), choices=BACKENDS,
        panel=INTEGERS, metavar="NAME", whole_run=_GRAPH, belongs_to="format")]
    wide_activations: Annotated[float, OptionSpec(
        help="qdq-int8 and qdq-full with 8-bit activations: share of the work, 0 to 1, that may be done in 16 bits, for the "
        "activations that cost the most accuracy in 8. With --max-loss, the least share that keeps to it is found.", default=0.0, least=0,
        panel=INTEGERS, metavar="X",
        whole_run="layers share values", belongs_to="format")]
    quantize_outputs: Annotated[bool, OptionSpec(
        help="qdq-int8: quantize layer outputs, too (QLinearMatMul, QGemm).", default=False, panel=INTEGERS,
        whole_run="layers share values")]
    prefer: Annotated[Literal["speed", "size"], OptionSpec(
        help="qdq-int8: speed computes convolutions in float that are slower in integers on this machine, where it is the target; size "
        "times nothing.", default="speed", panel=INTEGERS, whole_run="layers share values", belongs_to="format")]
    row_ranges: Annotated[bool, OptionSpec(
        help="dynamic-int8: a range for every row of a layer's input, so that samples of a batch do not depend on each other.",
        default=False, panel=INTEGERS, whole_run="layers share values")]
    feedback: Annotated[bool | None, OptionSpec(
        help="Quantize in stages, each layer towards the float output from its quantized inputs.",
        default_text="for convolutions yes, for layers as the effort says; no where a quantizer is named", panel=FINE,
        flags=("--feedback/--no-feedback",), whole_run="stages are those of the whole model")]
    output_hessian: Annotated[Literal["none", "two-sided", "adaptive"] | None, OptionSpec(
        help="What gradients of the model's outputs are for: two-sided lets errors of a layer's outputs cancel; adaptive weighs its inputs "
        "by them; none. For efforts balanced and best, with data.", default_text="two-sided with effort best, else none", panel=FINE,
        metavar="NAME", whole_run="gradients are those of the whole model")]
    tune_scales: Annotated[bool | None, OptionSpec(
        help="Tune the scales of all layers by the loss at the model's outputs, in three passes over the data.",
        default_text="where layers have float inputs: with effort best up to 4 bits; with effort balanced at 2 and 3 bits, in one pass, if "
        "max_memory allows it", panel=FINE,
        flags=("--tune-scales/--no-tune-scales",), whole_run="the loss is that of the whole model")]
    low_rank: Annotated[int, OptionSpec(
        help="Rank of a float branch beside every layer that recovers error; 0: none.", default=0, least=0, panel=FINE, metavar="N")]
    rotate: Annotated[Literal["none", "on", "auto"] | None, OptionSpec(
        help="Rotate the residual stream of a transformer, and the values of its attentions, so that weights are easier to round; folded "
        "into the weights, at no cost: none; on; auto: where it lowers the loss of the model with weights rounded to nearest. The stream "
        "stays as it is where norms stand behind the sums (BERT).",
        default_text="on for weights of up to 4 bits with one scale per channel and auto for 2 and 3 bits in blocks, unless effort fast or "
        "a quantizer is given; else none",
        panel=FINE, metavar="NAME",
        whole_run="it turns what layers share")]
    equalize: Annotated[bool, OptionSpec(
        help="Move scales between channels into norms, layers and integer convolutions before, at no cost.", default=False, panel=FINE,
        whole_run="it moves scales between layers")]
    split_outliers: Annotated[bool, OptionSpec(
        help="Split layers with outliers in two, at twice their cost.", default=False, panel=FINE, whole_run=_GRAPH)]
    split_salient: Annotated[float, OptionSpec(
        help="Share of every layer's inputs, up to 0.5, those with the largest gradients, whose weights get 8 bits, in a second product; "
        "0: none.", default=0.0, least=0, panel=FINE, metavar="X", whole_run=_GRAPH)]
    twin_ranges: Annotated[bool, OptionSpec(
        help="qdq-int8: two ranges for inputs from GELU and Softmax, at twice the cost.", default=False, panel=INTEGERS, whole_run=_GRAPH,
        belongs_to="format")]
    target: Annotated[str | None, OptionSpec(
        help=f"Machine on which no accumulator may overflow: {', '.join(TARGETS)}.", choices=TARGETS, panel=INTEGERS, metavar="NAME",
        whole_run=_PROOF, displaces=("accumulator_bits", "accumulator_tile"), belongs_to="format")]
    accumulator_bits: Annotated[int | None, OptionSpec(
        help="Accumulator that may not overflow, instead of a target; sizes the blocks of matmulnbits.", panel=INTEGERS, metavar="P",
        whole_run=_PROOF, displaces=("target",), belongs_to="format")]
    accumulator_tile: Annotated[int | None, OptionSpec(
        help="Terms along K that share the accumulator.", default_text="all of them; matmulnbits: its block", panel=INTEGERS, metavar="T",
        whole_run=_PROOF, belongs_to="format")]
    target_size: Annotated[str | None, OptionSpec(
        help="Mixed precision, least loss in a file of this size: 25% of the source, 4bit (as all layers at 4), 30MB. A block size "
        "given with it is the only one tried.", expected="a text such as '25%', '4bit' or '30MB'", panel=WEIGHTS, metavar="SIZE",
        whole_run=_BUDGET, displaces=("bits", "max_loss"))]
    max_loss: Annotated[str | None, OptionSpec(
        help="Mixed precision, smallest file of this loss on held-out calibration data. 1% is 0.01 of the mean KL divergence in nats "
        "(logits) or of 1 - mean cosine (other outputs), not of the size or the perplexity; at most 100%. With a metric, of that: an "
        "amount, or a percentage of the float model's.", expected="a text such as '1%' or '0.01'", panel=WEIGHTS, metavar="LOSS",
        whole_run=_BUDGET, displaces=("bits", "target_size"))]
    conv_bits: Annotated[int | None, OptionSpec(
        help="Bits of the weights of convolutions in every format, 3 to 8; none leaves them float.",
        default_text="8; chosen for each by a budget, where they compute in float", choices=conv.BITS,
        none_word="none", panel=OTHERS, metavar="N", whole_run=_CONVOLUTIONS)]
    conv_form: Annotated[conv.Form, OptionSpec(
        help="Quantized convolutions: fold (floats again when the file is loaded, full speed), dequantize (DequantizeLinear, in every "
        "run), integer (qdq-int8: computed in integers, with all that is between them).",
        default_text=_by_format(lambda form: form.conv_form), panel=OTHERS, metavar="NAME", whole_run=_CONVOLUTIONS)]
    embeddings: Annotated[str, OptionSpec(
        help="Embedding tables: gather-block-quantized (one contrib operator), dequantize (standard operators, 8 bits), none.",
        default="none", choices=("none", *embedding.FORMS), panel=OTHERS, metavar="NAME", whole_run=_TABLES)]
    embedding_bits: Annotated[int | None, OptionSpec(
        help="Bits of a table, 4 or 8.", default_text="8", choices=embedding.BITS, panel=OTHERS, metavar="N", whole_run=_TABLES,
        belongs_to="embeddings")]
    recurrent: Annotated[str, OptionSpec(
        help="Weights of LSTM, GRU and RNN, in 8 bits: dynamic-quantize-lstm (one contrib operator, integers, fast; other operators as "
        "fold), fold (computed in float at its speed), dequantize (DequantizeLinear, in every run), none.",
        default="none", choices=("none", *recurrent.FORMS), panel=OTHERS, metavar="NAME", whole_run=_RECURRENT)]


_TEXT, _OPTIONAL, _FLAG = (str,), (str, NoneType), (bool,)


def _by_name(specs: Iterable[OptionSpec]) -> dict[str, OptionSpec]:
    return {spec.name: spec for spec in specs}


RUN = _by_name(
    (
        OptionSpec(name="model", kind="path", help="ONNX model to read, or a folder of models.", types=_TEXT, panel=DATA),
        OptionSpec(
            name="calibration", kind="path",
            help=".npz of stacked inputs, folder of .npz batches, or folder of test_data_set folders; or text: a .txt file, or a .jsonl "
            "file of text, chats (messages) or tokens (input_ids), read with a tokenizer. Without it: data-free.", types=_TEXT,
            panel=DATA, flags=("--calibration", "-c")),
        OptionSpec(
            name="output", kind="path", help="File to write, or folder for a folder.", default_text="MODEL with .magr before its suffix",
            types=_OPTIONAL, panel=DATA, flags=("--output", "-o")),
        OptionSpec(
            name="validation", argument="validation_data", kind="path",
            help="Held-out inputs to compare both models on, in the same forms.", types=_TEXT, panel=DATA),
        OptionSpec(
            name="metric", kind="path",
            help="Your own measure, SCRIPT.py or SCRIPT.py:FUNCTION: predictions on the validation inputs in, a number out, the higher "
            "the better. It is reported for both models, and --max-loss is of it.", types=_OPTIONAL, panel=DATA, metavar="SCRIPT"),
        OptionSpec(
            name="tokenizer", kind="path", help="Text: tokenizer.json, or its folder.", default_text="the one beside the model",
            types=_OPTIONAL, panel=DATA, metavar="FILE"),
        OptionSpec(
            name="samples", help="Text: sequences that are drawn from it.", types=(int, NoneType), least=1, panel=DATA, metavar="N",
            default_text="128; all lines for a model that is no language model"),
        OptionSpec(
            name="sequence_length", help="Text: tokens of a sequence.", types=(int, NoneType), least=2, panel=DATA, metavar="N",
            default_text="512, or less for a short text"),
        OptionSpec(name="seed", help="Text: seed of the draw.", types=(int,), default=0, least=0, panel=DATA, metavar="N"),
        OptionSpec(
            name="models", kind="patterns", help="Folders: only these models, the others are copied; repeatable.", types=_TEXT,
            panel=DATA, metavar="PATTERN"),
        OptionSpec(
            name="overwrite", help="Folders: replace an earlier result; your own files in it are kept. A file is always replaced.",
            types=_FLAG, default=False, panel=DATA),
        OptionSpec(
            name="mask", help="Input that marks the rows to count; auto: attention_mask if there is one; none.", types=_OPTIONAL,
            default="auto", none_word="none", panel=DATA),
        OptionSpec(
            name="batch_size", help="Samples per batch when a stacked .npz is split.", types=(int,), default=16, least=1, panel=DATA),
        OptionSpec(
            name="decode_steps", help="Decoders with a cache: last tokens of each sample that are fed once more, one by one.",
            types=(int,), default=STEPS, least=0, panel=DATA),
        OptionSpec(
            name="preset", help="A set of options to start from; see 'onnx-magr presets'.", types=_OPTIONAL, panel=RECIPES,
            metavar="NAME", flags=("--preset", "-p")),
        OptionSpec(
            name="include", kind="patterns", help="Only layers whose node, weight or module matches; repeatable.", types=_TEXT,
            panel=LAYERS),
        OptionSpec(name="exclude", kind="patterns", help="Leave matching layers as they are; repeatable.", types=_TEXT, panel=LAYERS),
        OptionSpec(
            name="requantize",
            help="Take weights behind DequantizeLinear (QDQ) for the floats they stand for, and quantize those; other forms are left "
            "alone.", types=_FLAG, default=False, panel=LAYERS),
        OptionSpec(
            name="keep_overridable",
            help="Leave weights that are inputs of the graph too to whoever runs the model; without this they become constants.",
            types=_FLAG, default=False, panel=LAYERS),
        OptionSpec(
            name="pipeline", argument="pipeline_text", help="Passes as text, instead of the options above; see 'onnx-magr passes'.",
            types=_TEXT, panel=FINE, metavar="TEXT"),
        OptionSpec(
            name="custom_ops", kind="paths", help="Shared library with custom operators of the model; may be given again.", types=_TEXT,
            panel=LARGE, metavar="FILE"),
        OptionSpec(
            name="provider", help=f"{', '.join(PROVIDERS)}, or an onnxruntime provider name.", types=_TEXT, default="cpu", panel=LARGE),
        OptionSpec(
            name="device",
            help="Where layers are solved: cpu; cuda or cuda:1, a GPU, with the extra gpu; torch-cpu, what a GPU does on the CPU, for "
            "tests. The provider says where models run.", types=_TEXT, default="cpu", panel=LARGE, metavar="NAME"),
        OptionSpec(
            name="workers", types=(str, int, NoneType), expected="a number of processes or the address of a scheduler",
            help="Solve layers in this many processes, or by the workers of a scheduler of dask.distributed, as tcp://host:8786, to the "
            "same file; see docs/distributed.md.", panel=LARGE, metavar="N|ADDRESS"),
        OptionSpec(
            name="cache", kind="size", help="Memory for values between stages, as 512MB or 2GB; more go to a temporary folder.",
            types=_TEXT, default="2GB", least=0, panel=LARGE, metavar="SIZE"),
        OptionSpec(
            name="max_memory", kind="size",
            help="Run models of more than a third of this in stages only, with finished layers on disk; see docs/large.md.",
            default_text="4GB", types=_OPTIONAL, panel=LARGE, metavar="SIZE"),
        OptionSpec(
            name="resume", kind="path",
            help="Keep finished layers in this folder; after a kill the same command goes on from there, to the same file.",
            types=_OPTIONAL, panel=LARGE, metavar="DIR"),
        OptionSpec(
            name="external_data", help="Put the weights into a data file beside the model, as is done above 0.5 GB.", types=_FLAG,
            default=False, panel=LARGE),
        OptionSpec(
            name="shard_size", kind="size", help="Put the weights into data files of at most this size, as 2GB.", types=_OPTIONAL,
            panel=LARGE, metavar="SIZE"),
    )
)
"""Options of a run beside `OPTIONS`: files, data, layers, memory."""

CALLS = _by_name(
    (
        OptionSpec(name="recipe", help="A Recipe, its file, or its values as a dict; every argument given beside it wins."),
        OptionSpec(
            name="layers",
            help='Options of single layers, as {"match": "*lm_head*", "bits": 8}, after those of the recipe; later ones win.',
            default=()),
        OptionSpec(
            name="gram_budget", kind="size", help="Memory for Gram matrices at a time; a smaller one costs more passes over the data.",
            default=DEFAULT_BUDGET, types=_TEXT),
        OptionSpec(
            name="progress",
            help="True draws bars on standard error where that is a terminal or a notebook; a callable gets a stage's name, steps done and "
            "steps in total. The logger magr_onnx has lines about stages at level INFO.", default=True),
        OptionSpec(
            name="on_layer",
            help="Called with the report's row of every layer as it is finished; again where a budget has it solved again."),
    )
)
"""Arguments that only calls in Python have."""
# fmt: on


def _spec(name: str, hint: Any) -> OptionSpec:
    """Complete the declaration of an option of `Options`: its name, and types and choices from its hint."""
    kind, spec = typing.get_args(hint)
    parts = typing.get_args(kind) if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union else (kind,)
    literals = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    types = tuple(str if typing.get_origin(part) is Literal else part for part in parts)
    owner = "format" if any(name in form.exclusive_options for form in FORMATS.values()) else spec.belongs_to
    result: OptionSpec = replace(spec, name=name, types=types, choices=tuple(spec.choices or literals), belongs_to=owner)
    return result


_COMMAND_LINE = ("help", "json", "layer", "quiet", "report", "save_recipe", "verbose", "version")
"""Names that the command line and recipes have beside the options here."""


def _quantizer_options(shared: Mapping[str, OptionSpec]) -> dict[str, OptionSpec]:
    """Return the options declared by quantizers.

    Raises:
        ValueError: One has a name that is taken: it would silently replace the other option.
    """
    arguments = (option.argument for option in RUN.values() if option.argument)
    fields = (field.name for field in dataclasses.fields(Quantize))
    taken = {*shared, *RUN, *CALLS, *arguments, *fields, *_COMMAND_LINE}
    declared = method_options()
    if problems := [f"{name!r} of quantizer {' and '.join(quantizers_with(name))}" for name in declared if name in taken]:
        raise ValueError(f"options have names that are taken: {', '.join(problems)}; rename them")
    return {name: replace(option, panel=option.panel or FINE) for name, option in declared.items()}


_shared = {name: _spec(name, hint) for name, hint in typing.get_type_hints(Options, include_extras=True).items()}
OPTIONS: Mapping[str, OptionSpec] = {**_shared, **_quantizer_options(_shared)}
"""What a plan is made of: `Options`, and the options that quantizers have of their own."""

KEYS: Mapping[str, OptionSpec] = {**RUN, **OPTIONS}
"""The keys of a recipe, which are the long options of the command line with _ for -."""

ARGUMENTS: Mapping[str, OptionSpec] = {**KEYS, **CALLS}

_attributes = "".join(f"        {option.name}: {option.text}\n" for option in OPTIONS.values())
Options.__doc__ = f"{Options.__doc__}\n\n    Attributes:\n{_attributes}"
