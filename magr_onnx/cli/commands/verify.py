"""`onnx-magr verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magr_onnx import api
from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Quiet, Verbose, target_names
from magr_onnx.core.overflow.accumulator import Accumulator
from magr_onnx.core.overflow.targets import TARGETS
from magr_onnx.errors import OptionError

EPILOG = """[bold]Examples[/bold]

onnx-magr verify model.onnx --target x86-avx2

onnx-magr verify model.onnx --accumulator-bits 16 --accumulator-tile 64

onnx-magr verify model.onnx --target generic --outer-bits 24 --json"""


def verify(
    model: Annotated[Path, typer.Argument(help="ONNX model to read, whoever quantized it.", show_default=False)],
    target: Annotated[
        str | None, typer.Option("--target", "-t", help=f"Machine to prove for: {', '.join(TARGETS)}.", autocompletion=target_names)
    ] = None,
    accumulator_bits: Annotated[int | None, typer.Option("--accumulator-bits", help="Width P of the register that sums a tile.")] = None,
    accumulator_tile: Annotated[
        int | None, typer.Option("--accumulator-tile", help="Consecutive terms T that share it. (default: the whole dot product)")
    ] = None,
    outer_bits: Annotated[
        int | None, typer.Option("--outer-bits", help="Width of the register the tile sums are added in. (default: 32)")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prove that no input of a model overflows an integer accumulator, or show one that does.

    Exits with 0 if nothing overflows and with 1 if something does; nodes that are no integer dot products are listed, not claimed.
    """
    accumulator = None
    if accumulator_bits is not None:
        outer = max(32, accumulator_bits) if outer_bits is None else outer_bits
        accumulator = Accumulator(accumulator_bits, accumulator_tile, outer)
    elif accumulator_tile is not None:
        raise OptionError("--accumulator-tile needs --accumulator-bits")
    if (target is None) == (accumulator is None):
        fault = "neither was given" if target is None else "both were given"
        raise OptionError(f"give one of --target ({', '.join(TARGETS)}) and --accumulator-bits: {fault}")
    result = api.verify(model, target=target, accumulator=accumulator, outer_bits=None if accumulator is not None else outer_bits)
    console.show(result.to_dict(), result.to_text(), as_json, quiet)
    if not result.ok:
        raise typer.Exit(1)
