"""Command-line options, made from the option table (`magr_onnx.config.options`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

import typer

from magr_onnx.cli import console
from magr_onnx.config.options import KEYS, PANELS
from magr_onnx.config.presets import PRESETS
from magr_onnx.core.option_spec import OptionSpec
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.passes.registry import stages

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


def target_names() -> list[tuple[str, str]]:
    """List targets with their summaries, for shell completion."""
    return [(name, target.summary) for name, target in TARGETS.items()]


def _preset_names() -> list[tuple[str, str]]:
    return [(name, preset.summary.partition(":")[0]) for name, preset in PRESETS.items()]


def _pipelines(incomplete: str) -> list[str]:
    """Complete the last pass of a pipeline."""
    complete, comma, start = incomplete.rpartition(",")
    return [f"{complete}{comma}{name}" for name in stages() if name.startswith(start)]


_MORE = {"preset": f" There are {', '.join(PRESETS)}."}
_COMPLETIONS: Mapping[str, Callable[..., Any]] = {"target": target_names, "preset": _preset_names, "pipeline": _pipelines}


def option(name: str) -> Any:
    """Declare an option of the table to typer."""
    spec = KEYS[name]
    return typer.Option(
        *(spec.flags or (f"--{name.replace('_', '-')}",)),
        help=spec.text + _MORE.get(name, ""),
        metavar=spec.metavar,
        min=spec.least if spec.kind == "value" else None,
        rich_help_panel=spec.panel,
        show_default=spec.default is not None,
        autocompletion=_COMPLETIONS.get(name),
    )


def with_options(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options of the table to a command's parameters; the command reads their values from the context."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if name in static})

        static = inspect.signature(command, eval_str=True).parameters
        parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in static.values()]
        parameters = sorted([*parameters, *(_parameter(KEYS[name]) for name in names)], key=_position)
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def _parameter(spec: OptionSpec) -> inspect.Parameter:
    annotation: Any = Annotated[_type(spec), option(spec.name)]
    return inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=spec.default, annotation=annotation)


def _type(spec: OptionSpec) -> Any:
    """Choose the type of an option on the command line, where every option may be omitted."""
    if spec.kind in ("paths", "patterns"):
        return list[Path] | None if spec.kind == "paths" else list[str] | None
    if spec.kind == "path":
        return Path | None
    types = [kind for kind in spec.types if kind is not NoneType]
    words = () if spec.none_word is None else (spec.none_word,)
    value: Any = str if spec.kind == "size" or (words and not spec.choices) else types[0]
    if spec.choices and spec.name not in _COMPLETIONS:
        value = Literal[(*spec.choices, *words)]
    return value if spec.default is not None else value | None


def _position(parameter: inspect.Parameter) -> int:
    """Sort parameters: arguments first, then the panels in order, then options of every command."""
    panel = next((getattr(info, "rich_help_panel", None) for info in getattr(parameter.annotation, "__metadata__", ())), None)
    argument = parameter.annotation is typer.Context or any(
        isinstance(info, typer.models.ArgumentInfo) for info in getattr(parameter.annotation, "__metadata__", ())
    )
    return -1 if argument else PANELS.index(panel) if panel in PANELS else len(PANELS)
