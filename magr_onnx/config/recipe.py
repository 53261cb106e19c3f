"""Recipes: all options of a run in one TOML file.

    version = 1
    model = "model.onnx"
    calibration = "inputs.npz"
    bits = 4

    [[layer]]
    match = "*lm_head*"
    bits = 8

A key is the long name of the command line's option with underscores, and so nearly all are the names `magr_onnx.optimize` has. Paths are
relative to the recipe's folder, and ``~`` means nothing in them. What is given beside a recipe wins over it, and it wins over its preset.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magr_onnx.config.layer_options import LayerOptions, problems_of
from magr_onnx.config.merge import dropped, merge
from magr_onnx.config.options import DATA, KEYS, OPTIONS, PANELS, RUN
from magr_onnx.config.schema import as_list, none_to_word, unknown, word_to_none
from magr_onnx.errors import RecipeError, raise_all
from magr_onnx.model_io.atomic import write_text
from magr_onnx.report.data import Report, megabytes
from magr_onnx.runtime.measure.metric import script_of

VERSION = 1
_ARGUMENTS = {name: option.argument for name, option in RUN.items() if option.argument}
_SHOWN = ("report", "json", "quiet", "verbose", "save_recipe", "recipe")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The options of a run.

    Attributes:
        values: By key; see `magr_onnx.config.schema.KEYS`.
        layers: Options of single layers, in order: later ones win.
        notes: Options dropped when recipes were merged, for the report.

    Raises:
        RecipeError: With everything that is wrong with the values.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[LayerOptions, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        raise_all(RecipeError, [problem for _, _, problem in _problems({"version": VERSION, **self.values})])

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Recipe:
        """Read a TOML file.

        Raises:
            RecipeError: It cannot be read or parsed, or with everything that is wrong in it, by line.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"recipe {file}: not TOML: {error}") from error
        except (OSError, ValueError) as error:  # bytes that are no text; a name that can be none
            raise RecipeError(f"recipe {str(file)!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if "version" not in data:
            data = {"version": None, **data}
        if problems := _problems(data):
            lines = _lines(text)
            raise_all(RecipeError, [f"{file}{_line(lines, key, table)}: {problem}" for key, table, problem in problems])
        return _made(data, file.parent)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Make a recipe of plain data with the same keys; ``version`` may be missing, and paths are as they are.

        Raises:
            RecipeError: With everything that is wrong in it.
        """
        versioned = {"version": VERSION, **data}
        raise_all(
            RecipeError, [f"layer {table + 1}: {problem}" if table is not None else problem for _, table, problem in _problems(versioned)]
        )
        return _made(versioned, None)

    @property
    def options(self) -> dict[str, Any]:
        """The options a plan is made of, without those of the preset."""
        return {name: value for name, value in self.values.items() if name in OPTIONS}

    @property
    def reads(self) -> list[Path]:
        """The files and folders that the run reads, apart from the model."""
        single = [self.values[name] for name in ("calibration", "validation", "tokenizer") if name in self.values]
        if self.values.get("metric") is not None:
            single.append(script_of(self.values["metric"])[0])
        return [Path(path) for path in (*single, *self.values.get("custom_ops", ()))]

    def arguments(self) -> dict[str, Any]:
        """List the arguments of `magr_onnx.optimize`, without those of the preset."""
        arguments = {_ARGUMENTS.get(name, name): value for name, value in self.values.items()}
        return {**arguments, "layers": self.layers} if self.layers else arguments

    def to_dict(self) -> dict[str, Any]:
        """Write plain data that `from_dict` takes."""
        tables = {"layer": [table.table for table in self.layers]} if self.layers else {}
        return {**none_to_word(self.values), **tables}

    def over(self, other: Recipe) -> Recipe:
        """Merge this recipe over another: its values win, and remove those they conflict with."""
        lower = {**other.values, "layers": other.layers} if other.layers else other.values
        values, notes = merge(lower, self.values), dropped(lower, self.values, "the recipe")
        return Recipe(values, (*values.pop("layers", ()), *self.layers), (*other.notes, *notes, *self.notes))

    def save(self, path: str | os.PathLike[str], comments: Sequence[str] = ()) -> None:
        """Write it as TOML, paths relative to its folder, with comments at the top.

        Raises:
            OutputError: The file cannot be written; one that was there is as it was.
        """
        file = Path(path)
        write_text(self.to_text(file.parent, comments), file, "recipe")

    def to_text(self, folder: Path | None = None, comments: Sequence[str] = ()) -> str:
        """Write TOML; paths are relative to ``folder``, where there is one."""
        lines = [*(f"# {line}".rstrip() for line in comments), *([""] if comments else []), f"version = {VERSION}"]
        for panel in PANELS:
            values = {name: self.values[name] for name, option in KEYS.items() if option.panel == panel and name in self.values}
            items = [f"{name} = {_toml(_placed(name, value, folder))}" for name, value in none_to_word(values).items()]
            title = f"{panel}; paths are relative to this file" if panel == DATA else panel
            lines += ["", f"# {title}", *items] if items else []
        for table in self.layers:
            lines += ["", "[[layer]]", *(f"{name} = {_toml(value)}" for name, value in table.table.items())]
        return "\n".join(lines) + "\n"


def _problems(data: Mapping[str, Any]) -> list[tuple[str, int | None, str]]:
    """List everything wrong: the key, the number of its layer table if it is in one, and a sentence."""
    problems: list[tuple[str, int | None, str]] = []
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
                problems += [(key, i, problem) for key, problem in problems_of(table)]
        elif name in _SHOWN:
            text = f"{name} is about what is shown, not about the run: give it on the command line"
        elif name not in KEYS:
            text = unknown(name, ("version", *KEYS, "layer"))
        else:
            text = KEYS[name].problem(value)
        if text is not None:
            problems.append((name, None, text))
    replaced = [name for name in data if name in OPTIONS or name == "preset"]
    if "pipeline" in data and replaced:
        problems.append(("pipeline", None, f"pipeline replaces {', '.join(replaced)}; give one or the other"))
    return problems


def _made(data: Mapping[str, Any], folder: Path | None) -> Recipe:
    values: dict[str, Any] = {}
    for name, value in word_to_none({name: value for name, value in data.items() if name not in ("version", "layer")}).items():
        kind, value = KEYS[name].kind, as_list(name, value)
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
    at = Path(path)
    try:  # through links of folders, as the system goes; a file that is a link keeps its name
        return Path(os.path.relpath(at.parent.resolve() / at.name, folder.resolve())).as_posix()
    except ValueError:  # another drive
        return Path(path).resolve().as_posix()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _line(lines: Mapping[tuple[str | int, ...], int], key: str, table: int | None) -> str:
    """Write ``:NUMBER`` of the line where a key of the top level, or of a layer's table, begins; nothing where there is none."""
    place: tuple[str | int, ...] = (key,) if table is None else ("layer", table, key) if key else ("layer", table)
    number = lines.get(place, lines.get(place[:1]))  # of a list of inline tables, where the list begins
    return "" if number is None else f":{number}"


def _lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Find the line where each key and header of a TOML text begins: ``("bits",)``, ``("layer", 0)``, ``("layer", 0, "bits")``.

    Lines are added to a statement until the parser takes it: texts and lists may go on over many.
    """
    lines: dict[tuple[str | int, ...], int] = {}
    header: tuple[str | int, ...] = ()
    tables, statement, start = 0, "", 1
    for number, line in enumerate(text.split("\n"), 1):
        start = start if statement else number
        statement += f"{line}\n"
        try:
            data = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            ((name, value),) = data.items()
            tables += name == "layer" and value == [{}]
            header = ("layer", tables - 1, *(value if isinstance(value, dict) else ())) if name == "layer" and tables else (name,)
            lines.setdefault(header, start)
        else:
            for key in data:
                lines.setdefault((*header, key), start)
        statement = ""
    return lines


def remarks(reports: Sequence[Report]) -> list[str]:
    """Write the comments of a run's recipe: its result for every model."""
    lines = [
        f"Written by onnx-magr {reports[0].versions['onnx-magr']} after this run. The same again, to the same bytes:",
        "",
        "    onnx-magr optimize --recipe FILE",
        "",
        "Keys are long options of the command line with underscores (docs/guides/recipes.md). What is not named below had its default.",
    ]
    for report in reports:
        lines += [
            "",
            f"{report.source}: {len(report.layers)} layers were converted, {len(report.skipped)} left as they are; "
            f"{megabytes(report.bytes_before)} became {megabytes(report.bytes_after)}. In full, layers went through",
            f"    {report.pipeline}",
            *(note for note in report.notes if note.startswith("preset ")),
        ]
    return lines
