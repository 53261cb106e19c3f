"""Rendering of templates, styles and scripts into self-contained HTML."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from magr_onnx.report.data import Report, layer_notes, megabytes, versions
from magr_onnx.report.html import side_by_side, summary

FOLDER = Path(__file__).resolve().parent / "templates"
SCRIPTS = ("table.js", "charts.js", "details.js", "page.js")


def page(report: Report) -> str:
    """Render one report."""
    lines = summary.lines_of(report)
    values = {
        "title": f"{summary.file_name(report.source)} · onnx-magr",
        "report": report,
        "lines": lines,
        "cards": summary.cards(report),
        "findings": summary.findings(report, lines),
        "notes": [*report.notes, *layer_notes(report.layers)],
        "skips": summary.skips(report),
        "has": {
            "feedback": summary.has_feedback(report),
            "running": any(line.running is not None for line in lines),
            "peak": any(line.peak is not None for line in lines),
            "sweeps": any(line.sweeps is not None for line in lines),
            "headroom": any(line.headroom is not None for line in lines),
            "activation": any((line.row.activation or {}).get("high") is not None for line in lines),
            "curves": any(len(line.row.errors) > 1 for line in lines),
        },
    }
    return _render("report.html.jinja", values, [report])


def comparison(first: Report, second: Report) -> str:
    """Render two reports side by side."""
    names = [summary.file_name(r.output or r.source) for r in (first, second)]
    values = {
        "title": f"{' and '.join(dict.fromkeys(names))} · onnx-magr",
        "names": names,
        "reports": (first, second),
        "judged": side_by_side.basis_of(first, second),
        "rows": side_by_side.compared(first, second),
        "options": side_by_side.options_compared(first, second),
        "layers": side_by_side.differences(first, second),
    }
    return _render("comparison.html.jinja", values, [first, second])


def index(source: str, pages: Mapping[str, tuple[str, Report]]) -> str:
    """Render an index of pages."""
    return _render("index.html.jinja", {"title": f"{source} · onnx-magr", "pages": pages}, [])


def _render(template: str, values: dict[str, Any], reports: list[Report]) -> str:
    page_template = _templates().get_template(template)
    return page_template.render(
        **values,
        made_by=f"onnx-magr {versions()['onnx-magr']}",
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        scripts=Markup("\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)),
        library=_library() if reports else "",
        data=[_embedded(r) for r in reports],
    )


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(FOLDER)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"duration": summary.duration, "decibels": summary.decibels, "megabytes": megabytes}
    return environment


@functools.cache
def _library() -> Markup:
    """Return the bundle of Vega-Embed, Vega-Lite and Vega, escaped for a script element."""
    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _embedded(report: Report) -> Markup:
    """Return the report as JSON, escaped for a script element."""
    text = json.dumps(report.to_dict(), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
