"""XNNPACK as a provider of onnxruntime, on phones."""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="xnnpack",
    source="operators of onnxruntime's core/providers/xnnpack that have a form between Q and DQ, and those that its CPU provider runs "
    "beside them in integers; not run",
    computed={**operators("Add AveragePool Concat GlobalAveragePool Mul Softmax"), "Resize": {"mode": ("linear",)}},
    moved=operators("Flatten MaxPool Reshape Squeeze Transpose Unsqueeze"),
    ranges={"Softmax": (0.0, 1.0)},
)
