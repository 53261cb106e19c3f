"""The options of `magr_onnx.optimize`, and the pipeline they stand for."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Collection
from typing import Literal, TypedDict, Unpack, cast, get_args

from magr_onnx.core.quantizers.auto import usual_alpha
from magr_onnx.errors import OptionError, closest, raise_all
from magr_onnx.passes import (
    CompensateBias,
    Convolutions,
    Embeddings,
    Equalize,
    ErrorFeedback,
    LowRank,
    MagR,
    OutputHessian,
    Plan,
    Quantize,
    QuantizeActivations,
    Rewrite,
    SplitOutliers,
    TwinRanges,
)
from magr_onnx.passes.emit import FORMATS, Format
from magr_onnx.passes.layers.conv import Form as ConvForm

FormatName = Literal["matmulnbits", "qdq", "qdq-int8", "dynamic-int8"]
Effort = Literal["fast", "balanced", "best"]
CONV_BITS = 8
BIAS = {"auto": None, "any": "any", "existing": "existing", "none": "none"}


_UNITS = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>B|kB|MB|GB)\s*", re.IGNORECASE)


def bytes_of(size: str | float) -> int | None:
    """Bytes that a size such as ``30 MB`` stands for, or a number; None where it is none, as what is not finite is."""
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        size = math.nan if match is None else float(match["number"]) * _UNITS[match["unit"].lower()]
    return round(size) if isinstance(size, numbers.Integral) or math.isfinite(size) else None


class Options(TypedDict, total=False):
    """What `build_pipeline` understands; every one has a good default.

    Attributes:
        bits: 2 to 8; default 4, or 8 for the integer formats.
        block_size: Rows that share a scale; None for one grid a channel. Default 32; the integer formats have one grid a channel.
        effort: How much time to spend where no quantizer is named: ``fast`` (MagR and ``comq`` with usual options, one pass over the data),
            ``balanced`` (default: ``auto`` with feedback, 2 to 2.5 times as long) or ``best`` (an output Hessian too, 4 to 6
            times as long). The integer formats have ``fast`` by default.
        quantizer: ``auto`` (all of the others' steps, options chosen per layer), ``comq`` (GPTQ refined by coordinate descent),
            ``gptq``, ``rtn`` or ``hqq`` (needs no data); ``a2q`` or ``a2q+`` under an accumulator. None (default) follows from the effort.
        format: ``matmulnbits`` (default), ``qdq``, or with 8-bit activations ``qdq-int8`` (static) or ``dynamic-int8``.
        symmetric: Fix the zero point in the middle (default False, True for the integer formats).
        alpha: Strength of MagR, relative to the layer; None (default) for one chosen per layer by quantizer auto, else 1e-3 per
            channel, 1e-4 per block, 0 above 4 bits; 0 for none.
        beta: Shrink of the min-max grid; None (default) searches it per group.
        damping: Multiple of the Gram matrix's diagonal added to it; None (default) for one that follows from the number of rows
            (auto: chosen).
        act_order: Round inputs in descending power; None (default) for yes (auto: chosen).
        sweeps: Most coordinate-descent sweeps (default 8).
        bias: ``auto`` (default: existing biases, and the bias input that MatMulNBits has anyway), ``existing``, ``any`` or
            ``none``.
        accuracy_level: MatMulNBits' compute type: 0 (default) unset, 1 float32, 4 int8.
        activation_type: ``uint8`` (default) or ``int8`` for qdq-int8.
        activation_range: ``auto`` (default), ``min-max``, ``percentile`` or ``min-error`` for qdq-int8.
        quantize_outputs: qdq-int8 also quantizes what layers put out, for all-integer QLinearMatMul and QGemm (default False).
        feedback: Quantize in stages, each layer towards the float output from the inputs of the quantized layers before; None
            (default) follows from the effort, and is no where a quantizer is named.
        low_rank: Rank of a float branch beside every product that gives back error, for two small MatMuls a layer; 0 (default) off.
        equalize: Move scales between channels into norms and layers before, where that is free at inference (default False).
        split_outliers: Layers whose few outliers spoil their grids become two that are summed, at twice the cost (default False).
        twin_ranges: qdq-int8 gives inputs from GELU and Softmax two ranges, at twice the cost of the layers they feed (default False).
        target: A machine of `magr_onnx.core.overflow.targets.TARGETS` on which no accumulator may overflow.
        accumulator_bits: Width of an accumulator that may not overflow, instead of a target. For matmulnbits it sizes the blocks.
        accumulator_tile: Consecutive terms that share the accumulator; None (default) for whole dot products (matmulnbits: its block).
        target_size: Mixed precision: the least measured loss in a file of at most this size: ``25%`` of the source, ``4bit`` (the size of
            a uniform model of 4 bits), ``30 MB``. A ``block_size`` given as well is the only one used.
        max_loss: Mixed precision: the smallest file that loses at most this on held-out calibration batches, ``1%`` standing for 0.01 of
            the mean KL divergence in nats (models with logits) or of 1 minus the mean cosine of the outputs (others). At most 1.
        conv_bits: Bits of the weights of convolutions, 3 to 8, one scale an output channel, in every format; None leaves them float.
            Default 8 where the model has any.
        conv_form: ``dequantize``: DequantizeLinear, which other tools know too; onnxruntime computes it in every run. ``fold``: codes that
            onnxruntime makes floats of when it loads the file, as fast as the float model. Default: the first in the formats qdq and
            qdq-int8 (in qdq-int8 always), the second in those of onnxruntime's own operators.
        embeddings: ``none`` (default), ``gather-block-quantized`` (4 or 8 bits, blocks of 32, one contrib operator) or ``dequantize`` (8
            bits, one scale a row, standard operators) for tables that are gathered from.
        embedding_bits: 4 or 8 (default) bits of a table.
    """

    bits: int | None
    block_size: int | None
    effort: Effort | None
    quantizer: str | None
    format: FormatName
    symmetric: bool | None
    alpha: float | None
    beta: float | None
    damping: float | None
    act_order: bool | None
    sweeps: int
    bias: str
    accuracy_level: int
    activation_type: Literal["uint8", "int8"]
    activation_range: str
    quantize_outputs: bool
    feedback: bool | None
    low_rank: int
    equalize: bool
    split_outliers: bool
    twin_ranges: bool
    target: str | None
    accumulator_bits: int | None
    accumulator_tile: int | None
    target_size: str | None
    max_loss: str | None
    conv_bits: int | None
    conv_form: ConvForm
    embeddings: str
    embedding_bits: int | None


_REWRITES: dict[str, Callable[[], Rewrite]] = {
    "equalize": Equalize,
    "split_outliers": SplitOutliers,
    "twin_ranges": TwinRanges,
}


def build_pipeline(**options: Unpack[Options]) -> Plan:
    """Make the plan that a set of options stands for: MagR, quantize, compensate the bias, emit.

    Raises:
        OptionError: Unknown options or values the target kernel rejects, all of them at once.
    """
    return pipeline_of(options)


def pipeline_of(options: Options, arguments: Collection[str] = ()) -> Plan:
    """`build_pipeline` for a function that has ``arguments`` beside the options, which a mistyped one may stand for."""
    names = [*arguments, *Options.__annotations__]
    listed = f"; there are {', '.join(names)}"
    problems = [f"unknown option {o!r}{closest(o, names) or listed}" for o in sorted(options.keys() - Options.__annotations__)]
    bias = options.get("bias", "auto")
    default = next(iter(FORMATS))
    name = options.get("format", default)
    if name not in FORMATS:
        problems.append(f"format {name!r} is not known; choose one of {', '.join(FORMATS)}")
    if bias not in BIAS:
        problems.append(f"bias={bias!r} is not known; choose one of {', '.join(BIAS)}")
    form = FORMATS.get(name, FORMATS[default])
    for other in FORMATS.values():
        problems += [f"{o} is for format {other.name} only" for o in other.own_options if other.name != name and options.get(o)]
    sizes_blocks = form.fit_accumulator is not None
    if form.fit_accumulator is not None and options.get("accumulator_bits") is not None:
        try:
            options = cast(Options, form.fit_accumulator(options))
        except OptionError as error:
            problems.append(str(error))
            options = _without_accumulator(options)
    elif sizes_blocks and options.get("accumulator_tile") is not None:
        problems.append("accumulator_tile needs accumulator_bits")
    bits, symmetric = options.get("bits"), options.get("symmetric")
    block: int | None = options.get("block_size", form.block_size)
    alpha, damping = options.get("alpha"), options.get("damping")
    bits = form.bits if bits is None else bits
    effort = options.get("effort") or form.effort
    if effort not in get_args(Effort):
        problems.append(f"effort={effort!r} is not known; choose one of {', '.join(get_args(Effort))}")
    named = options.get("quantizer")
    if named is not None and options.get("effort") is not None:
        problems.append(f"effort={effort} and quantizer={named}: an effort chooses the quantizer; give one of them")
    quantizer = named or ("comq" if effort == "fast" else "auto")
    feedback = options.get("feedback")
    if feedback is None:
        feedback = named is None and effort != "fast"
    auto = quantizer == "auto"
    if alpha is None and not auto:
        alpha = usual_alpha(bits, block)
    quantize = Quantize(
        quantizer,
        bits,
        block,
        form.symmetric if symmetric is None else symmetric,
        options.get("beta"),
        damping,
        options.get("act_order"),
        options.get("sweeps", 8),
        target=options.get("target"),
        accumulator_bits=None if sizes_blocks else options.get("accumulator_bits"),
        accumulator_tile=None if sizes_blocks else options.get("accumulator_tile"),
        alpha=alpha if auto else None,
    )
    policy = BIAS.get(bias) or form.bias
    tables, embedding_bits = options.get("embeddings", "none"), options.get("embedding_bits")
    if tables == "none" and embedding_bits is not None:
        problems.append(f"embedding_bits={embedding_bits} needs embeddings: gather-block-quantized, or dequantize for 8 bits")
    convs: Convolutions | None = None
    if "conv_form" in options and options.get("conv_bits", CONV_BITS) is None:
        problems.append(f"conv_form={options['conv_form']!r} needs conv_bits")
    elif "conv_bits" in options or "conv_form" in options:
        convs = convolutions(options)
        if "conv_bits" not in options:  # whether there are any to convert is not known here
            problems += convs.problems(None)
        if options.get("conv_bits") is None:
            convs = None
    rank = options.get("low_rank", 0)
    plan = Plan(
        rewrites=tuple(make() for option, make in _REWRITES.items() if options.get(option)),
        error_feedback=ErrorFeedback() if feedback else None,
        output_hessian=OutputHessian() if named is None and effort == "best" else None,
        magr=MagR(alpha, True, block, damping) if alpha and not auto else None,
        activations=_activations(form, options),
        quantize=quantize,
        low_rank=LowRank(rank) if rank else None,
        bias=CompensateBias(policy) if policy != "none" else None,  # type: ignore[arg-type]
        emitter=form.make_emitter(options) if name in FORMATS else None,
        convolutions=convs,
        embeddings=Embeddings(tables, 8 if embedding_bits is None else embedding_bits) if tables != "none" else None,  # type: ignore[arg-type]
    )
    raise_all(OptionError, [*problems, *plan.problems()])
    return plan


def convolutions(options: Options) -> Convolutions:
    """The pass that quantizes convolutions, with the other options that concern it."""
    bits, symmetric = options.get("conv_bits"), options.get("symmetric")
    form = FORMATS.get(options.get("format", ""))
    return Convolutions(
        CONV_BITS if bits is None else bits,
        True if symmetric is None else symmetric,
        options.get("alpha"),
        options.get("conv_form", "fold" if form is None else form.conv_form),
    )


def _activations(form: Format, options: Options) -> QuantizeActivations | None:
    """The grids of layer inputs that a format needs."""
    if form.input_grids == "static":
        return QuantizeActivations(options.get("activation_type", "uint8"), options.get("activation_range", "auto"))  # type: ignore[arg-type]
    return None if form.input_grids is None else QuantizeActivations("dynamic")


def _without_accumulator(options: Options) -> Options:
    rest: Options = {**options}
    rest.pop("accumulator_bits", None)
    rest.pop("accumulator_tile", None)
    return rest
