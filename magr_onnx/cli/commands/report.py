"""`onnx-magr report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from magr_onnx.cli import console
from magr_onnx.errors import OptionError
from magr_onnx.report import html
from magr_onnx.report.data import Report

EPILOG = """[bold]Examples[/bold]

onnx-magr report report.json --open

onnx-magr report int4.json mixed.json -o comparison.html"""


def report(
    reports: Annotated[
        list[Path], typer.Argument(metavar="REPORT [OTHER]", help="JSON of 'optimize --report'; two to compare.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page to write, .html. (default: beside the first report)", metavar="FILE", show_default=False),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Make a page of a report, or of two side by side; prints where it is."""
    if len(reports) > 2:
        raise OptionError(f"{len(reports)} reports given; give one, or two to compare")
    first = reports[0]
    suffix = f"_{reports[1].stem}" if len(reports) == 2 else ""
    out = first.with_name(f"{first.stem}{suffix}.html") if output is None else output
    if out.suffix.lower() not in html.PAGES:
        raise OptionError(f"page {out}: give a name that ends in .html")
    html.check([out], set(reports))
    loaded = [Report.load(path) for path in reports]
    html.write(html.comparison(*loaded) if len(loaded) == 2 else loaded[0].to_html(), out)
    console.say(str(out))
    if open_page and not webbrowser.open(out.resolve().as_uri()):
        console.errors.print(f"no browser could be opened; open {out} yourself", markup=False)
