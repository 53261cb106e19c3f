"""`onnx-magr demo`."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from magr_onnx.cli import console, demonstration
from magr_onnx.cli.options import Json, Quiet, Verbose
from magr_onnx.errors import OutputError

EPILOG = "[bold]Example[/bold]\n\nonnx-magr demo"


def demo(
    folder: Annotated[Path | None, typer.Option("--folder", help="Keep the quantized models here; default: they are removed.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize the bundled language model and print its perplexity before and after: about 20 seconds on a laptop."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}; give another one") from error
    with tempfile.TemporaryDirectory(prefix="onnx-magr-") as temporary, console.progress_bar(not quiet) as progress:
        result = demonstration.run(folder or Path(temporary), progress)
    console.show(dataclasses.asdict(result), demonstration.to_text(result), as_json, quiet)
