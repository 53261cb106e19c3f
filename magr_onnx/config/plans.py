"""Plans made of options."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Unpack, cast, get_args

from magr_onnx import passes
from magr_onnx.config.options import BIAS, OPTIONS, Effort, Options
from magr_onnx.core.quantizers import method_options
from magr_onnx.core.quantizers.auto import usual_alpha
from magr_onnx.errors import OptionError, choose_one, closest, raise_all
from magr_onnx.passes.emit import FORMATS, Format
from magr_onnx.passes.plan import form_problems

CONV_BITS = 8
EPOCHS = {"balanced": {2: 1, 3: 1}, "best": {2: 3, 3: 3, 4: 3}}
"""Passes over the data that tune scales, by effort and bits: errors of more bits are too small to pay for it."""
ROTATED_CHANNELS, TRIED_BLOCKS = 4, 3
"""Most bits of weights with one scale per channel, where a rotation is usual, and in blocks, where it is tried: it gains 20% and 6%."""
RATES = {2: 6e-3}  # of tuning, by bits, where not the usual one

_REWRITES: tuple[type[passes.Rewrite], ...] = (passes.Equalize, passes.SplitOutliers, passes.TwinRanges)


def build_pipeline(**options: Unpack[Options]) -> passes.Plan:
    """Make the plan that a set of options stands for: MagR, quantize, compensate the bias, emit.

    Raises:
        OptionError: Unknown options or values the target kernel rejects, all of them at once.
    """
    return plan_of(options)


def plan_of(options: Options, arguments: Collection[str] = (), provider: str = "cpu") -> passes.Plan:
    """Make the plan for a function that has ``arguments`` beside the options, which a mistyped one may stand for.

    Raises:
        OptionError: Unknown options or values the target kernel or ``provider`` rejects, all of them at once.
    """
    name = options.get("format", OPTIONS["format"].default)
    form = FORMATS.get(name, FORMATS[OPTIONS["format"].default])
    problems = [*_unknown(options, arguments), *_for_other_formats(options, name)]
    options, accumulator_problem = _fit_accumulator(form, options)
    problems += [*accumulator_problem, *_conflicts(options, form)]
    effort, named, feedback = options.get("effort") or form.effort, options.get("quantizer"), options.get("feedback")
    quantize = _quantize(form, options, named or ("comq" if effort == "fast" else "auto"))
    bias = options.get("bias", "auto")
    policy = form.bias if bias == "auto" else bias
    plan = passes.Plan(
        rewrites=tuple(_rewrites(options, form, quantize)),
        error_feedback=passes.ErrorFeedback() if (named is None and effort != "fast" if feedback is None else feedback) else None,
        output_hessian=_output_hessian(options, "two-sided" if named is None and effort == "best" else "none"),
        magr=_magr(quantize, options.get("alpha")),
        activations=_activations(form, options),
        quantize=quantize,
        low_rank=passes.LowRank(rank) if (rank := options.get("low_rank", 0)) else None,
        bias=passes.CompensateBias(policy) if policy != "none" else None,  # type: ignore[arg-type]
        tuning=_tuning(options, form, effort if named is None else None, quantize.bits),
        emitter=form.make_emitter(options) if name in FORMATS else None,
        convolutions=None if options.get("conv_bits") is None else convolutions(options),
        recurrent=None if (recurrent := options.get("recurrent", "none")) == "none" else passes.Recurrent(recurrent),  # type: ignore[arg-type]
        embeddings=_embeddings(options),
    )
    if options.get("output_hessian", "none") not in ("none", None) and not quantize.quantizer.chooses:
        asked = options["output_hessian"]
        problems.append(f"output_hessian={asked} is for efforts balanced and best, or quantizer auto, with calibration data")
    raise_all(OptionError, [*problems, *plan.problems(provider)])
    return plan


def _unknown(options: Options, arguments: Collection[str]) -> Iterator[str]:
    """Name unknown options, formats and bias policies."""
    names = [*arguments, *OPTIONS]
    for option in sorted(options.keys() - OPTIONS.keys()):
        yield f"unknown option {option!r}" + (closest(option, names) or f"; there are {', '.join(names)}")
    if (form := options.get("format", OPTIONS["format"].default)) not in FORMATS:
        yield f"format {form!r} is not known; {choose_one(form, FORMATS)}"
    if (rotate := options.get("rotate")) not in (None, *OPTIONS["rotate"].choices):
        yield f"rotate={rotate!r} is not known; {choose_one(rotate, OPTIONS['rotate'].choices)}"
    if (bias := options.get("bias", "auto")) not in BIAS:
        yield f"bias={bias!r} is not known; {choose_one(bias, BIAS)}"


def _for_other_formats(options: Options, name: str) -> Iterator[str]:
    """Name options that are for another format only."""
    allowed = FORMATS[name].exclusive_options if name in FORMATS else ()
    exclusive = dict.fromkeys(option for form in FORMATS.values() for option in form.exclusive_options if option not in allowed)
    for option in exclusive:
        if options.get(option):
            yield f"{option} is for format {' or '.join(f.name for f in FORMATS.values() if option in f.exclusive_options)} only"


def _fit_accumulator(form: Format, options: Options) -> tuple[Options, list[str]]:
    """Size bits and blocks for the accumulator, in formats whose blocks decide what fits; also returns what is wrong with it."""
    if form.fit_accumulator is None:
        return options, []
    if options.get("accumulator_bits") is None:
        return options, ["accumulator_tile needs accumulator_bits"] if options.get("accumulator_tile") is not None else []
    try:
        return cast(Options, form.fit_accumulator(options)), []
    except OptionError as error:
        rest: Options = {**options}
        rest.pop("accumulator_bits", None)
        rest.pop("accumulator_tile", None)
        return rest, [str(error)]


def _conflicts(options: Options, form: Format) -> Iterator[str]:
    """Name options that conflict."""
    effort, named = options.get("effort") or form.effort, options.get("quantizer")
    if effort not in get_args(Effort):
        yield f"effort={effort!r} is not known; {choose_one(effort, get_args(Effort))}"
    if named is not None and options.get("effort") is not None:
        yield f"effort={effort} and quantizer={named}: an effort chooses the quantizer; give one of them"
    if (prefer := options.get("prefer", "speed")) not in (known := OPTIONS["prefer"].choices):
        yield f"prefer={prefer!r} is not known; {choose_one(prefer, known)}"
    if options.get("embeddings", "none") == "none" and (bits := options.get("embedding_bits")) is not None:
        yield f"embedding_bits={bits} needs embeddings: gather-block-quantized, or dequantize for 8 bits"
    if "conv_form" in options and options.get("conv_bits", CONV_BITS) is None:
        yield f"conv_form={options['conv_form']!r} needs conv_bits"
    elif "conv_form" in options and "conv_bits" not in options:  # whether there are any to convert is not known here
        yield from (*convolutions(options).problems(None), *form_problems(options["conv_form"], form.emitter.input_grids))


def _rewrites(options: Options, form: Format, quantize: passes.Quantize) -> Iterator[passes.Rewrite]:
    """Make the rewrites that are asked for, and a rotation where it usually gains, if neither haste nor a quantizer is asked for.

    Where the whole graph is to be in integers there is none: before a tied head it would leave a product in float.
    """
    rotate, whole = options.get("rotate"), form.make_emitter(options).rules is not None
    if rotate is None and not whole and options.get("quantizer") is None and options.get("effort") != "fast":
        blocks = quantize.block_size is not None
        if quantize.bits <= (TRIED_BLOCKS if blocks else ROTATED_CHANNELS):
            yield passes.Rotate(auto=blocks, optional=True)
    elif rotate not in (None, "none"):
        yield passes.Rotate(auto=rotate == "auto")
    yield from (rewrite() for rewrite in _REWRITES if options.get(rewrite.name.replace("-", "_")))
    if fraction := options.get("split_salient", 0.0):
        yield passes.SplitSalient(fraction)


def _quantize(form: Format, options: Options, quantizer: str) -> passes.Quantize:
    """Make the quantizer's stage. Formats that size their blocks for an accumulator need none in the quantizer."""
    bits, symmetric = options.get("bits"), options.get("symmetric")
    fits = form.fit_accumulator is not None
    quantize = passes.Quantize(
        quantizer,
        form.bits if bits is None else bits,
        options.get("block_size", form.block_size),
        form.symmetric if symmetric is None else symmetric,
        options.get("beta"),
        options.get("damping"),
        options.get("act_order"),
        options.get("sweeps", OPTIONS["sweeps"].default),
        target=options.get("target"),
        accumulator_bits=None if fits else options.get("accumulator_bits"),
        accumulator_tile=None if fits else options.get("accumulator_tile"),
        method_options={name: value for name in method_options() if (value := options.get(name)) is not None},
    )
    return replace(quantize, alpha=options.get("alpha")) if quantize.quantizer.chooses else quantize


def _output_hessian(options: Options, usual: str) -> passes.OutputHessian | None:
    """Make the stage of the gradients, of the kind asked for or the usual one."""
    kind = options.get("output_hessian") or usual
    return None if kind == "none" else passes.OutputHessian(kind)  # type: ignore[arg-type]


def _magr(quantize: passes.Quantize, alpha: float | None) -> passes.MagR | None:
    """Make the stage of MagR, where the quantizer does not run it itself."""
    if quantize.quantizer.chooses:
        return None
    alpha = usual_alpha(quantize.bits, quantize.block_size, quantize.beta) if alpha is None else alpha
    return passes.MagR(alpha, True, quantize.block_size, quantize.damping) if alpha else None


def _tuning(options: Options, form: Format, effort: str | None, bits: int) -> passes.TuneScales | None:
    """Make the stage that tunes scales: if asked for, or as the effort does, of few bits, where layers have float inputs."""
    asked, usual = options.get("tune_scales"), passes.TuneScales()
    epochs = EPOCHS.get(effort or "", {}).get(bits, 0) if form.emitter.input_grids is None else 0
    if not (epochs if asked is None else asked):
        return None
    return passes.TuneScales(epochs if asked is None else usual.epochs, RATES.get(bits, usual.rate), asked is None and effort != "best")


def _activations(form: Format, options: Options) -> passes.QuantizeActivations | None:
    """Make the stage for layer inputs, where the format quantizes them."""
    if form.emitter.input_grids == "static":
        rules = form.make_emitter(options).rules
        usual = "uint8" if rules is None else rules.types[0]
        return passes.QuantizeActivations(
            options.get("activation_type", usual),  # type: ignore[arg-type]
            options.get("activation_range", "auto"),  # type: ignore[arg-type]
            options.get("wide_activations", 0.0),
        )
    return None if form.emitter.input_grids is None else passes.QuantizeActivations("dynamic")


def _embeddings(options: Options) -> passes.Embeddings | None:
    if (form := options.get("embeddings", "none")) == "none":
        return None
    bits = options.get("embedding_bits")
    return passes.Embeddings(form, 8 if bits is None else bits)  # type: ignore[arg-type]


def convolutions(options: Options) -> passes.Convolutions:
    """Make the pass that quantizes convolutions."""
    bits, symmetric, feedback = options.get("conv_bits"), options.get("symmetric"), options.get("feedback")
    form = FORMATS.get(options.get("format", ""))
    return passes.Convolutions(
        CONV_BITS if bits is None else bits,
        True if symmetric is None else symmetric,
        options.get("alpha"),
        options.get("conv_form", "fold" if form is None else form.conv_form),
        options.get("quantizer") is None if feedback is None else feedback,
    )
