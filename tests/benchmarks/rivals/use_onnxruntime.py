"""onnxruntime's own weight-only quantizers, asymmetric."""

from __future__ import annotations

from functools import partial

from adapter import Task, serve
from common import ORT_TOOLS, Unsupported, ort_quantize


def quantize(task: Task, tool: str) -> None:
    try:
        ort_quantize(tool, task.model, task.calibration, task.output, task.bits, task.block)
    except Unsupported as reason:
        raise SystemExit(str(reason)) from None


METHODS = {tool: partial(quantize, tool=tool) for tool in ORT_TOOLS}

if __name__ == "__main__":
    serve("onnxruntime", METHODS)
