"""Self-contained HTML pages of reports.

The libraries for plots (Vega-Lite) and templates (Jinja) are an extra, ``pip install 'onnx-magr[report]'``; without it, whatever renders
a page raises an `OptionError`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from magr_onnx.errors import OptionError, OutputError, install, raise_all
from magr_onnx.model_io.atomic import why_not_writable, write_text

if TYPE_CHECKING:
    from magr_onnx.report.data import Report

NEEDED = ("jinja2", "vl_convert")
PAGES = (".html", ".htm")


def page(report: Report) -> str:
    """Render one report as HTML."""
    _check_extra("a page")
    from magr_onnx.report.html import render

    return render.page(report)


def comparison(first: Report, second: Report) -> str:
    """Render a comparison of two reports as HTML."""
    _check_extra("a page")
    from magr_onnx.report.html import render

    return render.comparison(first, second)


def index(source: str, pages: Mapping[str, tuple[str, Report]]) -> str:
    """Render an index of pages as HTML; ``pages`` maps file names to the model's name and report."""
    _check_extra("a page")
    from magr_onnx.report.html import render

    return render.index(source, pages)


def check(paths: Iterable[Path], taken: Collection[Path] = ()) -> None:
    """Check that reports can be written to ``paths`` and overwrite none of the files in ``taken``.

    Raises:
        OutputError: A folder does not exist, or a file of the run would be overwritten.
        OptionError: The suffix is neither of a page nor of JSON, or the extra ``report`` is not installed.
    """
    files = list(paths)
    raise_all(OutputError, [p for path in files for p in misplaced(f"report {path}", path, taken)])
    for path in files:
        if path.suffix.lower() in PAGES:
            _check_extra(f"report {path}")
        elif path.suffix.lower() != ".json":
            raise OptionError(f"report {path}: give a name that ends in .html (a page) or .json (data)")


def misplaced(what: str, path: Path, taken: Collection[Path]) -> list[str]:
    """Return the reasons why a small file cannot be written to ``path``."""
    if not os.path.isdir(path.parent):  # pathlib would raise for a name that is too long
        return [f"{what}: folder {path.parent} does not exist; create it first"]
    if os.path.isdir(path) or path.resolve() in {p.resolve() for p in taken}:
        return [f"{what} would overwrite a folder or a file of this run; choose another name"]
    return why_not_writable(what, path)


def save(report: Report, path: Path) -> None:
    """Save a report as `Report.save` does."""
    check([path])
    write(page(report) if path.suffix.lower() in PAGES else report.to_json() + "\n", path)


def write(text: str, path: Path) -> None:
    """Write a text file, escaping bytes that are not UTF-8.

    Raises:
        OutputError: It cannot be written; an existing file is unchanged.
    """
    write_text(text, path, "report", "backslashreplace")


def _check_extra(what: str) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"{what} needs the extra 'report' ({', '.join(missing)} not installed): {install('report')}; JSON needs none")
