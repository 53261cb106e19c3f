"""OpenVINO, alone or as a provider of onnxruntime, on CPUs, GPUs and NPUs of Intel.

Activations are uint8 only: in int8 a convolution behind a Concat is wrong by 8 to 74 steps of its result, whatever the zero points
[measured with onnxruntime-openvino 1.24.1 on a CPU].
"""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="openvino",
    source="operators that NNCF quantizes for OpenVINO on CPUs (nncf/common/hardware/configs/cpu.py); run with onnxruntime-openvino 1.24.1",
    computed=operators("Add AveragePool Concat Gemm GlobalAveragePool LeakyRelu MatMul Mul PRelu ReduceMean Relu Sub"),
    moved=operators("Flatten Identity MaxPool Reshape Slice Split Squeeze Transpose Unsqueeze"),
    types=("uint8",),
    int4="stored",
)
