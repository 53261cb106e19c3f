"""Core ML, for models that are converted with its tools."""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="coreml",
    source="Apple, Core ML Tools, Quantization Overview: 8-bit activations, one scale a tensor, beside 8-bit weights; not run",
    computed=operators("Add AveragePool Concat Gemm GlobalAveragePool MatMul Mul Relu"),
    moved=operators("Flatten MaxPool Reshape Squeeze Transpose Unsqueeze"),
    types=("int8", "uint8"),
)
