"""Recipes: everything a run is told, in one TOML file.

    version = 1
    model = "model.onnx"
    calibration = "inputs.npz"
    bits = 4

    [[layer]]
    match = "*lm_head*"
    bits = 8

A key is the long name of the command line's option with underscores, and so nearly all are the names `magr_onnx.optimize` has. Paths are
relative to the recipe's folder. What is given beside a recipe wins over it, and it wins over its preset.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from magr_onnx.errors import OutputError, RecipeError, raise_all
from magr_onnx.keys import KEYS, OPTIONS, problem, unknown, unworded, worded
from magr_onnx.layerwise import LayerOptions, problems_of
from magr_onnx.options import FORMATS, Options
from magr_onnx.presets import find_preset
from magr_onnx.report import Report, megabytes

P = ParamSpec("P")
R = TypeVar("R")

VERSION = 1
_ARGUMENTS = {"validation": "validation_data", "pipeline": "pipeline_text"}
_SHOWN = ("report", "json", "quiet", "verbose", "save_recipe", "recipe")
_FORM = (
    "accuracy_level",
    "activation_type",
    "activation_range",
    "quantize_outputs",
    "target",
    "accumulator_bits",
    "accumulator_tile",
    "twin_ranges",
)
_YIELDS: dict[str, Sequence[str]] = {
    "quantizer": ("effort",),
    "effort": ("quantizer",),
    "bits": ("target_size", "max_loss"),
    "target_size": ("bits", "max_loss"),
    "max_loss": ("bits", "target_size"),
    "target": ("accumulator_bits", "accumulator_tile"),
    "accumulator_bits": ("target",),
}
"""What is given up for an option that stands in its place, where that was said later."""
_PIPELINES = ("pipeline", "pipeline_text")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run in words.

    Attributes:
        values: By key; see `magr_onnx.keys.KEYS`.
        layers: Options of single layers, in order: later ones win.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[LayerOptions, ...] = ()

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recipe:
        """Read a TOML file.

        Raises:
            RecipeError: It cannot be read or parsed, or with everything that is wrong in it, by line.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
            data = tomllib.loads(text)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"recipe {file}: not TOML: {error}") from error
        if "version" not in data:
            data = {"version": None, **data}
        raise_all(RecipeError, [f"{file}{_line(text, key, table)}: {said}" for key, table, said in _problems(data)])
        return _made(data, file.parent)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """From plain data of the same keys; ``version`` may be missing, and paths are as they are.

        Raises:
            RecipeError: With everything that is wrong in it.
        """
        whole = {"version": VERSION, **data}
        raise_all(RecipeError, [f"layer {table + 1}: {said}" if table is not None else said for _, table, said in _problems(whole)])
        return _made(whole, None)

    @property
    def options(self) -> Options:
        """What a pipeline is made of, without the preset's part."""
        return cast(Options, {name: value for name, value in self.values.items() if name in OPTIONS})

    def arguments(self) -> dict[str, Any]:
        """Arguments for `magr_onnx.optimize`, those of the preset not among them."""
        found = {_ARGUMENTS.get(name, name): value for name, value in self.values.items()}
        return {**found, "layers": self.layers} if self.layers else found

    def over(self, other: Recipe) -> Recipe:
        """This recipe's values, and the other's where it has none and they do not contradict."""
        return Recipe(over(other.values, self.values), (*other.layers, *self.layers))

    def save(self, path: str | os.PathLike[str], comments: Sequence[str] = ()) -> None:
        """Write it as TOML, paths relative to its folder, with comments at the top.

        Raises:
            OutputError: The file cannot be written.
        """
        file = Path(path)
        try:
            file.write_text(self.to_text(file.parent, comments), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"recipe {file}: cannot be written: {error.strerror or error}") from error

    def to_text(self, folder: Path | None = None, comments: Sequence[str] = ()) -> str:
        """The file's text; paths are relative to ``folder``, where there is one."""
        lines = [*(f"# {line}".rstrip() for line in comments), *([""] if comments else []), f"version = {VERSION}"]
        for title, names in _SECTIONS.items():
            given = {name: self.values[name] for name in names if name in self.values}
            found = [f"{name} = {_toml(_placed(name, value, folder))}" for name, value in worded(given).items()]
            lines += ["", f"# {title}", *found] if found else []
        for table in self.layers:
            lines += ["", "[[layer]]", *(f"{name} = {_toml(value)}" for name, value in table.table.items())]
        return "\n".join(lines) + "\n"


_SECTIONS = {
    "What goes in and comes out; paths are relative to this file": (
        "model",
        "models",
        "calibration",
        "validation",
        "output",
        "overwrite",
        "custom_ops",
        "resume",
    ),
    "Where the options below start from": ("preset",),
    "Weights and formats": ("pipeline", *OPTIONS),
    "Which layers": ("include", "exclude", "requantize"),
    "How the run is made": ("mask", "batch_size", "decode_steps", "provider", "cache", "max_memory", "external_data", "shard_size"),
}


def over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments said first and arguments said later: the later ones win, and what they stand in the place of goes."""
    given = {name for name, value in upper.items() if value is not None}
    gone = {name for some, names in _YIELDS.items() if some in given for name in names}
    gone |= set(OPTIONS) if given & set(_PIPELINES) else set(_PIPELINES) if given & set(OPTIONS) else set()
    if (form := upper.get("format")) is not None and form != lower.get("format", next(iter(FORMATS))):
        gone |= set(_FORM)
    return {**{name: value for name, value in lower.items() if name not in gone}, **upper}


def with_recipe(function: Callable[P, R]) -> Callable[P, R]:
    """Give `optimize` the arguments of its recipe and its preset, where the caller gave none.

    What ``function`` gets has no recipe left, and a preset only to say so.
    """
    signature = inspect.signature(function)
    first = next(iter(signature.parameters))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("options", {})
        recipe = given.pop("recipe", None)
        if recipe is None and given.get("preset") is None and "layers" not in given:
            return function(*args, **kwargs)
        said = Recipe() if recipe is None else _recipe(recipe)
        name = given.get("preset") or said.values.get("preset")
        tables = [*said.layers, *(t if isinstance(t, LayerOptions) else LayerOptions.of(t) for t in given.pop("layers", ()))]
        merged = over(said.arguments(), {key: value for key, value in given.items() if value is not None or key in OPTIONS})
        if name is not None:
            preset = find_preset(name)
            merged, tables = {**over(dict(preset.options), merged), "preset": name}, [*preset.layers, *tables]
        if "pipeline_text" in merged:
            tables = [table for table in tables if not table.optional]
        if folder := [name for name in ("models", "overwrite") if name in merged]:
            raise RecipeError(f"{' and '.join(folder)}: for a folder of models, and this is about one (magr_onnx.folders.optimize_folder)")
        merged["layers"] = tuple(tables)
        return function(merged.pop(first, None), **merged)

    return call


def argument(name: str, given: Mapping[str, Any], default: Any) -> Any:
    """One argument of `optimize`, for who needs it beforehand: as given, as its recipe says, or the default.

    Raises:
        RecipeError: The recipe cannot be read, or with everything that is wrong in it.
    """
    if given.get(name) is not None:
        return given[name]
    recipe = given.get("recipe")
    return default if recipe is None else _recipe(recipe).arguments().get(name, default)


def _recipe(value: Any) -> Recipe:
    if isinstance(value, Recipe):
        return value
    return Recipe.from_dict(value) if isinstance(value, Mapping) else Recipe.load(value)


def _problems(data: Mapping[str, Any]) -> list[tuple[str, int | None, str]]:
    """Everything wrong: the key, the number of the layer table it is in if it is in one, and a sentence."""
    found: list[tuple[str, int | None, str]] = []
    for name, value in data.items():
        text = None
        if name == "version":
            if value is None:
                text = f"version is missing; begin with version = {VERSION}"
            elif value != VERSION or isinstance(value, bool):
                text = f"version = {value!r}: this onnx-magr reads version {VERSION}"
        elif name == "layer":
            tables = value if isinstance(value, list | tuple) else None
            if tables is None:
                text = "layer is a list of tables: begin each with [[layer]], in two brackets"
            for i, table in enumerate(tables or ()):
                found += [(key, i, said) for key, said in problems_of(table)]
        elif name in _SHOWN:
            text = f"{name} is about what is shown, not about the run: give it on the command line"
        elif name not in KEYS:
            text = unknown(name, ("version", *KEYS, "layer"))
        else:
            text = problem(name, value)
        if text is not None:
            found.append((name, None, text))
    given = [name for name in data if name in OPTIONS]
    if "pipeline" in data and given:
        found.append(("pipeline", None, f"pipeline replaces {', '.join(given)}; give one or the other"))
    return found


def _made(data: Mapping[str, Any], folder: Path | None) -> Recipe:
    values: dict[str, Any] = {}
    for name, value in unworded({name: value for name, value in data.items() if name not in ("version", "layer")}).items():
        kind = KEYS[name].kind
        if kind in ("paths", "patterns"):
            value = tuple([value] if isinstance(value, str | os.PathLike) else value)
        if folder is not None and kind == "path":
            value = folder / value
        if folder is not None and kind == "paths":
            value = tuple(folder / each for each in value)
        values[name] = value
    return Recipe(values, tuple(map(LayerOptions.of, data.get("layer", ()))))


def _placed(name: str, value: Any, folder: Path | None) -> Any:
    kind = KEYS[name].kind
    if kind == "path":
        return _relative(value, folder)
    return [_relative(each, folder) for each in value] if kind == "paths" else value


def _relative(path: Any, folder: Path | None) -> str:
    if folder is None:
        return str(path)
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return Path(path).resolve().as_posix()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value), ensure_ascii=False)


def _line(text: str, key: str, table: int | None) -> str:
    """``:NUMBER`` of the line that gives a key, of the top level or of a layer's table; empty where there is no such line."""
    at = None
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?\s*([\w-]+)", line)
        if header:
            if header[1] == "layer":
                at = 0 if at is None else at + 1
            if (header[1] == key and table is None) or (key == "" and at == table and header[1] == "layer"):
                return f":{number}"
        elif at == table and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return f":{number}"
    return ""


def remarks(reports: Sequence[Report]) -> list[str]:
    """Comments for the recipe of a run: what it came to, for every model."""
    found = [
        f"Written by onnx-magr {reports[0].versions['onnx-magr']} after this run. The same again, to the same bytes:",
        "",
        "    onnx-magr optimize --recipe FILE",
        "",
        "Keys are long options of the command line with underscores (docs/guides/recipes.md). What is not named below had its default.",
    ]
    for report in reports:
        found += [
            "",
            f"{report.source}: {len(report.layers)} layers were converted, {len(report.skipped)} left as they are; "
            f"{megabytes(report.bytes_before)} became {megabytes(report.bytes_after)}. In full, layers went through",
            f"    {report.pipeline}",
            *(note for note in report.notes if note.startswith("preset ")),
        ]
    return found
