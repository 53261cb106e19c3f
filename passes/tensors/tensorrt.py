"""TensorRT, alone or as a provider of onnxruntime: symmetric int8."""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="tensorrt",
    source="NVIDIA, TensorRT documentation, Working with Quantized Types: symmetric grids, one scale a tensor, weights with one a channel; "
    "not run",
    computed=operators("Add AveragePool Concat Gemm GlobalAveragePool MatMul"),
    moved=operators("Flatten Identity MaxPool Reshape Squeeze Transpose Unsqueeze"),
    types=("int8",),
    symmetric=True,
)
