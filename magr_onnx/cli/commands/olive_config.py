"""`onnx-magr olive-config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from magr_onnx.cli import console
from magr_onnx.model_io.atomic import write_text

EPILOG = """[bold]Example[/bold]

onnx-magr olive-config -o olive_package.json

olive run --config workflow.json --package-config olive_package.json"""


def olive_config(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: standard output.")] = None,
) -> None:
    """Print the package configuration that gives Olive the pass OnnxMagr beside all its own."""
    from magr_onnx.integrations.olive import package_config

    config = package_config()
    if output is None:
        console.say_json(config)
        return
    write_text(json.dumps(config, indent=2) + "\n", output, "package configuration")
