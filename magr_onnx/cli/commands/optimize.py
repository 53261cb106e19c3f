"""`onnx-magr optimize`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Quiet, Verbose, with_options
from magr_onnx.config.invocation import Invocation
from magr_onnx.config.layer_options import LayerOptions
from magr_onnx.config.options import DATA, KEYS, OPTIONS, RECIPES, RUN
from magr_onnx.config.recipe import Recipe, remarks
from magr_onnx.errors import OptionError, OutputError, do_all, raise_all
from magr_onnx.model_io.writing import data_files
from magr_onnx.report import html
from magr_onnx.report.data import MOST
from magr_onnx.workflow import forecast
from magr_onnx.workflow.directory import OptimizedFolder, check_reports, run_folder, taken_by
from magr_onnx.workflow.optimize import run
from magr_onnx.workflow.request import resolve

EPILOG = """[bold]Examples[/bold]

onnx-magr optimize model.onnx -o model.int4.onnx --calibration inputs.npz

onnx-magr optimize model.onnx --preset llm-int4 --calibration inputs.npz --save-recipe recipe.toml

onnx-magr optimize --recipe recipe.toml --bits 8

onnx-magr optimize model.onnx --calibration batches/ --bits 2 --effort best --report report.html

onnx-magr optimize model.onnx --bits 3 --block-size channel --calibration inputs.npz --validation heldout.npz

onnx-magr optimize model.onnx --format qdq-int8 --target x86-avx2 --calibration inputs.npz

onnx-magr optimize model.onnx --target-size 25% --calibration inputs.npz

onnx-magr optimize model.onnx --pipeline 'magr{alpha=1e-3}' -o smaller-weights.onnx --calibration inputs.npz

onnx-magr optimize model.onnx --calibration texts.txt --dry-run

onnx-magr optimize exported-folder/ -o int4-folder/ --calibration texts.txt

onnx-magr optimize model.onnx --calibration chats.jsonl --tokenizer tokenizer.json --samples 128 --sequence-length 512"""


ModelArgument = Annotated[
    Path | None, typer.Argument(help="ONNX model to read, or a folder of models; a recipe may name it instead.", show_default=False)
]
ReportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        help="Also write the report to this file, a page (.html) or data (.json); can be repeated.",
        metavar="FILE",
        rich_help_panel=DATA,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe", "-r", metavar="FILE", help="TOML file that describes the run; options given here win over it.", rich_help_panel=RECIPES
    ),
]
SaveRecipeOption = Annotated[
    Path | None, typer.Option("--save-recipe", metavar="FILE", help="Write the recipe of this run, with comments.", rich_help_panel=RECIPES)
]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="PATTERN:OPTIONS",
        help="Options of matching layers, as '*lm_head*:bits=8,block_size=32'; repeatable, later ones win.",
        rich_help_panel=RECIPES,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Only forecast time, memory and size of the run, from short measurements here; write nothing."),
]


@with_options(name for name in (*OPTIONS, *RUN) if name != "model")
def optimize(
    context: typer.Context,
    model: ModelArgument = None,
    report: ReportOption = None,
    recipe: RecipeOption = None,
    save_recipe: SaveRecipeOption = None,
    layer: LayerOption = None,
    dry_run: DryRunOption = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize the linear layers and convolutions of a model, and report what happened to every one."""
    run_recipe = recipe_of(context).over(Recipe() if recipe is None else Recipe.load(recipe))
    arguments = run_recipe.arguments()
    source = arguments.get("model")
    if source is None:
        raise OptionError("no model: give one, or a recipe that names one")
    source = Path(source)
    if not source.is_dir() and "models" in arguments:
        raise OptionError(f"--models is for a folder of models, and {source} is none")
    out = Path(arguments.get("output") or _output(source))
    files = {source, out, *run_recipe.reads, *data_files(source), *([] if recipe is None else [recipe])}
    recipe_file = set() if save_recipe is None else {save_recipe}
    if source.is_dir():
        files |= taken_by(source, out)
        check_reports(source, arguments.get("models", ()), report or (), files | recipe_file)
    else:
        html.check(report or (), files | recipe_file)
    if save_recipe is not None:
        _check_recipe(run_recipe, save_recipe, files)
    if dry_run:
        _forecast(source, out, run_recipe, as_json, quiet)
        return
    console.await_output(out, resumable="resume" in arguments)
    with console.watch(quiet) as (progress, on_layer):
        arguments = {"model": source, "recipe": run_recipe, "output": out, "progress": progress, "on_layer": on_layer}
        invocation = Invocation(console.command_line(), recipe=run_recipe.to_text())
        result = run_folder(arguments, invocation) if source.is_dir() else run(resolve(arguments, invocation)).report
    writes = [partial(result.save, path) for path in report or ()]
    if save_recipe is not None:
        comments = remarks(list(result.reports.values()) if isinstance(result, OptimizedFolder) else [result])
        writes.insert(0, partial(run_recipe.save, save_recipe, comments))
    do_all(writes)
    console.show(result.to_dict(), result.to_text(None if verbose else MOST, console.columns()), as_json, quiet)


def _forecast(source: Path, out: Path, run_recipe: Recipe, as_json: bool, quiet: bool) -> None:
    """Print what a run would take."""
    if source.is_dir():
        raise OptionError(f"--dry-run forecasts a run on one model, and {source} is a folder; give the models in it one by one")
    with console.watch(quiet) as (progress, _):
        arguments = {"model": source, "recipe": run_recipe, "output": out, "progress": progress}
        result = forecast.measure(resolve(arguments, Invocation(console.command_line(), recipe=run_recipe.to_text())))
    console.show(result.to_dict(), result.to_text(), as_json, quiet)


def _check_recipe(recipe: Recipe, path: Path, other_files: Collection[Path]) -> None:
    """Check before the run that its recipe can be written, and overwrites no file of the run.

    Raises:
        OutputError: It cannot; the message has all problems.
    """
    problems = html.misplaced(f"recipe {path}", path, other_files)
    if path.suffix.lower() != ".toml":
        problems.append(f"recipe {path}: give a name that ends in .toml")
    try:
        recipe.to_text(path.parent).encode()
    except UnicodeEncodeError as error:
        line = error.object[error.object.rfind("\n", 0, error.start) + 1 :].splitlines()[0]
        problems.append(f"recipe {path}: {line!r} has bytes that are not text, and TOML is text; rename the file")
    raise_all(OutputError, problems)


def _output(model: Path) -> Path:
    if model.is_dir():
        folder = model.resolve()  # for its name, which "." lacks
        return folder.with_name(f"{folder.name}.magr")
    return model.with_name(f"{model.stem}.magr{model.suffix or '.onnx'}")


def recipe_of(context: typer.Context) -> Recipe:
    """Make a recipe of the command-line options, which are named like its keys.

    Raises:
        OptionError: An option is invalid; the message has all problems.
    """
    explicit = {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    values = {name: _plain(name, value) for name, value in context.params.items() if name in explicit and name in KEYS}
    tables = [LayerOptions.parse(text) for text in (context.params["layer"] or ())]
    return Recipe(Recipe.from_dict(values).values, tuple(tables))


def _plain(name: str, value: Any) -> Any:
    """Convert numeric text to the number that a recipe has, also where a word is allowed instead."""
    types = KEYS[name].types
    if not isinstance(value, str) or not value.isascii() or KEYS[name].is_none_word(value):
        return value
    if int in types and value.isdecimal():
        return int(value)
    if float in types:
        with contextlib.suppress(ValueError):  # reported by the check of the option's type
            return float(value)
    return value
