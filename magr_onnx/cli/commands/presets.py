"""`onnx-magr presets`."""

from __future__ import annotations

from magr_onnx.cli import console
from magr_onnx.cli.options import Json
from magr_onnx.config.presets import PRESETS
from magr_onnx.report.data import wrapped

EPILOG = "[bold]Examples[/bold]\n\nonnx-magr presets\n\nonnx-magr optimize model.onnx --preset web --calibration inputs.npz"


def presets(as_json: Json = False) -> None:
    """List the presets, what they are for and what they set."""
    lines, value = [], []
    for preset in PRESETS.values():
        lines += [preset.name, *wrapped(f"    {preset.summary}", 4), *wrapped(f"    sets {preset}", 9), ""]
        tables = [table.table for table in preset.layers]
        value.append({"name": preset.name, "summary": preset.summary, "options": dict(preset.options), "layers": tables})
    console.show(value, "\n".join(lines[:-1]), as_json)
