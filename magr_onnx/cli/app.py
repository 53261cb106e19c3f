"""The commands of ``onnx-magr`` as one application; a command's module is imported only when the command runs."""

from __future__ import annotations

import re
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import magr_onnx
from magr_onnx.cli.commands import COMMANDS
from magr_onnx.errors import choose_one

_INVALID_CHOICE = re.compile(r"(?:Value error, )?'(?P<value>.*)' is not one of (?P<choices>.*?)\.?")


class _Deferred(TyperCommand):
    """A command by its name and summary; `make_context` imports its module."""

    @cached_property
    def command(self) -> TyperCommand:
        """The command, made from the function of the same name (with _ for -) in its module."""
        function = str(self.name).replace("-", "_")
        module = import_module(f"magr_onnx.cli.commands.{function}")
        single = typer.Typer(add_completion=False)
        single.command(self.name, epilog=module.EPILOG)(getattr(module, function))
        command = get_command(single)
        assert isinstance(command, TyperCommand)
        return command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.command.make_context(info_name, args, parent, **extra)


class _Commands(TyperGroup):
    """All commands; errors for wrong values suggest the closest valid one, as for recipes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, summary in COMMANDS.items():
            self.add_command(_Deferred(name, help=summary))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if (match := _INVALID_CHOICE.fullmatch(error.message)) is not None:
                choices = match["choices"].replace("'", "").split(", ")
                error.message = f"{match['value']!r}: {choose_one(match['value'], choices)}"
            raise


app = typer.Typer(
    name="onnx-magr",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def commands() -> dict[str, TyperCommand]:
    """Import every command with its options; by name, in the order of the help."""
    group: Any = get_command(app)
    return {name: deferred.command for name, deferred in group.commands.items()}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"onnx-magr {magr_onnx.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Quantize ONNX models to 2 to 8 bits with MagR, GPTQ and bias correction.

    Try [bold]onnx-magr demo[/bold] first: it needs no model and no data.
    """
    from magr_onnx.cli import console

    console.await_output(None)
