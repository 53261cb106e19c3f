"""What a run is asked to do: a call resolved over its recipe, its preset and the defaults, once, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from magr_onnx.config import layer_options, schema
from magr_onnx.config.arguments import DEFAULTS, OnLayer, Progress, in_order, over_preset, over_recipe
from magr_onnx.config.invocation import Invocation, plain, without_defaults
from magr_onnx.config.options import Options
from magr_onnx.config.plans import plan_of
from magr_onnx.config.selection import Patterns
from magr_onnx.core import backends
from magr_onnx.core.backends import HOST, Backend
from magr_onnx.errors import OptionError, ProviderError, RecipeError, joined, raise_all
from magr_onnx.passes import Plan
from magr_onnx.passes.layers.selection import Selection
from magr_onnx.runtime.data.sources import Source
from magr_onnx.runtime.data.text import Reading
from magr_onnx.runtime.measure.metric import Metric
from magr_onnx.runtime.ort.session import provider_problems
from magr_onnx.workflow.cluster import address_of
from magr_onnx.workflow.goal import Goal, goal_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptimizeRequest:
    """One run, with every question of what overrides what answered, sizes in bytes, and paths as `Path`.

    Fields that are not described here are arguments of `magr_onnx.optimize`: see `magr_onnx.RunArguments`.

    Attributes:
        invocation: How it was asked for, for the report.
        validation: The ``validation_data``.
        metric: The user's own measure, on it.
        reading: How text is read, but for the model's folders.
        plan: What is done to the model.
        options: What the plan was made of; None where a pipeline was given.
        budget: The size or the loss that mixed precision is to reach; None for one width of codes.
        layer_plans: What is done instead to layers with options of their own.
        patterns: Which layers to convert, and options of single layers.
        notes: Sentences for the report: what was left out of recipe and preset.
        result_options: All arguments that the result depends on, by name, as the job directory compares them.
    """

    invocation: Invocation
    model: Any
    calibration: Source | None
    validation: Source | None
    metric: Metric | None
    output: Path | None
    plan: Plan
    options: Options | None
    budget: Goal | None
    layer_plans: Sequence[Plan]
    patterns: Patterns
    requantize: bool
    keep_overridable: bool
    provider: str
    mask: str | None
    batch_size: int
    decode_steps: int
    reading: Reading
    custom_ops: Sequence[str | os.PathLike[str]]
    gram_budget: int
    cache: int
    max_memory: int | None
    shard_size: int | None
    external_data: bool
    resume: Path | None
    workers: int | str | None
    device: Backend
    progress: Progress | bool | None
    on_layer: OnLayer | None
    preset: str | None
    notes: Sequence[str]
    result_options: Mapping[str, Any]


def resolve(arguments: Mapping[str, Any], invocation: Invocation) -> OptimizeRequest:
    """Turn the explicit arguments of a call, by name, into a request.

    Raises:
        RecipeError: The recipe cannot be used, or is for a folder of models.
        OptionError: With everything that is wrong with the options.
    """
    merged, notes = over_recipe(arguments)
    if "models" in merged:
        raise RecipeError("models: for a folder of models, and this is about one (magr_onnx.optimize_folder)")
    merged = {name: value for name, value in merged.items() if name != "overwrite"}  # a result in one file replaces an earlier one anyway
    merged, preset_notes = over_preset(merged)
    values = {name: merged.get(name, default) for name, default in DEFAULTS.items()}
    if values["model"] is None:
        raise OptionError('no model; give one, or name it in the recipe: model = "model.onnx"')
    options: Any = {name: value for name, value in merged.items() if name not in DEFAULTS}
    provider = values["provider"]
    plan, made_of, budget = _plan(values, options)
    plan = plan.suited(provider)
    patterns = Patterns(Selection(values["include"], values["exclude"]), values["layers"])
    layer_plans = layer_options.pipelines(patterns.tables, made_of or {}, plan, provider)
    if values["calibration"] is None:
        _check_data_free(plan, budget)
    sizes = {name: schema.size(name, values[name]) for name in ("max_memory", "shard_size", "gram_budget", "cache")}
    if values["output"] is None and (sizes["shard_size"] is not None or values["external_data"]):
        raise OptionError("shard_size and external_data are about files; give an output")
    if invocation.options is None:
        invocation = replace(invocation, options=plain(without_defaults(in_order(merged), DEFAULTS)))
    paths = {name: None if values[name] is None else Path(values[name]) for name in ("output", "resume")}
    workers = None if values["workers"] is None else address_of(values["workers"])
    device = backends.find(values["device"])
    if device is not HOST and workers is not None:
        raise OptionError(f"device {device.name} and workers: workers solve layers on CPUs; give one of the two")
    unchanged = {field.name: values[field.name] for field in fields(OptimizeRequest) if field.name in values}
    return OptimizeRequest(
        **{**unchanged, **sizes, **paths, "metric": _metric(values), "workers": workers, "device": device},
        invocation=invocation,
        validation=values["validation_data"],
        reading=reading_of(values),
        plan=plan,
        options=made_of,
        budget=budget,
        layer_plans=layer_plans,
        patterns=patterns,
        notes=(*notes, *preset_notes),
        result_options={**options, **_result_options(values)},
    )


def _metric(values: Mapping[str, Any]) -> Metric | None:
    """The user's own measure; None where there is none.

    Raises:
        OptionError: It cannot be called, or there is nothing to call it on.
    """
    if values["metric"] is None:
        return None
    metric = Metric.of(values["metric"])
    if values["validation_data"] is None:
        raise OptionError(f"metric {metric.where} is of predictions on held-out inputs; give these (--validation, validation_data)")
    return metric


def reading_of(values: Mapping[str, Any], folders: Sequence[Path] = ()) -> Reading:
    """Return how text is read, by the arguments of a call."""
    tokenizer = values["tokenizer"]
    return Reading(
        tokenizer=None if tokenizer is None else Path(tokenizer),
        folders=folders,
        samples=values["samples"],
        length=values["sequence_length"],
        seed=values["seed"],
    )


def _plan(values: Mapping[str, Any], options: Options) -> tuple[Plan, Options | None, Goal | None]:
    """The plan of a run, the options it is made of, and its budget.

    Raises:
        OptionError: With everything that is wrong with the plan, and the provider if it is not available.
        ProviderError: It is not available, and nothing else is wrong.
    """
    unavailable = provider_problems(values["provider"])
    try:
        made = _made(values, options)
    except OptionError as error:
        raise joined(type(error), [*error.problems, *unavailable]) from error
    raise_all(ProviderError, unavailable)
    return made


def _made(values: Mapping[str, Any], options: Options) -> tuple[Plan, Options | None, Goal | None]:
    if values["pipeline_text"] is not None:
        if options:
            raise OptionError(f"give a pipeline or options, not both (options: {', '.join(options)})")
        plan = Plan.read(values["pipeline_text"])
        plan.check(values["provider"])
        return plan, None, None
    budget = goal_of(options, values["metric"] is not None)
    if values["calibration"] is None and options.get("effort") is None and options.get("quantizer") is None:  # nothing to choose by
        options = {**options, "effort": "fast"}
    return plan_of(options, tuple(DEFAULTS), values["provider"]), options, budget


def _check_data_free(plan: Plan, budget: Goal | None) -> None:
    """Refuse what cannot be done without calibration data."""
    if plan.input_grids == "static":
        raise OptionError("static 8-bit activations need calibration data for their ranges; give some, or use format dynamic-int8")
    if plan.error_feedback is not None:
        raise OptionError("error feedback needs calibration data; give some, or take effort fast")
    if budget is not None:
        raise OptionError(f"{budget.text} needs calibration data to measure what each layer can bear; give some, or give bits instead")


def _result_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments beside the options that a result depends on, in words."""
    names = ["include", "exclude", "requantize", "keep_overridable", "mask", "batch_size", "decode_steps", "provider"]
    names += ["samples", "sequence_length", "seed", "device"]
    texts = {"custom_ops": list(map(str, values["custom_ops"])), "layers": "; ".join(map(str, values["layers"])) or "none"}
    return {**{name: values[name] for name in names}, **texts}
