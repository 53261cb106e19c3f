"""OpenVINO, alone or as a provider of onnxruntime, on CPUs, GPUs and NPUs of Intel."""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="openvino",
    source="operators that NNCF quantizes for OpenVINO on CPUs (nncf/common/hardware/configs/cpu.py); not run",
    computed=operators("Add AveragePool Concat Gemm GlobalAveragePool LeakyRelu MatMul Mul PRelu ReduceMean Relu Sub"),
    moved=operators("Flatten Identity MaxPool Reshape Slice Split Squeeze Transpose Unsqueeze"),
)
