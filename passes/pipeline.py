"""Pipelines as text: ``"magr{alpha=1e-3},quantize{method=gptq,bits=4},emit-matmulnbits"``.

To add a pass: write its file in this folder and add its class to `PASSES`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import onnx_ir as ir

from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import Target, find_target
from magr_onnx.core.types import WeightSpec
from magr_onnx.errors import OptionError, PipelineError, raise_all
from magr_onnx.passes.base import LayerPass
from magr_onnx.passes.emit.int8 import EmitDynamicInt8, EmitQDQInt8
from magr_onnx.passes.emit.matmulnbits import CUDA_LARGEST_BLOCK, EmitMatMulNBits
from magr_onnx.passes.emit.qdq import EmitQDQ
from magr_onnx.passes.layer_passes.activations import QuantizeActivations
from magr_onnx.passes.layer_passes.bias_compensation import CompensateBias
from magr_onnx.passes.layer_passes.convolutions import Convolutions
from magr_onnx.passes.layer_passes.embeddings import Embeddings
from magr_onnx.passes.layer_passes.error_feedback import ErrorFeedback
from magr_onnx.passes.layer_passes.low_rank import LowRank
from magr_onnx.passes.layer_passes.magr import MagR
from magr_onnx.passes.layer_passes.output_hessian import OutputHessian
from magr_onnx.passes.layer_passes.quantize import Quantize
from magr_onnx.passes.rewrites.equalize import Equalize
from magr_onnx.passes.rewrites.split_outliers import SplitOutliers
from magr_onnx.passes.rewrites.twin_ranges import TwinRanges

PASSES: dict[str, type[LayerPass]] = {
    p.name: p
    for p in (
        Equalize,
        SplitOutliers,
        TwinRanges,
        ErrorFeedback,
        OutputHessian,
        MagR,
        QuantizeActivations,
        Quantize,
        LowRank,
        CompensateBias,
        EmitMatMulNBits,
        EmitQDQ,
        EmitQDQInt8,
        EmitDynamicInt8,
        Convolutions,
        Embeddings,
    )
}
EMITTERS = (EmitMatMulNBits, EmitQDQ, EmitQDQInt8, EmitDynamicInt8)

_PASS = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*")
_WORDS = {"true": True, "false": False, "none": None, "channel": None}


def options_of(kind: type[LayerPass]) -> dict[str, tuple[Any, Any]]:
    """Option name to its type and default."""
    hints = typing.get_type_hints(kind)
    return {f.name: (hints[f.name], f.default) for f in fields(kind)}


def parse(text: str) -> tuple[LayerPass, ...]:
    """The passes a pipeline text names.

    Raises:
        PipelineError: The text does not parse, or names an unknown pass or option, or a value has the wrong type.
    """
    passes: list[LayerPass] = []
    position = 0
    while True:
        match = _PASS.match(text, position)
        if match is None:
            raise PipelineError(f"pipeline: expected a pass name at character {position} of {text!r}")
        passes.append(_make(match["name"], match["options"] or ""))
        position = match.end()
        if position == len(text):
            return tuple(passes)
        if text[position] == "{":  # whose options would have matched
            end = re.compile(r"[^{}]*").match(text, position + 1)
            assert end is not None
            raise PipelineError(f"pipeline: expected '}}' at character {end.end()} of {text!r}, for the '{{' at {position}")
        if text[position] != ",":
            raise PipelineError(f"pipeline: expected ',' at character {position} of {text!r}, found {text[position:]!r}")
        position += 1


def of(given: str | Sequence[LayerPass]) -> tuple[LayerPass, ...]:
    """The passes that were given, or that a text names.

    Raises:
        PipelineError: As `parse`, or it is neither.
    """
    if isinstance(given, str):
        return parse(given)
    if not isinstance(given, list | tuple) or not all(isinstance(p, LayerPass) for p in given):
        raise PipelineError(f"pipeline_text = {given!r}: expected a text or a list of passes of magr_onnx.passes")
    return tuple(given)


def _make(name: str, text: str) -> LayerPass:
    if name not in PASSES:
        raise PipelineError(f"pipeline: no pass is called {name!r}; there are {', '.join(PASSES)}")
    known = options_of(PASSES[name])
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in known:
            raise PipelineError(f"pipeline: {name} has no option {item!r}; it takes {', '.join(known) or 'none'}")
        values[key] = _value(f"{name}{{{key}}}", value, known[key][0])
    return PASSES[name](**values)


def _value(where: str, text: str, kind: Any) -> Any:
    kinds = (kind,) if typing.get_origin(kind) is typing.Literal else typing.get_args(kind) or (kind,)
    choices = [c for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)]
    if choices:
        if text == "none" and text not in choices and type(None) in kinds:
            return None
        if text not in choices:
            raise PipelineError(f"pipeline: {where}={text}: choose one of {', '.join(choices)}")
        return text
    allowed = set(kinds)
    if text.lower() in _WORDS and type(_WORDS[text.lower()]) in allowed:
        return _WORDS[text.lower()]
    for convert in (int, float, str):
        if convert in allowed:
            try:
                return convert(text)
            except ValueError:
                continue
    names = " or ".join(sorted("none" if t is type(None) else t.__name__ for t in allowed))
    raise PipelineError(f"pipeline: {where}={text}: expected {names}")


def resolve(passes: Sequence[LayerPass]) -> tuple[LayerPass, ...]:
    """Passes that leave ``bias`` or ``activation`` open get those of the pipeline's compensate-bias and quantize-activations."""
    policy = next((p.bias for p in passes if isinstance(p, CompensateBias)), None)
    inputs = activations_of(passes)
    resolved: list[LayerPass] = []
    for p in passes:
        if isinstance(p, ErrorFeedback | MagR | Quantize | LowRank) and p.bias is None:
            p = replace(p, bias=policy)
        if isinstance(p, Quantize) and p.activation is None and inputs is not None:
            p = replace(p, activation=inputs.type)
        resolved.append(p)
    return tuple(resolved)


def activations_of(passes: Sequence[LayerPass]) -> QuantizeActivations | None:
    """The pipeline's demand on layer inputs, if it has one."""
    return next((p for p in passes if isinstance(p, QuantizeActivations)), None)


def accumulator_of(passes: Sequence[LayerPass]) -> Target | Accumulator | None:
    """The accumulator that may not overflow, if the pipeline asks for one."""
    for p in passes:
        if isinstance(p, Quantize) and p.target is not None:
            return find_target(p.target)
        if isinstance(p, Quantize) and p.accumulator_bits is not None:
            return p.accumulator()
        if isinstance(p, EmitMatMulNBits) and p.accumulator_bits is not None:
            return Accumulator(p.accumulator_bits, None, max(32, p.accumulator_bits))
    return None


def text_of(passes: Iterable[LayerPass]) -> str:
    """The text that `parse` turns back into ``passes``."""
    return ",".join(map(str, passes))


def spec_of(passes: Sequence[LayerPass]) -> WeightSpec | None:
    """The grid the pipeline quantizes float32 weights to, if it quantizes."""
    return next((p.spec() for p in passes if isinstance(p, Quantize) and not p.problems(None)), None)


def check(passes: Sequence[LayerPass], provider: str = "cpu") -> None:
    """Find everything wrong with the options of a pipeline before any work.

    Args:
        passes: The pipeline.
        provider: Where the result will run: not every kernel exists everywhere.

    Raises:
        OptionError: With every problem found.
    """
    problems: list[str] = []
    spec: WeightSpec | None = None
    invalid = False
    passes = resolve(passes)
    for p in passes:
        if isinstance(p, Quantize):
            found = p.problems(spec)
            problems += found
            invalid = bool(found)
            spec = spec if found else p.spec()
        elif not (invalid and isinstance(p, EMITTERS)):
            problems += p.problems(spec)
    problems += [problem for p in passes for problem in p.fits(passes)]
    problems += _activation_problems(passes)
    if spec is not None and spec.bits == 2 and "cuda" in provider.lower():
        problems.append("2 bits on cuda: onnxruntime's CUDA kernel of MatMulNBits takes 4 and 8 bits only; use 4 bits, or provider cpu")
    raise_all(OptionError, problems)


def suited(passes: Sequence[LayerPass], provider: str) -> tuple[LayerPass, ...]:
    """The passes, with what they write kept to what the kernels of ``provider`` take."""
    if "cuda" not in provider.lower():
        return tuple(passes)
    return tuple(
        replace(p, largest_block=min(p.largest_block, CUDA_LARGEST_BLOCK)) if isinstance(p, EmitMatMulNBits) else p for p in passes
    )


def _activation_problems(passes: Sequence[LayerPass]) -> list[str]:
    """Whether the form that is written has the inputs the pipeline asks for, and the accumulator is one of integers."""
    inputs = activations_of(passes)
    kind = None if inputs is None else "dynamic" if inputs.type == "dynamic" else "static"
    found = ["quantize-activations appears twice"] if sum(isinstance(p, QuantizeActivations) for p in passes) > 1 else []
    for p in passes:
        wanted = {EmitQDQInt8: "static", EmitDynamicInt8: "dynamic", EmitMatMulNBits: None, EmitQDQ: None}.get(type(p), kind)
        if wanted != kind:
            need = {"static": "quantize-activations with type uint8 or int8", "dynamic": "quantize-activations with type dynamic"}
            found.append(
                f"{p.name} needs {need[wanted]} before it" if wanted else f"{p.name} keeps activations float; remove quantize-activations"
            )
        if isinstance(p, Quantize) and p.activation not in (None, None if inputs is None else inputs.type):
            other = "no pass quantizes them" if inputs is None else f"quantize-activations has type {inputs.type}"
            found.append(f"quantize expects {p.activation} activations, and {other}; leave activation out")
        if isinstance(p, Quantize) and p.accumulator_bits is not None and p.activation is None:
            found.append(
                "accumulator_bits needs integer activations (format qdq-int8 or dynamic-int8): floats have no accumulator to overflow"
            )
    return found


def prepare(passes: Sequence[LayerPass], model: ir.Model) -> bool:
    """Whole-model changes the passes need first."""
    spec = spec_of(passes)
    changed = [p.prepare(model, spec) for p in passes]
    return any(changed)
