"""The keyword arguments of `magr_onnx.optimize`, merged with those of a recipe and of a preset."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.merge import dropped, merge
from magr_onnx.config.options import ARGUMENTS, Options
from magr_onnx.config.presets import find_preset
from magr_onnx.config.recipe import Recipe
from magr_onnx.config.schema import as_list, displaced_options, word_to_none
from magr_onnx.errors import OptionError, RecipeError, raise_all
from magr_onnx.passes import Plan, Stage
from magr_onnx.report.layer_row import LayerRow
from magr_onnx.runtime.data.sources import Source
from magr_onnx.runtime.measure.metric import Predictions

Size = int | str
"""Bytes, or text such as ``"2 GB"``."""
FolderSource = Source | Mapping[str, Source | None]
"""Data for the models of a folder: one source, or a dict by model."""
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, steps done and steps in total."""
OnLayer = Callable[[LayerRow], None]
"""Called with the report's row of a finished layer."""
Metric = Callable[[Predictions], Any]
"""Called with a model's predictions on the validation data; returns a number, the higher the better."""


class _Omitted:
    def __repr__(self) -> str:
        return "OMITTED"


OMITTED: Any = _Omitted()
"""The default of an argument for which None means something: what the recipe says, or else None."""


class RunArguments(TypedDict, total=False):
    """What `magr_onnx.optimize` and `magr_onnx.optimize_folder` take beside `Options`: types for callers; the option table has the rest."""

    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None
    preset: str | None
    layers: Sequence[LayerOptions | Mapping[str, Any]]
    output: str | os.PathLike[str] | None
    pipeline_text: str | Plan | Sequence[Stage] | None
    provider: str
    mask: str | None
    batch_size: int
    decode_steps: int
    metric: Metric | str | os.PathLike[str] | None
    tokenizer: str | os.PathLike[str] | None
    samples: int | None
    sequence_length: int | None
    seed: int
    include: Sequence[str]
    exclude: Sequence[str]
    requantize: bool
    keep_overridable: bool
    custom_ops: Sequence[str | os.PathLike[str]]
    gram_budget: Size
    cache: Size
    progress: Progress | bool | None
    on_layer: OnLayer | None
    max_memory: Size | None
    shard_size: Size | None
    external_data: bool
    resume: str | os.PathLike[str] | None
    workers: int | str | None
    device: str


class Arguments(Options, RunArguments, total=False):
    """The keyword arguments of `magr_onnx.optimize`: `RunArguments`, `Options`, and one more.

    Attributes:
        validation_data: Held-out inputs to compare the float and the quantized model on.
    """

    validation_data: Source | None


class FolderArguments(Options, RunArguments, total=False):
    """The keyword arguments of `magr_onnx.optimize_folder`: `RunArguments`, `Options`, and what follows.

    Attributes:
        validation_data: Held-out inputs, in the same forms as calibration data.
        models: Shell patterns of the models to optimize (``"encoder*"``), by their path in the folder; others are carried along. One that
            is a model's path, brackets and all, means that model.
        overwrite: Replace an earlier result: a folder that has the same models. Models, their data and files the new result has are
            replaced, all others in it are kept as they are, links and empty folders too; also what is written into it during the run.
            What is replaced leaves its permissions. It stays until the new one is whole; a process that is killed between the two
            renames leaves neither under that name. The result of one model, a file, always replaces an earlier one.
    """

    validation_data: FolderSource | None
    models: Sequence[str]
    overwrite: bool


_first = ("model", "calibration", "recipe", "preset", "layers", "output", "validation_data")
_options = {option.argument or option.name: option for option in ARGUMENTS.values()}
DEFAULTS: Mapping[str, Any] = {
    name: () if _options[name].kind in ("patterns", "paths") else _options[name].default
    for name in dict.fromkeys((*_first, *RunArguments.__annotations__))
}
"""What stands for an argument that neither the call nor its recipe gives, in the order a report writes calls."""
FOLDER_DEFAULTS: Mapping[str, Any] = {**DEFAULTS, "models": (), "overwrite": False}

_attributes = "".join(f"        {name}: {_options[name].text}\n" for name in RunArguments.__annotations__)
RunArguments.__doc__ = f"{RunArguments.__doc__}\n\n    Attributes:\n{_attributes}"


def explicit(**arguments: Any) -> dict[str, Any]:
    """Keep the arguments that a caller gave: those that are not `OMITTED`."""
    return {name: value for name, value in arguments.items() if value is not OMITTED}


def in_order(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sort arguments as reports show them: in the order of `DEFAULTS`, then the options."""
    return {name: arguments[name] for name in DEFAULTS if name in arguments} | dict(arguments)


def over_recipe(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fill in what a call omits from its recipe.

    An argument that is None counts as given, but for the model.

    Returns:
        The arguments, without ``recipe``, and notes on what was left out of the recipe.

    Raises:
        RecipeError: The recipe cannot be used.
        OptionError: An argument has a value that no recipe could have for it.
    """
    upper = dict(arguments)
    recipe = read_recipe(upper.pop("recipe", None))
    tables = _tables(upper.pop("layers", None))
    raise_all(OptionError, _mistyped(upper))
    if upper.get("model") is None:
        upper.pop("model", None)
    upper = {name: as_list(name, value) for name, value in word_to_none(upper).items()}
    lower = recipe.arguments()
    merged = merge(lower, upper)
    merged["layers"] = (*merged.get("layers", ()), *tables)
    if merged["layers"] and merged.get("pipeline_text") is not None:
        texts = "; ".join(map(str, merged["layers"]))
        raise OptionError(f"options of single layers ({texts}) need the run's options to start from, and it has a pipeline")
    return merged, [*recipe.notes, *dropped(lower, upper, "the recipe")]


def over_preset(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fill in what arguments without a recipe leave to their preset; its tables of layers stand before theirs.

    Returns:
        The arguments, and notes on what was left out of the preset.

    Raises:
        OptionError: There is no such preset, or a pipeline is given, which leaves it nothing to set.
    """
    upper = dict(arguments)
    if upper.get("preset") is None:
        return upper, []
    preset, tables = find_preset(upper["preset"]), upper.pop("layers")
    if upper.get("pipeline_text") is not None:
        raise OptionError(f"preset {preset.name} and a pipeline: a pipeline replaces all options; give one or the other")
    lower = cast(Mapping[str, Any], preset.options)
    layers = [layer for table in preset.layers for layer in _without(table, upper, lower)]
    return {**merge(lower, upper), "layers": (*layers, *tables)}, dropped(lower, upper, f"preset {preset.name}")


def _without(table: LayerOptions, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> list[LayerOptions]:
    """Return a preset's table without options given for all layers, and without what belongs to the values that those replace; none if
    that leaves no options."""
    replaced = {name: arguments[name] for name in table.options if name in arguments}
    displaced = displaced_options(table.options, replaced, options)
    kept = {name: value for name, value in table.options.items() if name not in replaced and name not in displaced}
    return [replace(table, options=cast(Options, kept))] if kept else []


def argument(name: str, arguments: Mapping[str, Any]) -> Any:
    """Look one argument of a call up: in the call, in its recipe, or among the defaults.

    Raises:
        RecipeError: The recipe cannot be read, or with everything that is wrong in it.
    """
    if arguments.get(name) is not None:
        return arguments[name]
    return read_recipe(arguments.get("recipe")).arguments().get(name, DEFAULTS[name])


def read_recipe(value: Any) -> Recipe:
    """Make a recipe of any form a caller may give it in; an empty one of None.

    Raises:
        RecipeError: It is none.
    """
    if value is None or isinstance(value, Recipe):
        return value or Recipe()
    if isinstance(value, Mapping):
        return Recipe.from_dict(value)
    if not isinstance(value, str | os.PathLike):
        raise RecipeError(f"recipe = {value!r}: give a file, its values as a dict, or a Recipe; found a {type(value).__name__}")
    return Recipe.load(value)


def _tables(value: Any) -> list[LayerOptions]:
    if value is not None and not isinstance(value, list | tuple):
        raise OptionError(f"layers = {value!r}: expected a list of tables with match and options, found a {type(value).__name__}")
    return [table if isinstance(table, LayerOptions) else LayerOptions.of(table) for table in value or ()]


def _mistyped(arguments: Mapping[str, Any]) -> list[str | None]:
    """Say what is wrong with arguments that recipes have too, under the same name; data and models are more than paths in Python.

    Which choices there are is said by what knows them, together with options that there are none of.
    """
    objects = ("model", "calibration", "validation", "metric", "pipeline")
    names = [name for name in arguments if name in ARGUMENTS and ARGUMENTS[name].types and name not in objects]
    return [ARGUMENTS[name].mistyped(arguments[name]) for name in names]
