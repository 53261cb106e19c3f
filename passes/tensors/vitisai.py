"""NPUs of AMD through onnxruntime's Vitis AI provider: scales are powers of two."""

from __future__ import annotations

from magr_onnx.passes.tensors.rules import Rules, operators

RULES = Rules(
    name="vitisai",
    source="AMD Quark for ONNX, configuration XINT8 (int8, power-of-two scales, symmetric); not run",
    computed=operators(
        "Add AveragePool Clip Concat Div Gemm GlobalAveragePool HardSigmoid LeakyRelu MatMul Mul PRelu ReduceMean Relu Sigmoid Softmax Sub "
        "Tanh"
    ),
    moved=operators("DepthToSpace Flatten Identity MaxPool Pad Reshape Resize Slice SpaceToDepth Split Squeeze Transpose Unsqueeze"),
    types=("int8",),
    symmetric=True,
    power_of_two=True,
    fixed_shapes=True,
)
