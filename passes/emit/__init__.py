"""The registry of output formats: how quantized weights are written, and read back.

To add one, write its file in this folder, with its emitter and a `Format` object, and add the latter to `FORMATS`. The emitter is then
available in pipelines, and the format as an option.
"""

from __future__ import annotations

from magr_onnx.passes.emit import int8, matmulnbits, qdq, qdq_full
from magr_onnx.passes.emit.format import Format

FORMATS: dict[str, Format] = {form.name: form for form in (matmulnbits.FORMAT, qdq.FORMAT, int8.STATIC, int8.DYNAMIC, qdq_full.FORMAT)}
"""Formats by name; the first is the default."""

__all__ = ["FORMATS", "Format"]
