"""The options of `magr_onnx.optimize`, and the pipeline they stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Unpack, cast, get_args

from magr_onnx.config.option_table import BIAS, OPTIONS, Effort, Options
from magr_onnx.core.quantizers import QUANTIZERS, method_options
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

CONV_BITS = 8


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
    names = [*arguments, *OPTIONS]
    listed = f"; there are {', '.join(names)}"
    problems = [f"unknown option {o!r}{closest(o, names) or listed}" for o in sorted(options.keys() - OPTIONS.keys())]
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
    chooses = quantizer in QUANTIZERS and QUANTIZERS[quantizer].chooses
    if alpha is None and not chooses:
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
        alpha=alpha if chooses else None,
        method_options={name: value for name in method_options() if (value := options.get(name)) is not None},
    )
    policy = form.bias if bias == "auto" else bias
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
        magr=MagR(alpha, True, block, damping) if alpha and not chooses else None,
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
