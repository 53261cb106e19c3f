"""`onnx-magr inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from magr_onnx import api
from magr_onnx.cli import console
from magr_onnx.cli.options import Json, Verbose, option
from magr_onnx.report.data import by_reason, name_end, wrapped

EPILOG = """[bold]Examples[/bold]

onnx-magr inspect model.onnx

onnx-magr inspect model.onnx --exclude '*head*' --json"""


def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX model to read.", show_default=False)],
    include: Annotated[list[str] | None, option("include")] = None,
    exclude: Annotated[list[str] | None, option("exclude")] = None,
    requantize: Annotated[bool, option("requantize")] = False,
    keep_overridable: Annotated[bool, option("keep_overridable")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List linear layers with shapes and ranges, and what would be left alone and why."""
    choice = {"requantize": requantize, "keep_overridable": keep_overridable}
    inspection = api.inspect(model, include=include or (), exclude=exclude or (), **choice)
    lines = [f"{inspection.name}: {inspection.bytes / 1e6:.2f} MB, opset {inspection.opset}, IR version {inspection.ir_version}", ""]
    width = console.columns()
    name_width = width - 49  # for names
    lines.append(f"{'layer':{name_width}} {'K x N':>16} {'type':>7} {'bias':>4} {'min':>8} {'max':>8}")
    for row in inspection.layers:
        name = name_end(row["scope"] or row["name"], name_width)
        bias = "yes" if row["bias"] else "-"
        shape = " x ".join(str(row[size]) for size in ("groups", "k", "n") if size != "groups" or row[size] > 1)
        lines.append(f"{name:{name_width}} {shape:>16} {row['dtype']:>7} {bias:>4} {row['min']:8.3f} {row['max']:8.3f}")
    lines += ["", f"{len(inspection.layers)} layers to convert, {len(inspection.skipped)} to leave as they are"]
    for reason, rows in by_reason(inspection.skipped).items():
        texts = (f"  {s.label} ({s.op}): {reason}{f' ({s.detail})' if s.detail else ''}" for s in rows)
        lines += [line for text in texts for line in wrapped(text, 4, width)]
    if inspection.notes:
        lines += ["", "notes", *(line for note in inspection.notes for line in wrapped(f"  {note}", 4, width))]
    value = {name: getattr(inspection, name) for name in ("name", "bytes", "opset", "ir_version", "layers", "notes")}
    value["skipped"] = [dataclasses.asdict(s) for s in inspection.skipped]
    console.show(value, "\n".join(lines), as_json)
