"""The registry of output formats: how quantized weights are written, and read back.

To add one: write its file in this folder, with its emitter and a `Format` object, and add that to `FORMATS`. The emitter then is in
pipelines, the format among the options.
"""

from __future__ import annotations

from magr_onnx.passes.emit import int8, matmulnbits, qdq
from magr_onnx.passes.emit.format import Format

FORMATS: dict[str, Format] = {form.name: form for form in (matmulnbits.FORMAT, qdq.FORMAT, int8.STATIC, int8.DYNAMIC)}
"""By name; the first is the default."""

__all__ = ["FORMATS", "Format"]
